"""JetFormer's decoder without golden files: each row against itself alone, causality, the cache, the options."""

import pytest
import torch
from torch import Tensor

from layers.networks.jetformer import DecoderConfig, JetFormerDecoder
from layers.text.batches import special_ids
from layers.text_image import Inputs

B, T, N, D = 5, 4, 6, 3
WORDS = 9
FIRST = torch.tensor([True, False, True, False, True])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
DROP = torch.tensor([False, False, True, False, False])
# tables of text, heads of keys, whether the prefix is causal
OPTIONS = [(1, 1, True), (3, 1, True), (1, 2, True), (1, 4, False), (3, 1, False)]
options = pytest.mark.parametrize(("tables", "kv_heads", "causal"), OPTIONS)


def decoder(tables: int = 1, kv_heads: int = 1, causal: bool = True, **changes) -> JetFormerDecoder:
    sizes = {"width": 16, "depth": 2, "num_heads": 4, "head_dim": 6, "mlp_hidden": 24, "dropout": 0.0} | changes
    config = DecoderConfig(**sizes, text_tables=tables, num_kv_heads=kv_heads, causal_prefix=causal)
    net = JetFormerDecoder(config, token_dim=D, vocab=special_ids(WORDS))
    for block in net.blocks:
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, N, D), torch.randint(WORDS, (B, T))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


# Whole sequences


@options
@torch.no_grad()
def test_each_row_is_what_it_would_be_alone_without_its_masked_ids(tables, kv_heads, causal):
    """No padding, no mask, no other row: sequences built by hand from the tables."""
    net, (image, text) = decoder(tables, kv_heads, causal), batch()
    found = net(image, text, FIRST, text_mask=MASK, drop_prefix=DROP)
    table = net.text_embed.weight
    for b in range(B):
        ids = torch.full((T,), net.vocab.nolabel) if DROP[b] else text[b, MASK[b]]
        words = torch.cat([table[ids + i * net.vocab.size] for i in range(tables)])
        bos, boi, soft = table[net.vocab.bos][None], table[net.vocab.boi][None], net.image_embed(image[b])
        x = torch.cat([bos, words, boi, soft] if FIRST[b] else [boi, soft, bos, words])[None]
        prefix = None if causal else torch.tensor([1 + len(words) if FIRST[b] else 1 + N])
        h = net.hidden(Inputs(x, None, prefix))[0]
        close(found.image[b], h[len(words) + 1 :][:N] if FIRST[b] else h[:N])
        if not DROP[b]:
            start = 0 if FIRST[b] else N + 1
            last = MASK[b].tolist().index(False) if not MASK[b].all() else T  # ids up to the first hole
            close(found.text[b, :last], h[start : start + last])


@options
@torch.no_grad()
def test_no_token_sees_a_later_one_or_a_masked_one(tables, kv_heads, causal):
    """By perturbation of each input; places of a prefix that is not causal see all of it."""
    net, (image, text) = decoder(tables, kv_heads, causal), batch()
    inputs = net.embed(image, text, FIRST, text_mask=MASK)
    before, length = net.hidden(inputs), inputs.x.shape[1]
    for i in range(length):
        moved = inputs.x.clone()
        moved[:, i] += torch.randn(B, 16)
        changed = (net.hidden(inputs._replace(x=moved)) - before).abs().amax(-1) > 1e-6
        for b in range(B):
            prefix = 0 if causal else 1 + (tables * T if FIRST[b] else N)
            seen = [inputs.valid[b, i].item() and (i <= j or max(i, j) < prefix or i < prefix) for j in range(length)]
            seen[i] = True  # of its own value, through the residual stream
            assert changed[b].tolist() == seen


@torch.no_grad()
def test_without_a_mask_all_ids_are_there():
    net, (image, text) = decoder(2), batch()
    plain, masked = net(image, text, FIRST), net(image, text, FIRST, text_mask=torch.ones_like(MASK))
    close(plain.image, masked.image)
    close(plain.text, masked.text)


@torch.no_grad()
def test_a_dropped_prefix_is_nolabel_at_every_place_whatever_the_mask_says():
    net, (image, text) = decoder(2), batch()
    dropped = net(image, text, FIRST, text_mask=MASK, drop_prefix=torch.ones_like(FIRST))
    nothing, everywhere = torch.full_like(text, net.vocab.nolabel), torch.ones_like(MASK)
    expected = net(image, nothing, FIRST, text_mask=everywhere)
    close(dropped.image[FIRST], expected.image[FIRST])
    later = net.embed(image, text, FIRST, drop_prefix=torch.ones_like(FIRST)).x[~FIRST]
    assert (later[:, 1 : 1 + N] == net.text_embed.weight[net.vocab.nolabel]).all()
    kept = net.embed(image, text, FIRST).x[~FIRST]
    assert torch.equal(later[:, 1 + N :], kept[:, 1 + N :]) and torch.equal(later[:, 0], kept[:, 0])


def test_recomputed_blocks_have_the_same_gradients():
    image, text = batch()
    grads = []
    for recompute in (False, True):
        torch.manual_seed(1)
        net = decoder(grad_checkpointing=recompute, dropout=0.3).train()
        torch.manual_seed(2)
        h = net(image, text, FIRST, text_mask=MASK)
        grads.append(torch.autograd.grad(h.image.square().sum() + h.text.square().sum(), list(net.parameters())))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


# Text


@torch.no_grad()
def test_tied_logits_are_of_all_tables_and_untied_ones_of_the_vocabulary():
    h = torch.randn(2, 3, 16)
    tied, untied = decoder(3), decoder(text_head="untied")
    close(tied.text_logits(h), h @ tied.text_embed.weight.T)
    assert tied.text_head is None and tied.text_logits(h).shape == (2, 3, 3 * (WORDS + 3))
    close(untied.text_logits(h), h @ untied.text_head.weight.T + untied.text_head.bias)
    assert untied.text_logits(h).shape == (2, 3, WORDS + 3)


# Decoding


@options
@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_decoding_an_image_equals_teacher_forcing_at_every_token(tables, kv_heads, causal, ragged):
    net, (image, text) = decoder(tables, kv_heads, causal), batch()
    given = {"drop_prefix": DROP} | ({"text_mask": MASK} if ragged else {})
    h, cache = net.prefill(net.image_prompt(text, **given), room=N - 1)
    hs = [h, *(net.step_image(image[:, k], cache) for k in range(N - 1))]
    close(torch.stack(hs, dim=1), net(image, text, torch.ones_like(FIRST), **given).image)
    assert cache.own.filled == cache.own.length
    assert (cache.begin is not None) == ragged


@pytest.mark.parametrize(("kv_heads", "causal"), [(1, True), (2, True), (1, False)])
@pytest.mark.parametrize("known", [None, torch.tensor([4, 1, 0, 2, 3])])
@torch.no_grad()
def test_decoding_text_equals_teacher_forcing_at_every_id(kv_heads, causal, known):
    """Behind the image alone, and behind beginnings of other lengths in other rows."""
    net, (image, text), length = decoder(1, kv_heads, causal), batch(), 3
    if known is None:
        prompt, known = net.text_prompt(image), torch.zeros(B, dtype=torch.int64)
    else:
        prompt = net.text_prompt(image, text, text_mask=torch.arange(T) < known[:, None])
    new = torch.randint(WORDS, (B, length))
    h, cache = net.prefill(prompt, room=length - 1)
    found = torch.stack([h, *(net.step_text(new[:, i], cache) for i in range(length - 1))], dim=1)
    for b in range(B):
        whole = torch.cat([text[b, : known[b]], new[b]])[None]
        expected = net(image[b : b + 1], whole, torch.zeros(1, dtype=torch.bool)).text[0, known[b] :]
        close(found[b], expected)


@torch.no_grad()
def test_prompts_of_one_length_need_neither_mask_nor_beginning():
    net, (image, text) = decoder(2), batch()
    for prompt in (net.image_prompt(text), net.text_prompt(image)):
        assert prompt.mask() is None and prompt.valid is None
        assert net.prefill(prompt, room=0)[1].begin is None


@torch.no_grad()
def test_the_cache_is_of_the_products_precision():
    net, (image, text) = decoder(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, cache = net.prefill(net.image_prompt(text, text_mask=MASK), room=N - 1)
        hs = [h, *(net.step_image(image[:, k], cache) for k in range(N - 1))]
        teacher = net(image, text, torch.ones_like(FIRST), text_mask=MASK).image
    assert cache.own.store.dtype == torch.bfloat16
    assert h.dtype == teacher.dtype == torch.float32  # of the norm, on a residual stream that is float32
    assert (torch.stack(hs, dim=1) - teacher).abs().max() < 0.1


# Options that do not go together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "net.num_heads 16 is not divisible by net.num_kv_heads 3"),
        ({"head_dim": 7}, "net.head_dim is 7: rotary"),
        ({"text_head": "untied"}, "net.text_tables is 16 with net.text_head=untied"),
        ({"num_kv_heads": 0}, "net.num_kv_heads is 0: it must be positive"),
        ({"depth": -1}, "net.depth is -1: it must be positive"),
        ({"text_tables": 0}, "net.text_tables is 0: it must be positive"),
        ({"dropout": 1.0}, "net.dropout is 1.0: it is the share that is dropped"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**changes)


def test_a_text_of_several_tables_cannot_be_continued():
    image, text = batch()
    with pytest.raises(ValueError, match=r"net\.text_tables is 2"):
        decoder(2).text_prompt(image, text)
