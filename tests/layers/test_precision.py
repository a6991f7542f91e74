"""Weights cast once for sampling."""

import torch

from layers.precision import cast_linear_, compute_dtype, without_autocast
from tests.methods.test_jit import module_from

CONFIG = {
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "bottleneck_dim": 8,
    "in_context_len": 2,
    "in_context_start": 1,
    "img_size": 16,
    "patch_size": 4,
    "num_classes": 5,
}


def test_casting_linear_weights_once_leaves_autocast_outputs_bit_equal():
    net = module_from(CONFIG).net
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    inputs = torch.randn(3, 16, 48), torch.tensor([0.1, 0.5, 0.97]), torch.tensor([0, 4, 5])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = net(*inputs)
        after = cast_linear_(net, torch.bfloat16)(*inputs)
    assert before.abs().max() > 0 and before.dtype == torch.bfloat16
    assert torch.equal(before, after)


def test_only_linear_layers_are_cast():
    net = cast_linear_(module_from(CONFIG).net, torch.bfloat16)
    linear = {id(p) for m in net.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    assert linear
    for name, p in net.named_parameters():
        assert p.dtype == (torch.bfloat16 if id(p) in linear else torch.float32), name
    assert net.rope.dtype == torch.float32


def test_products_inside_keep_the_dtype_of_their_factors():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast(x.device):
            assert torch.equal(x @ x, x.mm(x)) and (x @ x).dtype == torch.float32
        assert (x @ x).dtype == compute_dtype("cpu") == torch.bfloat16
    assert compute_dtype("cpu") == compute_dtype("meta") == torch.float32
    with without_autocast("meta"):
        assert (x.to("meta") @ x.to("meta")).dtype == torch.float32
