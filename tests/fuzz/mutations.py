"""Strategies that damage good files: bytes, members of zip archives, chunks of PNG, trees of JSON."""

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([*NUMBERS, -1, -(2**31)]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["U8", "I64", "F32", "float32", "../x", "/", "a" * 300, "os.system", "\0", "1e9", "train"]),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@st.composite
def mutated(draw: st.DrawFn, originals: Sequence[bytes], *, most: int = 5) -> bytes:
    """One of the originals after up to `most` changes: bits, bytes, numbers, cuts, insertions, copies."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["bit", "byte", "number", "cut", "drop", "insert", "copy"])):
            case "bit":
                data[at : at + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[at : at + 1])
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":
                size, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
                data[at : at + size] = (draw(st.sampled_from(NUMBERS)) % 256**size).to_bytes(size, order)
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "copy":
                to = draw(st.integers(0, len(data)))
                data[to:to] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def mutated_zip(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """An archive whose checksums are right: members changed, left out, there twice, renamed, compressed."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(draw(st.sampled_from(originals)))) as old,
        zipfile.ZipFile(buffer, "w") as new,
    ):
        chosen = draw(st.integers(0, len(old.namelist()) - 1))
        packing = draw(st.sampled_from([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED]))
        for number, name in enumerate(old.namelist()):
            data = old.read(name)
            if number != chosen:
                new.writestr(name, data, packing)
                continue
            match draw(st.sampled_from(["data", "data", "data", "data", "drop", "rename"])):
                case "data":
                    new.writestr(name, draw(mutated([data])), packing)
                case "rename":
                    new.writestr(draw(st.sampled_from(["x", "a.npy", "archive/data.pkl", "../up"])), data, packing)
    return buffer.getvalue()


@st.composite
def mutated_png(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """A PNG whose checksums are right: a chunk changed, left out, doubled or renamed."""
    data = draw(st.sampled_from(originals))
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(chunks) - 1))
        kind, body = chunks[number]
        match draw(st.sampled_from(["body", "body", "body", "drop", "double", "rename"])):
            case "body":
                chunks[number] = (kind, draw(mutated([body])))
            case "drop":
                chunks[number : number + 1] = [] if len(chunks) > 1 else [(kind, body)]
            case "double":
                chunks.insert(number, (kind, body))
            case "rename":
                chunks[number] = (draw(st.sampled_from([b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"zTXt", b"acTL"])), body)
    return data[:8] + b"".join(map(_chunk, chunks))


def _chunk(part: tuple[bytes, bytes]) -> bytes:
    kind, body = part
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@st.composite
def mutated_tree(draw: st.DrawFn, original: Any, *, values: st.SearchStrategy[Any] = JSON) -> Any:
    """A tree of dicts and lists in which up to three places hold something else, or are gone."""
    tree = _copied(original)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 4)):
            holder[key] = draw(values)
        else:
            del holder[key]
    return tree


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _places(tree: Any) -> Any:
    """(holder, key) of every value."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])
