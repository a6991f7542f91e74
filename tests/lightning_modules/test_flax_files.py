"""Files of flax: what is in them comes out, and a damaged or hostile one is one clear error that costs nothing."""

import io
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_modules import flax_files, npz_files
from lightning_modules.flax_files import is_msgpack, read_msgpack, read_npz
from tests.lightning_modules.flax_writer import Raw, array, chunked, extension, nested, packed

TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint32", "bool")


def values(dtype: str, *shape: int) -> torch.Tensor:
    numbers = torch.randint(0, 2 if dtype == "bool" else 100, shape, generator=torch.Generator().manual_seed(1))
    return numbers.to(getattr(torch, dtype))


def msgpack(folder: Path, tree) -> Path:
    path = folder / "vae_params"
    path.write_bytes(packed(tree))
    return path


def npz(folder: Path, entries: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> Path:
    path = folder / "params.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


# What is there comes out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3)])
def test_msgpack_arrays_keep_type_shape_and_values(dtype, shape, tmp_path):
    tensor = values(dtype, *shape)
    found = read_msgpack(msgpack(tmp_path, {"a": {"b": tensor}}))
    assert list(found) == ["a/b"] and found["a/b"].dtype == tensor.dtype and torch.equal(found["a/b"], tensor)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3)])
def test_npz_arrays_keep_type_shape_and_values(dtype, fortran, shape, tmp_path):
    tensor = values(dtype, *shape)
    raw = tensor.view(torch.int16).numpy().view("V2") if dtype == "bfloat16" else tensor.numpy()
    found = read_npz(npz(tmp_path, {"a/b.npy": npy(np.asarray(raw, order="F" if fortran else "C"))}))["a/b"]
    assert found.dtype == tensor.dtype and torch.equal(found, tensor) and found.is_contiguous()


def test_npz_as_numpy_writes_it_compressed_too(tmp_path):
    arrays = {"a/kernel": np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32), "b": np.float32(2)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz")
        assert {name: tensor.numpy().tolist() for name, tensor in found.items()} == {
            name: value.tolist() for name, value in arrays.items()
        }


def test_of_a_training_state_the_parameters_are_read(tmp_path):
    one, damaged = npy(np.ones(2)), b"not looked at"
    state = {"params/a/b.npy": one, "params/params/c.npy": one, "opt/0/mu.npy": damaged, "extra/step.npy": damaged}
    assert list(read_npz(npz(tmp_path, state))) == ["a/b", "params/c"]
    bare = {"params_adaptor/a.npy": one, "decoder/b.npy": one, "opt/0/mu.npy": damaged}
    assert list(read_npz(npz(tmp_path, bare))) == ["params_adaptor/a", "decoder/b"]


def test_numbers_scalars_and_large_arrays_are_leaves_and_none_is_left_out(tmp_path):
    large = values("bfloat16", 5, 7)
    scalar = extension(3, array(values("float32")))
    tree = {"step": 12, "low": -3, "rate": 0.25, "on": True, "empty": None, "s": scalar, "large": chunked(large, 8)}
    found = read_msgpack(msgpack(tmp_path, tree | {"long name of more than 31 characters": values("int8", 2)}))
    assert {name: found[name].item() for name in ("step", "low", "rate", "on")} == {
        "step": 12,
        "low": -3,
        "rate": 0.25,
        "on": True,
    }
    assert torch.equal(found["large"], large) and torch.equal(found["s"], values("float32"))
    assert "empty" not in found and len(found) == 7


def test_every_form_of_number_and_size_is_read(tmp_path):
    forms = {
        "fix": b"\x07",
        "negative": b"\xff",
        "u8": b"\xcc\xc8",
        "u16": b"\xcd\x01\x00",
        "u32": b"\xce\x00\x01\x00\x00",
        "i8": b"\xd0\x80",
        "i16": b"\xd1\x80\x00",
        "i32": b"\xd2\x80\x00\x00\x00",
        "f32": b"\xca\x3f\x80\x00\x00",
    }
    expected = [7, -1, 200, 256, 65536, -128, -32768, -(2**31), 1.0]
    found = read_msgpack(msgpack(tmp_path, {name: Raw(data) for name, data in forms.items()}))
    assert [tensor.item() for tensor in found.values()] == expected
    payload = b"\x93\x91\x02\xa4int8\xc4\x02\x01\x02"  # fix array, fix text, bin 8
    sizes = {
        "ext 8": b"\xc7" + bytes([len(payload)]),
        "ext 16": b"\xc8" + struct.pack(">H", len(payload)),
        "fixext 16": b"\xd8",
    }
    filled = b"\x93\x91\x06\xa4int8\xc4\x06" + bytes(range(6))
    tree = {name: Raw(head + b"\x01" + (filled if name == "fixext 16" else payload)) for name, head in sizes.items()}
    found = read_msgpack(msgpack(tmp_path, {"map 32": Raw(b"\xdf\x00\x00\x00\x03" + packed(tree)[1:])}))
    assert [tensor.tolist() for tensor in found.values()] == [[1, 2], [1, 2], [0, 1, 2, 3, 4, 5]]


def test_a_set_is_chosen_by_the_first_name_that_is_there(tmp_path):
    tree = nested({"g_params/a": values("int8", 2), "ema_params/a": values("int8", 3), "opt/odd": b"text"})
    path = msgpack(tmp_path, tree)
    assert {name: len(tensor) for name, tensor in read_msgpack(path, sets=("ema_params", "g_params")).items()} == {
        "a": 3
    }
    assert len(read_msgpack(path, sets=("absent", "g_params"))["a"]) == 2
    with pytest.raises(ValueError, match=r"vae_params is not .*no x or y, only ema_params, g_params, opt"):
        read_msgpack(path, sets=("x", "y"))


def test_tensors_are_copies_that_can_be_written(tmp_path):
    path = msgpack(tmp_path, {"a": values("float32", 3), "b": chunked(values("float32", 3), 2)})
    before = path.read_bytes()
    for tensor in read_msgpack(path).values():
        tensor.add_(1)
    assert path.read_bytes() == before


def test_msgpack_is_recognised_by_its_first_bytes(tmp_path):
    assert is_msgpack(msgpack(tmp_path, {"ema_params": {}}))
    assert is_msgpack(msgpack(tmp_path, {f"key{i}": 1 for i in range(20)}))
    assert is_msgpack(msgpack(tmp_path, {"a name of more than 31 characters": 1}))
    others = {"old.pth": {"_use_new_zipfile_serialization": False}, "new.pth": {}}
    for name, options in others.items():
        torch.save({"ema_params": torch.zeros(2)}, tmp_path / name, **options)
        assert not is_msgpack(tmp_path / name)
    for size in range(100):  # the length of the header is what a safetensors file begins with
        save_file({"x" * (size + 1): torch.zeros(1)}, tmp_path / "x.safetensors")
        assert not is_msgpack(tmp_path / "x.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    assert not is_msgpack(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="absent"):
        is_msgpack(tmp_path / "absent")


# Damaged and hostile files


GOOD = {"a": {"b": values("float32", 2, 3)}, "step": 3}
HUGE = {"__msgpack_chunked_array__": True, "shape": {"0": 2**40}, "chunks": {"0": values("int8", 2)}}
LIES = {
    "nothing": (Raw(b""), "empty file"),
    "no map": ([1, 2], "holds no map"),
    "bytes after it": (Raw(packed(GOOD) + b"\x00"), "1 bytes follow"),
    "unused byte": ({"a": Raw(b"\xc1")}, "0xc1, which begins no value"),
    "key that is no text": (Raw(b"\x81\x01\x02"), "no text, or is there twice"),
    "key twice": (Raw(b"\x82\xa1a\x01\xa1a\x02"), "no text, or is there twice"),
    "text that is none": (Raw(b"\x81\xa1\xff\x01"), "utf-8"),
    "text as a value": ({"a": {"b": "x"}}, "'a/b' is neither an array nor a number"),
    "bytes as a value": ({"a": b"x"}, "'a' is neither"),
    "list as a value": ({"a": [1]}, "'a' is neither"),
    "number beyond int64": ({"a": 2**63}, "'a' is neither"),
    "complex number": ({"a": extension(2, packed([1.0, 2.0]))}, "extension of type 2"),
    "time": ({"a": Raw(b"\xd6\xff\x00\x00\x00\x00")}, "extension of type -1"),
    "extension that is no array": ({"a": extension(1, packed({"x": 1}))}, r"not \(shape, type, bytes\)"),
    "shape that is none": ({"a": extension(1, array(values("int8", 2), shape=["2"]))}, r"the shape \['2'\]"),
    "negative shape": ({"a": extension(1, array(values("int8", 2), shape=[-1, -2]))}, "the shape"),
    "too many dims": ({"a": extension(1, array(values("int8", 1), shape=[1] * 33))}, "the shape"),
    "huge shape": ({"a": extension(1, array(values("int8", 2), shape=[2**40, 2**40]))}, "'a' is int8 .* but has 2"),
    "small shape": ({"a": extension(1, array(values("int8", 2), shape=[1]))}, "1 bytes, but has 2"),
    "objects": ({"a": extension(1, array(values("int8", 2), dtype="object"))}, "of type 'object', only float64"),
    "unknown type": ({"a": extension(1, array(values("int8", 2), dtype="complex64"))}, "of type 'complex64'"),
    "huge binary": (Raw(b"\x81\xa1a\xc6\xff\xff\xff\xff"), "ends 4294967295 bytes too early"),
    "huge list": (Raw(b"\x81\xa1a\xdd\xff\xff\xff\xff"), "too early"),
    "huge map": (Raw(b"\xdf\xff\xff\xff\xff\xa1a\x01"), "too early"),
    "huge array in parts": ({"a": HUGE}, "'a' is int8 .* but has 2"),
    "array in parts without": ({"a": {"__msgpack_chunked_array__": True}}, "in parts lacks some"),
    "array in no parts": ({"a": HUGE | {"chunks": {}}}, "in parts lacks some"),
    "array that lacks a part": ({"a": HUGE | {"chunks": {"1": values("int8", 2)}}}, "in parts lacks some"),
    "parts of several types": (
        {"a": HUGE | {"chunks": {"0": values("int8", 1), "1": values("uint8", 1)}}},
        "several types",
    ),
    "deep nesting": (Raw(b"\x81\xa1a" * 100_000 + b"\x01"), "nested deeper than 64"),
    "deep lists": (Raw(b"\x91" * 100_000 + b"\x01"), "nested deeper than 64"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_msgpack_file_that_lies_is_one_error_that_names_it(case, tmp_path):
    tree, message = LIES[case]
    with pytest.raises(ValueError, match=f"vae_params is not a readable flax msgpack file: .*{message}"):
        read_msgpack(msgpack(tmp_path, tree))


def test_many_values_are_refused_before_they_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(flax_files, "MAX_VALUES", 1000)
    assert len(read_msgpack(msgpack(tmp_path, {str(i): i for i in range(499)}))) == 499
    with pytest.raises(ValueError, match="more than 1000 values"):
        read_msgpack(msgpack(tmp_path, {"a": [0] * 1000}))


def test_wherever_a_file_was_cut_it_is_an_error(tmp_path):
    whole = packed(GOOD)
    np.savez(tmp_path / "whole.npz", **{"a/b": np.ones((2, 3)), "c": np.ones(4)})
    archive = (tmp_path / "whole.npz").read_bytes()
    for data, name, read in ((whole, "x", read_msgpack), (archive, "x.npz", read_npz)):
        for length in range(len(data)):
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(ValueError, match="is not a readable"):
                read(tmp_path / name)


@pytest.mark.parametrize("kind", ["msgpack", "npz", "compressed"])
def test_damaged_bytes_give_values_or_that_error(kind, tmp_path):
    """Nothing else, whichever byte is hit: no other exception, no allocation out of proportion."""
    path = tmp_path / "x"
    if kind == "msgpack":
        path.write_bytes(packed(GOOD | {"large": chunked(values("int16", 3, 3), 4)}))
    else:
        save = np.savez if kind == "npz" else np.savez_compressed
        save(tmp_path / "x.npz", **{"params/a": np.ones((2, 3), np.float32), "opt/b": np.ones(4)})
        (tmp_path / "x.npz").rename(path)
    read, data, chance = read_msgpack if kind == "msgpack" else read_npz, path.read_bytes(), random.Random(0)
    failed = 0
    tracemalloc.start()
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        path.write_bytes(damaged)
        try:
            read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a readable")
            failed += 1
    assert failed > 50 and tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
BAD_ENTRIES = {
    "no npy": (b"text", "no npy file"),
    "short": (b"\x93NUMPY\x01\x00", "no npy file"),
    "objects": (header(PLAIN.replace("<f4", "|O"), b"12345678"), "of type 'O'"),
    "big-endian": (header(PLAIN.replace("<f4", ">f4"), b"12345678"), "not plain"),
    "structured": (header(PLAIN.replace("'<f4'", "[('a', '<f4')]"), b"12345678"), "not plain"),
    "code": (header(PLAIN.replace("(2,)", "__import__('os')"), b"12345678"), "not plain"),
    "huge": (header(PLAIN.replace("(2,)", f"({2**40}, {2**40})"), b"12345678"), "but has 8"),
    "endless number": (header(PLAIN.replace("(2,)", f"({'9' * 5000},)"), b""), "digits"),
    "too short": (header(PLAIN, b"1234"), "8 bytes, but has 4"),
    "too long": (header(PLAIN, b"1234567890"), "8 bytes, but has 10"),
    "header beyond the end": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "not plain"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_an_npz_entry_that_is_no_plain_array_is_one_error_that_names_the_file(case, tmp_path):
    data, message = BAD_ENTRIES[case]
    with pytest.raises(ValueError, match=rf"params\.npz is not a readable npz file: .*{message}"):
        read_npz(npz(tmp_path, {"a.npy": data}))


def test_other_archives_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'readme\.txt' is no array"):
        read_npz(npz(tmp_path, {"readme.txt": b""}))
    with pytest.raises(ValueError, match="packed in an unknown way"):
        read_npz(npz(tmp_path, {"a.npy": npy(np.ones(3))}, compression=zipfile.ZIP_BZIP2))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("a.npy", npy(np.ones(3)))
    with pytest.raises(ValueError, match=r"'a\.npy' .* there twice"):
        read_npz(tmp_path / "twice.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="of type 'O'"):
        read_npz(tmp_path / "objects.npz")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_npz(tmp_path / "absent.npz")


def test_an_archive_that_unpacks_to_far_more_than_it_is_was_not_made_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_files, "SMALL", 2**16)
    bomb = npz(tmp_path, {"a.npy": npy(np.zeros(2**18, np.float32))}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"its \d+ bytes would unpack to 10487"):
        read_npz(bomb)
