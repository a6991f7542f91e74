"""Exponential moving averages: the rule, the swaps, the state in a checkpoint."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.callbacks.ema import EMA

DECAYS = (0.9, 0.5)


class Falling(L.LightningModule):
    """SGD whose gradient is 1: the weights fall by 0.25 per optimiser step, whatever the data."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 8.0]))
        self.fixed = nn.Parameter(torch.tensor([5.0]), requires_grad=False)
        self.register_buffer("table", torch.tensor([7.0]))
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.w.sum() + 0 * self.fixed.sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.w.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=0.25)


def batches(count=100):
    return DataLoader(torch.zeros(count, 1))


def trainer(ema, folder, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    kwargs = {"max_epochs": -1, "enable_checkpointing": False, "num_sanity_val_steps": 0, **kwargs}
    return L.Trainer(callbacks=[ema], devices=1, default_root_dir=folder, **quiet, **kwargs)


def averaged(decay: float, steps: int) -> torch.Tensor:
    """d^k w_0 + (1 - d) sum_i d^(k-i) w_i with w_i = w_0 - i/4, in float64."""
    w0 = torch.tensor([1.0, 8.0], dtype=torch.float64)
    terms = (decay ** (steps - i) * (w0 - i / 4) for i in range(1, steps + 1))
    return decay**steps * w0 + (1 - decay) * sum(terms, torch.zeros(2, dtype=torch.float64))


@pytest.fixture(autouse=True)
def _short_runs():
    with warnings.catch_warnings():
        for remark in ("initial weights", "no `val_dataloader`", "dataloader is not resumable"):
            warnings.filterwarnings("ignore", f".*{remark}.*")
        yield


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_averages_have_the_closed_form_and_step_with_the_optimiser(tmp_path, steps, accumulate):
    ema, module = EMA(DECAYS), Falling()
    trainer(ema, tmp_path, max_steps=steps, accumulate_grad_batches=accumulate).fit(module, batches())
    torch.testing.assert_close(module.w.detach(), torch.tensor([1.0, 8.0]) - steps / 4)
    for decay, shadow in zip(DECAYS, ema.shadows, strict=True):
        assert list(shadow) == ["w"], "trainable parameters only"
        torch.testing.assert_close(shadow["w"].double(), averaged(decay, steps), atol=1e-6, rtol=0)


def test_bf16_weights_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"float32 weights and w is torch\.bfloat16.*bf16-mixed"):
        EMA(DECAYS).start(Falling().bfloat16())


def test_averages_start_as_float32_copies_of_their_own():
    module, ema = Falling(), EMA(DECAYS)
    ema.start(module)
    module.w.data.add_(1)
    assert [shadow["w"].dtype for shadow in ema.shadows] == [torch.float32] * 2
    assert [shadow["w"].tolist() for shadow in ema.shadows] == [[1.0, 8.0]] * 2


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_a_decay_outside_the_range_is_an_error_naming_it(decay):
    with pytest.raises(ValueError, match=f"EMA decay {decay} is not in"):
        EMA([0.9, decay])


def started():
    ema, module = EMA(DECAYS), Falling()
    ema.start(module)
    for _ in range(3):
        module.w.data.sub_(0.25)
        ema.update(module)
    return ema, module


@pytest.mark.parametrize(("which", "decay"), [("0.9", 0.9), ("0.5", 0.5)])
def test_context_holds_the_chosen_average_and_restores_the_weights(which, decay):
    ema, module = started()
    before = module.w.detach().clone()
    with ema.weights(module, which):
        torch.testing.assert_close(module.w.detach().double(), averaged(decay, 3), atol=1e-6, rtol=0)
    assert torch.equal(module.w, before)
    torch.testing.assert_close(ema.shadows[ema.names.index(which)]["w"].double(), averaged(decay, 3), atol=1e-6, rtol=0)


def test_context_raw_changes_nothing():
    ema, module = started()
    before = module.w.detach().clone()
    with ema.weights(module, "raw"):
        assert torch.equal(module.w, before)


def test_context_restores_bit_equal_weights_after_an_exception():
    ema, module = started()
    before, averages = module.w.detach().clone(), [shadow["w"].clone() for shadow in ema.shadows]
    with pytest.raises(RuntimeError, match="sampling failed"), ema.weights(module, "0.5"):
        assert not torch.equal(module.w, before)
        raise RuntimeError("sampling failed")
    assert torch.equal(module.w, before)
    assert all(torch.equal(shadow["w"], a) for shadow, a in zip(ema.shadows, averages, strict=True))


def test_an_exception_in_validation_leaves_the_raw_weights(tmp_path):
    class Failing(Falling):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise RuntimeError("validation failed")

    ema, module = EMA(DECAYS), Failing()
    with pytest.raises(RuntimeError, match="validation failed"):
        trainer(ema, tmp_path, max_steps=4, val_check_interval=2).fit(module, batches(), batches(1))
    assert torch.equal(module.w, torch.tensor([0.5, 7.5]))
    assert not torch.equal(module.seen[0], module.w)
    torch.testing.assert_close(ema.shadows[0]["w"].double(), averaged(0.9, 2), atol=1e-6, rtol=0)


def test_validation_sees_the_first_average_and_training_goes_on_from_the_raw_weights(tmp_path):
    ema, module = EMA(DECAYS), Falling()
    trainer(ema, tmp_path, max_steps=4, val_check_interval=2).fit(module, batches(), batches(1))
    assert len(module.seen) == 2
    for steps, seen in zip((2, 4), module.seen, strict=True):
        torch.testing.assert_close(seen.double(), averaged(0.9, steps), atol=1e-6, rtol=0)
    assert torch.equal(module.w, torch.tensor([0.0, 7.0]))


def saved(folder, **kwargs):
    """A checkpoint after 3 steps."""
    ema, module = EMA(DECAYS), Falling()
    run = trainer(ema, folder, max_steps=3, **kwargs)
    run.fit(module, batches())
    run.save_checkpoint(folder / "three.ckpt")
    return folder / "three.ckpt"


def test_validating_a_checkpoint_uses_its_first_average(tmp_path):
    path, module = saved(tmp_path), Falling()
    trainer(EMA(DECAYS), tmp_path).validate(module, batches(1), ckpt_path=path, weights_only=True, verbose=False)
    torch.testing.assert_close(module.seen[0].double(), averaged(0.9, 3), atol=1e-6, rtol=0)
    assert torch.equal(module.w, torch.tensor([0.25, 7.25]))


@pytest.mark.parametrize("decays", [DECAYS, DECAYS[::-1], DECAYS[1:]])
def test_a_resumed_run_goes_on_with_the_averages_by_decay(tmp_path, decays):
    path, module, ema = saved(tmp_path), Falling(), EMA(decays)
    trainer(ema, tmp_path, max_steps=5).fit(module, batches(), ckpt_path=path, weights_only=True)
    for decay, shadow in zip(decays, ema.shadows, strict=True):
        torch.testing.assert_close(shadow["w"].double(), averaged(decay, 5), atol=1e-6, rtol=0)


def test_a_decay_missing_in_the_restored_state_is_an_error_listing_those_there(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"no EMA of decay 0\.99, only \[0\.5, 0\.9\]"):
        trainer(EMA([0.9, 0.99]), tmp_path, max_steps=5).fit(Falling(), batches(), ckpt_path=path, weights_only=True)


def test_a_run_too_short_for_its_decay_is_told_so_with_a_better_one(tmp_path):
    with pytest.warns(UserWarning, match=r"EMA 0\.9999 will still be 98% initial .* 200 steps.* near 0\.95"):
        EMA([0.9999])._warn_if_short(200)
    with pytest.warns(UserWarning, match=r"EMA 0\.9999 .* 4 steps"):
        trainer(EMA([0.1, 0.9999]), tmp_path, max_steps=4).fit(Falling(), batches())


def test_a_run_long_enough_for_its_decay_is_not_warned(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(EMA([0.5]), tmp_path, max_steps=7).fit(Falling(), batches())  # 0.5^7 is below one per cent
    assert [w for w in caught if "initial weights" in str(w.message)] == []
