"""Label maps as tokens: order of maps, bins of depth, freezing, errors. Parity is tested in tests/methods."""

import pytest
import torch

from layers.networks.label_map_vae import LabelMapVAEConfig
from layers.tokenizers.label_map import LabelMapTokenizer

ARCH = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_hidden": 16, "patch_size": 4}
ARCH |= {"seq_len": 4, "token_dim": 3}


def tokenizer(**changes) -> LabelMapTokenizer:
    options = {"classes": {"instances": 4, "semantics": 6}, "arch": ARCH, "frozen": False}
    return LabelMapTokenizer(8, **options | changes)


def batch(size: int = 8) -> dict:
    maps = {name: torch.randint(0, 4, (2, size, size), dtype=torch.int16) for name in ("semantics", "instances")}
    return {"image": torch.zeros(2, 3, size, size, dtype=torch.uint8), **maps}


def test_maps_are_stacked_in_the_order_of_classes_whatever_the_batch_says():
    rows = batch()
    assert torch.equal(tokenizer().stacked(rows)[:, 0], rows["instances"])
    swapped = tokenizer(classes={"semantics": 6, "instances": 4})
    assert torch.equal(swapped.stacked(rows)[:, 0], rows["semantics"])


def test_depth_is_put_into_bins_and_comes_back_as_their_middles():
    ours = tokenizer(classes={"depth": 4}, min_depth=0.0, max_depth=4.0)
    depth = torch.rand(2, 8, 8) * 4
    bins = ours.stacked({"depth": depth})
    assert torch.equal(bins[:, 0], depth.long())
    assert torch.equal(ours.depth(bins[:, 0]), depth.floor() + 0.5)


def test_tokens_are_samples_of_the_posterior_that_the_moments_state():
    ours, rows = tokenizer(), batch()
    raw = ours.encode_image(ours.stacked(rows))
    tokens = ours(rows, torch.Generator().manual_seed(0)).x
    assert raw.shape == (2, 6, 2, 2) and tokens.shape == (2, 4, 3)
    noise = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, logvar = raw.chunk(2, dim=1)
    torch.testing.assert_close(tokens, (mean + (0.5 * logvar).exp() * noise).flatten(2).mT)
    assert torch.equal(ours({"raw": raw}, torch.Generator().manual_seed(0)).x, tokens)
    torch.testing.assert_close(ours.latents(tokens).flatten(2).mT, tokens)


def test_decoding_gives_a_picture_of_the_prediction():
    ours = tokenizer()
    torch.nn.init.normal_(ours.vae.decoder_head.weight)
    x = torch.randn(2, 4, 3)
    maps = ours.predict(x)
    assert {name: m.shape for name, m in maps.items()} == dict.fromkeys(("semantics", "instances"), (2, 8, 8))
    picture = ours.decode(x)
    assert picture.shape == (2, 3, 8, 8) and torch.equal(picture, ours.picture(maps))


def test_arguments_rebuild_it():
    ours = tokenizer(min_fraction=0.1)
    assert LabelMapTokenizer(**ours.init_args()).init_args() == ours.init_args()


def test_a_frozen_one_stays_in_eval_mode_and_refuses_to_run_before_its_weights_are_there():
    frozen = tokenizer(frozen=True, weights="x.npz")
    frozen.train()
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(ValueError, match=r"frozen and has no weights yet \(the file 'x\.npz' was not read\)"):
        frozen(batch())
    frozen.load_weights(tokenizer().vae.state_dict(), origin="elsewhere")
    assert frozen(batch()).x.shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tokenizer(classes={"colours": 3}), r"classes are \{'colours': 3\}: set .*classes to"),
        (lambda: tokenizer(classes={"depth": 1}), r"at least 2"),
        (lambda: tokenizer(min_depth=5.0, max_depth=5.0), r"min_depth 5\.0 is not below max_depth 5\.0"),
        (lambda: LabelMapVAEConfig(seq_len=200), r"arch\.seq_len is 200: tokens lie in a square"),
        (lambda: LabelMapTokenizer(9, classes={"depth": 4}, arch=ARCH), r"9x9 pixels cannot be cut into patches of 4"),
        (lambda: tokenizer().stacked(batch(16)), r"maps are 16x16, the tokenizer expects 8: give --data"),
        (lambda: tokenizer(classes={"depth": 4}).stacked(batch()), r"gives no map 'depth', only image, semantics"),
        (lambda: tokenizer().load_weights({}, origin="x"), r"x does not fit this model: \d+ missing"),
    ],
)
def test_errors_name_the_setting(make, message):
    with pytest.raises(ValueError, match=message):
        make()
