"""Figures against closed values (computed independently, float64), against torch-fidelity and against SciPy."""

import numpy as np
import pytest
import torch

from lightning_modules.scores import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_covariance,
    precision_recall,
)


@pytest.fixture(scope="module")
def features():
    """Two sets (40, 8) in closed form."""
    n, d = torch.arange(40).double()[:, None], torch.arange(8).double()[None]
    return torch.sin(0.37 * n * (d + 1) + d) + d / 8, 1.2 * torch.cos(0.23 * n * (d + 1) + 2 * d)


@pytest.fixture(scope="module")
def logits():
    n, j = torch.arange(40).double()[:, None], torch.arange(7).double()[None]
    return 3 * torch.sin(0.7 * n + 1.3 * j)


def moments(rows):
    return mean_covariance(len(rows), rows.double().sum(0), rows.double().T @ rows.double())


def test_frechet_distance_golden(features):
    (mu1, sigma1), (mu2, sigma2) = map(moments, features)
    assert float((mu1 - mu2).square().sum()) == pytest.approx(2.192436774254323, rel=1e-12)
    assert float(sigma1.trace()) == pytest.approx(4.076821385514495, rel=1e-12)
    assert float(sigma2.trace()) == pytest.approx(5.8859868921773675, rel=1e-12)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(2.44308037855376, rel=1e-10)


def test_neighbour_figures_golden(features):
    assert precision_recall(*features) == (1.0, 0.9)
    value, spread = kernel_distance(*features, subsets=1, size=40)
    assert value == pytest.approx(0.94301592583, rel=1e-10) and spread == 0


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"splits": 4}, 2.100898888074159, 0.028534097826993794),
        ({"splits": 4, "seed": None}, 2.2787335110543294, 0.016211889653885057),
        ({"splits": 1, "seed": None}, 2.290003686786426, 0),
    ],
)
def test_inception_score_golden(logits, options, mean, std):
    assert inception_score(logits, **options) == pytest.approx((mean, std), rel=1e-12, abs=1e-14)


def test_frechet_distance_of_equal_and_of_shifted_sets(features):
    mu, sigma = moments(features[0])
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(4 * 8, rel=1e-12)


@pytest.mark.parametrize("rows", [400, 30])  # 30 < 64: rank-deficient
def test_frechet_distance_against_scipy(rows):
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    a = torch.randn(rows, 64, generator=generator, dtype=torch.float64)
    b = torch.randn(rows, 64, generator=generator, dtype=torch.float64) @ mix / 8 + 0.1
    (mu1, s1), (mu2, s2) = moments(a), moments(b)
    root = linalg.sqrtm((s1 @ s2).numpy()).real
    wanted = float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * np.trace(root)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(wanted, rel=1e-5 if rows < 64 else 1e-10)


@pytest.mark.slow
def test_all_figures_against_torch_fidelity():
    """Its Inception, kernel and neighbour figures, on its own defaults, of features that are nothing special."""
    isc, fid, kid, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("isc", "fid", "kid", "prc"))
    generator = torch.Generator().manual_seed(1)
    fake, real = torch.randn(1200, 16, generator=generator), 1.1 * torch.randn(1100, 16, generator=generator) + 0.2
    logits = 2 * torch.randn(1200, 10, generator=generator)
    theirs = isc.isc_features_to_metric(logits)
    assert inception_score(logits) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9
    )
    statistics = [fid.fid_features_to_statistics(rows) for rows in (fake, real)]
    theirs = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    (mu1, s1), (mu2, s2) = moments(fake), moments(real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(theirs, rel=1e-5)
    theirs = kid.kid_features_to_metric(fake, real, verbose=False)
    ours = kernel_distance(fake, real)
    assert ours[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    theirs = prc.prc_features_to_metric(fake, real, verbose=False)
    assert precision_recall(fake, real) == pytest.approx((theirs["precision"], theirs["recall"]), abs=2e-3)


def test_density_and_coverage_by_hand():
    """Reals at 0, 1, 2, 3, 10 with k = 1: radii 1, 1, 1, 1, 7. A fake at 0.5 lies in the balls of 0 and 1."""
    real = torch.tensor([[0.0], [1], [2], [3], [10]])
    assert density_coverage(torch.tensor([[0.5]]), real, neighbours=1) == (2.0, 0.4)
    assert density_coverage(torch.tensor([[0.5], [30.0]]), real, neighbours=1) == (1.0, 0.4)
    assert density_coverage(real, real, neighbours=1)[1] == 1.0


def test_copies_of_one_image_have_precision_but_no_recall():
    real = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    precision, recall = precision_recall(real[:1].repeat(50, 1), real)
    assert precision == 1.0 and recall <= 0.01


def test_too_few_images():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"at least 10 images .* got 9"):
        inception_score(torch.zeros(9, 4))
    with pytest.raises(ValueError, match="3 neighbours need more than 3 images"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_global_random_state_is_left_alone(features):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    kernel_distance(*features, size=10), inception_score(features[0])
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
