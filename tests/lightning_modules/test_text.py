"""Captions of real data modules in a module: batches, workers, resume, vocabularies learnt by a run, mismatches."""

import logging

import lightning as L
import pytest
import torch
from PIL import Image

from datamodules.digits import DigitsData
from datamodules.image_text import ImageTextData
from datamodules.photo_patches import PhotoPatchesData
from datamodules.shapes import ShapesData
from datamodules.synthetic import SyntheticData
from layers.text.bpe import BPETokenizer
from layers.text.byte import ByteTokenizer
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.base import GenerativeModule
from lightning_modules.optim import OptimConfig
from lightning_modules.text import WithText, as_text_tokenizer, check_text, text_config
from lightning_modules.weights import read_torch

BYTES = {"class_path": "layers.text.byte.ByteTokenizer", "init_args": {"lower": True}}
TEXT = ("text", "text_mask", "text_loss")


class Reader(WithText, GenerativeModule):
    """Learns nothing and remembers the texts that it was given."""

    def __init__(self, text=BYTES, text_len=24, ignore_pad=True, num_classes=64):
        options = {"init_from": None, "init_key": None, "init_classes": "keep", "compile": False}
        super().__init__(PixelTokenizer(8, 8), num_classes, OptimConfig(lr=0.1), None, **options)
        self.text, self.text_len, self.ignore_pad = as_text_tokenizer(text), text_len, ignore_pad
        self.save_arguments(text=text_config(self.text), text_len=text_len, ignore_pad=ignore_pad)
        self.net = torch.nn.Linear(1, 1)
        self.seen = []

    def training_loss(self, batch, generator=None):
        assert set(TEXT) <= set(batch)
        if self.training:
            self.seen.append(batch["text"].tolist())
        return {"loss": self.net.weight.sum().square()}


def fit(module, data, *, ckpt_path=None, **limits):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **limits,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def captioned_folder(root, count=12):
    """Images of 8 px with two captions each."""
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(f"picture {i}\nimage {i}\n")
    return root


def folder_data(root, **options):
    settings = {"batch_size": 4, "num_workers": 0, "columns": {"caption": ".txt"}, "val_split": "train", "seed": 3}
    return ImageTextData(str(root), 8, **settings | options)


def batch_of(data):
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize(
    "data",
    [
        DigitsData(8, 6),
        ShapesData(16, 6, length=12, val_length=4, cache_dir=None),
        SyntheticData(8, 6),
    ],
    ids=lambda data: type(data).__name__,
)
def test_captions_of_every_set_become_texts(data):
    module, batch = Reader(text_len=80), batch_of(data)
    ready = module.on_before_batch_transfer(batch, 0)
    assert module.decode_text(ready["text"]) == batch["caption"]
    assert ready["text"].shape == ready["text_mask"].shape == ready["text_loss"].shape == (6, 80)
    assert ready["text_mask"].sum(1).tolist() == [len(caption.encode()) for caption in batch["caption"]]
    assert all(ready[name] is batch[name] for name in batch)
    assert module.with_text(ready) is ready


def test_prompts_are_read_as_captions_are():
    module = Reader(ignore_pad=False, text_len=12)
    batch = module.with_text({"caption": ["red ring", ""], "label": torch.zeros(2)})
    assert all(torch.equal(batch[name], tensor) for name, tensor in module.encode_text(["red ring", ""]).items())
    assert module.decode_text(batch["text"]) == ["red ring", ""]


def test_without_a_tokenizer_the_label_is_the_text():
    module = Reader(text=None, num_classes=10)
    batch = module.with_text(batch_of(DigitsData(8, 6)))
    assert torch.equal(batch["text"][:, 0], batch["label"]) and batch["text_loss"].all()
    assert module.special_ids == (10, 11, 12, 13)
    for use in (lambda: module.encode_text(["one"]), lambda: module.decode_text(batch["text"])):
        with pytest.raises(ValueError, match="trained on class labels and knows no text: give LABELS="):
            use()


def test_special_ids_follow_the_form():
    assert Reader(ignore_pad=False).special_ids == (258, 259, 260, 261)
    assert Reader(ignore_pad=True).special_ids == (258, 1, 259, 260)


def test_data_without_captions_is_refused():
    pytest.importorskip("skimage")
    with pytest.raises(ValueError, match=r"has no captions, which this model learns: use data .*text=null"):
        Reader().on_before_batch_transfer(batch_of(PhotoPatchesData(16, 4, limit_n=8)), 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_reads_the_texts_of_the_unbroken_one(tmp_path, num_workers):
    captioned_folder(tmp_path)
    unbroken = Reader()
    fit(unbroken, folder_data(tmp_path), max_steps=9)
    texts = [unbroken.decode_text(torch.tensor(ids)) for ids in unbroken.seen]
    words = {(text.split()[0], text.split()[1]) for texts in texts for text in texts}
    assert len(texts) == 9 and len(words) > 12  # both captions of some images
    first, second = Reader(), Reader()
    fit(first, folder_data(tmp_path, num_workers=num_workers), max_steps=4).save_checkpoint(tmp_path / "a.ckpt")
    fit(second, folder_data(tmp_path, num_workers=num_workers), max_steps=9, ckpt_path=tmp_path / "a.ckpt")
    assert first.seen + second.seen == unbroken.seen


def learning(path, vocab_size=262):
    return {"class_path": "layers.text.bpe.BPETokenizer", "init_args": {"path": str(path), "vocab_size": vocab_size}}


def test_a_run_learns_its_vocabulary_once_and_its_checkpoint_knows_it(tmp_path):
    pytest.importorskip("tokenizers")
    captioned_folder(tmp_path)
    path, data = tmp_path / "run" / "bpe.json", folder_data(tmp_path)
    first = Reader(text=learning(path))
    fit(first, data, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    expected = BPETokenizer(str(tmp_path / "same.json"), 262)
    expected.train(text for batch in data.ordered_loader("train") for text in batch["caption"])
    assert path.read_bytes() == expected.path.read_bytes()
    assert first.decode_text(torch.tensor(first.seen[0]))[0].split()[0] in ("picture", "image")
    saved = read_torch(tmp_path / "a.ckpt")["hyper_parameters"]["text"]  # plain values only
    assert saved["init_args"]["sha256"] == expected.init_args()["sha256"] is not None
    alone = as_text_tokenizer(saved)
    assert alone.encode("Picture 7") == first.text.encode("picture 7")
    written = path.stat().st_mtime_ns
    second = Reader(text=learning(path))
    fit(second, folder_data(tmp_path), max_steps=3, ckpt_path=tmp_path / "a.ckpt")
    assert len(second.seen) == 1 and path.stat().st_mtime_ns == written


def test_a_run_does_not_resume_with_another_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    captioned_folder(tmp_path)
    fit(Reader(text=learning(tmp_path / "a.json")), folder_data(tmp_path), max_steps=1).save_checkpoint(
        tmp_path / "a.ckpt"
    )
    BPETokenizer(str(tmp_path / "b.json"), 262).train(["other words", "other wells"] * 5)
    for other, difference in (
        (learning(tmp_path / "b.json"), "sha256="),
        (BYTES, r"class_path=layers\.text\.bpe\.BPETokenizer, this run has layers\.text\.byte"),
        (None, "class_path="),
    ):
        with pytest.raises(ValueError, match=rf"trained with a text tokenizer of {difference}"):
            fit(Reader(text=other), folder_data(tmp_path), max_steps=2, ckpt_path=tmp_path / "a.ckpt")
    (tmp_path / "a.json").rename(tmp_path / "moved.json")
    fit(
        Reader(text=learning(tmp_path / "moved.json")),
        folder_data(tmp_path),
        max_steps=2,
        ckpt_path=tmp_path / "a.ckpt",
    )


def test_weights_of_another_vocabulary_are_refused_wherever_a_run_starts_from_them(tmp_path):
    pytest.importorskip("tokenizers")
    for name, words in (("a", "round wheels"), ("b", "other words")):
        BPETokenizer(str(tmp_path / f"{name}.json"), 262).train([words, words.replace("s", "")] * 5)
    path, own = tmp_path / "a.ckpt", Reader(text=learning(tmp_path / "a.json"))
    saved = {"state_dict": own.state_dict(), "hyper_parameters": dict(own.hparams)}
    torch.save(saved, path)
    with pytest.raises(ValueError, match=rf"{path} was trained with a text tokenizer of sha256=.* back \(a vocabulary"):
        Reader(text=learning(tmp_path / "b.json")).load_official(path)
    own.load_official(path)
    torch.save({"state_dict": own.state_dict()}, path)  # says nothing of texts
    own.load_official(path)
    torch.save(saved | {"hyper_parameters": {"text": "a.json"}}, path)
    with pytest.raises(ValueError, match=r"text is 'a.json', expected a class_path"):
        own.load_official(path)


def test_a_vocabulary_needs_captions(tmp_path):
    pytest.importorskip("skimage")
    with pytest.raises(ValueError, match="no captions to learn a text vocabulary from"):
        fit(Reader(text=learning(tmp_path / "a.json")), PhotoPatchesData(16, 4, limit_n=8), max_steps=1)


def test_configs_make_tokenizers_of_layers_text_only():
    assert text_config(ByteTokenizer()) == BYTES and text_config(None) is None and as_text_tokenizer(None) is None
    assert as_text_tokenizer({"class_path": "layers.text.byte.ByteTokenizer"}).lower
    made = ByteTokenizer(lower=False)
    assert as_text_tokenizer(made) is made and not as_text_tokenizer(text_config(made)).lower
    for name in ("os.system", "layers.text.base.Path", "layers.text.byte.Nothing", "layers.text.none.ByteTokenizer"):
        with pytest.raises(ValueError, match=f"'{name}' is no text tokenizer class in layers.text: not loaded"):
            as_text_tokenizer({"class_path": name, "init_args": {}})
    with pytest.raises(ValueError, match=r"text tokenizer ByteTokenizer: .*'size'"):
        as_text_tokenizer({"class_path": "layers.text.byte.ByteTokenizer", "init_args": {"size": 3}})


def test_a_checkpoint_of_labels_and_one_of_texts_do_not_mix():
    check_text(None, None)
    check_text(BYTES, ByteTokenizer())
    with pytest.raises(ValueError, match="lower=True, this run has False"):
        check_text(BYTES, ByteTokenizer(lower=False))
    with pytest.raises(ValueError, match="class_path=None, this run has layers"):
        check_text(None, ByteTokenizer())
