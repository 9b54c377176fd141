"""Ranks that export together write the bytes that one process writes; what fails on one of them leaves nothing."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from abyssal.checkpoint import layout, model_folder
from abyssal.checkpoint.layout import Format
from abyssal.checkpoint.sharded import load_sharded
from abyssal.checkpoint.sharded_reader import ShardedReader
from abyssal.checkpoint.shards import Shard, Sharded
from abyssal.train.config import CheckpointConfig
from abyssal.train.export import export_checkpoint, save_result_from_state
from abyssal.train.folder import RunFolder
from abyssal.train.run import run_training
from tests.parallel.test_checkpoints import refused, rows_of, world
from tests.support.checkpoints import contents
from tests.support.run_data import prepare_texts, run_of
from tests.unit.train.test_step import CONFIG, SPEC

SHARD_BYTES = 40_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, a checkpoint of the second, and an average."""
    folder = tmp_path_factory.mktemp("export")
    prepared = prepare_texts(folder / "data", [f"alpha beta {number} gamma" * 9 for number in range(20)], 300, 0.2)
    config = replace(CONFIG, steps=2, ema_decay=0.9, checkpoint=CheckpointConfig(save_every=2))
    run_training(RunFolder(folder / "run"), run_of(prepared, SPEC, config), measure_peak=False)
    return folder / "run"


def export_together(run: Path, destination: Path, form: Format, average: bool) -> int:
    written = export_checkpoint(run, destination, form, average=average, max_shard_bytes=SHARD_BYTES, group=world())
    return written.num_tensors


def export_on_a_full_disk(run: Path, destination: Path, full: int) -> str:
    group, write = world(), model_folder._Plan._write_shard

    def no_room(self: model_folder._Plan, partial: Path, shard: layout.Shard) -> None:
        write(self, partial, shard)
        if group.rank() == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model_folder._Plan._write_shard = no_room
    try:
        return refused(lambda: export_together(run, destination, "bf16", average=False))
    finally:
        model_folder._Plan._write_shard = write


def save_state(run: Path, checkpoint: Path, form: Format) -> None:
    """As at the end of a run whose state lies in rows on its ranks, and that saved no checkpoint."""
    group = world()
    state: dict[str, Tensor | Sharded] = {}
    with ShardedReader(checkpoint) as reader:
        for name, record in reader.tensors.items():
            rows = rows_of(record.shape[0], group.rank(), group.size())
            part = torch.empty((rows.stop - rows.start, *record.shape[1:]), dtype=getattr(torch, record.dtype))
            offsets = (rows.start, *(0 for _ in record.shape[1:]))
            state[name] = Sharded(record.shape, part.dtype, (Shard(offsets, part),))
    load_sharded(checkpoint, state, group=group)
    save_result_from_state(RunFolder(run), 2, state, form, group)


@pytest.mark.parametrize(("form", "average"), [("bf16", False), ("fp8", False), ("fp32", True)])
def test_ranks_write_the_bytes_of_one_process(form: Format, average: bool, workers, run: Path, tmp_path: Path) -> None:
    alone = export_checkpoint(run, tmp_path / "alone", form, average=average, max_shard_bytes=SHARD_BYTES)
    assert workers(2)(export_together, run, tmp_path / "together", form, average) == [alone.num_tensors] * 2
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert len(list((tmp_path / "alone").glob("*.safetensors"))) > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_leaves_no_folder(full: int, workers, run: Path, tmp_path: Path) -> None:
    for error in workers(2)(export_on_a_full_disk, run, tmp_path / "model", full):
        assert f"rank {full}: No space left on device" in error
    assert not list(tmp_path.iterdir())


def test_bad_input_is_told_to_all_ranks(workers, run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for error in workers(2)(export_refused, run, tmp_path / "there"):
        assert "there: exists; give another folder" in error
    for error in workers(2)(export_refused, tmp_path, tmp_path / "model"):
        assert "holds no run.json, so it is no run" in error


def export_refused(run: Path, destination: Path) -> str:
    return refused(lambda: export_together(run, destination, "bf16", average=False))


def test_the_result_of_a_run_that_saved_no_checkpoint(workers, run: Path, tmp_path: Path) -> None:
    """From a state in rows on four ranks: the folders that one process made of its own model."""
    copy = RunFolder(tmp_path / "run")
    copy.path.mkdir()
    (copy.path / "run.json").write_bytes((run / "run.json").read_bytes())
    copy.tokenizer.symlink_to(run / "tokenizer")
    workers(4)(save_state, copy.path, run / "checkpoints" / "step-00000002", CONFIG.model_format)
    for name in ("model", "model-average"):
        assert contents(copy.path / name) == contents(run / name)
    assert sorted(path.name for path in copy.path.iterdir()) == ["model", "model-average", "run.json", "tokenizer"]
