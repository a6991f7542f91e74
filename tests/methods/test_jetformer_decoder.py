"""JetFormer's decoder against the official code: golden cases are discovered, sizes and options are read from each.

Here: decoder, gradients, cached decoding, parameter names, initial statistics. Elsewhere: mixtures and guidance in
layers/heads/test_gmm_jetformer_golden.py, and what needs no golden file in layers/networks/test_jetformer.py.
Tolerances are those of the golden README.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layers.checkpoint import to_official, to_ours
from layers.heads.gmm import GMMHead
from layers.networks.jetformer import DecoderCache, DecoderConfig, JetFormerDecoder, decoder_rules, stacked, unrolled
from layers.text.batches import SpecialIds
from layers.text_image import Inputs, attention_mask, right_aligned
from tests.golden_cases import Golden, case_id, golden_paths, read_json

METHOD = "jetformer"
FLOW = "params_adaptor/"  # parameters that are the flow's, not the decoder's
VARIANTS = {"bf16head": {"head_dtype": "bfloat16"}, "prefixlm": {"causal_mask_on_prefix": False}}
COUNTS = {"image_head": "LogitsImage/", "image_embed": "EmbedImage/", "text_embed": "EmbedText/"}
COUNTS |= {"text_head": "LogitsText/", "decoder_blocks": "decoder/"}
TRUNCATED = 2.4  # ratio of a sample's extreme to its deviation that no full normal distribution of so many stays below


def golden(kind: str):
    """Parametrise over the files whose names are of this kind."""
    paths = [p for p in golden_paths(METHOD, "**/*.safetensors") if re.fullmatch(kind, p.stem)]
    return pytest.mark.parametrize("path", paths, ids=case_id)


class Model(nn.Module):
    """What the rules name: decoder and image head of an official configuration. Absent fields have its defaults."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        config = DecoderConfig(
            width=model["width"],
            depth=model["depth"],
            num_heads=model["num_heads"],
            num_kv_heads=model["num_kv_heads"],
            head_dim=model["head_dim"],
            mlp_hidden=model["mlp_dim"],
            dropout=model.get("dropout", 0.0),
            text_tables=model.get("num_vocab_repeats", 1),
            text_head="untied" if model.get("untie_output_vocab", False) else "tied",
            causal_prefix=model.get("causal_mask_on_prefix", True),
        )
        vocab = SpecialIds(model["bos_id"], model["boi_id"], model["nolabel_id"], size=model["vocab_size"])
        self.net = JetFormerDecoder(config, token_dim=model["out_dim"], vocab=vocab)
        mixtures = {"num_mixtures": model["num_mixtures"], "scale_min": model.get("scale_tol", 1e-6)}
        dtype = model.get("head_dtype", "float32")
        self.head = GMMHead(model["out_dim"], model["width"], **mixtures, init="zero", dtype=dtype)

    def load(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(to_ours(unrolled(state), decoder_rules(self.net.config)))

    def official(self, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return stacked(to_official(self.state_dict() if state is None else state, decoder_rules(self.net.config)))


def params(g: Golden, prefix: str = "param/") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): g[name] for name in g.names() if name.startswith(prefix)}


def model_of(path: Path, **changes: Any) -> Model:
    """The model of a golden file, in eval mode, with the parameters that it holds or that its json names."""
    config = read_json(path.with_suffix(".json"))
    if named := re.search(r"(\S+)\.safetensors", str(config.get("params", ""))):
        path = path.with_name(named[0])
    model = Model(config["model"] | changes)
    state = params(Golden(path, partial=True))
    model.load({name: tensor for name, tensor in state.items() if not name.startswith(FLOW)})
    return model.eval()


def close(actual: Tensor, expected: Tensor, *, atol: float = 2e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


def check_gradient(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def arguments(g: Golden) -> dict[str, Tensor]:
    """Those of `embed`, but the image."""
    arguments = {"text": g["in/text"].long(), "text_mask": g["in/text_mask"].bool()}
    arguments["text_first"] = g["in/text_first_mask"].bool()
    return arguments | ({"drop_prefix": g["in/drop_prefix"].bool()} if "in/drop_prefix" in g else {})


# Decoder


@golden("decoder_.*")
def test_golden_decoder(path):
    model = model_of(path)
    with Golden(path) as g:
        assert params(g)
        image, given = g["in/image_tokens"].clone().requires_grad_(), arguments(g)
        check_inside(g, model, image, given)
        h = model.net(image, **given)
        mixture, text_logits = model.head.distribution(h.image), model.net.text_logits(h.text)
        log_prob = mixture.log_prob(g["in/image_tokens"])
        normalised = mixture._replace(logits=mixture.logits.log_softmax(-1))
        for name, tensor in normalised._asdict().items():
            close(tensor, g[f"out/gmm_{name}"])
        close(model.head.linear(h.image), g["out/image_logits"])
        close(text_logits, g["out/text_logits"])
        close(log_prob, g["out/image_log_prob"])
        loss = (log_prob * g["in/cotangent_log_prob"]).sum()
        (loss + (text_logits.log_softmax(-1) * g["in/cotangent_text_logprob"]).sum()).backward()
        check_gradient(image.grad, g["grad/image_tokens"])
        found, expected = model.official(gradients(model)), params(g, "grad/param/")
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            check_gradient(found[name], tensor)
        for name in sorted({match[1] for n in g.names() if (match := re.match(r"variant_(\w+)/", n))}):
            check_variant(g, name, model_of(path, **VARIANTS[name]), image.detach(), given)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@torch.no_grad()
def check_inside(g: Golden, model: Model, image: Tensor, given: dict[str, Tensor]) -> None:
    """The sequence as it goes in, and what every block makes of it."""
    outputs = []
    handles = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in model.net.blocks]
    inputs = model.net.embed(image, **given).without_last()
    h = model.net.hidden(inputs)
    close(inputs.x, g["mid/embedded"])
    assert torch.equal(inputs.valid, g["mid/input_mask"].bool())
    assert torch.equal(inputs.positions(), g["mid/positions"].long())
    assert torch.equal(inputs.mask(), g["mid/attn_mask"].bool())
    recorded = [name for name in g.names() if re.fullmatch(r"mid/block\d+", name)]
    for output, name in zip(outputs, recorded, strict=True):
        close(output, g[name])
    close(outputs[-1], g["mid/encoded"])
    close(h, g["mid/pre_logits"])
    for handle in handles:
        handle.remove()


@torch.no_grad()
def check_variant(g: Golden, variant: str, model: Model, image: Tensor, given: dict[str, Tensor]) -> None:
    """The same parameters under another option; everything that is recorded of it."""
    h, inputs = model.net(image, **given), model.net.embed(image, **given).without_last()
    half = model.head.dtype == torch.bfloat16
    found = {"mid/attn_mask": inputs.mask().float(), "out/text_logits": model.net.text_logits(h.text)}
    found["out/image_log_prob"] = -model.head.nll(h.image, image)
    mixture = model.head.distribution(h.image)  # of the rounded product
    found["out/image_logits"] = nn.functional.linear(
        h.image.to(model.head.dtype), *(p.to(model.head.dtype) for p in model.head.linear.parameters())
    )
    assert torch.equal(mixture.logits, found["out/image_logits"][..., : mixture.logits.shape[-1]].float())
    for name in (n.removeprefix(f"variant_{variant}/") for n in g.names() if n.startswith(f"variant_{variant}/")):
        loose = {"atol": 0.1 if "log_prob" in name else 0.02, "rtol": 0.0} if half else {}
        close(found[name], g[f"variant_{variant}/{name}"], **loose)


# Decoding


@golden("decode_(?!images).*")
@torch.no_grad()
def test_golden_decoding(path):
    model = model_of(path)
    with Golden(path) as g:
        image, text, mask, drop = (g[f"in/{name}"] for name in ("image_tokens", "text", "text_mask", "drop_prefix"))
        given = {"text_mask": mask.bool(), "drop_prefix": drop.bool()}
        h, cache = check_prefill(g, model, model.net.image_prompt(text.long(), **given), room=image.shape[1] - 1)
        hs = [h, *(model.net.step_image(image[:, k], cache) for k in range(image.shape[1] - 1))]
        pre_logits = torch.stack(hs, dim=1)
        close(pre_logits, g["out/decode_pre_logits"])
        close(model.head.linear(pre_logits), g["out/decode_image_logits"])
        first = torch.ones(len(image), dtype=torch.bool)
        close(model.net(image, text.long(), first, **given).image, g["out/teacher_pre_logits"])
        check_cache(g, cache)
        if "caption/out/decode_pre_logits" in g:
            check_caption(g, model, image, text.long())


def check_prefill(g: Golden, model: Model, prompt: Inputs, *, room: int) -> tuple[Tensor, DecoderCache]:
    """The prompt before and after it is aligned, and what the blocks make of it, where it is valid."""
    for stage in ("prefill", "right_aligned"):
        x, valid, mask = prompt.x, prompt.valid, attention_mask(prompt.valid, prompt.prefix)
        if stage == "right_aligned":
            x, valid, mask = right_aligned(x, valid, mask)
        close(x, g[f"mid/{stage}_embedded"])
        assert torch.equal(valid, g[f"mid/{stage}_input_mask"].bool())
        assert torch.equal(mask, g[f"mid/{stage}_attn_mask"].bool())
    seen = []
    handle = model.net.norm.register_forward_hook(lambda _, __, output: seen.append(output))
    h, cache = model.net.prefill(prompt, room=room)
    handle.remove()
    close(seen[0][valid], g["out/prefill_pre_logits"][valid])  # elsewhere the official softmax of an empty row
    assert torch.equal(h, seen[0][:, -1])
    return h, cache


def check_cache(g: Golden, cache: DecoderCache) -> None:
    """After the last step: lengths, and keys and values from each row's beginning on."""
    store, filled = cache.own.store, cache.own.filled  # (depth, 2, B, K, S, d)
    assert torch.equal(cache.begin, g["cache/cache_begin"].long())
    for name, expected in {"cache_end": filled, "seq_len": filled - cache.begin}.items():
        assert torch.equal(g[f"cache/{name}"].long(), torch.zeros_like(cache.begin) + expected)
    official = "cache/decoder/layers/attn"
    assert (g[f"{official}/idx"] == filled).all() and store.shape[4] == filled
    there = torch.arange(filled) >= cache.begin[:, None]
    for part, name in enumerate(("k_cache", "v_cache")):
        ours = store[:, part].permute(1, 0, 3, 2, 4)  # (B, depth, S, K, d)
        close(ours.transpose(1, 2)[there], g[f"{official}/{name}"].transpose(1, 2)[there])


def check_caption(g: Golden, model: Model, image: Tensor, text: Tensor) -> None:
    h, cache = model.net.prefill(model.net.text_prompt(image), room=text.shape[1] - 1)
    hs = [h, *(model.net.step_text(text[:, i], cache) for i in range(text.shape[1] - 1))]
    pre_logits = torch.stack(hs, dim=1)
    close(pre_logits, g["caption/out/decode_pre_logits"])
    close(model.net.text_logits(pre_logits), g["caption/out/decode_text_logits"])
    teacher = model.net(image, text, torch.zeros(len(image), dtype=torch.bool))
    close(teacher.text, g["caption/out/teacher_pre_logits"])


# Official files


@golden("decoder_.*")
def test_golden_parameters_go_back_unchanged(path):
    official, ours = params(Golden(path, partial=True)), model_of(path).official()
    assert set(ours) == set(official)
    assert all(torch.equal(ours[name], tensor) for name, tensor in official.items())


def entries(name: str, wanted: str):
    """Configurations of JetFormer in a json: those that have what is wanted of the decoder."""
    cases = [
        pytest.param(entry, id=f"{case_id(path)}-{key}")
        for path in golden_paths(METHOD, f"**/{name}.json")
        for key, entry in read_json(path).items()
        if wanted in entry["params"]
    ]
    return pytest.mark.parametrize("entry", cases)


def decoder_params(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry["params"].items() if not name.startswith(FLOW)}


@entries("manifest", "EmbedText/embedding")
def test_golden_manifest(entry):
    with torch.device("meta"):
        model = Model(entry["model"])
    shapes = {name: list(tensor.shape) for name, tensor in model.official().items()}
    assert shapes == decoder_params(entry)
    for count, prefix in COUNTS.items():
        found = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(prefix))
        assert found == entry["param_counts"][count]
    assert sum(p.numel() for p in model.parameters()) == sum(entry["param_counts"][name] for name in COUNTS)


@entries("init_stats", "EmbedText/embedding")
def test_golden_initial_statistics(entry):
    """Mean, deviation and extremes; a constant exactly, a truncated normal distribution's end within five per cent."""
    state, expected = Model(entry["model"]).official(), decoder_params(entry)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {n: s["shape"] for n, s in expected.items()}
    for name, stats in expected.items():
        tensor, std, size = state[name], stats["std"], state[name].numel()
        if std == 0:
            assert (tensor == stats["mean"]).all(), name
            continue
        assert abs(tensor.std() / std - 1) < 5 * size**-0.5, name  # five standard errors of a sample, at least
        assert abs(tensor.mean()) < 5 * std * size**-0.5, name
        extreme = max(-stats["min"], stats["max"])
        assert abs(tensor.abs().max() / extreme - 1) < (0.05 if extreme < TRUNCATED * std else 0.3), name
