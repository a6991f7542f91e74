"""SwiGLU and GeGLU."""

import pytest
import torch

from layers.mlp import GeGLU, SwiGLU, swiglu_hidden


def test_swiglu_equals_its_formula():
    mlp, x = SwiGLU(6, 5), torch.randn(2, 3, 6)
    gate = x @ mlp.w12.weight[:5].T + mlp.w12.bias[:5]
    value = x @ mlp.w12.weight[5:].T + mlp.w12.bias[5:]
    expected = (gate / (1 + (-gate).exp()) * value) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=1e-5)


def test_geglu_equals_its_formula_without_biases():
    mlp, x = GeGLU(6, 5), torch.randn(2, 3, 6)
    gate, value = x @ mlp.w12.weight[:5].T, x @ mlp.w12.weight[5:].T
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(mlp(x), (gelu * value) @ mlp.w3.weight.T, atol=1e-6, rtol=1e-5)
    assert [name for name, _ in mlp.named_parameters()] == ["w12.weight", "w3.weight"]


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2730), (1280, 3413), (1664, 4437)])
def test_hidden_size_is_two_thirds_truncated(width, hidden):
    assert swiglu_hidden(width, 4.0) == hidden


def test_dropout_acts_before_w3_and_only_in_train_mode():
    mlp, x = SwiGLU(4, 64, dropout=0.5), torch.randn(1, 4)
    seen = []
    mlp.w3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mlp.eval()(x)
    mlp.train()(x)
    assert (seen[0] != 0).all()
    kept = seen[1] != 0
    assert 10 < kept.sum() < 54
    torch.testing.assert_close(seen[1][kept], 2 * seen[0][kept])
