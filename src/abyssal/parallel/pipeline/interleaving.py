"""A forward and a backward chunk interleaved, as data: small moves of both sides for one layer, over all layers.

V3 [section 3.2.1, figure 4] hides the communication of one chunk behind the computation of another: while the forward's
tokens travel to their experts, the backward computes, and the other way round.  Here that is a tuple of moves; the
forward's are in the order of its row, the backward's in the order of its own, and how the two are shuffled is the whole
art.  ``ahead`` says that a move belongs to the next layer: so the backward's communication of the next layer can begin
in the gap of this one.

Chunks of other lengths than each other need nothing: what has no partner runs alone.  Dense layers neither: their moves
of communication do nothing.  Free of torch, so that what draws or times an interleaving can read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["F", "B"]
Verb = Literal["run", "start", "wait", "weight"]
Stage = Literal["attention_in", "attention_out", "dispatch", "shared", "experts", "combine", "finish"]


@dataclass(frozen=True, slots=True)
class Move:
    """Run a stage; or start its communication, or wait for it; or run the gradients of its weights."""

    verb: Verb
    stage: Stage

    def __str__(self) -> str:
        return f"{self.verb} {self.stage}"


def _moves(text: str) -> tuple[Move, ...]:
    return tuple(Move(*part.split()) for part in text.split(", "))  # type: ignore[arg-type]


FORWARD_ROW = _moves(
    "run attention_in, run attention_out, start dispatch, wait dispatch, run shared, run experts, start combine, "
    "wait combine, run finish"
)
"""One layer's forward."""
BACKWARD_ROW = _moves(
    "run finish, start combine, wait combine, run experts, run shared, start dispatch, wait dispatch, "
    "run attention_out, run attention_in"
)
"""One layer's backward, without weights."""
WEIGHTS = _moves("weight experts, weight shared, weight attention_out, weight attention_in")
"""One layer's weights, each after its stage of the backward."""
