"""Reference statistics of a real set: what distances are measured against. Made once, by `make stats`, never in a run.

An npz file with `mu` (d,) and `sigma` (d, d), as ADM's and JiT's files have them; ours also say what they were made
from and may hold features of some images, for precision, recall, density, coverage and KID.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.extractors import Extractor
from lightning_modules.npz_files import read_arrays
from lightning_modules.weights import file_sha256


@dataclass
class Reference:
    """Mean (d,) and covariance (d, d), float64; features (M, d) float32 or images uint8 (M, 3, H, W) where the file has
    them. `about`: n, extractor, weights_sha256, resize, images; empty for a file of others."""

    mu: Tensor
    sigma: Tensor
    features: Tensor | None = None
    images: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    sha256: str = ""

    def check(self, extractor: Extractor, *, image_size: int | None = None) -> None:
        """Raise ValueError unless these are statistics of that extractor, and of images of that size where known."""
        if len(self.mu) != extractor.dim:
            raise ValueError(
                f"statistics '{self.path}' have {len(self.mu)} features, extractor {extractor.name} has "
                f"{extractor.dim}: make them with it (make stats EXTRACTOR={extractor.name})"
            )
        made = self.about.get("weights_sha256")
        if made and made != extractor.sha256:
            raise ValueError(
                f"statistics '{self.path}' were made with weights {made[:8]}... of {self.about.get('extractor')}, now "
                f"they are {extractor.sha256[:8]}... of {extractor.name}: make them anew (make stats)"
            )
        size = self.about.get("image_size")
        if image_size and size and size != image_size:
            raise ValueError(f"statistics '{self.path}' are of {size}x{size} images, these have {image_size}")

    def features_by(self, extractor: Extractor, *, device: str | torch.device = "cpu") -> Tensor | None:
        """Real features (M, d): the file's, or computed from the file's images (ADM's: 10,000); None without both."""
        if self.features is not None or self.images is None:
            return self.features
        return torch.cat([extractor(part.to(device))[0].cpu() for part in self.images.split(64)])


def load_reference(path: str | Path) -> Reference:
    """Read an npz file of statistics.

    Raises FileNotFoundError, or ValueError for a file that is damaged, lacks `mu` or `sigma`, or whose covariance is
    not finite or not symmetric.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no statistics at '{path}' (STATS=): make them with make stats, or give ADM's or JiT's"
        )
    arrays = read_arrays(path, ("mu", "sigma", "features", "arr_0", "about"))
    if missing := {"mu", "sigma"} - set(arrays):
        raise ValueError(f"'{path}' has no {' and no '.join(sorted(missing))}: it holds {sorted(arrays)}")
    about = _about(arrays, path)
    for name in ("mu", "sigma"):
        if arrays[name].dtype.kind not in "fiu":
            raise ValueError(f"'{path}': {name} is of type {arrays[name].dtype}, which are no numbers")
    mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    _check_moments(mu, sigma, path)
    features, images = arrays.get("features"), arrays.get("arr_0")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mu) or features.dtype.kind != "f"):
        raise ValueError(f"'{path}': features {features.dtype} {features.shape} do not belong to mu ({len(mu)},)")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
        raise ValueError(f"'{path}': arr_0 is {images.dtype} {images.shape}, expected uint8 images (N, H, W, 3)")
    return Reference(
        mu,
        sigma,
        features=None if features is None else torch.from_numpy(features.astype(np.float32, copy=False)),
        images=None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2),
        about=about,
        path=str(path),
        sha256=file_sha256(path),
    )


def _about(arrays: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    try:
        about = json.loads(str(arrays["about"])) if "about" in arrays else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}': about is no JSON ({error})") from error
    if not isinstance(about, dict):
        raise ValueError(f"'{path}': about is a {type(about).__name__}, expected a mapping")
    return about


def save_reference(reference: Reference, path: str | Path) -> None:
    """Write an npz file, atomically; folders are made. Raises ValueError for a name without .npz."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"statistics are npz files: '{path}' must end in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"mu": reference.mu.numpy(), "sigma": reference.sigma.numpy(), "about": json.dumps(reference.about)}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def _check_moments(mu: Tensor, sigma: Tensor, path: Path) -> None:
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"'{path}': mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} do not belong together")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"'{path}' holds values that are not finite")
    if (sigma.diagonal() < 0).any():
        raise ValueError(f"'{path}': sigma has negative variances, so it is no covariance")
    if not torch.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * float(sigma.abs().max())):
        raise ValueError(f"'{path}': sigma is not symmetric, so it is no covariance")
