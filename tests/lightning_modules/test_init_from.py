"""Starting from files: another class table, misfits, checkpoints of another kind."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.jit import JiTModule
from tests.methods.test_jit import module_from

CONFIG = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "bottleneck_dim": 8,
    "in_context_len": 2,
    "in_context_start": 1,
    "img_size": 16,
    "patch_size": 8,
    "num_classes": 5,
}
TABLE = "net.y_embedder.embedding_table.weight"


def random_module(**changes) -> JiTModule:
    module = module_from({**CONFIG, **changes})
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


@pytest.fixture
def official(tmp_path):
    """A file of five classes, and the module it came from."""
    module = random_module()
    save_file({n: t.contiguous() for n, t in module.official_state_dict().items()}, tmp_path / "five.safetensors")
    return tmp_path / "five.safetensors", module


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("num_classes", [1, 3, 5, 8])
def test_new_classes_are_fresh_the_null_row_and_everything_else_come_from_the_file(official, num_classes):
    path, source = official
    module = random_module(num_classes=num_classes)
    module.init_classes = "new"
    before = snapshot(module)
    module.load_official(path)
    after, wanted = module.state_dict(), source.state_dict()
    assert after[TABLE].shape == (num_classes + 1, 32)
    assert torch.equal(after[TABLE][:-1], before[TABLE][:-1])
    assert torch.equal(after[TABLE][-1], wanted[TABLE][-1])
    others = [name for name in wanted if name != TABLE]
    assert len(others) == len(wanted) - 1
    assert all(torch.equal(after[name], wanted[name]) for name in others)
    assert not any(torch.equal(before[name], wanted[name]) for name in others)


def test_null_label_predicts_what_the_file_did_after_a_change_of_classes(official):
    path, source = official
    module = random_module(num_classes=3)
    module.init_classes = "new"
    module.load_official(path)
    x, t = torch.randn(2, 4, 192), torch.tensor([0.2, 0.8])
    with torch.no_grad():
        ours, theirs = (m.net(x, t, torch.full((2,), m.num_classes)) for m in (module, source))
    assert torch.equal(ours, theirs)


def test_kept_classes_load_everything(official):
    path, source = official
    module = random_module()
    module.load_official(path)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_keeping_a_table_of_another_size_is_one_error_with_the_cure_and_changes_nothing(official):
    path, _ = official
    module = random_module(num_classes=3)
    before = snapshot(module)
    with pytest.raises(ValueError) as error:
        module.load_official(path)
    text = str(error.value)
    assert f"1 of another shape ({TABLE} (6, 32) instead of (4, 32))" in text
    assert "five.safetensors" in text and "init_classes=new" in text and "\n" not in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"depth": 3}, "14 missing (net.blocks.2."),
        ({"depth": 1, "in_context_start": 0}, "14 unknown (net.blocks.1."),
        ({"in_context_len": 0}, "1 unknown (net.in_context_posemb)"),
        ({"img_size": 32}, "net.pos_embed (1, 4, 32) instead of (1, 16, 32)"),
    ],
)
def test_a_file_of_another_size_is_one_error_and_changes_nothing(official, changes, part):
    path, _ = official
    module = random_module(**changes)
    before = snapshot(module)
    with pytest.raises(ValueError) as error:
        module.load_official(path)
    assert part in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_file_of_unknown_names_is_an_error_naming_one(tmp_path):
    save_file({"decoder.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"another model: 1 unknown \(decoder\.weight\)"):
        random_module().load_official(tmp_path / "other.safetensors")


def checkpoint(module: JiTModule, path, **changes):
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(content | changes, path)
    return path


def test_a_checkpoint_alone_rebuilds_the_module_in_eval_mode(tmp_path):
    source = random_module(num_classes=3)
    module = JiTModule.load_from_checkpoint(checkpoint(source, tmp_path / "a.ckpt"))
    assert not module.training
    assert dict(module.hparams) == dict(source.hparams)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(("weights", "value"), [("ema", 2.0), ("0.9", 2.0), ("0.5", 3.0), ("raw", None)])
def test_chosen_weights_of_a_checkpoint_are_loaded(tmp_path, weights, value):
    source = random_module()
    shadows = [{"net.in_context_posemb": torch.full((1, 2, 32), v)} for v in (2.0, 3.0)]
    path = checkpoint(source, tmp_path / "a.ckpt", callbacks={"EMA": {"decays": [0.9, 0.5], "shadows": shadows}})
    loaded = JiTModule.load_from_checkpoint(path, weights=weights).net.in_context_posemb
    expected = source.net.in_context_posemb if value is None else torch.full_like(loaded, value)
    assert torch.equal(loaded, expected)


def test_an_official_file_is_no_checkpoint_of_ours(tmp_path):
    torch.save({"model": random_module().official_state_dict()}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"official\.pth is not a checkpoint of ours.*from_official"):
        JiTModule.load_from_checkpoint(tmp_path / "official.pth")


def test_a_checkpoint_whose_weights_do_not_fit_its_sizes_is_one_error(tmp_path):
    path = checkpoint(random_module(), tmp_path / "a.ckpt", state_dict=random_module(depth=3).state_dict())
    with pytest.raises(ValueError, match=r"a\.ckpt does not fit this model: 14 unknown"):
        JiTModule.load_from_checkpoint(path)


def test_a_missing_checkpoint_is_never_a_fresh_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was loaded"):
        JiTModule.load_from_checkpoint(tmp_path / "none.ckpt")


def test_an_official_file_needs_a_recipe_of_this_method(tmp_path):
    class Other(JiTModule):
        """Another method."""

    with pytest.raises(ValueError, match="experiment 'jit_digits' is a JiTModule, not a Other"):
        Other.from_official("jit_digits", tmp_path / "none.pth")
