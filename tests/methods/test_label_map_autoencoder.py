"""The VAE of label maps against the official code: golden cases are discovered, sizes are read from each case.

Here: network, losses, prediction, file layouts, manifests, recipes. Tolerances are those of the golden README.
"""

import numpy as np
import pytest
import torch

from experiments.load import load_data, load_module
from layers.checkpoint import check_fit, to_official, to_ours
from layers.conv_autoencoder import Posterior
from layers.label_maps import depth_of_bins, panoptic_map
from layers.networks.label_map_vae import LabelMapVAE, LabelMapVAEConfig, flax_rules, unrolled
from layers.tokenizers.label_map import LabelMapTokenizer
from lightning_modules.label_map_autoencoder import LabelMapAutoencoderModule, LabelMapLoss
from lightning_modules.tokenizer_weights import load_tokenizer_weights
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
    "model.init_args.tokenizer.init_args.arch.width": 32,
    "model.init_args.tokenizer.init_args.arch.encoder_depth": 1,
    "model.init_args.tokenizer.init_args.arch.decoder_depth": 1,
    "model.init_args.tokenizer.init_args.arch.num_heads": 2,
    "model.init_args.tokenizer.init_args.arch.mlp_hidden": 64,
    "model.init_args.tokenizer.init_args.arch.patch_size": 4,
    "model.init_args.tokenizer.init_args.arch.seq_len": 4,
    "model.init_args.tokenizer.init_args.arch.token_dim": 3,
}
TINY_OF = {
    "vae_uvim_depth": {
        "data.init_args.task": "depth",
        "model.init_args.tokenizer.init_args.classes": {"depth": 16},
    }
}

MIN_FRACTION = 0.25  # of panoptic_pred_minfrac, stated in the golden README
CASES = golden_paths("givt", "**/uvim_vae*.safetensors")
MANIFESTS = [
    (path, name)
    for path in golden_paths("givt", "**/manifest*.json")
    for name, entry in read_json(path).items()
    if "inout_specs" in entry.get("model", {})
]


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def network(config: dict) -> tuple[LabelMapVAE, list[int]]:
    """The network of a case, and which channel of its labels each of our maps is: by channel, as a json is sorted."""
    assert config.get("bottleneck_resize"), "learned matrices in place of the resize are in no official configuration"
    specs = sorted(config["inout_specs"].items(), key=lambda item: item[1][0])
    patch = pair(config["patch_size"])
    assert patch[0] == patch[1]
    arch = LabelMapVAEConfig(
        width=config["width"],
        encoder_depth=config["enc_depth"],
        decoder_depth=config["dec_depth"],
        num_heads=config["num_heads"],
        mlp_hidden=config["mlp_dim"],
        patch_size=patch[0],
        seq_len=config["code_len"],
        token_dim=config["codeword_dim"],
    )
    classes = {name: count for name, (_, count) in specs}
    return LabelMapVAE(arch, classes=classes, size=pair(config["input_size"])), [channel for _, (channel, _) in specs]


def close(actual, expected, *, atol=5e-5, rtol=1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("path", CASES, ids=case_id)
@torch.no_grad()
def test_golden(path):
    config = read_json(path.with_suffix(".json"))
    with Golden(path) as golden:
        net, channels = network(config)
        params = {n.removeprefix("params/"): golden[n] for n in golden.names() if n.startswith("params/")}
        net.load_state_dict(to_ours(unrolled(params), flax_rules(config["num_heads"])))
        maps = golden["labels"][..., channels].movedim(-1, 1)

        posterior = Posterior(net.encode(maps), logvar_range=None)
        close(posterior.mean.flatten(2).mT, golden["mu"])
        close(posterior.logvar.flatten(2).mT, golden["logvar"])
        close(posterior.kl(), golden["loss_kl_per_image"])

        latents = golden["z"].mT.unflatten(2, (net.config.code_side, -1))
        logits = net.decode(latents)
        for name in net.classes:
            close(logits[name], golden[f"dec_{name}"])
        close(sum(net.reconstruction(latents, maps, ignore_zero=False).values()), golden["loss_rec_per_image"])
        masked = net.reconstruction(latents, maps, ignore_zero=True)
        for name in net.classes:
            if f"loss_rec_masked_zero_{name}" in golden:
                close(masked[name], golden[f"loss_rec_masked_zero_{name}"])
        check_predictions(logits, golden, config)


def check_predictions(logits, golden, config) -> None:
    for name, fraction in (("panoptic_pred", 0.0), ("panoptic_pred_minfrac", MIN_FRACTION)):
        if name in golden:
            ours = panoptic_map(logits["semantics"], logits["instances"], min_fraction=fraction)
            assert torch.equal(torch.stack([ours["semantics"], ours["instances"]], -1), golden[name].long())
    if "depth_logits" in golden:
        bins = golden["depth_logits"].argmax(-1)
        ours = depth_of_bins(bins, config["depth_bins"], low=config["min_depth"], high=config["max_depth"])
        close(ours, golden["depth_unbinned"])


@pytest.mark.parametrize(("path", "name"), MANIFESTS, ids=[name for _, name in MANIFESTS])
def test_manifest_fits_both_ways(path, name):
    entry = read_json(path)[name]
    with torch.device("meta"):
        net, _ = network(entry["model"])
        official = {n: torch.empty(shape) for n, shape in entry["params"].items()}
    rules = flax_rules(entry["model"]["num_heads"])
    check_fit(to_ours(unrolled(official), rules), net.state_dict(), origin=name)
    ours = {n: t.shape for n, t in to_official(net.state_dict(), rules).items()}
    assert ours == {n: t.shape for n, t in unrolled(official).items()}
    assert sum(p.numel() for p in net.parameters()) == entry["num_params_total"]


# The module


def tokenizer(**changes) -> LabelMapTokenizer:
    arch = {"width": 32, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "mlp_hidden": 64, "patch_size": 4}
    options = {"classes": {"instances": 4, "semantics": 13}, "arch": arch | {"seq_len": 4, "token_dim": 3}}
    return LabelMapTokenizer(16, **{"frozen": False} | options | changes)


def scanned(state: dict, *, prefix: str = "") -> dict[str, np.ndarray]:
    """An official state with the layers of each half in one array on axis 0, as big_vision writes it."""
    stacked: dict[str, list] = {}
    for name, tensor in state.items():
        stacked.setdefault(name.replace("block_0/", "block/").replace("block_1/", "block/"), []).append(tensor.numpy())
    return {prefix + n: np.stack(parts) if "block/" in n else parts[0] for n, parts in stacked.items()}


@pytest.mark.parametrize("layout", ["apart", "scanned", "scanned below params/"])
def test_official_file_serves_as_weights_of_a_frozen_tokenizer(tmp_path, layout):
    module = LabelMapAutoencoderModule(tokenizer())
    torch.nn.init.normal_(module.tokenizer.vae.decoder_head.weight)
    state, path = module.official_state_dict(), tmp_path / "vae.npz"
    apart = {name: tensor.numpy() for name, tensor in state.items()}
    np.savez(path, **apart if layout == "apart" else scanned(state, prefix="params/" if "params" in layout else ""))
    frozen = tokenizer(frozen=True, weights=str(path))
    load_tokenizer_weights(frozen)
    expected = module.tokenizer.vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in frozen.vae.state_dict().items())
    fresh = LabelMapAutoencoderModule(tokenizer())
    fresh.load_official(path)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in fresh.tokenizer.vae.state_dict().items())


def test_another_token_length_says_what_to_set(tmp_path):
    state, path = LabelMapAutoencoderModule(tokenizer()).official_state_dict(), tmp_path / "vae.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    arch = tokenizer().init_args()["arch"] | {"token_dim": 5}
    with pytest.raises(ValueError, match=r"vae\.npz has tokens of 3 numbers, this tokenizer 5: set .*arch.token_dim=3"):
        load_tokenizer_weights(tokenizer(arch=arch, frozen=True, weights=str(path)))


def test_loss_is_the_sum_of_the_maps_cross_entropies_and_the_weighted_kl():
    module = LabelMapAutoencoderModule(tokenizer(), LabelMapLoss(kl_weight=0.5))
    torch.nn.init.normal_(module.tokenizer.vae.decoder_head.weight, std=0.1)
    ids = torch.randint(0, 4, (2, 2, 16, 16))
    noise = torch.randn(2, 3, 2, 2)
    terms = module.losses(ids, noise)
    posterior = Posterior(module.tokenizer.encode_image(ids), logvar_range=None)
    logits = module.tokenizer.vae.decode(posterior.mean + (0.5 * posterior.logvar).exp() * noise)
    for k, name in enumerate(("instances", "semantics")):
        expected = torch.nn.functional.cross_entropy(logits[name].movedim(-1, 1), ids[:, k])
        torch.testing.assert_close(terms[name], expected)
    total = terms["instances"] + terms["semantics"] + 0.5 * terms["kl"]
    torch.testing.assert_close(terms["loss"], total)


def test_recomputed_logits_have_the_same_gradients():
    arch = tokenizer().init_args()["arch"]
    plain = LabelMapAutoencoderModule(tokenizer())
    torch.nn.init.normal_(plain.tokenizer.vae.decoder_head.weight, std=0.1)
    saving = LabelMapAutoencoderModule(tokenizer(arch=arch | {"grad_checkpointing": True}))
    saving.load_state_dict(plain.state_dict())
    ids, noise = torch.randint(0, 4, (2, 2, 16, 16)), torch.randn(2, 3, 2, 2)
    for module in (plain, saving):
        module.losses(ids, noise)["loss"].backward()
    pairs = zip(plain.parameters(), saving.parameters(), strict=True)
    assert all(torch.allclose(p.grad, q.grad, atol=1e-6) for p, q in pairs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelMapAutoencoderModule(tokenizer(frozen=True)), r"is trained here: set .*frozen=false"),
        (lambda: LabelMapAutoencoderModule(tokenizer(weights="x.npz")), r"to start from a file, give OFFICIAL="),
        (lambda: LabelMapLoss(kl_weight=-1.0), r"loss\.kl_weight is -1\.0"),
        (lambda: LabelMapAutoencoderModule(tokenizer(), score_images=-1), r"score_images is -1"),
        (lambda: LabelMapAutoencoderModule(tokenizer()).sample([0]), r"draws no images"),
    ],
)
def test_errors_name_the_setting(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("experiment", "beta", "epochs"), [("panoptic", 2.5e-4, 500), ("depth", 2e-4, 200)])
def test_recipes_are_the_official_ones(experiment, beta, epochs):
    with torch.device("meta"):
        module = load_module(f"vae_uvim_{experiment}")
    data = load_data(f"vae_uvim_{experiment}")
    assert (module.loss_config.kl_weight, module.loss_config.ignore_zero) == (beta, experiment == "depth")
    assert (data.batch_size, data.image_size, module.tokenizer.seq_len) == (1024, 512, 256)
    assert (module.optim.peak_lr(1024), module.optim.weight_decay, module.optim.betas) == (1e-3, 0.1, (0.9, 0.95))
    expected = {"panoptic": 221_268_512, "depth": 229_924_896}[experiment]
    assert sum(p.numel() for p in module.parameters()) == expected
    assert {"panoptic": [("instances", 100), ("semantics", 134)], "depth": [("depth", 256)]}[experiment] == list(
        module.tokenizer.classes.items()
    )
