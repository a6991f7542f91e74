"""The heads of MAR's comparison, by name (Li et al., arXiv 2406.11838, section 3; Tables 1 and 3, appendix D.3)."""

from dataclasses import dataclass
from typing import Literal

from layers.checks import check_positive
from layers.heads.base import Head
from layers.heads.categorical import CategoricalHead
from layers.heads.diffusion import DiffusionHead
from layers.heads.flow import FlowHead
from layers.heads.regression import RegressionHead


@dataclass
class HeadConfig:
    """What stands for p(token | z). Paper section 3; Tables 1 and 3, appendix D.3."""

    kind: Literal["diffusion", "flow", "categorical", "regression"] = "diffusion"
    width: int = 1024
    depth: int = 6
    repeat: int = 4  # draws of time and noise per token and step (diffusion_batch_mul); others have no such draws
    clip_denoised: float | None = None  # diffusion: tokens lie within +-this (1 for pixels), so clamp their prediction

    def __post_init__(self) -> None:
        check_positive("head", self, "width", "depth", "repeat", "clip_denoised")


def make_head(config: HeadConfig, width: int, *, token_dim: int, vocab_size: int | None) -> Head:
    """The head of a recipe. Raises ValueError where tokens are ids and the head is continuous, or the reverse."""
    if (config.kind == "categorical") != bool(vocab_size):
        kinds = "ids: use head.kind=categorical" if vocab_size else "continuous: use diffusion, flow or regression"
        raise ValueError(f"head.kind is {config.kind}, but the tokenizer's tokens are {kinds}")
    if config.clip_denoised is not None and config.kind != "diffusion":
        raise ValueError(f"head.clip_denoised is {config.clip_denoised}, but only the diffusion head clips: remove it")
    if config.kind == "categorical":
        return CategoricalHead(vocab_size, width)
    if config.kind == "regression":
        return RegressionHead(token_dim, width)
    sizes = {"width": config.width, "depth": config.depth}
    if config.kind == "flow":
        return FlowHead(token_dim, width, **sizes)
    return DiffusionHead(token_dim, width, **sizes, clip_denoised=config.clip_denoised)
