"""Which expert stands in which physical slot, and on which rank: a record free of torch.

The router speaks of *logical* experts; the tensors are stacked by *physical slot*.  With redundant experts (V3 report
section 3.4) an expert has several slots.  The algorithms that choose a placement from observed loads are in
``abyssal.parallel.placement``; this is what they produce and what the model, the dispatcher and the planner read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """``slots[p]`` is the logical expert of physical slot ``p``; ranks hold equal runs of slots, in order.

    Raises:
        ValueError: an expert without a slot, a slot of no expert, or slots that do not divide over the ranks.
    """

    num_experts: int
    slots: tuple[int, ...]
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"placement.num_experts is {self.num_experts}: set it to 1 or more")
        if self.num_ranks < 1 or len(self.slots) % self.num_ranks:
            raise ValueError(
                f"placement.num_ranks is {self.num_ranks}: set it to a divisor of the {len(self.slots)} slots"
            )
        for slot, expert in enumerate(self.slots):
            if not 0 <= expert < self.num_experts:
                raise ValueError(f"placement.slots[{slot}] is {expert}: experts are 0 to {self.num_experts - 1}")
        missing = sorted(set(range(self.num_experts)) - set(self.slots))
        if missing:
            raise ValueError(f"placement.slots has no slot for expert {missing[0]}: give every expert at least one")

    @classmethod
    def identity(cls, num_experts: int, num_ranks: int = 1) -> Placement:
        """Every expert once, in order."""
        return cls(num_experts, tuple(range(num_experts)), num_ranks)

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots) // self.num_ranks

    @property
    def is_identity(self) -> bool:
        """Whether slot p holds expert p, so that slots need no mapping."""
        return self.slots == tuple(range(self.num_experts))

    def rank_of_slot(self, slot: int) -> int:
        """The rank that holds physical slot ``slot``."""
        if not 0 <= slot < len(self.slots):
            raise IndexError(f"slot {slot} of {len(self.slots)}")
        return slot // self.slots_per_rank

    def slots_of_rank(self, rank: int) -> tuple[int, ...]:
        """Physical slots of ``rank``, in the order in which it stacks them; ``slots[p]`` gives their experts."""
        if not 0 <= rank < self.num_ranks:
            raise IndexError(f"rank {rank} of {self.num_ranks}")
        return tuple(range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank))

    def experts_of_rank(self, rank: int) -> tuple[int, ...]:
        """The logical expert of each slot of ``rank``, in the order in which it stacks them."""
        if not 0 <= rank < self.num_ranks:
            raise IndexError(f"rank {rank} of {self.num_ranks}")
        return self.slots[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    def replicas(self, expert: int) -> tuple[int, ...]:
        """Physical slots that hold ``expert``, ascending."""
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of {self.num_experts}")
        return self.replica_table()[expert]

    def replica_table(self) -> tuple[tuple[int, ...], ...]:
        """:meth:`replicas` of every expert, in one pass over the slots."""
        table: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.slots):
            table[expert].append(slot)
        return tuple(tuple(slots) for slots in table)
