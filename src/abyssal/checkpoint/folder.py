"""A Hugging Face model folder opened for reading: which file holds which tensor, and their rows in any dtype.

Opening checks the files against each other (headers, index, shards on disk); whether the tensors are those of the
model is :mod:`abyssal.checkpoint.contents`.  Rows come out in the dtype that is asked for, whether they are stored in
it, in another one, or in block-scaled FP8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, KeysView
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.checkpoint.names import scale_name
from abyssal.checkpoint.safetensors_file import TORCH_DTYPES, SafetensorsReader
from abyssal.checkpoint.safetensors_header import TensorEntry
from abyssal.kernels.fp8_block import BLOCK, dequantise_blocks
from abyssal.spec.hf_config import CONFIG_NAME, load_config, parse_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FP8 = "F8_E4M3"
"""Safetensors name of the codes of block-scaled FP8."""
WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", FP8})
"""What a weight may be stored in."""
_NAMED_IN_ERRORS = 5
_BLOCK_ELEMENTS = 8 << 20  # 32 MiB in FP32


def row_blocks(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) that cover a tensor in blocks of a few tens of MiB, each start a multiple of 128."""
    width = max(1, entry.num_elements // max(1, entry.num_rows))
    step = max(BLOCK, _BLOCK_ELEMENTS // width // BLOCK * BLOCK)
    for start in range(0, entry.num_rows, step):
        yield start, min(start + step, entry.num_rows)


class CheckpointFolder:
    """The safetensors files of one model folder, open.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: a configuration that is not supported, no weights, a broken file, or an index that does not agree
            with the files; naming the file, the tensors and what to do.
    """

    def __init__(self, path: str | Path, drop_cache: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{path}: is not a folder; give a Hugging Face model folder (config.json, *.safetensors)")
        self.config = load_config(self.path)
        self.spec = parse_config(self.config, str(self.path / CONFIG_NAME))
        self._readers: dict[str, SafetensorsReader] = {}
        try:
            self._location = self._locate(drop_cache)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> KeysView[str]:
        """Every tensor of the folder, FP8 scales among them."""
        return self._location.keys()

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return [reader.path for reader in self._readers.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._location

    def entry(self, name: str) -> TensorEntry:
        return self._location[name].entries[name]

    def position(self, name: str) -> tuple[str, int]:
        """File and offset of a tensor: the order in which reading is fastest."""
        reader = self._location[name]
        return reader.path.name, reader.header.offsets[name]

    def dtype(self) -> torch.dtype:
        """The dtype of most weights; BF16 for FP8, which is a storage format."""
        sizes: dict[str, int] = {}
        for name in self.names:
            entry = self.entry(name)
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_elements
        most = max((dtype for dtype in sizes if dtype in WEIGHT_DTYPES), key=sizes.__getitem__, default="BF16")
        return torch.bfloat16 if most == FP8 else TORCH_DTYPES[most]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows as they are stored."""
        return self._location[name].read(name, start, stop)

    def decode_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows in ``dtype``; of an FP8 tensor multiplied by their scales (``start`` is a multiple of 128 there)."""
        stored = self.read_rows(name, start, stop)
        if self.entry(name).dtype != FP8:
            return stored.to(dtype)
        assert start % BLOCK == 0, f"rows of {name} from {start} on: FP8 is read in blocks of {BLOCK} rows"
        scales = self.read_rows(scale_name(name), start // BLOCK, -(-stop // BLOCK)).float()
        if not torch.isfinite(scales).all():
            raise ValueError(
                f"{self.file_of(name)}: {scale_name(name)} has a scale that is infinite or NaN; fetch it again"
            )
        return dequantise_blocks(stored, scales, dtype)

    def fill(self, target: Tensor, name: str) -> None:
        """Write tensor ``name`` into ``target``, straight from disk if dtype and device allow, else in row blocks."""
        entry, reader = self.entry(name), self._location[name]
        if target.device.type == "cpu" and target.is_contiguous() and target.dtype == TORCH_DTYPES[entry.dtype]:
            reader.read_into(name, target)
            return
        working = torch.float64 if target.dtype == torch.float64 else torch.float32
        for start, stop in row_blocks(entry):  # the copy rounds, once
            is_fp8 = entry.dtype == FP8
            rows = self.decode_rows(name, start, stop, working) if is_fp8 else self.read_rows(name, start, stop)
            target[start:stop].copy_(rows)

    def file_of(self, name: str) -> Path:
        return self._location[name].path

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- opening ----

    def _locate(self, drop_cache: bool) -> dict[str, SafetensorsReader]:
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if single.is_file() and index.is_file():
            raise ValueError(
                f"{self.path}: has both {SINGLE_FILE} and {INDEX_FILE}; delete the one that is not the model"
            )
        shards = sorted(path.name for path in self.path.glob("model-*-of-*.safetensors"))
        if single.is_file():
            self._readers = {SINGLE_FILE: SafetensorsReader(single, drop_cache)}
            return dict.fromkeys(self._readers[SINGLE_FILE].entries, self._readers[SINGLE_FILE])
        if not index.is_file():
            raise ValueError(f"{self.path}: {_no_weights(self.path, shards)}")
        weight_map = _read_json(index, "it says which file holds which tensor").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index}: has no weight_map of tensor names to file names; fetch it again")
        files = sorted(set(weight_map.values()))
        if missing := [file for file in files if not (self.path / file).is_file()]:
            raise ValueError(f"{index}: names {listed(missing)}, not in the folder; fetch the missing files")
        if unnamed := [shard for shard in shards if shard not in files]:
            raise ValueError(f"{index}: does not name {listed(unnamed)}; fetch the index that belongs to these files")
        for file in files:
            self._readers[file] = SafetensorsReader(self.path / file, drop_cache)
        self._compare_index(index, weight_map)
        return {name: self._readers[file] for name, file in weight_map.items()}

    def _compare_index(self, index: Path, weight_map: dict[str, str]) -> None:
        wrong = [
            f"{name} (not in {file})" for name, file in weight_map.items() if name not in self._readers[file].entries
        ]
        for file, reader in self._readers.items():
            wrong += [f"{name} (in {file})" for name in reader.entries if weight_map.get(name) != file]
        if wrong:
            raise ValueError(f"{index}: disagrees with the files about {listed(wrong)}; fetch index and files again")


def _read_json(path: Path, purpose: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; {purpose}, so fetch it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error}); fetch it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: is not a JSON object; fetch it again")
    return fields


def _no_weights(path: Path, shards: list[str]) -> str:
    if shards:
        return f"has {len(shards)} shards but no {INDEX_FILE}; fetch the index, without it a missing shard goes unseen"
    if any(path.glob("pytorch_model*.bin")):
        return "has weights in pytorch_model*.bin alone; save them as safetensors first (transformers' save_pretrained)"
    return f"has neither {SINGLE_FILE} nor {INDEX_FILE}; fetch the weights"


def listed(items: list[str]) -> str:
    more = len(items) - _NAMED_IN_ERRORS
    return "; ".join(items[:_NAMED_IN_ERRORS]) + (f"; and {more} more" if more > 0 else "")
