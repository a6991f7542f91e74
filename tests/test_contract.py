"""What every method promises, on its TINY sizes: a finite loss, learning, samples, reproducibility.

Autoencoders draw no images, so what concerns samples is not asked of them; tests/lightning_modules/test_autoencoder.py
has what they promise instead.
"""

import pytest
import torch

from experiments import recipes
from experiments.load import find_class, instantiate, load_config
from lightning_modules.base import to_uint8
from tests.smoke import SMOKE, tiny


def families() -> list[str]:
    """One recipe of each module: the family's own ("jit"), or where that is another module's, the first."""
    found: dict[str, str] = {}
    for name in sorted(recipes.names(), key=lambda name: ("_" in name, name)):
        found.setdefault(load_config(name)["model"]["class_path"], name)
    return list(found.values())


FAMILIES = families()
GENERATORS = [
    name
    for name in FAMILIES
    if not hasattr(find_class(load_config(name)["model"]["class_path"], "model"), "reconstruct")
]


def build(experiment: str):
    """Module and data module, shrunken."""
    overrides = [f"{key}={value}" for key, value in tiny(experiment).items()]
    config = load_config(experiment, overrides)
    smoke = load_config(experiment, overrides, overlays=[SMOKE])
    smoke["data"]["init_args"] |= {"image_size": config["model"]["init_args"]["tokenizer"]["init_args"]["image_size"]}
    return instantiate(config["model"], "model"), instantiate(smoke["data"], "data")


@pytest.fixture(params=FAMILIES)
def built(request):
    module, data = build(request.param)
    data.setup()
    return module, next(iter(data.train_dataloader()))


@pytest.fixture(params=GENERATORS)
def sampler(request):
    return build(request.param)[0]


def test_loss_is_finite_and_every_trainable_parameter_gets_a_gradient(built):
    module, batch = built
    for _ in range(2):  # zero-initialised outputs hide what lies behind them at the first step
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        module.training_loss(batch)["loss"].backward()
        optimizer.step()
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_one_batch_is_learnt(built):
    module, batch = built
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)

    def loss():
        return module.training_loss(batch, torch.Generator().manual_seed(0))["loss"]

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        if value.item() < 0.6 * first:
            return
    pytest.fail(f"from {first} the loss fell to {value.item()} in 60 steps")


def test_samples_have_shape_range_and_follow_the_seed(sampler):
    labels = [0, 1, 2]
    first, again, other = (sampler.sample(labels, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    size = sampler.tokenizer.image_size
    assert first.shape == (3, 3, size, size) and first.dtype == torch.float32
    assert to_uint8(first).dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_image_does_not_depend_on_its_batch(sampler):
    def draw(indices):
        generators = [torch.Generator().manual_seed(100 + i) for i in indices]
        return sampler.sample([i % 3 for i in indices], generator=generators)

    together, alone = draw([0, 1, 2]), draw([1])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_sampling_leaves_mode_and_global_random_state_alone(sampler):
    sampler.train()
    state = torch.get_rng_state()
    sampler.sample([0], generator=torch.Generator().manual_seed(0))
    assert sampler.training and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range_names_value_and_range(sampler, label):
    with pytest.raises(ValueError, match=rf"label {label} is out of range.*0\.\.9"):
        sampler.sample([0, label])
    with pytest.raises(ValueError, match="there are no labels"):
        sampler.sample([])


def test_weights_go_to_the_official_layout_and_back(built):
    module, _ = built
    back = module.ours_from_official(module.official_state_dict())
    assert set(back) == set(module.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())
