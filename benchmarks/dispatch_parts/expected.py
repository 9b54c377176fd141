"""What has to travel, counted from the routing alone: beside it stand the dispatcher's and the link's own counts.

One token at a time and without the dispatchers' index work, so that it is a check on it.

- Plain: each choice is a copy of the token.  It stays, or goes inside its node, or across.
- Hierarchical: a token crosses once to each other node that has one of its experts, to the rank of the sender's index,
  and from there goes once to each rank of the node that has one of them; copies that stay on a rank count as stayed, on
  either hop.
- Weights, four bytes a choice, go the same ways, one for each choice on each hop.

Over random scores plain sends K(N-1)/N copies of a token across, hierarchical no more than M(N-1)/N.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .setting import BF16_BYTES, WEIGHT_BYTES, Setting

LINKS = ("stayed", "inside", "across")


@dataclass(frozen=True)
class Copies:
    """Of all tokens together, by the link they take."""

    rows: dict[str, int]
    weights: dict[str, int]

    def dispatch_bytes(self, setting: Setting) -> dict[str, int]:
        """FP8 tokens and the weights of choices."""
        return {link: self.rows[link] * setting.token_bytes + self.weights[link] * WEIGHT_BYTES for link in LINKS}

    def combine_bytes(self, setting: Setting) -> dict[str, int]:
        """BF16 rows."""
        return {link: self.rows[link] * setting.hidden * BF16_BYTES for link in LINKS}


def plain_copies(setting: Setting) -> Copies:
    """Of one all-to-all."""
    rows: Counter[str] = Counter()
    for source in range(setting.ranks):
        for experts in setting.expert_ids(source).tolist():
            rows.update(_link(setting, source, _rank_of(setting, expert)) for expert in experts)
    return _copies(rows, rows)


def hierarchical_copies(setting: Setting) -> Copies:
    """Of both hops."""
    rows: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for source in range(setting.ranks):
        for experts in setting.expert_ids(source).tolist():
            ranks = [_rank_of(setting, expert) for expert in experts]
            gates = [_gate(setting, source, rank) for rank in ranks]
            hops = {(source, gate) for gate in gates}, set(zip(gates, ranks, strict=True))
            choices = [(source, gate) for gate in gates], list(zip(gates, ranks, strict=True))
            for copies, chosen in zip(hops, choices, strict=True):
                rows.update(_link(setting, *hop) for hop in copies)
                weights.update(_link(setting, *hop) for hop in chosen)
    return _copies(rows, weights)


def _rank_of(setting: Setting, expert: int) -> int:
    return expert // (setting.experts // setting.ranks)


def _gate(setting: Setting, source: int, rank: int) -> int:
    """The rank of the source's index on the node of ``rank``."""
    return rank // setting.ranks_per_node * setting.ranks_per_node + source % setting.ranks_per_node


def _link(setting: Setting, source: int, target: int) -> str:
    if source == target:
        return "stayed"
    return "inside" if source // setting.ranks_per_node == target // setting.ranks_per_node else "across"


def _copies(rows: Counter[str], weights: Counter[str]) -> Copies:
    return Copies({link: rows[link] for link in LINKS}, {link: weights[link] for link in LINKS})
