"""FSDP2: which blocks are cut, checkpoints that go from one strategy to another, whole weights where they are needed.

That two processes train as one is in test_ddp.py.
"""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from experiments.load import load_module
from lightning_modules.adafactor import Adafactor
from lightning_modules.pieces import exchange, piece_like, whole, whole_tree
from lightning_modules.sharding import (
    ShardedStrategy,
    blocks_of,
    gathered,
    is_sharded,
    prepare_strategy,
    release,
    sharded_state,
)
from tests.processes import Run, steps, train
from tests.test_contract import FAMILIES, build

pytestmark = pytest.mark.timeout(3600)  # seconds: processes that wait for each other do so for ever
WITHOUT_BLOCKS = {"vae"}  # convolutions: gathered once for the step
STEPS = 8


# What is cut


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_BLOCKS])
def test_every_method_has_blocks_that_are_gathered_apart(family):
    """A new kind of block belongs in BLOCKS, or all of its weights are gathered for the whole step."""
    module, _ = build(family)
    blocks = blocks_of(module)
    inside = [p for block in blocks for p in block.parameters()]
    assert len({id(p) for p in inside}) == len(inside), "a weight in two blocks"
    assert all(p.requires_grad for p in inside)
    assert len(blocks) >= 2


@pytest.mark.parametrize(("backward", "blocks"), [("plain", 2), ("recompute", 2), ("reversible", 0)])
def test_a_flow_is_cut_by_couplings_but_not_a_reversible_one(backward, blocks):
    net = {"depth": 2, "block_depth": 1, "width": 32, "num_heads": 2, "backward": backward}
    module = load_module("jet_digits", [f"model.init_args.net.{key}={value}" for key, value in net.items()])
    assert len(blocks_of(module)) == blocks


# One process


def test_a_module_in_one_piece_is_left_alone():
    module, _ = build("jit")
    before = {name: param.data_ptr() for name, param in module.named_parameters()}
    with gathered(module):
        assert not is_sharded(module)
    release(module)
    assert {name: param.data_ptr() for name, param in module.named_parameters()} == before
    x = torch.randn(3)
    assert whole(x) is x and piece_like(x, torch.zeros(3)) is x
    tree = {"a": [x, (1, "b")]}
    assert whole_tree(tree, keep=False) == tree


def test_exchange_swaps_values_in_place():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
    where = first.data_ptr(), second.data_ptr()
    exchange(first, second)
    assert first.tolist() == [0, 0] and second.tolist() == [1, 1]
    assert (first.data_ptr(), second.data_ptr()) == where


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Adafactor])
def test_state_of_whole_parameters_is_kept_as_it_is(optimizer):
    param = torch.nn.Parameter(torch.ones(2, 3))
    made = optimizer([param], lr=0.1)
    param.grad = torch.ones(2, 3)
    made.step()
    state = made.state_dict()
    assert sharded_state(made, state)["state"] == state["state"]


# Errors


@pytest.mark.parametrize(
    ("strategy", "precision", "said"),
    [
        (ModelParallelStrategy(1, 1), "32-true", ["ModelParallelStrategy", "auto, ddp or fsdp2"]),
        (ShardedStrategy(), "16-mixed", ["16-mixed", "bf16-mixed"]),
    ],
)
def test_what_was_never_tried_is_refused(strategy, precision, said):
    trainer = SimpleNamespace(strategy=strategy, precision=precision)
    with pytest.raises(ValueError) as error:
        prepare_strategy(torch.nn.Linear(1, 1), trainer)
    assert all(text in str(error.value) for text in said)


@pytest.mark.parametrize("size", [0, 3])
def test_shard_size_must_divide_the_processes(size):
    strategy = ShardedStrategy(shard_size=size)
    strategy.__class__ = type("Two", (ShardedStrategy,), {"world_size": 2})
    with pytest.raises(ValueError, match=f"shard_size is {size}.*the 2 processes"):
        strategy._mesh()


def test_each_process_needs_a_row_of_validation():
    _, data = build("jit")
    data.setup()
    data.trainer = SimpleNamespace(global_rank=1, world_size=len(data.val_set) + 1, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match=r"there are 4 validation rows for 5 processes: lower --trainer.devices"):
        data.val_dataloader()


# Several processes


def assert_same(actual: Run, expected: Run) -> None:
    """Losses and weights. Moments of gradients that are nought but for rounding may differ."""
    assert actual.curves["train/loss"] == pytest.approx(expected.curves["train/loss"], rel=1e-5, abs=1e-5)
    assert actual.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.checkpoint["state_dict"].items():
        torch.testing.assert_close(actual.checkpoint["state_dict"][name], tensor, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_a_checkpoint_goes_from_one_strategy_to_the_next(tmp_path):
    """DDP, then FSDP2, then one process, then FSDP2 again: each goes on where the one before stopped."""
    experiments = ["jit", "givt_uvim_depth"]  # AdamW, and Adafactor, whose moments have other shapes than parameters
    line = [*steps(STEPS), "--model.init_args.optim.schedule=constant"]
    straight = train(tmp_path / "straight", "one", experiments, *line)
    for number, strategy in enumerate(("ddp", "fsdp2", "one", "fsdp2"), start=1):
        length = [f"--trainer.max_steps={number * STEPS // 4}", *(["--ckpt=last"] if number > 1 else [])]
        runs = train(tmp_path / "broken", strategy, experiments, *line, *length)
    for actual, expected in zip(runs, straight, strict=True):
        assert_same(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["kept", "groups"])
def test_options_train_as_one_process(strategy, tmp_path):
    line = [*steps(STEPS), "--data.init_args.batch_size=8", "--trainer.accumulate_grad_batches=2"]
    line += ["--trainer.gradient_clip_val=0.01", "--trainer.num_sanity_val_steps=1"]
    expected = train(tmp_path / "one", "one", ["jit", "mar"], *line)
    for actual, wanted in zip(train(tmp_path / strategy, strategy, ["jit", "mar"], *line), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.slow
def test_figures_of_drawn_images_are_those_of_one_process(tmp_path):
    """Three batches for two processes; shapes judge themselves, so no network is needed."""
    data = "{image_size: 32, batch_size: 4, length: 8, val_length: 4}"
    line = [*steps(4), "--data=datamodules.shapes.ShapesData", f"--data.init_args={data}"]
    line += ["--model.init_args.num_classes=64", "--fid.every_n_steps=2", "--fid.num_images=6", "--fid.batch_size=2"]
    (expected,) = train(tmp_path / "one", "one", ["jit_shapes"], *line, "--fid.extractor=null")
    (actual,) = train(tmp_path / "two", "fsdp2", ["jit_shapes"], *line, "--fid.extractor=null")
    figures = [tag for tag in expected.curves if tag.endswith("_acc")]
    assert figures
    for tag in figures:
        assert actual.curves[tag] == pytest.approx(expected.curves[tag], abs=1e-6), tag
