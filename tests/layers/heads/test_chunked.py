"""Linear layer and density by chunks: the plain form's values and gradients, in memory that does not grow with rows."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.measure import LiveBytes
from layers.heads.chunked import CHUNK_BYTES, MIN_CHUNK_ROWS, chunk_rows, density_of_linear, linear, linear_of_rows

R, D, E, P = 50, 3, 6, 12
CHUNK = 16  # rows
NUMBER = 4  # bytes


def density(outputs: Tensor, x: Tensor) -> Tensor:
    """Something that is not linear, with every output and every channel in it."""
    return (outputs.unflatten(-1, (D, P // D)).tanh() * x[..., None]).square().sum((-1, -2)).sqrt()


def inputs(rows: int = R, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(rows, E), (rows, D), (P, E), (P,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def apply(tensors: list[Tensor], rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return density_of_linear(*tensors, density=density, dtype=dtype, rows=rows)


def grads(value: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((value * torch.linspace(-1, 2, len(value))).sum(), tensors)


@pytest.mark.parametrize("rows", [1, CHUNK, R - 1, R, R + 1])
def test_values_and_gradients_are_those_of_the_plain_form(rows):
    tensors = inputs()
    h, x, weight, bias = tensors
    plain, chunked = density(h @ weight.T + bias, x), apply(tensors, rows)
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(grads(chunked, tensors), grads(plain, tensors), rtol=1e-4, atol=1e-5)


def test_only_the_gradients_that_are_needed():
    tensors = inputs()
    for tensor in (tensors[1], tensors[3]):
        tensor.requires_grad_(False)
    apply(tensors, CHUNK).sum().backward()
    assert [t.grad is None for t in tensors] == [False, True, False, True]


def test_no_row_at_all_gives_none():
    assert apply(inputs(0), CHUNK).shape == (0,)


def test_bfloat16_products_leave_float32_gradients():
    """Rounded as one product of all rows would be, up to the order of the sum over chunks."""
    tensors = inputs()
    plain, chunked = apply(tensors, R, torch.bfloat16), apply(tensors, CHUNK, torch.bfloat16)
    assert torch.equal(plain, chunked) and plain.dtype == torch.float32
    assert not torch.equal(plain, apply(tensors, R))
    for a, b in zip(grads(chunked, tensors), grads(plain, tensors), strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.02 * b.abs().max()


def test_autocast_does_not_change_the_product():
    tensors = inputs()
    h, _, weight, bias = tensors
    expected, wanted = linear(h, weight, bias, torch.float32), grads(apply(tensors, CHUNK), tensors)
    index = torch.arange(P).expand(R, P)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(h, weight, bias, torch.float32), expected)
        torch.testing.assert_close(linear_of_rows(h[None], weight, bias, index, torch.float32)[0], expected)
        assert all(torch.equal(a, b) for a, b in zip(grads(apply(tensors, CHUNK), tensors), wanted, strict=True))


def peak(rows: int, chunk: int) -> int:
    tensors = inputs(rows)
    with LiveBytes() as meter:
        apply(tensors, chunk).sum().backward()
    return meter.peak


def test_memory_grows_by_the_gradients_of_rows_alone():
    """Twice the rows need their own h.grad and x.grad, and nothing that is as wide as the outputs."""
    more = 8 * CHUNK
    assert peak(2 * more, CHUNK) - peak(more, CHUNK) <= more * (E + D + 1) * NUMBER
    assert peak(2 * more, 2 * more) - peak(more, more) > more * 3 * P * NUMBER  # the plain form; so the meter works


def test_nothing_is_kept_but_the_inputs():
    """Saved for the backward pass: h, x, weight and bias themselves, for any number of rows."""
    for rows in (4 * CHUNK, 8 * CHUNK):
        tensors, kept = inputs(rows), []
        with saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            apply(tensors, CHUNK)
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tensors}


def test_chunks_have_their_bytes_but_are_never_narrow():
    assert chunk_rows(528) == CHUNK_BYTES // (4 * 528) > 10_000  # GIVT
    assert chunk_rows(263_168) == MIN_CHUNK_ROWS  # JetFormer


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_of_rows_are_those_of_the_whole_layer(groups, monkeypatch):
    monkeypatch.setattr("layers.heads.chunked.MIN_CHUNK_ROWS", 7)  # so that several chunks are met
    monkeypatch.setattr("layers.heads.chunked.CHUNK_BYTES", 1)
    h, _, weight, bias = inputs()
    h, index = torch.randn(groups, R, E), torch.randint(P, (R, 5))
    whole = linear(h, weight, bias, torch.float32)
    found = linear_of_rows(h, weight, bias, index, torch.float32)
    torch.testing.assert_close(found, whole.gather(-1, index.expand(groups, R, 5)))
