"""Statistics files: ours, ADM's and JiT's; everything that cannot be a covariance is refused."""

import numpy as np
import pytest
import torch

from lightning_modules.extractors import make_extractor
from lightning_modules.reference import Reference, load_reference, save_reference


@pytest.fixture
def extractor():
    return make_extractor("randconv")


def moments(dim: int) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(0).normal(size=(3 * dim, dim))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def test_round_trip(tmp_path, extractor):
    arrays = {name: torch.from_numpy(value) for name, value in moments(256).items()}
    about = {"n": 768, "extractor": "fd_randconv", "weights_sha256": extractor.sha256, "image_size": 32, "images": "x"}
    save_reference(Reference(**arrays, features=torch.ones(5, 256), about=about), tmp_path / "new" / "x.npz")
    read = load_reference(tmp_path / "new" / "x.npz")
    assert torch.equal(read.mu, arrays["mu"]) and torch.equal(read.sigma, arrays["sigma"])
    assert read.about == about and read.features.shape == (5, 256) and len(read.sha256) == 64
    read.check(extractor, image_size=32)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"], "no temporary file is left"


def test_an_adm_file_gives_moments_and_features_of_its_images(tmp_path, extractor):
    """ADM's reference holds float32 moments, spatial ones that we do not use, and 10,000 images as arr_0."""
    images = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
    spatial = {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    adm = {name: value.astype(np.float32) for name, value in moments(256).items()}
    np.savez(tmp_path / "adm.npz", arr_0=images, **adm, **spatial)
    read = load_reference(tmp_path / "adm.npz")
    assert read.mu.dtype == torch.float64 and read.about == {}
    wanted = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))[0]
    assert torch.allclose(read.features_by(extractor), wanted, atol=1e-5)


def test_a_jit_file_has_moments_only(tmp_path, extractor):
    np.savez(tmp_path / "jit.npz", **moments(256))
    read = load_reference(tmp_path / "jit.npz")
    read.check(extractor, image_size=256)
    assert read.features_by(extractor) is None


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"mu": np.zeros(3)}, "no sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not belong together"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) + np.eye(3, k=1) * 1e-3}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "negative variances"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "no numbers"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "about": "{"}, "about is no JSON"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "about": "[1]"}, "about is a list"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((5, 4))}, "do not belong to mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "arr_0": np.zeros((5, 4, 4))}, "expected uint8 images"),
        ({"mu": np.array([object()]), "sigma": np.eye(1)}, "not a readable npz"),  # pickled: not loaded
    ],
)
def test_what_is_no_statistics(tmp_path, arrays, match):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        load_reference(tmp_path / "bad.npz")


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="make stats"):
        load_reference(tmp_path / "none.npz")
    np.savez(tmp_path / "whole.npz", **moments(8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("cut.npz", "empty.npz", "array.npy"):
        with pytest.raises(ValueError, match="not a readable npz"):
            load_reference(tmp_path / name)


def test_statistics_of_another_extractor_or_size(extractor):
    mu, sigma = torch.zeros(8), torch.eye(8)
    with pytest.raises(ValueError, match="8 features, extractor randconv has 256"):
        Reference(mu, sigma, path="x.npz").check(extractor)
    wide = {"mu": torch.zeros(256), "sigma": torch.eye(256), "path": "x.npz"}
    with pytest.raises(ValueError, match="made with weights abc"):
        Reference(**wide, about={"weights_sha256": "abc", "extractor": "fd_y"}).check(extractor)
    with pytest.raises(ValueError, match="of 64x64 images, these have 32"):
        Reference(**wide, about={"image_size": 64}).check(extractor, image_size=32)
