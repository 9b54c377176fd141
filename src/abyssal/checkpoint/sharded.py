"""A flat dictionary of tensors on disk, in PyTorch's distributed-checkpoint format with a JSON sidecar.

    FOLDER/.metadata       PyTorch's table: which part of which tensor lies where
    FOLDER/__0_0.distcp    the tensors that rank 0 holds, as ``torch.save`` writes each; one such file a rank
    FOLDER/state.json      everything else (:mod:`abyssal.checkpoint.sidecar`)

Only tensors go into PyTorch's part, so ``torch.distributed.checkpoint.load`` reads it, and nothing in it needs a free
unpickler (:mod:`abyssal.checkpoint.safe_metadata`).  Bytes are kept as they are in every dtype.  One process writes
and reads here, or all ranks of a group together, which share the file system; what was saved by some may be loaded by
any others, each the rectangles that it holds.  PyTorch's own save across ranks is not called: it checks that volumes
add up and not that every part is there, and it can leave ranks waiting for one that failed.  The same tensors and
fields give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from abyssal.checkpoint.folder import listed
from abyssal.checkpoint.ranks import Ranks
from abyssal.checkpoint.sharded_plan import Plan, check_plans, plan_of, record_of, rectangle_of, shards_of
from abyssal.checkpoint.sharded_reader import ShardedReader
from abyssal.checkpoint.sharded_writer import write_file, write_table
from abyssal.checkpoint.shards import Sharded
from abyssal.checkpoint.sidecar import Sidecar, json_copy, read_sidecar, write_sidecar
from abyssal.checkpoint.whole_folder import whole_folder

_OVERHEAD_BYTES, _OVERHEAD_BYTES_PER_TENSOR = 64 << 10, 4 << 10


def bytes_needed(tensors: Mapping[str, Tensor | Sharded]) -> int:
    """Room on the disk that :func:`save_sharded` takes at most for this rank's part, in bytes (fields of more than
    32 KiB aside)."""
    parts = [(tensor.nbytes, len(shards_of(tensor))) for tensor in tensors.values()]
    return sum(num_bytes + num * _OVERHEAD_BYTES_PER_TENSOR for num_bytes, num in parts) + _OVERHEAD_BYTES


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor | Sharded],
    fields: dict[str, Any],
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Write ``folder`` whole or not at all; one that is there already is replaced.

    Args:
        folder: its parents are made.
        tensors: by name, of any dtype; they must not change meanwhile.  A plain one is given by this rank alone.
        fields: JSON values; those of the first rank are written.
        group: over gloo, whose ranks all call this and return together; by default this process is alone.

    Raises:
        ValueError: a field that JSON cannot keep, or ranks that do not hold every tensor whole and once: what is
            missing or twice is named.
        OSError: the disk is full or fails, on some rank, whose number is in the message on all of them.  Nothing is
            left behind, and an older ``folder`` is as it was.
    """
    ranks = Ranks(group)
    ranks.together(lambda: _save(folder, tensors, fields, ranks))  # nobody returns before the folder has its name


def _save(folder: Path, tensors: Mapping[str, Tensor | Sharded], fields: dict[str, Any], ranks: Ranks) -> None:
    def planned() -> tuple[Plan, dict[str, Any]]:
        return plan_of(tensors), json_copy(fields)

    plans = ranks.gather(planned)
    with ExitStack() as stack:
        records = ranks.first(lambda: check_plans([plan for plan, _ in plans]))
        partial = ranks.first(lambda: stack.enter_context(whole_folder(folder)))
        written = ranks.gather(lambda: write_file(partial, tensors, ranks.rank))
        if ranks.is_first:
            write_sidecar(partial, Sidecar(plans[0][1], records, write_table(partial, written)))


def load_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor | Sharded],
    part: str = "",
    group: distributed.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill ``tensors`` in place with those of ``folder``, and return its fields.

    ``part`` is what the names of ``tensors`` begin with, all that do and no others; the rest is left on the disk.
    Everything is checked first: names, shapes and dtypes, and the checksum of every file.  With a group each rank gives
    what it wants, whoever saved it; a name must be asked for by one of them; and each file is checked by one of them.

    Raises:
        ValueError: one message naming the tensors that are missing, unexpected or of another shape or dtype, or the
            file that is missing, truncated or altered; nothing was changed.  Also for files that agree with their
            checksums and hold no tensors: nothing is run, but some of ``tensors`` may be filled by then.  What one rank
            finds is raised on all.
    """
    ranks = Ranks(group)
    with ExitStack() as stack:
        reader = ranks.together(lambda: stack.enter_context(ShardedReader(folder)))
        _check_tensors(reader, tensors, part, ranks)
        reader.check_files(ranks)
        ranks.together(lambda: _fill(reader, tensors))
    return reader.fields


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields that were saved with the tensors.

    Raises:
        ValueError: ``folder`` holds no complete checkpoint.
    """
    return read_sidecar(folder).fields


def _fill(reader: ShardedReader, tensors: Mapping[str, Tensor | Sharded]) -> None:
    for name, tensor in tensors.items():
        for shard in shards_of(tensor):
            reader.read_into(name, rectangle_of(shard), shard.tensor)


def _check_tensors(reader: ShardedReader, tensors: Mapping[str, Tensor | Sharded], part: str, ranks: Ranks) -> None:
    def unasked() -> set[str]:
        plan_of(tensors)
        return {name for name in reader.tensors if name.startswith(part) and name not in tensors}

    by_rank = ranks.gather(unasked)
    nobodys = ranks.first(lambda: set.intersection(*by_rank))
    problems = [f"{name} is missing" for name in tensors if name not in reader.tensors]
    problems += [f"{name} is unexpected" for name in reader.tensors if name in nobodys]
    for name, tensor in tensors.items():
        found, wanted = reader.tensors.get(name), record_of(tensor)
        if found is not None and found != wanted:
            problems.append(f"{name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}")
    ranks.together(lambda: _refuse(reader.folder, problems))


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"{folder}: the tensors are not those of this run: {listed(problems)}; go on with the model and the "
            "options with which it was saved"
        )
