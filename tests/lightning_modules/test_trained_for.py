"""Settings that no shape shows: kept with the weights, compared on every way of loading them."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lightning_modules.trained_for import NAME, TrainedFor


class Loader(L.LightningModule):
    """What stands behind it in the order of classes."""

    def load_weights(self, state, *, origin):
        self.load_state_dict(state)

    def on_load_checkpoint(self, checkpoint):
        self.resumed = True


class Module(TrainedFor, Loader):
    def __init__(self, steps=4, kind="a"):
        super().__init__()
        self.keep_facts(objective__steps=steps, kind=kind)

    trainer = SimpleNamespace(ckpt_path="last.ckpt")


def test_the_same_settings_load_and_resume():
    state = Module().state_dict()
    assert set(state) == {NAME} and state[NAME].dtype == torch.uint8
    module = Module()
    module.load_weights(state, origin="file")
    module.on_load_checkpoint({"state_dict": state})
    assert module.resumed


@pytest.mark.parametrize(
    ("other", "message"), [({"steps": 12}, "objective.steps=4, .* 12"), ({"kind": "b"}, "kind=a, .* b")]
)
def test_other_settings_are_refused(other, message):
    state, module = Module().state_dict(), Module(**other)
    with pytest.raises(ValueError, match=f"^file was trained with {message}: set it back"):
        module.load_weights(state, origin="file")
    with pytest.raises(ValueError, match=rf"the checkpoint last.ckpt \(CKPT=\) was trained with {message}"):
        module.on_load_checkpoint({"state_dict": state})


def test_a_setting_may_be_left_out_and_a_state_without_any_is_the_strict_loads_business():
    state = Module(steps=5).state_dict()
    Module().check_facts(state, "file", but=["objective.steps"])
    Module().check_facts({}, "file")


@pytest.mark.parametrize("coded", [[], list(b"[1]"), list(b"{"), [1.5], [300], 3])
def test_a_damaged_note_is_one_error(coded):
    with pytest.raises(ValueError, match=r"^file does not say what it was trained for: 'trained_for' in it is damaged"):
        Module().check_facts({NAME: torch.tensor(coded)}, "file")
