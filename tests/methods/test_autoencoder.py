"""The tokenizers' recipes: their TINY sizes, and what the papers fix."""

import torch

from experiments.load import load_config, load_data, load_module
from lightning_modules.autoencoder import AutoencoderObjective

# Overrides that shrink any recipe of an autoencoder; tests/smoke.py and the contract tests run every recipe with them.
TINY = {
    "data.init_args.image_size": 16,
    "data.init_args.num_classes": 10,
    "model.init_args.num_classes": 10,
    "model.init_args.tokenizer.init_args.image_size": 16,
    "model.init_args.tokenizer.init_args.arch.base_channels": 8,
    "model.init_args.tokenizer.init_args.arch.multipliers": [1, 2],
    "model.init_args.tokenizer.init_args.arch.num_res_blocks": 1,
    "model.init_args.tokenizer.init_args.arch.z_channels": 4,
    "model.init_args.tokenizer.init_args.arch.encoder_attention": [],
    "model.init_args.tokenizer.init_args.arch.norm_groups": 4,
    "model.init_args.objective.perceptual_weight": 0.0,
    "model.init_args.objective.disc_start": 0,
    "model.init_args.discriminator.channels": 8,
    "model.init_args.discriminator.num_layers": 1,
}
# recipes that need more; a class_path here drops TINY's arguments of the class that it replaces
TOKENIZER = "model.init_args.tokenizer"
IDS = {
    f"{TOKENIZER}.class_path": "layers.tokenizers.maskgit_vq.MaskGITVQTokenizer",
    f"{TOKENIZER}.init_args.image_size": 16,
    f"{TOKENIZER}.init_args.num_codes": 32,
    f"{TOKENIZER}.init_args.arch.base_channels": 8,
    f"{TOKENIZER}.init_args.arch.multipliers": [1, 2],
    f"{TOKENIZER}.init_args.arch.num_res_blocks": 1,
    f"{TOKENIZER}.init_args.arch.z_channels": 4,
    f"{TOKENIZER}.init_args.arch.norm_groups": 4,
}
TINY_OF = {
    "vae_givt": {
        f"{TOKENIZER}.class_path": "layers.tokenizers.beta_vae.BetaVAETokenizer",
        f"{TOKENIZER}.init_args.image_size": 16,
        f"{TOKENIZER}.init_args.arch.base_channels": 8,
        f"{TOKENIZER}.init_args.arch.multipliers": [1, 2],
        f"{TOKENIZER}.init_args.arch.num_res_blocks": 1,
        f"{TOKENIZER}.init_args.arch.z_channels": 4,
        f"{TOKENIZER}.init_args.arch.norm_groups": 4,
    },
    **dict.fromkeys(["vq", "vq_digits", "vq_openmoji", "vq_shapes"], IDS),
}


def test_recipe_is_kl_16_by_the_recipe_of_ldm():
    with torch.device("meta"):
        module = load_module("vae")
    tokenizer, objective = module.tokenizer, module.objective
    assert sum(p.numel() for p in tokenizer.parameters() if p.requires_grad) == 66_456_019  # MAR's kl16.ckpt
    assert (tokenizer.latent_size, tokenizer.arch.latent_channels, tokenizer.arch.stride) == (16, 16, 16)
    assert (objective.l1_weight, objective.l2_weight, objective.reduction) == (1, 0, "sum")
    assert (objective.kl_weight, objective.perceptual_weight) == (1e-6, 1)
    assert (objective.disc_weight, objective.disc_start) == (0.5, 50_001)
    assert module.optim.betas == (0.5, 0.9) and module.optim.weight_decay == 0
    assert module.optim.peak_lr(load_data("vae").batch_size) == 1e-4 and load_data("vae").batch_size == 256


def test_recipe_of_givt_is_the_released_network_by_the_published_figures():
    """53.0 M parameters (manifest), beta of the released default, an average of MaskGIT's decay, GIVT's VAE loss."""
    with torch.device("meta"):
        module = load_module("vae_givt")
    tokenizer, objective = module.tokenizer, module.objective
    assert sum(p.numel() for p in tokenizer.parameters() if p.requires_grad) == 53_032_611
    assert (tokenizer.grid, tokenizer.token_dim, tokenizer.latent_scale) == ((16, 16), 16, 1.0)
    assert (objective.l1_weight, objective.l2_weight, objective.reduction) == (0, 0.5, "sum")
    assert objective.kl_weight == 5e-5 and load_config("vae_givt")["ema"]["decays"] == [0.999]
    assert (module.optim.lr, module.optim.betas, load_data("vae_givt").batch_size) == (1e-4, (0.0, 0.99), 256)


def test_recipe_of_ids_is_the_released_network_with_beta_on_the_commitment():
    """54.5 M parameters (manifest); MaskGIT's convention, which is the paper's, and not that of taming and RAR."""
    with torch.device("meta"):
        module = load_module("vq")
    tokenizer, objective = module.tokenizer, module.objective
    assert sum(p.numel() for p in tokenizer.parameters() if p.requires_grad) == 54_515_587
    assert (tokenizer.grid, tokenizer.vocab_size) == ((16, 16), 1024)
    assert (objective.commitment_weight, objective.codebook_weight, objective.reduction) == (0.25, 1.0, "mean")
    assert (objective.entropy_weight, objective.entropy_temperature) == (0.1, 0.01)
    default = AutoencoderObjective()
    assert (default.commitment_weight, default.codebook_weight, default.entropy_weight) == (1.0, 0.25, 0.0)


def test_toy_recipes_of_ids_reduce_as_their_headers_say():
    for experiment, sizes in {
        "vq_digits": ((4, 4), 256),
        "vq_shapes": ((8, 8), 256),
        "vq_openmoji": ((8, 8), 512),
    }.items():
        module = load_module(experiment)
        assert (module.tokenizer.grid, module.tokenizer.vocab_size) == sizes
        assert (module.objective.commitment_weight, module.objective.codebook_weight) == (0.25, 1.0)


def test_toy_recipes_reduce_as_their_headers_say():
    for experiment, grid in {"vae_digits": (4, 4, 4), "vae_openmoji": (8, 8, 8)}.items():
        tokenizer = load_module(experiment).tokenizer
        assert (tokenizer.latent_size, tokenizer.latent_size, tokenizer.arch.latent_channels) == grid
