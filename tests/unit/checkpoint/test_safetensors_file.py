"""Our safetensors streams against the safetensors library, and against files that are broken in every way."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abyssal.checkpoint.safetensors_file import TORCH_DTYPES, SafetensorsReader, SafetensorsWriter, temporary_name
from abyssal.checkpoint.safetensors_header import TensorEntry, header_length, parse_header

SHAPES = [(7, 5), (3,), (2, 3, 4), (1, 1), (0, 4), (129, 2), ()]
UNKNOWN_TO_THE_LIBRARY = {"F8_E8M0"}  # its torch reader, as of 0.8


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _random(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = max(1, torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)[: torch.Size(shape).numel()].reshape(shape)


def _tensors(dtypes: list[str]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{number}": _random(TORCH_DTYPES[name], shape, number)
        for name in dtypes
        for number, shape in enumerate(SHAPES)
    }


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    entries = [TensorEntry(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, entries) as writer:
        for name, tensor in reversed(tensors.items()):
            for start in range(0, tensor.shape[0], 3) if tensor.dim() else ():
                writer.write_rows(name, tensor[start : start + 3])
            if not tensor.dim():
                writer.write_rows(name, tensor)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = _tensors([name for name in TORCH_DTYPES if name not in UNKNOWN_TO_THE_LIBRARY])
    _write(tmp_path / "ours.safetensors", tensors)
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert _bits(found[name]) == _bits(tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = _tensors([name for name in TORCH_DTYPES if name not in UNKNOWN_TO_THE_LIBRARY])
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    with SafetensorsReader(tmp_path / "theirs.safetensors") as reader:
        assert reader.header.metadata == {"format": "pt"}
        assert reader.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = reader.read(name)
            assert found.shape == tensor.shape and _bits(found) == _bits(tensor), name


def test_our_own_reader_reads_every_dtype(tmp_path: Path) -> None:
    tensors = _tensors(list(TORCH_DTYPES))
    _write(tmp_path / "ours.safetensors", tensors)
    with SafetensorsReader(tmp_path / "ours.safetensors", drop_cache=True) as reader:
        assert all(_bits(reader.read(name)) == _bits(tensor) for name, tensor in tensors.items())
        for name, entry in reader.entries.items():  # aligned, so that others can map the file
            assert (reader.header.offsets[name] % TORCH_DTYPES[entry.dtype].itemsize) == 0


def test_rows_go_straight_into_place(tmp_path: Path) -> None:
    weight = torch.arange(60.0).reshape(10, 6)
    _write(tmp_path / "f", {"a": torch.zeros(3, dtype=torch.int8), "w": weight})
    with SafetensorsReader(tmp_path / "f") as reader:
        target = torch.full((12, 6), -1.0)
        reader.read_into("w", target[2:6], row=5)
        assert torch.equal(target[2:6], weight[5:9])
        assert (target[:2] == -1).all() and (target[6:] == -1).all()
        assert torch.equal(reader.read("w", 9, 10), weight[9:])
        with pytest.raises(AssertionError, match="beyond"):
            reader.read_into("w", target[:2], row=9)
        with pytest.raises(AssertionError, match="F32"):
            reader.read_into("w", target[:2].double())


# ---- broken files ----


def _file(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "truncated data": ({"a": _entry(0, 8), "b": _entry(8, 16)}, bytes(12), "truncated: tensor b ends at byte"),
    "bytes after the end": ({"a": _entry(0, 8)}, bytes(9), "1 bytes after its last tensor"),
    "overlap": ({"a": _entry(0, 8), "b": _entry(4, 12)}, bytes(12), "tensor b overlaps a"),
    "hole": ({"a": _entry(0, 8), "b": _entry(12, 16)}, bytes(16), "tensor b leaves a hole after a"),
    "hole at the start": ({"a": _entry(4, 8)}, bytes(8), "tensor a leaves a hole"),
    "wrong length": ({"a": _entry(0, 8, [3])}, bytes(8), "tensor a of F32 .3. needs 12 bytes and has 8"),
    "unknown dtype": ({"a": _entry(0, 8, dtype="F7")}, bytes(8), "tensor a has dtype 'F7'"),
    "dtype missing": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "tensor a has dtype None"),
    "negative shape": ({"a": _entry(0, 8, [-2])}, bytes(8), "tensor a has shape"),
    "shape of floats": ({"a": {**_entry(0, 8), "shape": [2.0]}}, bytes(8), "tensor a has shape"),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "tensor a has no valid data_offsets"),
    "offsets reversed": ({"a": _entry(8, 0, [2])}, bytes(8), "tensor a has no valid data_offsets"),
    "entry of a number": ({"a": 3}, b"", "tensor a has no valid data_offsets"),
    "twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "a is there twice"),
    "not JSON": (b'{"a":', b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "a list": ([1], b"", "not a JSON object"),
    "odd metadata": ({"__metadata__": [1]}, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case: str, tmp_path: Path) -> None:
    header, data, message = BROKEN[case]
    path = _file(tmp_path / "model-1.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsReader(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x08\0\0\0", "truncated: 4 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated inside its header"),
        (struct.pack("<Q", 1 << 40) + b"{}", "corrupt or not a safetensors file"),
        (b"<!DOCTYPE html><html>", "corrupt or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
    ],
)
def test_files_that_are_none_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        SafetensorsReader(tmp_path / "m")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_header_cut_or_damaged_anywhere_is_an_error_or_harmless(data: st.DataObject) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": _entry(0, 8), "b": _entry(8, 12)}).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes(12)
    damaged = bytearray(whole)
    cut = data.draw(st.integers(0, len(whole)))
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        damaged[position] = data.draw(st.integers(0, 255))
    damaged = damaged[:cut]
    try:
        length = header_length(bytes(damaged[:8]), len(damaged), "f")
        header = parse_header(bytes(damaged[8 : 8 + length]), len(damaged), "f")
    except ValueError as error:
        assert str(error).startswith("f: ")
    else:  # whatever is accepted accounts for every byte
        assert sum(entry.num_bytes for entry in header.entries.values()) == len(damaged) - 8 - length


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "f", {"w": torch.ones(1000)})
    with SafetensorsReader(tmp_path / "f") as reader:
        with (tmp_path / "f").open("r+b") as file:
            file.truncate(500)
        with pytest.raises(ValueError, match="ended inside tensor w"):
            reader.read("w")


# ---- writing ----

ENTRIES = [TensorEntry("w", "F32", (10, 3)), TensorEntry("s", "U8", (4,))]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path / "f", ENTRIES) as writer:
        writer.write_rows("w", torch.ones(4, 3))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_was_not_written_stops_the_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="4 rows of"), SafetensorsWriter(tmp_path / "f", ENTRIES) as writer:
        writer.write_rows("w", torch.ones(4, 3))
        writer.write_rows("s", torch.ones(4, dtype=torch.uint8))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("rows", [torch.ones(11, 3), torch.ones(2, 4), torch.ones(2, 3, dtype=torch.int32)])
def test_rows_that_do_not_fit_are_refused(rows: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(AssertionError), SafetensorsWriter(tmp_path / "f", ENTRIES) as writer:
        writer.write_rows("w", rows)


def test_an_interrupted_file_is_resumed(tmp_path: Path) -> None:
    weight, scales = torch.randn(10, 3), torch.arange(4, dtype=torch.uint8)
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "f", ENTRIES, resumable=True) as writer:
        writer.write_rows("w", weight[:6])
        writer.write_rows("s", scales)
        raise KeyboardInterrupt
    assert temporary_name(tmp_path / "f").exists() and not (tmp_path / "f").exists()
    with SafetensorsWriter(tmp_path / "f", ENTRIES, resume={"w": 5, "s": 4}) as writer:
        writer.write_rows("w", weight[5:])
    found = load_file(tmp_path / "f")
    assert torch.equal(found["w"], weight) and torch.equal(found["s"], scales)


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is gone"):
        SafetensorsWriter(tmp_path / "f", ENTRIES, resume={})
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "f", ENTRIES, resumable=True):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="begun for other tensors"):
        SafetensorsWriter(tmp_path / "f", ENTRIES[:1], resume={})
