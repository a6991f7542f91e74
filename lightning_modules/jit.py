"""JiT: a plain Transformer on raw pixel patches that predicts the clean image ("Back to Basics: Let Denoising
Generative Models Denoise", Li & He, arXiv 2511.13720; official code LTH14/JiT).

Unusual: x-prediction trained with a v-loss, so the network's output never has to hold noise; patches as large as
16x16x3 through a rank-limited embedding; copies of the label embedding enter as extra tokens halfway up.
In: pixel tokens (B, L, D), time (B,) with 1 = data, labels (B,). Out: the clean tokens (B, L, D).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Generator, Tensor, nn

from layers.blocks import AdaLNBlock
from layers.checkpoint import Rule
from layers.checks import check_share
from layers.diffusion.flow_matching import Space, convert, interpolate, logit_normal, target
from layers.embed import LabelEmbedder, TimestepEmbedder, sincos_2d
from layers.guidance import cfg, interval_scale
from layers.init import xavier_linears_
from layers.mlp import swiglu_hidden
from layers.norm import RMSNorm, modulate
from layers.random import Generators, randn
from layers.rope import axial_rope
from layers.samplers.ode import SOLVERS, Velocity, solve, uniform_times
from layers.tokenizers.base import Tokenizer
from lightning_modules.base import Batch, GenerativeModule
from lightning_modules.config import as_config
from lightning_modules.optim import OptimConfig
from lightning_modules.protocol import Protocol


@dataclass
class JiTConfig:
    """Sizes of the network; the defaults are B/16. Paper Table 9."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    bottleneck_dim: int = 128  # rank of the patch embedding
    in_context_len: int = 32  # label tokens put before the patches
    in_context_start: int = 4  # 0-based index of the first block that sees them
    attn_dropout: float = 0.0  # dropout acts in the middle half of the blocks only
    proj_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.in_context_len and not 0 <= self.in_context_start < self.depth:
            raise ValueError(
                f"net.in_context_start is {self.in_context_start}, but the blocks are 0..{self.depth - 1}: "
                f"lower it, or set net.in_context_len to 0"
            )


@dataclass
class JiTObjective:
    """Training path and loss. Paper sections 3 and 4, Tables 1 to 3."""

    prediction: Space = "x"  # what the network outputs
    loss: Space = "v"  # where the squared error is taken
    p_mean: float = -0.8  # logit(t) ~ N(p_mean, p_std^2)
    p_std: float = 0.8
    noise_scale: float = 1.0  # std of the noise at t = 0; image size / 256 in the paper
    t_eps: float = 0.05  # smallest divisor, in training and in sampling
    label_drop_prob: float = 0.1

    def __post_init__(self) -> None:
        if self.t_eps <= 0:
            raise ValueError(f"objective.t_eps is {self.t_eps}: it must be positive, or a division by zero follows")
        check_share("objective", self, "label_drop_prob")


@dataclass
class JiTSampling:
    """Sampler settings. Official `denoiser.py`."""

    method: Literal["euler", "heun"] = "heun"
    num_steps: int = 50
    cfg_scale: float = 1.0  # off at 1
    cfg_interval: tuple[float, float] = (0.1, 1.0)  # guidance acts strictly inside

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"sampling.num_steps is {self.num_steps}: sampling needs at least one step")
        low, high = self.cfg_interval
        if not 0 <= low < high:
            raise ValueError(f"sampling.cfg_interval is ({low}, {high}): the lower end must be below the upper one")


class BottleneckEmbed(nn.Module):
    """Patch embedding of limited rank: Linear without bias to `bottleneck_dim`, Linear to the width."""

    def __init__(self, token_dim: int, bottleneck_dim: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Linear(token_dim, bottleneck_dim, bias=False)
        self.proj2 = nn.Linear(bottleneck_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x))  # (B, L, E)


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to the token dim."""

    def __init__(self, width: int, token_dim: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # (B, E) each
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, L, D)


class JiT(nn.Module):
    """The network. Official `model_jit.py`; parameter names are its names."""

    def __init__(self, config: JiTConfig, *, grid: tuple[int, int], token_dim: int, num_classes: int) -> None:
        super().__init__()
        width, depth = config.width, config.depth
        self.config = config
        self.pos_embed = nn.Parameter(sincos_2d(width, grid).unsqueeze(0), requires_grad=False)  # (1, L, E)
        if config.in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, config.in_context_len, width))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.x_embedder = BottleneckEmbed(token_dim, config.bottleneck_dim, width)
        hidden = swiglu_hidden(width, config.mlp_ratio)
        middle = range(depth // 4, 3 * (depth // 4))
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                width,
                config.num_heads,
                mlp_hidden=hidden,
                attn_dropout=config.attn_dropout if i in middle else 0.0,
                proj_dropout=config.proj_dropout if i in middle else 0.0,
            )
            for i in range(depth)
        )
        self.final_layer = FinalLayer(width, token_dim)
        rope = axial_rope(width // config.num_heads, grid, num_prefix=config.in_context_len)
        self.register_buffer("rope", rope, persistent=False)  # (2, K + L, E/N)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Official `initialize_weights`: the fresh network returns exactly 0."""
        xavier_linears_(self)
        normal = [self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight]
        for weight in normal + ([self.in_context_posemb] if self.config.in_context_len else []):
            nn.init.normal_(weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in [*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x (B, L, D), t (B,) or (1,), labels (B,) with num_classes = none -> (B, L, D).

        Under bf16 autocast the residual stream is bf16 up to the label tokens, float32 after, as in the official code.
        """
        num_context, start = self.config.in_context_len, self.config.in_context_start
        y = self.y_embedder(labels)  # (B, E)
        c = self.t_embedder(t) + y  # (B, E)
        x = self.x_embedder(x)
        x = x + self.pos_embed.to(x.dtype)  # (B, L, E)
        for i, block in enumerate(self.blocks):
            if num_context and i == start:
                context = y.unsqueeze(1) + self.in_context_posemb  # (B, K, E)
                x = torch.cat([context, x], dim=1)  # (B, K + L, E), float32 from here on under autocast too
            offset = num_context if i < start else 0
            x = block(x, c, self.rope[:, offset:])
        return self.final_layer(x[:, num_context:], c)  # (B, L, D)


class JiTModule(GenerativeModule):
    """Training and sampling of JiT; see GenerativeModule for the common arguments."""

    OFFICIAL_KEYS = ("model", "model_ema1", "model_ema2")
    UNCONDITIONAL = ("objective.label_drop_prob=0", "sampling.cfg_scale=1")  # authors' answer in LTH14/JiT issue 7
    PROTOCOL = Protocol(
        num_images=50_000,
        num_classes=1000,
        statistics={256: "jit_in256_stats.npz", 512: "jit_in512_stats.npz"},
        weights=("0.9999", "model_ema1"),
        note="50 images per class, first average, guidance and interval of the recipe; FID against the whole ImageNet "
        "training set in ADM's crop, not flipped (jit_in256_stats.npz, jit_in512_stats.npz), from PNG files",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        net: JiTConfig = JiTConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        objective: JiTObjective = JiTObjective(),  # noqa: B008
        sampling: JiTSampling = JiTSampling(),  # noqa: B008
        optim: OptimConfig = OptimConfig(blr=5e-5),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        sampling = as_config(JiTSampling, sampling)
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        super().__init__(tokenizer, num_classes, optim, sampling, **loading, compile=compile)
        self.objective = as_config(JiTObjective, objective)
        config = as_config(JiTConfig, net)
        self.net = JiT(config, grid=self.tokenizer.grid, token_dim=self.tokenizer.token_dim, num_classes=num_classes)
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            net=config,
            objective=self.objective,
            sampling=sampling,
            optim=self.optim,
            **loading,
            compile=compile,
        )

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Mean squared error over images. Official `Denoiser.forward`."""
        objective, x = self.objective, self.tokens(batch, generator).x
        size = x.shape[0]
        dropped = self.global_rows(torch.rand, size, generator=generator) < objective.label_drop_prob
        normal = self.global_rows(torch.randn, size, generator=generator)
        noise = self.global_rows(torch.randn, size, *x.shape[1:], generator=generator)
        t = logit_normal(normal, mean=objective.p_mean, std=objective.p_std)
        labels = torch.where(dropped & self.training, self.num_classes, batch["label"])
        return {"loss": self.denoising_loss(x, labels, t, noise).mean()}

    def denoising_loss(self, x: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss per image for given draws: x (B, L, D), labels (B,), t (B,), unit noise (B, L, D) -> (B,).

        float32 island, but for the network.
        """
        t, noise = t.view(-1, 1, 1), noise * self.objective.noise_scale
        z = interpolate(x, noise, t)  # (B, L, D)
        output = self.net(z, t.flatten(), labels).float()
        return self.error(output, x, noise, z, t)

    def error(self, output: Tensor, x: Tensor, noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Squared error of a network output, taken in the loss space: all (B, L, D), t (B, 1, 1) -> (B,)."""
        objective = self.objective
        wanted = target(objective.prediction, x, noise)
        output, wanted = (
            convert(value, z, t, source=objective.prediction, to=objective.loss, t_eps=objective.t_eps)
            for value in (output, wanted)
        )
        return (output - wanted).square().flatten(1).mean(1)

    def sample_tokens(self, labels: Tensor, sampling: JiTSampling, generator: Generators = None) -> Tensor:
        """Solve dz/dt = v from noise to data. Official `Denoiser.generate`."""
        shape = (len(labels), self.tokenizer.seq_len, self.tokenizer.token_dim)
        noise = randn(shape, generator, device=self.device) * self.objective.noise_scale
        return self.solve(noise, labels, sampling)

    def solve(self, noise: Tensor, labels: Tensor, sampling: JiTSampling) -> Tensor:
        """The sampler for a given start: noise (B, L, D) with its scale, labels (B,) -> tokens (B, L, D)."""
        velocity = self.guided_velocity(labels, sampling)
        return solve(SOLVERS[sampling.method](velocity, noise, uniform_times(sampling.num_steps)))

    def guided_velocity(self, labels: Tensor, sampling: JiTSampling) -> Velocity:
        """(z, t) -> guided velocity for labels (B,).

        Both branches run as one batch; outside the guidance interval only the conditional one runs.
        """
        both = torch.cat([labels, torch.full_like(labels, self.num_classes)])

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            scale = interval_scale(t, sampling.cfg_scale, sampling.cfg_interval)
            if scale == 1:
                return self.velocity(z, t, labels)
            cond, uncond = self.velocity(z.repeat(2, 1, 1), t, both).chunk(2)
            return cfg(cond, uncond, scale)

        return velocity

    def velocity(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Unguided velocity, float32: z (B, L, D), one host time t, labels (B,) -> (B, L, D)."""
        output = self.net(z, torch.full((1,), float(t), device=z.device), labels).float()
        return convert(output, z, t, source=self.objective.prediction, to="v", t_eps=self.objective.t_eps)

    def official_rules(self) -> list[Rule]:
        """Names are the official ones; the two convolutions of the patch embedding become linear maps."""
        p, c = self.tokenizer.patch_size, self.tokenizer.channels
        return [
            Rule(
                "net.x_embedder.proj1.weight",
                "net.x_embedder.proj1.weight",
                lambda w: rearrange(w, "o c p q -> o (p q c)"),
                lambda w: rearrange(w, "o (p q c) -> o c p q", p=p, q=p, c=c),
            ),
            Rule(
                "net.x_embedder.proj2.weight",
                "net.x_embedder.proj2.weight",
                lambda w: w.flatten(1),
                lambda w: w[:, :, None, None],
            ),
            Rule("net.*", "net.*"),
        ]
