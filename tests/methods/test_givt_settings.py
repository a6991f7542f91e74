"""GIVT's settings that cannot work: each is an error that names them, before the first step where they are a sampler's;
and scales that collapse while training."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from layers.flows.adapter import AdapterConfig, FlowAdapter
from layers.heads.gmm import COLLAPSED, GMMHead
from layers.networks.givt import GIVTConfig
from lightning_modules.givt import GIVTSampling, HeadConfig
from tests.methods.test_givt_variants import batch, build

FULL = HeadConfig(1, "full")
# module, settings, what the error says
UNUSABLE = [
    ({"drop": 0.0}, {"cfg_scale": 1.4}, r"cfg_scale is 1\.4, .*label_drop_prob is 0\.0; set cfg_scale to 1"),
    ({"head": FULL}, {"cfg_scale": 1.4}, r"cfg_scale is 1\.4, .* kind 'full' does not have: set it to 1"),
    ({"head": HeadConfig(1)}, {"top_p": 0.9}, r"top_p is 0\.9, but there is one component"),
    ({}, {"top_p": 1.5}, r"top_p is 1\.5"),
    ({}, {"inv_temperature": -1.0}, r"inv_temperature is -1\.0"),
    ({}, {"clip_sigmas": 2.0, "cfg_scale": 1.4, "guidance": "rejection"}, r"clip_sigmas is 2\.0"),
    ({"attention": "bidirectional"}, {"num_iter": 17}, "num_iter is 17, but 16 tokens"),
    ({"attention": "bidirectional"}, {"num_beams": 2}, "of causal models: set both to 1"),
]


@pytest.mark.parametrize(("module", "settings", "message"), UNUSABLE)
def test_a_sampler_that_cannot_work_is_an_error_before_training(module, settings, message):
    found = build(**module)
    found.sampling = GIVTSampling(**settings)
    found._trainer = SimpleNamespace(
        precision="32-true", strategy=SingleDeviceStrategy(), datamodule=None, ckpt_path=None
    )
    with pytest.raises(ValueError, match=message):
        found.setup("fit")


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("kind", ["diagonal", "per_channel", "full"])
def test_looking_at_a_sampler_draws_no_number_of_the_trainings(attention, kind):
    module, state = build(attention, head=HeadConfig(1, kind)), torch.get_rng_state()
    module.check_sampling(GIVTSampling(num_iter=4, temperature=0.9))
    if kind != "full":
        module.check_sampling(GIVTSampling(num_iter=4, cfg_scale=1.4, guidance="rejection"))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GIVTSampling(temperature=0.0), r"sampling\.temperature is 0\.0"),
        (lambda: GIVTSampling(clip_sigmas=-1.0), r"sampling\.clip_sigmas is -1\.0"),
        (lambda: GIVTSampling(choice_temperature=-3.0), r"sampling\.choice_temperature is -3\.0"),
        (lambda: GIVTConfig(num_heads=0), r"net\.num_heads is 0"),
        (lambda: GIVTConfig(depth=0), r"net\.depth is 0"),
        (lambda: GIVTConfig(dropout=1.0), r"net\.dropout is 1\.0"),
        (lambda: AdapterConfig(num_blocks=-1), r"adapter\.num_blocks is -1"),
        (lambda: AdapterConfig(bottleneck=0), r"adapter\.bottleneck is 0"),
        (lambda: FlowAdapter(AdapterConfig(1, 1), 4, (2, 2)), r"adapter\.bottleneck is 0"),
        (lambda: GMMHead(2, 4, num_mixtures=2, scale_min=0.0), r"scale_min is 0\.0"),
    ],
)
def test_sizes_and_factors_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def validated(scale: str, scale_min: float, raw: float) -> None:
    """A validation epoch of a model whose raw scales are all `raw`."""
    module = build(head=HeadConfig(3, "diagonal", scale, scale_min))
    module.log_dict = lambda *_, **__: None
    torch.nn.init.zeros_(module.head.linear.weight)
    torch.nn.init.constant_(module.head.linear.bias, raw)
    module.on_validation_epoch_start()
    for index in range(2):
        module.validation_step(batch(), index)
    module.on_validation_epoch_end()


def test_collapsed_scales_end_the_training_and_say_what_to_do():
    with pytest.raises(ValueError, match=r"collapsed, to 1\.0e-06: .*DequantisedTokenizer.*head\.scale_min"):
        validated("squareplus", 1e-6, -1e5)
    validated("squareplus", 1e-6, -100.0)  # 0.01
    validated("squareplus", 2 * COLLAPSED, -1e5)  # as small as was asked for
    validated("squareplus_unfixed", 1e-6, -1e5)  # of such a run they are the rule
