"""The ViT trunk: sizes, recomputation, initialisation, resampled positions. Parity is tested in tests/methods."""

import pytest
import torch

from layers.networks.vit import ViT, ViTConfig, resample_positions

SMALL = ViTConfig(width=32, depth=2, num_heads=2, mlp_hidden=64, patch_size=4)


def test_images_need_not_be_square():
    net = ViT(SMALL, channels=5, size=(8, 12))
    assert net(torch.randn(2, 5, 8, 12)).shape == (2, 6, 32)


def test_recomputed_blocks_have_the_same_gradients():
    plain = ViT(SMALL, channels=3, size=(8, 8))
    saving = ViT(ViTConfig(**vars(SMALL) | {"grad_checkpointing": True}), channels=3, size=(8, 8))
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8)
    for net in (plain, saving):
        net(images).square().sum().backward()
    assert all(torch.allclose(p.grad, q.grad) for p, q in zip(plain.parameters(), saving.parameters(), strict=True))


def test_query_key_and_value_are_initialised_apart():
    """Xavier uniform over E x E each, wider than over the fused 3E x E."""
    torch.manual_seed(0)
    weight = ViT(ViTConfig(width=256, depth=1, num_heads=2, mlp_hidden=8), channels=3, size=(16, 16))
    weight = weight.trunk.blocks[0].attn.qkv.weight
    assert weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, rel=1e-3)


def test_positions_are_resampled_corner_to_corner():
    grid = torch.arange(3.0)[:, None] + 10 * torch.arange(3.0)  # value row + 10 column
    resampled = resample_positions(grid.reshape(1, 9, 1), (5, 2)).view(5, 2)
    expected = torch.linspace(0, 2, 5)[:, None] + 10 * torch.tensor([0.0, 2.0])
    torch.testing.assert_close(resampled, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViT(SMALL, channels=3, size=(8, 10)), r"8x10 pixels cannot be cut into patches of 4"),
        (lambda: resample_positions(torch.zeros(1, 8, 2), (2, 2)), r"8 positions are of no square grid"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
