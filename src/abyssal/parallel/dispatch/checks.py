"""What a dispatcher refuses before anything is sent, and the token by which ranks know that they plan the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from abyssal.parallel.dispatch.routes import MOST_SLOTS
from abyssal.spec.placement import Placement


def check_rows(what: str, given: int, planned: int) -> None:
    """Refuse tensors of another plan."""
    if given != planned:
        raise ValueError(f"{what}: {given} were given and the plan is for {planned}; give those it was made for")


def check_placements(placements: Mapping[int, Placement], num_ranks: int, on_node: int = 1) -> None:
    """Refuse placements over another number of ranks than the group has, or with more slots than can be numbered.

    Args:
        on_node: ranks of the group on one node.
    """
    for layer, placement in placements.items():
        if placement.num_ranks != num_ranks:
            raise ValueError(
                f"placement of layer {layer} is over {placement.num_ranks} ranks and the expert group has {num_ranks}; "
                f"make it with num_ranks={num_ranks}"
            )
        if placement.slots_per_rank * on_node > MOST_SLOTS:
            raise ValueError(
                f"placement of layer {layer} has {placement.slots_per_rank} slots on each of the {on_node} ranks of a "
                f"node; a node can have {MOST_SLOTS} together"
            )


def fingerprint(layer: int, placement: Placement, top_k: int) -> int:
    """A number that travels with the counts; another rank's differs where it plans something else."""
    return zlib.crc32(repr((layer, placement.slots, placement.num_ranks, top_k)).encode())


def check_fingerprints(own: int, others: Sequence[int]) -> None:
    """Refuse peers that plan another layer, placement or number of choices at this point."""
    odd = [peer for peer, other in enumerate(others) if other != own]
    if odd:
        raise ValueError(
            f"peers {odd[:8]} of the group are not at this layer with this rank's placement and number of choices; "
            "give all ranks the same placements, and plan their layers in one order"
        )
