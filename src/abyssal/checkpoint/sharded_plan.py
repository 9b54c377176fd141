"""Whether what the ranks hold of each tensor is all of it, once, before any of it is written.

A tensor of which a row is held by no rank would be saved with a hole, and one that two hold says nothing of which is
right; neither may wait until somebody loads it.  Experts are named, as they are what gets lost on a change of
placement: in a stacked tensor the leading axis is the logical expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from abyssal.checkpoint.folder import listed
from abyssal.checkpoint.rectangles import Fault, Rectangle, first_fault, overlap
from abyssal.checkpoint.shards import Shard, Sharded
from abyssal.checkpoint.sidecar import TensorRecord

Plan = dict[str, tuple[TensorRecord, list[Rectangle]]]
"""By name, a tensor and the rectangles of it that a rank holds."""


def record_of(tensor: Tensor | Sharded) -> TensorRecord:
    return TensorRecord(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def shards_of(tensor: Tensor | Sharded) -> Sequence[Shard]:
    """What this rank holds of a tensor, nothing that is empty; a plain one is whole."""
    if not isinstance(tensor, Sharded):
        return (Shard((0,) * tensor.dim(), tensor),)
    return [shard for shard in tensor.shards if shard.tensor.numel()]


def rectangle_of(shard: Shard) -> Rectangle:
    return Rectangle(tuple(shard.offsets), tuple(shard.tensor.shape))


def plan_of(tensors: Mapping[str, Tensor | Sharded]) -> Plan:
    """What this rank holds.

    Raises:
        ValueError: a shard beyond its tensor or of another dtype, by name.
    """
    plan: Plan = {}
    for name, tensor in tensors.items():
        record, shards = record_of(tensor), shards_of(tensor)
        whole = Rectangle.whole(record.shape)
        for shard in shards:
            rectangle = rectangle_of(shard)
            axes = len(rectangle.offsets), len(rectangle.sizes)
            if axes != (len(whole.sizes),) * 2 or (rectangle.num_elements and overlap(whole, rectangle) != rectangle):
                raise ValueError(
                    f"{name}: the shard at {list(shard.offsets)} of shape {list(shard.tensor.shape)} lies outside the "
                    f"tensor, whose shape is {list(record.shape)}"
                )
            if shard.tensor.dtype != tensor.dtype:
                raise ValueError(
                    f"{name}: the shard at {list(shard.offsets)} is {shard.tensor.dtype}, the tensor {tensor.dtype}"
                )
        plan[name] = record, [rectangle_of(shard) for shard in shards]
    return plan


def check_plans(plans: Sequence[Plan]) -> dict[str, TensorRecord]:
    """The tensors that the ranks hold together, after checking that each is there whole and once.

    Raises:
        ValueError: naming the tensors, and of each the first part that no rank holds, or that several do.
    """
    records: dict[str, TensorRecord] = {}
    held: dict[str, list[tuple[int, Rectangle]]] = {}
    problems: list[str] = []
    for rank, plan in enumerate(plans):
        for name, (record, rectangles) in plan.items():
            if records.setdefault(name, record) != record:
                found = f"{record.dtype} {list(record.shape)}"
                problems.append(f"{name} is {found} on rank {rank} and otherwise on a rank before")
                continue
            held.setdefault(name, []).extend((rank, rectangle) for rectangle in rectangles)
    for name, record in records.items():
        fault = _fault(record, [rectangle for _, rectangle in held[name]])
        if fault is not None:
            owners = sorted(held[name][index][0] for index in fault.owners)
            problems.append(_problem(_part(name, fault.part, record), owners))
    if problems:
        raise ValueError(f"the ranks do not hold every tensor whole and once: {listed(problems)}; nothing was saved")
    return records


def _fault(record: TensorRecord, rectangles: Sequence[Rectangle]) -> Fault | None:
    whole = Rectangle.whole(record.shape)
    if whole.num_elements:
        return first_fault(whole, rectangles)
    return None if len(rectangles) == 1 else Fault(whole, tuple(range(len(rectangles))))


def _part(name: str, part: Rectangle, record: TensorRecord) -> str:
    stacked = ".experts." in name and len(record.shape) > 1
    if not stacked:
        return name if part.sizes == record.shape else f"{name}{part}"
    first, last = part.offsets[0], part.ends[0] - 1
    experts = f"expert {first}" if first == last else f"experts {first} to {last}"
    whole = part.sizes[1:] == record.shape[1:]
    return f"{experts} of {name}" if whole else f"{experts} of {name} ({part})"


def _problem(part: str, ranks: Sequence[int]) -> str:
    return f"{part} comes from ranks {', '.join(map(str, ranks))}" if ranks else f"no rank holds {part}"
