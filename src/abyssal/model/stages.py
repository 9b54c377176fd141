"""A layer as a row of stages, whole or cut apart.

The row is: *attention_in* (norm, projections, rotation, cache write) → *attention_out* (attention, output projection,
residual, norm, router) → *dispatch* → *shared* → *experts* → *combine* → *finish* (residual).  Only dispatch and
combine communicate; they start and are waited for.

Whole, the stages run one after another under one autograd graph (:func:`run_stages`).  Cut, each stage has a graph of
its own between explicit records, so that a schedule may run the stages of a forward chunk between those of a backward
chunk: :class:`StageRun` gives each stage ``forward``, ``backward_input`` and ``backward_weight``, and the stages that
communicate also ``start_forward`` and ``start_backward`` [V3 section 3.2.1, figure 4].

Legend: T tokens, D model, H heads, Q query width, X cached values, K chosen experts, A rows sorted by slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from abyssal.kernels.fp8_tiles import Quantised
from abyssal.model.dispatch import DispatchPlan, Done, Handle, Rows, Then, combine, dispatch, start_dispatch
from abyssal.model.step import Step
from abyssal.precision.linear import WeightQueue

if TYPE_CHECKING:
    from abyssal.model.block import Block

StageName = Literal["attention_in", "attention_out", "dispatch", "shared", "experts", "combine", "finish"]

STAGES: tuple[StageName, ...] = (
    "attention_in",
    "attention_out",
    "dispatch",
    "shared",
    "experts",
    "combine",
    "finish",
)
COMMUNICATING: frozenset[StageName] = frozenset({"dispatch", "combine"})
_READS: dict[StageName, tuple[str, ...]] = {
    "attention_in": ("x_TD",),
    "attention_out": ("x_TD", "query_THQ", "entries_TX"),
    "shared": ("u_TD",),
    "experts": ("rows_AD", "weights_A"),
    "finish": ("x_TD", "shared_TD", "combined_TD"),
}
"""Fields of the record that a stage computes with; it hands on the others, and their gradients back, as they are."""


@dataclass(frozen=True)
class StageIO:
    """What one stage hands to the next.  Gradients travel back in the same record, field by field."""

    x_TD: Tensor
    """Residual stream."""
    query_THQ: Tensor | None = None
    entries_TX: Tensor | None = None
    u_TD: Tensor | None = None
    """Normalised input of the feed-forward."""
    weights_TK: Tensor | None = None
    plan: DispatchPlan | None = None
    rows_AD: Tensor | None = None
    """Rows at their experts: inputs before the stage *experts*, outputs after it."""
    rows_codes: Quantised | None = None
    """The inputs as they travelled, when they did so in FP8."""
    weights_A: Tensor | None = None
    shared_TD: Tensor | None = None
    combined_TD: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def having(self, **changes: Tensor | Quantised | DispatchPlan | None) -> StageIO:
        """A copy with other values in some fields; a tenth of the time of ``dataclasses.replace``, which decoding,
        with a few of them a layer, would feel."""
        copy = object.__new__(StageIO)
        copy.__dict__.update(self.__dict__, **changes)
        return copy


Gradients = dict[str, Tensor]
"""Gradients of a :class:`StageIO`, by field name."""
Arrivals = dict[str, Tensor | Quantised | None]
"""Fields of a :class:`StageIO` that communication brings."""


def _dispatch(io: StageIO, step: Step) -> StageIO:
    """Dispatch under autograd."""
    if io.plan is None:
        return io
    assert io.u_TD is not None and io.weights_TK is not None
    rows = dispatch(io.u_TD, io.weights_TK, io.plan, step.dispatcher, step.wire)
    return io.having(weights_TK=None, **_arrivals(rows))


def _arrivals(rows: Rows) -> Arrivals:
    return {"rows_AD": rows.values_AD, "weights_A": rows.weights_A, "rows_codes": rows.codes}


def _combine(io: StageIO, step: Step) -> StageIO:
    """Combine under autograd."""
    if io.plan is None:
        return io
    assert io.rows_AD is not None
    return io.having(plan=None, rows_AD=None, combined_TD=combine(io.rows_AD, io.plan, step.dispatcher, step.wire))


def run_stage(name: StageName, block: Block, io: StageIO, step: Step) -> StageIO:
    """One stage under the caller's autograd graph; a stage that communicates is waited for."""
    if name == "dispatch":
        return _dispatch(io, step)
    if name == "combine":
        return _combine(io, step)
    return getattr(block, name)(io, step)


def run_stages(block: Block, x_TD: Tensor, step: Step) -> Tensor:
    """The whole layer: every stage in a row."""
    io = StageIO(x_TD)
    for name in STAGES:
        io = run_stage(name, block, io, step)
    return io.x_TD


class _Cut(torch.autograd.Function):
    """The values outside the graph that made them.  Their gradients end in a list: a leaf would do the same and keep
    the values alive, which after the stage's forward only those operations should that need them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, collected: list[Tensor | None], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.collected = collected
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.collected.extend(gradients)
        return (None, None, *(None for _ in gradients))


class CutGraph:
    """A graph of its own for what runs between :meth:`inputs` and :meth:`outputs`.  It holds no tensor by itself: an
    activation lives as long as an operation needs it and no longer."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._collected: list[Tensor | None] = []
        self._edges: dict[str, GradientEdge] = {}

    def inputs(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values as the graph's beginnings; gradients of all of them are collected."""
        self._names = tuple(values)
        if not values:
            return {}
        anchor = torch.empty(0, requires_grad=True)
        with torch.enable_grad():
            cut = _Cut.apply(anchor, self._collected, *(value.detach() for value in values.values()))
        return dict(zip(self._names, cut, strict=True))  # type: ignore[arg-type]

    def outputs(self, values: Mapping[str, Tensor]) -> None:
        """Say where the graph ends."""
        self._edges = {name: get_gradient_edge(value) for name, value in values.items() if value.requires_grad}

    def backward(self, gradients: Mapping[str, Tensor]) -> Gradients:
        """Gradients of the inputs from those of the outputs, once; the graph is gone afterwards."""
        names, edges = [name for name in self._edges if name in gradients], self._edges
        self._edges = {}
        if names:
            torch.autograd.backward([edges[name] for name in names], [gradients[name] for name in names])
        collected, self._collected = self._collected, []
        found = zip(self._names, collected, strict=False)  # nothing where no gradient came
        return {name: gradient for name, gradient in found if gradient is not None}


class StageRun:
    """One run of one stage of one block, with a graph of its own.

    Call ``forward`` once, then ``backward_input`` once with the gradients of what it returned, then
    ``backward_weight`` once, whenever the schedule likes.
    """

    def __init__(self, name: StageName, block: Block, step: Step) -> None:
        self.name: StageName = name
        self._block = block
        self._queue = WeightQueue()
        self._step = replace(step, queue=self._queue)
        self._graph = CutGraph()
        self._made: frozenset[str] = frozenset()
        self._plan: DispatchPlan | None = None

    @property
    def communicates(self) -> bool:
        return self.name in COMMUNICATING

    def forward(self, io: StageIO) -> StageIO:
        """Run the stage on ``io``, cut from whatever made it."""
        if self.communicates:
            rest, coming = self.start_forward(io)
            return rest.having(**coming.wait())
        read = {name: value for name in _READS[self.name] if (value := getattr(io, name)) is not None}
        inputs = io.having(**self._graph.inputs(read))
        with torch.enable_grad():
            outputs = run_stage(self.name, self._block, inputs, self._step)
        made = {name: value for name, value in outputs.tensors().items() if value is not getattr(io, name)}
        self._graph.outputs(made)
        self._made = frozenset(made)
        return outputs

    def backward_input(self, gradients: Gradients) -> Gradients:
        """Gradients of the stage's input from those of its output; weight gradients of its products wait in a queue."""
        if self.communicates:
            rest, coming = self.start_backward(gradients)
            return joined(rest, coming.wait())
        passing = {name: gradient for name, gradient in gradients.items() if name not in self._made}
        return {**passing, **self._graph.backward(gradients)}

    def backward_weight(self) -> None:
        """The weight gradients put off by ``backward_input``."""
        self._queue.run()

    def start_forward(self, io: StageIO) -> tuple[StageIO, Handle[Arrivals]]:
        """Begin the communication of a stage that communicates.

        Returns:
            what stays at hand, which other stages may compute with meanwhile, and the fields that will come.
        """
        assert self.communicates, self.name
        self._plan = io.plan
        if io.plan is None:
            return io, Done({})
        dispatcher, plan = self._step.dispatcher, io.plan
        if self.name == "dispatch":
            assert io.u_TD is not None and io.weights_TK is not None
            handle = start_dispatch(dispatcher, io.u_TD.detach(), io.weights_TK.detach(), plan, self._step.wire)
            return io.having(weights_TK=None), Then(handle, _arrivals)
        assert io.rows_AD is not None
        handle = dispatcher.start_combine(io.rows_AD.detach(), None, plan)
        return io.having(plan=None, rows_AD=None), Then(handle, lambda sent: {"combined_TD": sent[0]})

    def start_backward(self, gradients: Gradients) -> tuple[Gradients, Handle[Gradients]]:
        """Begin the communication of its backward: combine for dispatch, dispatch for combine.

        Returns:
            gradients that stay at hand, and those that will come; :func:`joined` puts them together.
        """
        assert self.communicates, self.name
        plan, self._plan = self._plan, None
        if plan is None:
            return gradients, Done({})
        rest = dict(gradients)
        if self.name == "dispatch":
            handle = self._step.dispatcher.start_combine(rest.pop("rows_AD"), rest.pop("weights_A"), plan)
            return rest, Then(handle, _token_gradients)
        dispatcher, wire = self._step.dispatcher, self._step.wire
        handle = start_dispatch(dispatcher, rest.pop("combined_TD"), None, plan, wire)
        return rest, Then(handle, lambda rows: {"rows_AD": rows.values_AD})


def joined(rest: Gradients, came: Gradients) -> Gradients:
    """Gradients at hand and those that came; where both have one of the same field, their sum in this order."""
    return {**rest, **{name: rest[name] + value if name in rest else value for name, value in came.items()}}


def _token_gradients(sent: tuple[Tensor, Tensor | None]) -> Gradients:
    """What came back from the experts."""
    du_TD, dweights_TK = sent
    assert dweights_TK is not None
    return {"u_TD": du_TD, "weights_TK": dweights_TK}
