"""How many bytes a dispatcher sends over which link: inside the rank, inside the node, across nodes.

Every byte is counted once, where it is sent.  What stays on its rank crosses no link and is counted by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class LinkBytes:
    """Bytes sent, by the link they took, and messages to other ranks."""

    stayed: int = 0
    inside: int = 0
    across: int = 0
    messages: int = 0

    def add(self, by_rank: Sequence[int], nodes: Sequence[int], rank: int) -> None:
        """Count a message of ``by_rank[r]`` bytes to each rank r of a group, which is on node ``nodes[r]``.

        Args:
            rank: the sender's place in the group.
        """
        for peer, (size, node) in enumerate(zip(by_rank, nodes, strict=True)):
            if peer == rank:
                self.stayed += size
            elif size:
                self.messages += 1
                if node == nodes[rank]:
                    self.inside += size
                else:
                    self.across += size


@dataclass
class Traffic:
    """What one dispatcher has sent from this rank; read it when nothing is under way."""

    plan: LinkBytes = field(default_factory=LinkBytes)
    """Counts, and where rows go."""
    dispatch: LinkBytes = field(default_factory=LinkBytes)
    """Rows and weights to experts: in the forward tokens, in the backward gradients of what combine returned."""
    combine: LinkBytes = field(default_factory=LinkBytes)
    """Rows and weights back: in the forward expert outputs, in the backward gradients of what dispatch brought."""

    def reset(self) -> None:
        """Begin to count anew; what was started before is no longer counted here."""
        self.plan, self.dispatch, self.combine = LinkBytes(), LinkBytes(), LinkBytes()
