"""A forward and a backward chunk interleaved, as data: small moves of both sides for one layer, over all layers.

V3 [section 3.2.1, figure 4] hides the communication of one chunk behind the computation of another: while the forward's
tokens travel to their experts the backward computes, and the other way round.  Here that is a tuple of moves, one layer
of each side.  The forward's moves are in the order of its row and the backward's in the order of its own, but for the
shared experts, which need neither communication; how the two are shuffled is the whole art.

A move that is ``ahead`` belongs to the next layer: so the next layer's communication can begin in a gap of this one.
Weights that are ``behind`` are those of the layer before, and where a pair begins, those that the pair before has left
over: what is computed last has nothing to hide, what is communicated first needs something to pass under.

Chunks of other lengths than each other need nothing more: what has no partner runs alone.  Neither do dense layers:
their moves of communication do nothing.  All ranks of an expert group must use one interleaving, because their
communication must start in one order.  Free of torch, so that what draws or times an interleaving can read it.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    "run attention_in, run attention_out, start dispatch, wait dispatch, run experts, start combine, run shared, "
    "wait combine, run finish"
)
"""One layer's forward, where it runs alone: its shared experts under the combine."""
BACKWARD_ROW = _moves(
    "run finish, start combine, run shared, wait combine, run experts, start dispatch, wait dispatch, "
    "run attention_out, run attention_in"
)
"""One layer's backward, without weights, likewise."""
SHARED = Move("run", "shared")
SHARED_BETWEEN: dict[Side, tuple[Move, Move]] = {
    "F": (Move("wait", "dispatch"), Move("run", "finish")),
    "B": (Move("run", "finish"), Move("wait", "dispatch")),
}
"""Where in its row an interleaving may put it: forward not before the dispatch is through, as with recomputation it
forgets what is sent; backward not after it, as their gradients are added there."""
WEIGHTS = _moves("weight experts, weight shared, weight attention_out, weight attention_in")
"""One layer's weights, each somewhere after its stage of the backward."""


_SHIFTED: dict[int, str] = {-1: " behind", 0: "", 1: " ahead"}


@dataclass(frozen=True, slots=True)
class Instruction:
    """A move of one side."""

    side: Side
    move: Move
    shift: Literal[-1, 0, 1] = 0
    """It is the next layer's (1, ahead) or the last one's (-1, behind; of weights)."""

    def __str__(self) -> str:
        return f"{self.side} {self.move}{_SHIFTED[self.shift]}"


@dataclass(frozen=True, slots=True)
class Placed:
    """A move of one side in a layer, counted from 0 in that side's direction; -1 is the last of the pair before."""

    side: Side
    place: int
    move: Move


@dataclass(frozen=True)
class Interleaving:
    """One layer of each side.

    Raises:
        ValueError: a move that is missing or there twice, or out of order; a weight before its stage; a side that is in
            the next layer before it is through with this one.
    """

    name: str
    instructions: tuple[Instruction, ...]

    def __post_init__(self) -> None:
        self._check_row("F", FORWARD_ROW)
        self._check_row("B", BACKWARD_ROW)
        self._check_weights()

    @classmethod
    def parse(cls, name: str, text: str) -> Interleaving:
        """From lines of ``F start dispatch | B run experts | B run finish ahead | B weight experts behind``.

        Raises:
            ValueError: what is not of that form, or is no interleaving.
        """
        found = []
        for part in text.replace("\n", "|").split("|"):
            words = part.split()
            if not words:
                continue
            known = {str(move) for move in (*FORWARD_ROW, *BACKWARD_ROW, *WEIGHTS)}
            shifts = [shift for shift, suffix in _SHIFTED.items() if suffix.split() == words[3:]]
            if words[0] not in ("F", "B") or " ".join(words[1:3]) not in known or not shifts:
                raise ValueError(f"interleaving {name}: {part.strip()!r} is no move; write it like 'F start dispatch'")
            found.append(Instruction(words[0], Move(words[1], words[2]), shifts[0]))  # type: ignore[arg-type]
        return cls(name, tuple(found))

    def unrolled(self, num_forward: int, num_backward: int) -> Iterator[Placed]:
        """Every move of chunks of so many layers but the :meth:`left_over`; at place -1 what the pair before left."""
        layers = {"F": num_forward, "B": num_backward}
        for turn in range(-1, max(num_forward, num_backward)):  # before the first, what is ahead in it
            for one in self.instructions:
                place = turn + one.shift
                if min(one.shift, 0) <= place < layers[one.side]:
                    yield Placed(one.side, place, one.move)

    def left_over(self, num_forward: int, num_backward: int) -> list[Placed]:
        """Weights of the backward that have no turn after them: for the next pair, or for when none follows."""
        if num_backward < max(num_forward, 1):
            return []
        return [Placed("B", num_backward - 1, one.move) for one in self.instructions if one.shift < 0]

    def _of(self, side: Side, weights: bool) -> list[Instruction]:
        """Of one side, in the order in which one layer goes through them."""
        own = [one for one in self.instructions if one.side == side and (one.move.verb == "weight") == weights]
        return sorted(own, key=lambda one: -one.shift)

    def _check_row(self, side: Side, row: tuple[Move, ...]) -> None:
        found = self._of(side, weights=False)
        if any(one.shift < 0 for one in found):
            raise ValueError(f"interleaving {self.name}: only weights can be behind")
        moves, row = [one.move for one in found if one.move != SHARED], tuple(move for move in row if move != SHARED)
        if tuple(moves) != row:
            wrong = next((index for index, (a, b) in enumerate(zip(moves, row, strict=False)) if a != b), len(moves))
            there = str(moves[wrong]) if wrong < len(moves) else "nothing"
            wanted = str(row[wrong]) if wrong < len(row) else "nothing more"
            raise ValueError(f"interleaving {self.name}: a layer's {side} has {there} where {wanted} comes next")
        self._check_shared(side, [one.move for one in found])
        in_text = [one for one in self.instructions if one in found]
        if [one.shift for one in in_text] != sorted(one.shift for one in in_text):
            raise ValueError(f"interleaving {self.name}: {side} is ahead in the next layer before this one is through")

    def _check_shared(self, side: Side, moves: list[Move]) -> None:
        after, before = SHARED_BETWEEN[side]
        places = [index for index, move in enumerate(moves) if move == SHARED]
        if len(places) != 1 or not moves.index(after) < places[0] < moves.index(before):
            raise ValueError(
                f"interleaving {self.name}: a layer's {side} needs {SHARED} once, after {after} and before {before}"
            )

    def _check_weights(self) -> None:
        weights = self._of("B", weights=True)
        if self._of("F", weights=True) or {one.move for one in weights} != {*WEIGHTS} or len(weights) != len(WEIGHTS):
            listed = ", ".join(str(one.move) for one in weights)
            raise ValueError(f"interleaving {self.name}: has weights {listed}; B needs each of {len(WEIGHTS)} once")
        places = {(one.side, one.move): index - len(self.instructions) * one.shift
                  for index, one in enumerate(self.instructions)}  # fmt: skip
        for one in weights:
            if places["B", one.move] < places["B", Move("run", one.move.stage)]:
                raise ValueError(f"interleaving {self.name}: {one.move} stands before its stage of the backward")


V3 = Interleaving.parse(
    "v3",
    """
    F start dispatch
    B weight attention_in behind | B run shared | B wait combine | B run experts | B start dispatch
    B weight shared | B weight experts
    F wait dispatch | F run shared | F run experts | F start combine
    B wait dispatch | B run attention_out | B run attention_in | B run finish ahead | B start combine ahead
    B weight attention_out
    F wait combine | F run finish | F run attention_in ahead | F run attention_out ahead
    """,
)
"""After V3's figure 4: each of the four communications passes under computation of the other side.  The backward's
combine has least to pass under where a pair begins; so the shared experts' backward and weights of the pair before are
put there."""

SERIAL = Interleaving.parse(
    "serial",
    """
    F run attention_in | F run attention_out | F start dispatch | F wait dispatch | F run shared | F run experts
    F start combine | F wait combine | F run finish
    B run finish | B start combine | B wait combine | B run experts | B weight experts | B run shared | B weight shared
    B start dispatch | B wait dispatch | B run attention_out | B weight attention_out
    B run attention_in | B weight attention_in
    """,
)
"""The same pair with every communication waited for at once: layer by layer, nothing hidden."""
