"""The header of a safetensors file: read, checked in full before a byte of data is trusted, and written.

A file is eight bytes of little-endian length, that many bytes of JSON (name -> dtype, shape, data_offsets), then the
data without a gap (https://huggingface.co/docs/safetensors).  The check is stricter than a reader needs: every byte of
the file must belong to exactly one tensor, so a file that was cut, padded or pasted together is refused with the tensor
at fault, and not half-read.  Free of torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

ELEMENT_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element of each dtype that a file may hold, by its safetensors name."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file as its header declares it."""

    name: str
    dtype: str
    """Safetensors name: BF16, F32, F8_E4M3, ..."""
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ELEMENT_BYTES[self.dtype]

    @property
    def num_rows(self) -> int:
        """Length of the leading axis (1 when there are no axes)."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the leading axis (of the tensor itself when it has no axes)."""
        return math.prod(self.shape[1:]) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """Tensors of a file, each with the offset of its first byte in the file."""

    entries: dict[str, TensorEntry]
    offsets: dict[str, int]
    metadata: dict[str, str]
    file_bytes: int
    """Length of the whole file."""


def header_length(first_bytes: bytes, file_bytes: int, file: str) -> int:
    """Length in bytes of the JSON, from the first eight bytes of a file.

    Raises:
        ValueError: the file is too short, is not safetensors, or ends inside its header.
    """
    if first_bytes.startswith(b"version "):
        raise ValueError(f"{file}: is a git-lfs pointer and not the weights; fetch them with `git lfs pull`")
    if len(first_bytes) < _LENGTH_BYTES:
        raise ValueError(f"{file}: is truncated: {file_bytes} bytes are too few for a safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", first_bytes[:_LENGTH_BYTES])
    if length > MAX_HEADER_BYTES or length < 2:
        raise ValueError(
            f"{file}: is corrupt or not a safetensors file: its header claims {length} bytes; fetch it again"
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise ValueError(
            f"{file}: is truncated inside its header ({file_bytes} bytes, the header alone needs "
            f"{_LENGTH_BYTES + length}); fetch it again"
        )
    return length


def parse_header(text: bytes, file_bytes: int, file: str) -> Header:
    """The tensors that the JSON ``text`` of a header declares, checked against the file's length.

    Raises:
        ValueError: naming the file and the tensor, for malformed JSON, an unknown dtype, a shape that does not fit its
            bytes, tensors that overlap or leave a hole, and data shorter or longer than declared.
    """
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: is corrupt: its safetensors header is not valid JSON ({error}); fetch it again"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: is corrupt: its safetensors header is not a JSON object; fetch it again")
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{file}: is corrupt: __metadata__ of its safetensors header is {metadata!r}; fetch it again")
    spans = sorted((*_span(name, declared, file), name) for name, declared in fields.items())
    entries = {name: _entry(name, fields[name], end - begin, file) for begin, end, name in spans}
    data_start = _LENGTH_BYTES + len(text)
    position, previous = 0, "the header"
    for begin, end, name in spans:
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole after"
            raise ValueError(
                f"{file}: is corrupt: tensor {name} {what} {previous} (byte {begin}, not {position}); fetch it again"
            )
        if data_start + end > file_bytes:
            raise ValueError(
                f"{file}: is truncated: tensor {name} ends at byte {data_start + end} and the file has {file_bytes}; "
                "fetch it again"
            )
        position, previous = end, name
    if data_start + position != file_bytes:
        raise ValueError(
            f"{file}: has {file_bytes - data_start - position} bytes after its last tensor ({previous}); fetch it again"
        )
    return Header(entries, {name: data_start + begin for begin, _, name in spans}, metadata, file_bytes)


def format_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The first bytes of a file that will hold ``entries``, and the layout that they declare.

    Wider elements come first, so that every tensor is aligned to its element, as the format asks; the order is
    otherwise kept.  Names must be unique.
    """
    ordered = sorted(entries, key=lambda entry: -ELEMENT_BYTES[entry.dtype])
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    position = 0
    for entry in ordered:
        assert entry.name not in fields, f"{entry.name} is declared twice"
        end = position + entry.num_bytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        begins[entry.name] = position
        position = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH_BYTES)
    first = struct.pack("<Q", len(text)) + text
    offsets = {name: len(first) + begin for name, begin in begins.items()}
    return first, Header({e.name: e for e in ordered}, offsets, dict(metadata), len(first) + position)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return fields


def _span(name: str, declared: object, file: str) -> tuple[int, int]:
    span = declared.get("data_offsets") if isinstance(declared, dict) else None
    if not _is_counts(span) or len(span) != 2 or span[0] > span[1]:
        raise ValueError(f"{file}: is corrupt: tensor {name} has no valid data_offsets; fetch it again")
    return span[0], span[1]


def _entry(name: str, declared: dict, num_bytes: int, file: str) -> TensorEntry:
    dtype, shape = declared.get("dtype"), declared.get("shape")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"{file}: tensor {name} has dtype {dtype!r}, which is not one of {', '.join(ELEMENT_BYTES)}")
    if not _is_counts(shape):
        raise ValueError(f"{file}: is corrupt: tensor {name} has shape {shape!r}; fetch it again")
    entry = TensorEntry(name, dtype, tuple(shape))
    if entry.num_bytes != num_bytes:
        raise ValueError(
            f"{file}: is corrupt: tensor {name} of {dtype} {list(entry.shape)} needs {entry.num_bytes} bytes and has "
            f"{num_bytes}; fetch it again"
        )
    return entry


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
