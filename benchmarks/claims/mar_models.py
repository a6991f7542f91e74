"""Small MARs on scikit-learn's digits, for claims: 8x8 grey pixels in 2x2 patches, so 16 tokens per image.

A continuous token is the four pixels of a patch. For cross-entropy it is the id of the nearest of the codes that
k-means finds in the patches of the training digits, so a picture of codes has lost something before any model sees it.
A cell trains one model and holds one group of figures for each way in which it is sampled.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.claims import digits
from benchmarks.claims.ledger import Cell, Settings
from datamodules.digits import SIDE
from layers.networks.mar import MARConfig
from layers.patch import patchify
from layers.random import Generators
from layers.tokenizers.base import Tokenizer, Tokens, from_uint8, to_uint8
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.mar import HeadConfig, MARModule, MARObjective, MARSampling
from lightning_modules.optim import OptimConfig

PATCH = 2  # pixels
TOKENS = (SIDE // PATCH) ** 2
MODEL = {
    "seeds": [0, 1, 2],
    "width": 64,
    "depth": 2,
    "num_heads": 4,
    "buffer": 1,
    "head_width": 64,
    "head_depth": 3,
    "repeat": 2,
    "steps": 900,
    "batch": 32,
    "lr": 2e-3,
    "warmup": 100,
    "ema": 0.995,
    "samples": 500,
    "sampling_steps": 25,
}
BIDIRECTIONAL = "bidirectional"
TRUNKS = {  # the paper's variants, by what the trunk is given
    "raster causal": {"attention": "causal", "order": "raster"},
    "random causal": {"attention": "causal", "order": "random"},
    BIDIRECTIONAL: {"attention": BIDIRECTIONAL, "order": "random"},
}


class GreyPixels(PixelTokenizer):
    """Patches of one of the three equal channels: token dim p*p."""

    def __init__(self, image_size: int, patch_size: int) -> None:
        super().__init__(image_size, patch_size, channels=1)

    def init_args(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "patch_size": self.patch_size}

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        return super().encode_raw(raw[:, :1])

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(x).expand(-1, 3, -1, -1)


class GreyCodes(GreyPixels):
    """The same patches as ids of the nearest of `vocab_size` codes; token_dim is 1, one id."""

    def __init__(self, image_size: int, patch_size: int, vocab_size: int) -> None:
        super().__init__(image_size, patch_size)
        self.vocab_size, self.token_dim = vocab_size, 1
        self.register_buffer("codes", codebook(image_size, patch_size, vocab_size))

    def init_args(self) -> dict[str, Any]:
        return {**super().init_args(), "vocab_size": self.vocab_size}

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        patches = super().encode_raw(raw).x  # (B, L, p*p)
        return Tokens(torch.cdist(patches, self.codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1))

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(self.codes[x])


@cache
def codebook(image_size: int, patch_size: int, vocab_size: int) -> Tensor:
    """Codes (vocab_size, p*p): k-means of all patches of the training digits, from one start."""
    from sklearn.cluster import KMeans

    images = from_uint8(digits.rows(image_size, "train").images[:, :1])
    patches = patchify(images, patch_size).flatten(0, 1)
    found = KMeans(vocab_size, n_init=1, random_state=0).fit(patches.numpy())
    return torch.from_numpy(found.cluster_centers_).float()


class Model(NamedTuple):
    """What distinguishes the trained models."""

    trunk: str  # of TRUNKS
    head: str  # HeadConfig's kind
    head_width: int

    def key(self, seed: int) -> str:
        return f"{self.trunk} {self.head} w={self.head_width} seed={seed}"


def build(model: Model, settings: Settings, seed: int) -> MARModule:
    """A fresh model, without dropout: its weights depend on the seed, its sizes on `settings`."""
    net = MARConfig(
        width=settings["width"],
        depth=settings["depth"],
        num_heads=settings["num_heads"],
        buffer_size=settings["buffer"],
        attn_dropout=0.0,
        proj_dropout=0.0,
        **TRUNKS[model.trunk],
    )
    head = HeadConfig(
        kind=model.head,
        width=model.head_width,
        depth=settings["head_depth"],
        repeat=settings["repeat"],
        clip_denoised=1.0 if model.head == "diffusion" else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(model.head, settings)
        optim = OptimConfig(lr=settings["lr"])
        return MARModule(tokenizer, digits.CLASSES, net, head, MARObjective(), MARSampling(), optim=optim)


def make_tokenizer(head: str, settings: Settings) -> Tokenizer:
    return GreyCodes(SIDE, PATCH, settings["vocab"]) if head == "categorical" else GreyPixels(SIDE, PATCH)


def make_sampling(model: Model, settings: Settings, *, num_iter: int, temperature: float = 1.0) -> MARSampling:
    """Without guidance; heads without steps take one."""
    num_steps = settings["sampling_steps"] if model.head == "diffusion" else 1
    return MARSampling(num_iter=num_iter, num_steps=num_steps, temperature=temperature)


def compute(model: Model, settings: Settings, seed: int, samplings: dict[str, MARSampling]) -> Cell:
    """Train, then a group of figures for each sampling, from the same noise; ten images of each as "points"."""
    module = build(model, settings, seed)
    average = digits.train(module, settings, seed, reseed=True)
    cell, points = {}, {}
    for name, sampling in samplings.items():
        images, labels = digits.draw_samples(module, average, settings["samples"], seed, sampling=sampling)
        cell[name], points[name] = digits.measure(images, labels), images[: digits.CLASSES].tolist()
    return {**cell, "points": points}


def measure_coded(settings: Settings) -> Cell:
    """Figures of the validation digits after the codebook, and their RMS error in grey levels."""
    rows, tokenizer = digits.rows(SIDE, "val"), make_tokenizer("categorical", settings)
    images = to_uint8(tokenizer.decode(tokenizer({"image": rows.images}).x))
    error = (images.float() - rows.images).square().mean().sqrt().item()
    return {**digits.measure(images, rows.labels), "error": error}


def setting(settings: Settings) -> str:
    """Data, model, training, figures: what all MAR claims share."""
    return (
        f"scikit-learn's digits at {SIDE} px, grey, in {PATCH}x{PATCH} patches: {TOKENS} tokens, each the four pixels "
        f"of a patch. A trunk {settings['width']} wide of {settings['depth']} + {settings['depth']} blocks, no "
        f"dropout, class tokens: {settings['buffer']}; a head of {settings['head_depth']} blocks, "
        f"{settings['repeat']} draws of time and noise per token, its prediction clamped to the range of pixels in "
        f"sampling. {settings['steps']} steps of {settings['batch']} images, AdamW, lr {settings['lr']:g} with a "
        f"cosine, average {settings['ema']}; of a seed all models see the same rows and draws; seeds "
        f"{settings['seeds']}. {settings['samples']} samples without guidance, {settings['sampling_steps']} diffusion "
        "steps per token. `fd_randconv` is a Frechet distance to the training digits over fixed random convolutions; a "
        "support vector machine reads the samples; variance is that of pixels within a class. Sizes and steps were "
        "chosen by the time they take, the thresholds by the paper's figures; one cell was tried before the full run."
    )
