"""Figures for sets of features: Frechet distance, Inception score, KID, precision and recall, density and coverage.

Plain functions of feature matrices, float64 throughout, without global random state. Sources: Heusel et al. 2017
(FID), Salimans et al. 2016 (IS), Binkowski et al. 2018 (KID), Kynkaanniemi et al. 2019 (precision, recall), Naeem et
al. 2020 (density, coverage); conventions (splits, permutation, kernel) are torch-fidelity's, which the papers used.
In: features (N, d) and logits (N, K) of any float type. Out: floats.
"""

import numpy as np
import torch
from torch import Tensor

IS_SEED = 2020  # torch-fidelity's rng_seed: rows are permuted before they are split
IS_SPLITS = 10
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
CHUNK = 2048  # rows of a distance matrix that are held at once


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) for means (d,) and covariances (d, d).

    The root's trace comes from eigenvalues of the symmetric h^T S2 h with S1 = h h^T: never complex, and defined for
    rank-deficient covariances too.
    """
    mu1, sigma1, mu2, sigma2 = (value.double() for value in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt()  # (d, d)
    trace = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def mean_covariance(count: int, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d), divided by n - 1, from float64 sums of f (d,) and of f f^T (d, d).

    Raises ValueError for fewer than two rows.
    """
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {count}")
    mean = total / count
    sigma = (outer - count * torch.outer(mean, mean)) / (count - 1)
    return mean, (sigma + sigma.T) / 2


def inception_score(logits: Tensor, *, splits: int = IS_SPLITS, seed: int | None = IS_SEED) -> tuple[float, float]:
    """Mean and population std over splits of exp(mean KL(p(y|x) || p(y))): logits (N, K), rows in image order.

    Split i holds rows i N // splits to (i + 1) N // splits after the permutation RandomState(seed); None: as they are.
    Raises ValueError for fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"the Inception score needs at least {splits} images (its splits), got {len(logits)}")
    logits = logits.double().cpu()
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    log_p = logits.log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]  # (n, K)
        log_mean = part.exp().mean(0, keepdim=True).log()
        scores.append((part.exp() * (part - log_mean)).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def kernel_distance(
    fake: Tensor, real: Tensor, *, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE, seed: int = IS_SEED
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased squared MMD with kernel (x.y / d + 1)^3 over random subsets.

    `size` is lowered to the number of rows there are. Subsets are drawn from RandomState(seed), `fake` first.
    """
    fake, real = fake.double().cpu(), real.double().cpu()
    size = min(size, len(fake), len(real))
    draws = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(draws.choice(len(fake), size, replace=False))]
        y = real[torch.from_numpy(draws.choice(len(real), size, replace=False))]
        values.append(_unbiased_mmd2(x, y))
    return float(np.mean(values)), float(np.std(values))


def _unbiased_mmd2(x: Tensor, y: Tensor) -> float:
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within = sum((k.sum() - k.trace()) for k in (kernel(x, x), kernel(y, y))) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def precision_recall(fake: Tensor, real: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of fakes inside any real ball, and of reals inside any fake ball; a ball reaches the k-th neighbour.

    Raises ValueError where a set has no k-th neighbour.
    """
    precision = _inside_any(fake, real, _radii(real, neighbours))
    return precision, _inside_any(real, fake, _radii(fake, neighbours))


def density_coverage(fake: Tensor, real: Tensor, *, neighbours: int = 5) -> tuple[float, float]:
    """Mean number of real balls around a fake, over k; and the share of real balls that hold a fake."""
    radii, inside, covered = _radii(real, neighbours), 0.0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in fake.split(CHUNK):
        hits = _distances(part, real) <= radii  # (n, R)
        inside += float(hits.sum())
        covered |= hits.any(0)
    return inside / (neighbours * len(fake)), float(covered.double().mean())


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th neighbour other than itself: (N,) float64."""
    if len(rows) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {len(rows)} images")
    parts = [_distances(part, rows).kthvalue(neighbours + 1, dim=1).values for part in rows.split(CHUNK)]
    return torch.cat(parts)


def _inside_any(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    hits = [(_distances(part, centres) <= radii).any(1) for part in points.split(CHUNK)]
    return float(torch.cat(hits).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (A, B), float64."""
    return torch.cdist(a.double(), b.double())
