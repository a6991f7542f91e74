"""Jet: a normalizing flow of pixels (Kolesnikov et al., arXiv 2412.15129; big_vision `proj/jet`).

One invertible network maps the patches of an image to as many numbers that are distributed as standard normal ones: the
likelihood is exact, and an image is drawn by one pass back. Unusual: no autoregression, no noise schedule; labels are
not looked at. In: tokens (B, L, D) of dequantised pixels. Out: latents (B, L, D) and log |det| (B,).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.flows.jet import Jet, JetConfig, jet_rules, normal_nats, stacked, unrolled
from layers.likelihood import bits_per_dim
from layers.random import Generators, randn
from layers.tokenizers.base import Tokenizer
from lightning_modules.base import Batch, GenerativeModule
from lightning_modules.config import as_config
from lightning_modules.likelihood import likelihood_terms
from lightning_modules.optim import OptimConfig
from lightning_modules.pretrained import TRAINED_TOKENIZER


@dataclass
class JetSampling:
    """Sampler settings."""

    temperature: float = 1.0  # standard deviation of the latents; below 1: likelier and more alike

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature is {self.temperature}: it must not be negative")


class JetModule(GenerativeModule):
    """Training and sampling of a flow alone; see GenerativeModule for the common arguments. `num_classes` is only what
    labels are checked against: the flow is unconditional."""

    OFFICIAL_KEYS = ("model",)  # the authors keep no average

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        net: JetConfig = JetConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        sampling: JetSampling = JetSampling(),  # noqa: B008
        optim: OptimConfig = OptimConfig(lr=3e-4),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        sampling = as_config(JetSampling, sampling)
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        super().__init__(tokenizer, num_classes, optim, sampling, **loading, compile=compile)
        config = as_config(JetConfig, net)
        if self.tokenizer.vocab_size:
            raise ValueError("a flow maps numbers, but this tokenizer's tokens are ids: use DequantisedTokenizer")
        self.net = Jet(config, grid=self.tokenizer.grid, token_dim=self.tokenizer.token_dim)
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            net=config,
            sampling=sampling,
            optim=self.optim,
            **loading,
            compile=compile,
        )

    def compiled_modules(self) -> list[nn.Module]:
        """The couplings' networks, which are all alike: compiled once, and run as they are by every backward pass."""
        return [coupling.net for coupling in self.net.couplings]

    # Training

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Mean bits per dimension. Official `loss_fn`. Raises ValueError for tokens without a density."""
        tokens = self.tokens(batch, generator)
        if tokens.logdet is None:
            raise ValueError(
                f"a flow's likelihood is one of pixels, and {type(self.tokenizer).__name__} has no density: use "
                f"layers.tokenizers.dequantised.DequantisedTokenizer"
            )
        nats = self.nats(tokens.x)
        loss = bits_per_dim(-nats, tokens.logdet, tokens.x[0].numel()).mean()
        return {"loss": loss.float(), **likelihood_terms(nats, tokens, batch)}

    def nats(self, x: Tensor) -> Tensor:
        """-log p of tokens (B, L, D), per image (B,)."""
        z, logdet = self.net(x)
        return normal_nats(z) - logdet

    # Sampling

    def prepare_sampling(self, *, compile: bool = False) -> None:
        """As GenerativeModule's, but for the last projection of each network, which stays float32."""
        self.net.prepare_sampling(compile=compile)

    def sample_tokens(self, labels: Tensor, sampling: JetSampling, generator: Generators = None) -> Tensor:
        """Tokens (B, L, D), as many as labels (B,), whatever they are."""
        shape = len(labels), self.tokenizer.seq_len, self.tokenizer.token_dim
        x, _ = self.net.inverse(sampling.temperature * randn(shape, generator, device=self.device))
        return x

    # Official files

    def unrolled(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return unrolled(state)

    def official_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As Pretrained's, with all couplings in one array and permutations as one-hot matrices, as in the files."""
        return stacked(super().official_state_dict(state))

    def official_rules(self) -> list[Rule]:
        """Names of couplings apart."""
        return [TRAINED_TOKENIZER, *jet_rules("net", num_heads=self.net.config.num_heads)]
