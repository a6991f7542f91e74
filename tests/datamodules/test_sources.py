"""Sources: which folders are splits, what is not read, classes that differ between files, the hub's errors."""

import warnings
from types import SimpleNamespace

import pytest
from PIL import Image

from datamodules.images import ImageData
from datamodules.sources import check_class_names, find_split, open_splits
from tests.datamodules.streams import table, write_tar


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def make_images(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), "red").save(root / name)


def open_data(source, **options):
    data = ImageData(str(source), 8, **{"batch_size": 1, "num_workers": 0} | options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["Train", "Val"], "train", "Train"),
        (["Train", "Val"], "validation", "Val"),
        (["Train", "train"], "train", "train"),
        (["train"], "Train", "train"),
        (["a"], "train", None),
        (["fold1"], "fold1", "fold1"),
    ],
)
def test_names_of_splits(names, wanted, found):
    assert find_split(names, wanted) == found


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev"])
def test_one_override_finds_the_validation_split(tmp_path, name, caplog):
    make_images(tmp_path, ["train/a/0.JPEG", "train/b/1.png"])
    (tmp_path / "README.md").write_text("read me")
    with caplog.at_level("INFO"):
        data = open_data(tmp_path, val_split="auto")
    assert data.val_set is None and "has no validation split: training goes without" in caplog.text
    make_images(tmp_path, [f"{name}/b/0.png"])
    data = open_data(tmp_path, val_split="auto")
    assert data.val_set[0]["label"].tolist() == [1]
    assert open_data(tmp_path, val_split="auto", split="validation").val_set is None  # not the training rows again


def test_what_lies_beside_folders_of_splits_is_named(tmp_path):
    make_images(tmp_path, ["Train/a/0.png", "Train/b/0.png", "Val/a/0.png", "test/a/0.png"])
    (tmp_path / "README.md").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_data(tmp_path)
    assert data.num_classes == 2 and len(data.train_set) == 2 and len(data.val_set) == 1
    make_images(tmp_path, ["bus/0.png", "0.png"])
    with pytest.warns(
        UserWarning, match=r"splits \['Train', 'Val', 'test'\]. 2 other .* not read, such as \['bus', '0.png'\]"
    ):
        assert set(open_splits(str(tmp_path))) == {"Train", "Val", "test"}


def test_a_source_without_images_says_what_it_holds_instead(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar", range(2))
    (tmp_path / "deep" / "default" / "part").mkdir(parents=True)
    table(range(2)).to_parquet(str(tmp_path / "deep" / "default" / "part" / "0.parquet"))
    for use in (open_data, lambda source: ImageData(str(source), 8).discover_classes()):
        with pytest.raises(FileNotFoundError, match=r"empty' holds no images: expected files .*\.png"):
            use(tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match=r"tars/0.tar', so set streaming=true"):
            use(tmp_path / "tars")
        for name in ("0.tar", "*.tar"):
            with pytest.raises(ValueError, match=r"names tars: set streaming=true \(--data.init_args.streaming=true\)"):
                use(tmp_path / "tars" / name)
    with pytest.raises(FileNotFoundError, match=r"set source to a folder nearer to '.*part/0.parquet'"):
        open_data(tmp_path / "deep")


def test_folders_of_splits_may_hold_tables(tmp_path):
    for name, rows in (("train", range(5)), ("val", range(3))):
        (tmp_path / "set" / name).mkdir(parents=True)
        table(rows, named=True).to_parquet(str(tmp_path / "set" / name / "0.parquet"))
    data = open_data(tmp_path / "set", cache_dir=str(tmp_path / "cache"))
    assert (len(data.train_set), len(data.val_set)) == (5, 3)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_classes_that_differ_between_the_files_of_two_splits(tmp_path, kind, streaming):
    import datasets
    import pyarrow as pa

    (tmp_path / "set").mkdir()
    for split, names in (("train", ["ant", "bee"]), ("validation", ["bee", "ant"])):
        label = datasets.ClassLabel(names=names)
        rows = table(range(2)).cast_column("label", label)
        path = tmp_path / "set" / f"{split}-0.{kind}"
        if kind == "parquet":
            rows.to_parquet(str(path))
        else:
            with pa.ipc.new_stream(str(path), rows.data.table.schema) as writer:
                writer.write_table(rows.data.table)
    with pytest.raises(ValueError, match=r"column 'label' differ between 'train' and 'validation' \(2 and 2 names"):
        open_data(tmp_path / "set", cache_dir=str(tmp_path / "cache"), streaming=streaming)
    (tmp_path / "set" / f"validation-0.{kind}").write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"validation-0.{kind}' cannot be read \(.*\): replace it"):
        check_class_names({split: [tmp_path / "set" / f"{split}-0.{kind}"] for split in ("train", "validation")}, "s")


def test_classes_of_a_hub_set_are_read_from_its_description(monkeypatch):
    import datasets

    def describe(features):
        info = datasets.DatasetInfo(features=features and datasets.Features(features))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(info=info))
        return ImageData("a/b", 8).discover_classes()

    image = {"image": datasets.Image()}
    assert describe(image | {"label": datasets.ClassLabel(num_classes=5)}) == 5
    assert describe(image | {"label": datasets.Value("int64")}) is None
    assert describe(image) == 1
    assert describe(None) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"),
            "no local path, and the hub cannot be reached",
        ),
        (
            FileNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit ..."),
            "gated dataset: accept its terms",
        ),
        (
            FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "check the name and HF_TOKEN",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py\nmore"),
            "no longer supported, but found b.py",
        ),
    ],
)
def test_hub_failures_are_one_line(tmp_path, monkeypatch, error, message):
    import datasets

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(ValueError, match=message):
        ImageData("a/b", 8).discover_classes()
    with pytest.raises(ValueError, match=message) as caught:
        open_data("a/b")
    assert "source='a/b'" in str(caught.value) and "\n" not in str(caught.value)


def test_hub_id_offline(tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"source='no/such-set' is no local path, and the hub cannot be reached"):
        open_data("no/such-set", cache_dir=str(tmp_path / "cache"))
