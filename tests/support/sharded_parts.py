"""A checkpoint as many ranks write it, by one process that takes each rank's part in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from abyssal.checkpoint.sharded_plan import check_plans, plan_of
from abyssal.checkpoint.sharded_writer import write_file, write_table
from abyssal.checkpoint.shards import Sharded
from abyssal.checkpoint.sidecar import Sidecar, write_sidecar
from abyssal.checkpoint.whole_folder import whole_folder


def save_parts(
    folder: Path, parts: Sequence[Mapping[str, Tensor | Sharded]], fields: dict[str, Any] | None = None
) -> None:
    """What ``save_sharded`` writes where rank r gives ``parts[r]``."""
    records = check_plans([plan_of(part) for part in parts])
    with whole_folder(folder) as partial:
        files = write_table(partial, [write_file(partial, part, rank) for rank, part in enumerate(parts)])
        write_sidecar(partial, Sidecar(fields or {}, records, files))
