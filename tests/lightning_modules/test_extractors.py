"""Extractors: known features, names that cannot be mistaken, and no stand-in for missing Inception weights."""

import pickle

import pytest
import torch
from torch import nn

from lightning_modules.extractors import EXTRACTORS, INCEPTION_FILE, InceptionV3, make_extractor
from lightning_modules.weights import file_sha256


def pictures(count: int = 4, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Weights in the right layout, of a fresh network: their checksum is not the published one."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = library.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # keep activations of order 1 through 94 layers
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def test_randconv_is_the_network_of_its_definition():
    torch.manual_seed(0)
    layers = [nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((3, 32), (32, 64), (64, 128))]
    x = pictures().float() / 127.5 - 1
    for layer in layers:
        x = nn.functional.leaky_relu(layer(x), 0.1)
    wanted = 10 * torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
    state = torch.get_rng_state()
    features, logits = make_extractor("randconv")(pictures())
    assert torch.equal(state, torch.get_rng_state()), "making it leaves the global random state alone"
    assert logits is None and torch.allclose(features, wanted.detach(), atol=1e-6)


def test_effnet_lite0_sees_what_is_in_a_picture():
    """The classifier on top of the same features knows the package's photographs: the weights are in their places."""
    timm = pytest.importorskip("timm")
    data = pytest.importorskip("skimage.data")
    extractor = make_extractor("effnet_lite0")
    photo = torch.from_numpy(data.coffee()[:, 100:500].copy()).permute(2, 0, 1)[None]
    photo = nn.functional.interpolate(photo.float(), size=(224, 224), mode="bilinear", antialias=True)
    assert isinstance(extractor.net, timm.models.efficientnet.EfficientNet)
    assert extractor.net((photo - 127.5) / 127.5).softmax(1).argmax().item() == 967  # espresso
    features, _ = extractor(pictures())
    assert features.shape == (4, 1280) and features.dtype == torch.float32 and features.std() > 0.01


@pytest.mark.parametrize("name", ["randconv", "effnet_lite0"])
def test_offline_extractors_are_never_called_fid(name):
    extractor = make_extractor(name)
    assert extractor.key == f"fd_{name}" and "fid" not in extractor.key
    assert len(extractor.sha256) == 64 and extractor(pictures())[0].shape == (4, extractor.dim)


def test_features_do_not_depend_on_autocast_or_train_mode():
    extractor = make_extractor("effnet_lite0")
    plain = extractor(pictures())[0]
    extractor.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(pictures())[0], plain)
    assert not any(p.requires_grad for p in extractor.parameters())


def test_missing_inception_weights_name_file_path_and_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        make_extractor("inception")
    for part in (INCEPTION_FILE, "6726825d", str(tmp_path / "hub" / "checkpoints"), "https://", "no FID"):
        assert part in str(error.value)


def test_inception_of_another_checksum_is_no_fid(inception_file):
    extractor = make_extractor("inception", weights=inception_file)
    assert extractor.key == f"fd_inception_{file_sha256(inception_file)[:8]}"
    features, logits = extractor(pictures(2))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)


def test_only_the_published_checksum_earns_the_name_fid(inception_file):
    extractor = InceptionV3(inception_file)
    extractor.sha256 = "6726825d" + "0" * 56
    assert extractor.key == "fid"


class Stranger:
    def __reduce__(self):
        return (print, ("code was run",))


def test_weights_that_would_run_code_are_refused(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"fc.bias": Stranger()}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        make_extractor("inception", weights=path)
    path.write_bytes(pickle.dumps(Stranger()))
    with pytest.raises(ValueError, match=r"not a readable|more than tensors"):
        make_extractor("inception", weights=path)
    assert "code was run" not in capsys.readouterr().out


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of torch-fidelity's Inception"):
        make_extractor("inception", weights=tmp_path / "other.pth")


def test_wrong_names_and_inputs():
    with pytest.raises(ValueError, match=f"unknown extractor 'dino': there are {', '.join(EXTRACTORS)}"):
        make_extractor("dino")
    with pytest.raises(ValueError, match="built in"):
        make_extractor("randconv", weights="x.pth")
    with pytest.raises(ValueError, match="uint8 images"):
        make_extractor("randconv")(pictures().float())
