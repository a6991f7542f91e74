"""GIVT's encoder-decoder against the official code: golden cases are discovered, sizes are read from each case.

Here: network, density, cached decoding, file layouts, manifests, search, recipes. Tolerances are those of the golden
README; beam search as such is in `test_givt_sampling.py`.
"""

import numpy as np
import pytest
import torch

from experiments.load import load_data, load_module
from layers.checkpoint import Rule, check_fit, to_official, to_ours
from layers.flax_layout import linear_rules, stack
from layers.heads.gmm import GMMHead
from layers.networks.givt import GIVTConfig
from layers.networks.uvim import UViM, decoder_rules, encoder_rules, unrolled
from layers.networks.vit import ViTConfig
from layers.tokenizers.base import from_uint8
from layers.tokenizers.label_map import LabelMapTokenizer
from lightning_modules.optim import OptimConfig
from lightning_modules.uvim import UViMModule, UViMSearch, by_heads
from tests.golden_cases import Golden, case_id, golden_paths, read_json

# Overrides that shrink any recipe of this module; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.class_path": "datamodules.shapes_labels.ShapesLabelMaps",
    "data.init_args.image_size": 16,
    "data.init_args.batch_size": 4,
    "data.init_args.task": "panoptic",
    "data.init_args.max_objects": 2,
    "data.init_args.length": 8,
    "data.init_args.val_length": 4,
    "model.init_args.tokenizer.init_args.image_size": 16,
    "model.init_args.tokenizer.init_args.classes": {"instances": 4, "semantics": 13},
    "model.init_args.tokenizer.init_args.weights": "",
    "model.init_args.tokenizer.init_args.frozen": False,  # random weights will do
    "model.init_args.tokenizer.init_args.arch.width": 32,
    "model.init_args.tokenizer.init_args.arch.encoder_depth": 1,
    "model.init_args.tokenizer.init_args.arch.decoder_depth": 1,
    "model.init_args.tokenizer.init_args.arch.num_heads": 2,
    "model.init_args.tokenizer.init_args.arch.mlp_hidden": 64,
    "model.init_args.tokenizer.init_args.arch.patch_size": 4,
    "model.init_args.tokenizer.init_args.arch.seq_len": 4,
    "model.init_args.tokenizer.init_args.arch.token_dim": 3,
    "model.init_args.encoder.width": 32,
    "model.init_args.encoder.depth": 1,
    "model.init_args.encoder.num_heads": 2,
    "model.init_args.encoder.mlp_hidden": 64,
    "model.init_args.encoder.patch_size": 4,
    "model.init_args.decoder.width": 32,
    "model.init_args.decoder.depth": 1,
    "model.init_args.decoder.num_heads": 2,
    "model.init_args.decoder.mlp_hidden": 64,
    "model.init_args.search.num_beams": 2,
    "model.init_args.search.num_fans": 2,
    "model.init_args.encoder_from": "",
}
TINY_OF = {
    "givt_uvim_depth": {
        "data.init_args.task": "depth",
        "model.init_args.tokenizer.init_args.classes": {"depth": 16},
    }
}

CASES = golden_paths("givt", "**/uvim_givt*.safetensors")
MANIFESTS = [
    (path, name)
    for path in golden_paths("givt", "**/manifest*.json")
    for name, entry in read_json(path).items()
    if {"num_layers", "num_decoder_layers", "emb_dim"} <= set(entry.get("model", {})) and entry["model"]["num_layers"]
]


def networks(config: dict) -> tuple[UViM, GMMHead]:
    """Trunk and head of an official configuration."""
    patch = config["patches"]
    assert patch[0] == patch[1] and config.get("num_labels") in (None, 1)
    sizes = {"width": config["emb_dim"], "num_heads": config["num_heads"], "mlp_hidden": config["mlp_dim"]}
    encoder = ViTConfig(**sizes, depth=config["num_layers"], patch_size=patch[0])
    decoder = GIVTConfig(**sizes, depth=config.get("num_decoder_layers") or config["num_layers"], dropout=0.0)
    tokens = {"seq_len": config["seq_len"], "token_dim": config["out_dim"]}
    kind = "per_channel" if config.get("per_channel_mixtures", True) else "diagonal"
    head = GMMHead(
        config["out_dim"],
        config["emb_dim"],
        num_mixtures=config["num_mixtures"],
        kind="full" if config.get("multivariate") else kind,
        scale="squareplus" if config.get("fix_square_plus") else "squareplus_unfixed",
        scale_min=config.get("scale_tol", 1e-6),
    )
    return UViM(encoder, decoder, size=tuple(config["input_size"]), **tokens), head


def rules(num_heads: int) -> list[Rule]:
    parts = {"net.encoder.": encoder_rules(num_heads), "net.decoder.": decoder_rules(num_heads)}
    parts["head."] = linear_rules("decoder/LogitsDense", "linear")
    return [rule._replace(ours=prefix + rule.ours) for prefix, some in parts.items() for rule in some]


def close(actual, expected, *, atol=2e-5, rtol=1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("path", CASES, ids=case_id)
@torch.no_grad()
def test_golden(path):
    config = read_json(path.with_suffix(".json"))
    with Golden(path) as golden:
        net, head = networks(config)
        both = torch.nn.ModuleDict({"net": net, "head": head}).eval()
        params = {n.removeprefix("params/"): golden[n] for n in golden.names() if n.startswith("params/")}
        both.load_state_dict(to_ours(unrolled(params), rules(config["num_heads"])))

        images, z = golden["cond_image"].movedim(-1, 1), golden["z"]
        close(net.encoder(images), golden["encoded"])
        h = net(images, z)
        close(head.linear(h), golden["logits"])
        log_prob = head.distribution(h).log_prob(z)
        close(log_prob, golden["logprob_per_channel"], atol=1e-3)
        terms = head(z.flatten(0, 1), h.flatten(0, 1), None, None)
        close(terms["loss"].mean(), golden["loss"].squeeze())

        cache = net.decoder.init_cache(len(z), dtype=torch.float32, device="cpu")
        cached = [net.prefill(images, cache)]
        cached += [net.step(z[:, i], i, cache) for i in range(z.shape[1] - 1)]
        close(head.linear(torch.stack(cached, dim=1)), golden["logits_cached"])


@pytest.mark.parametrize(("path", "name"), MANIFESTS, ids=[name for _, name in MANIFESTS])
def test_manifest_fits_both_ways(path, name):
    entry = read_json(path)[name]
    with torch.device("meta"):
        net, head = networks(entry["model"])
        official = {n: torch.empty(shape) for n, shape in entry["params"].items()}
    ours = torch.nn.ModuleDict({"net": net, "head": head}).state_dict()
    both_ways = rules(entry["model"]["num_heads"])
    check_fit(to_ours(unrolled(official), both_ways), ours, origin=name)
    back = {n: t.shape for n, t in to_official(ours, both_ways).items()}
    assert back == {n: t.shape for n, t in unrolled(official).items()}
    assert sum(t.numel() for t in ours.values()) == entry["num_params_givt"]


# The module


def tokenizer(**changes) -> LabelMapTokenizer:
    arch = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "mlp_hidden": 16, "patch_size": 4}
    options = {"classes": {"instances": 4, "semantics": 13}, "arch": arch | {"seq_len": 4, "token_dim": 3}}
    return LabelMapTokenizer(16, **{"frozen": False} | options | changes)


ENCODER = {"width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 32, "patch_size": 4}
DECODER = {"width": 32, "depth": 2, "num_heads": 2, "mlp_hidden": 32, "dropout": 0.0}


def build(**changes) -> UViMModule:
    """Small, with weights that are not symmetric."""
    search = UViMSearch(num_beams=2, num_fans=3)
    module = UViMModule(
        **{"tokenizer": tokenizer(), "encoder": ENCODER, "decoder": DECODER, "search": search} | changes
    )
    torch.nn.init.normal_(module.head.linear.weight, std=0.2)
    torch.nn.init.normal_(module.tokenizer.vae.decoder_head.weight)
    return module.eval()


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)


def equal(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_prediction_follows_the_seed_and_leaves_mode_and_global_random_state_alone():
    module, images = build().train(), pictures()
    state = torch.get_rng_state()
    first, again, other = (module.predict(images, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert module.training and torch.equal(state, torch.get_rng_state())
    assert {name: (m.shape, m.dtype) for name, m in first.items()} == dict.fromkeys(
        ("semantics", "instances"), (torch.Size([3, 16, 16]), torch.int64)
    )
    assert equal(first, again) and not equal(first, other)


def test_an_image_does_not_depend_on_its_batch():
    module, images = build(), pictures()

    def tokens(rows):
        generators = [torch.Generator().manual_seed(100 + i) for i in rows]
        with torch.no_grad():
            return module.beams(images[rows], module.sampling, generators).tokens

    torch.testing.assert_close(tokens([0, 1, 2])[1:2], tokens([1]), atol=1e-5, rtol=1e-4)


def test_more_beams_find_likelier_sequences():
    module, images = build(), pictures(8)
    scores = []
    for beams, fans in ((1, 1), (4, 8)):
        with torch.no_grad():
            found = module.beams(images, UViMSearch(num_beams=beams, num_fans=fans), torch.Generator().manual_seed(0))
        assert found.tokens.shape == (8, beams, 4, 3)
        scores.append(found.scores[:, 0, -1])
    assert scores[1].mean() > scores[0].mean()


def test_the_score_is_the_tempered_log_probability_of_the_sequence():
    module, images = build(), pictures()
    with torch.no_grad():
        found = module.beams(images, UViMSearch(temperature=0.7, num_beams=2, num_fans=3), torch.Generator())
        h = module.net(from_uint8(images), found.tokens[:, 0])
        log_prob = module.head.distribution(h).tempered(0.7).log_prob(found.tokens[:, 0]).sum((1, 2))
    torch.testing.assert_close(found.scores[:, 0, -1], log_prob, atol=1e-4, rtol=1e-4)


def test_depth_comes_in_metres():
    module = build(tokenizer=tokenizer(classes={"depth": 8}, min_depth=0.0, max_depth=8.0))
    depth = module.predict(pictures())["depth"]
    assert depth.dtype == torch.float32 and set(depth.unique().tolist()) <= {i + 0.5 for i in range(8)}


def test_loss_is_the_mean_over_channels_of_the_negative_log_likelihood():
    module, images = build(), pictures()
    maps = {"semantics": torch.randint(0, 13, (3, 16, 16)), "instances": torch.randint(0, 4, (3, 16, 16))}
    terms = module.training_loss({"image": images, **maps}, torch.Generator().manual_seed(0))
    x = module.tokenizer(maps, torch.Generator().manual_seed(0)).x
    log_prob = module.head.distribution(module.net(from_uint8(images), x)).log_prob(x)
    torch.testing.assert_close(terms["loss"], -log_prob.mean())
    torch.testing.assert_close(terms["nats_per_token"], -log_prob.sum(-1).mean())
    terms["loss"].backward()
    assert all(p.grad is None for p in module.tokenizer.parameters())


def test_rates_decay_and_factoring_are_the_official_ones():
    module = build()
    names = dict(module.named_parameters())
    encoder = [name for name in names if name.startswith("net.encoder.")]
    assert {module.lr_multiplier(n, names[n]) for n in encoder} == {0.1}
    assert {module.lr_multiplier(n, p) for n, p in names.items() if n not in encoder} == {1.0}
    free = {n for n, p in names.items() if p.requires_grad and p.ndim > 1 and module.no_weight_decay(n, p)}
    assert free == {
        "net.encoder.trunk.pos_embed",
        "net.decoder.pos_embed",
        "net.decoder.label_embed.embedding_table.weight",
    }
    official = module.official_state_dict()
    for name, kind in (("attn.qkv.weight", "query"), ("cross.q.weight", "query"), ("cross.kv.weight", "key")):
        where = "SelfAttn" if name.startswith("attn") else "CrossAttn"
        shape = module.factored_shape(f"net.decoder.blocks.0.{name}", names[f"net.decoder.blocks.0.{name}"])
        assert sorted(shape[1:]) == sorted(official[f"decoder/EncDecBlock0/{where}/{kind}/kernel"].shape)
    assert by_heads("net.encoder.trunk.blocks.0.attn.proj.weight", (32, 32), 2) == (32, 2, 16)
    assert by_heads("net.encoder.patch_embed.weight", (32, 3, 4, 4), 2) == (32, 3, 4, 4)


@pytest.mark.parametrize("scan", [False, True])
def test_official_file_in_both_layouts(tmp_path, scan):
    module, path = build(tokenizer=tokenizer(frozen=True)), tmp_path / "givt.npz"
    module.tokenizer.loaded = True
    state = module.official_state_dict()
    if scan:
        state = stack(state, "encoder/encoderblock", "encoder/encoderblock_{}", axis=0)
        state = stack(state, "decoder/EncDecBlock", "decoder/EncDecBlock{}", axis=1)
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    fresh = build(tokenizer=tokenizer(frozen=True))
    fresh.load_official(path)
    trained = {n: p for n, p in module.state_dict().items() if not n.startswith("tokenizer.")}
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in trained.items())


def test_a_file_with_tokens_of_another_length_says_what_to_set(tmp_path):
    state, path = build(tokenizer=tokenizer(frozen=True)).official_state_dict(), tmp_path / "givt.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    longer = tokenizer(frozen=True, arch=tokenizer().init_args()["arch"] | {"token_dim": 5})
    with pytest.raises(ValueError, match=r"tokens have 3 numbers, this model's 5: set .*arch\.token_dim=3"):
        build(tokenizer=longer).load_official(path)


def classifier(module: UViMModule, *, grid: int, old_names: bool, class_token: bool) -> dict[str, np.ndarray]:
    """A ViT classifier's npz file that holds the module's encoder, but for positions of a grid of its own."""
    state = {}
    for name, tensor in to_official(module.net.encoder.state_dict(), encoder_rules(2)).items():
        name = name.replace("encoder/", "Transformer/").replace("EmbedPatches/", "embedding/")
        if old_names:
            for new, old in (("LayerNorm_1", "LayerNorm_2"), ("MlpBlock_0", "MlpBlock_3")):
                name = name.replace(new, old)
            name = name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        state[name] = tensor.numpy()
    del state["pos_embedding_encoder"]
    width, rows = 32, np.arange(grid, dtype=np.float32)
    positions = np.broadcast_to((rows[:, None] + 10 * rows).reshape(1, -1, 1), (1, grid**2, width))
    if class_token:
        positions = np.concatenate([np.full((1, 1, width), 99, np.float32), positions], axis=1)
        state["cls"] = np.zeros((1, 1, width), np.float32)
    state["Transformer/posembed_input/pos_embedding" if old_names else "pos_embedding"] = positions
    return state | {"head/kernel": np.zeros((width, 5), np.float32), "head/bias": np.zeros(5, np.float32)}


@pytest.mark.parametrize(("old_names", "class_token"), [(True, True), (False, False)])
def test_image_encoder_starts_from_a_classifier(tmp_path, old_names, class_token):
    module, path = build(), tmp_path / "vit.npz"
    np.savez(path, **classifier(module, grid=3, old_names=old_names, class_token=class_token))
    fresh = build()
    fresh.load_encoder(path)
    expected = dict(module.net.encoder.state_dict())
    found = fresh.net.encoder.state_dict()
    places = torch.linspace(0, 2, 4)  # corner to corner: 3 positions in a row become 4
    positions = (places[:, None] + 10 * places).reshape(1, -1, 1).expand(1, 16, 32)
    torch.testing.assert_close(found.pop("trunk.pos_embed"), positions)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(decoder=DECODER | {"attention": "bidirectional"}), r"decoder\.attention is bidirectional"),
        (lambda: build(encoder=ENCODER | {"width": 64}), r"encoder\.width is 64, decoder\.width 32"),
        (lambda: UViMSearch(num_beams=0), r"search\.num_beams is 0"),
        (lambda: UViMSearch(temperature=-1.0), r"search\.temperature is -1\.0"),
        (lambda: build(encoder=ENCODER | {"depth": 0}), r"encoder\.depth is 0"),
        (lambda: tokenizer(min_fraction=2.0), r"min_fraction is 2\.0"),
        (lambda: tokenizer(arch={"num_heads": 0}), r"arch\.num_heads is 0"),
        (lambda: build().predict(pictures()[..., 1:]), r"images are \(3, 16, 15\), this model takes \(3, 16, 16\)"),
        (lambda: build().training_loss({"image": pictures()}), r"the data gives no map 'instances', only image"),
        (lambda: build().load_encoder("nothing.npz"), r"no file at 'nothing\.npz' \(encoder_from"),
    ],
)
def test_errors_name_the_setting(make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()


def test_a_file_without_positions_is_no_vit(tmp_path):
    np.savez(tmp_path / "x.npz", **{"embedding/kernel": np.zeros((4, 4, 3, 32), np.float32)})
    with pytest.raises(ValueError, match=r"x\.npz is no ViT .* no learned positions"):
        build().load_encoder(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("experiment", "search", "epochs"), [("panoptic", (0.85, 4, 8), 200), ("depth", (0.9, 2, 8), 50)]
)
def test_recipes_are_the_official_ones(experiment, search, epochs):
    with torch.device("meta"):
        module = load_module(f"givt_uvim_{experiment}")
    data, found = load_data(f"givt_uvim_{experiment}"), module.sampling
    assert (found.temperature, found.num_beams, found.num_fans) == search
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 707_329_072
    assert (data.batch_size, data.image_size, module.encoder_lr) == (512, 512, 0.1)
    expected = {"optimizer": "adafactor", "lr": 1e-3, "weight_decay": 1e-3, "schedule": "cosine"}
    expected |= {"panoptic": {"warmup_steps": 4000}, "depth": {"warmup_epochs": 5}}[experiment]
    assert module.optim == OptimConfig(**expected)
