"""Activations are gone as early as can be: graphs after I, what weights wait for after W, outputs once sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from abyssal.model.transformer import Transformer
from abyssal.parallel.pipeline.chunk import ModelChunk
from abyssal.parallel.pipeline.executor import Executor
from abyssal.parallel.pipeline.schedule import schedule
from abyssal.train.loop import build_model
from tests.support.live_storages import LiveStorages
from tests.support.many_ranks import CONFIG
from tests.support.pipelines import SPEC, batch, micro_batches
from tests.support.sleeping_stages import SleepingChunk, boundary, on_threads, results

PRECISIONS: dict[str, dict[str, Any]] = {
    "float64": {},
    "bfloat16": {"compute": "bfloat16"},
    "fp8": {"compute": "bfloat16", "precision": "fp8", "recompute": ("norm", "up_projection", "swiglu")},
}
MIDDLE = range(2, 4)


def prepared(precision: str) -> tuple[Transformer, ModelChunk, Tensor, Tensor, LiveStorages]:
    """A chunk that has been through a step already, so that whatever is kept for good is there."""
    model = build_model(SPEC, dataclasses.replace(CONFIG, **PRECISIONS[precision]))
    parts = micro_batches(model, batch(2, rows=8), 2)
    generator = torch.Generator().manual_seed(2)
    shape, dtype = (len(parts[0].inputs[0]), SPEC.hidden_size), model.embedded(parts[0].inputs[0][:1]).dtype
    x_TD, gradient_TD = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    chunk = ModelChunk(model, MIDDLE, 1, 4)
    chunk.begin(parts)
    chunk.forward(1, x_TD)
    chunk.backward_input(1, gradient_TD)
    chunk.backward_weight(1)
    chunk.begin(parts)
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return model, chunk, x_TD, gradient_TD, LiveStorages([*model.parameters(), *gradients, x_TD, gradient_TD])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_forward_holds_no_more_than_the_same_layers_under_one_graph(precision: str) -> None:
    model, chunk, x_TD, _, storages = prepared(precision)
    with storages:
        chunk.forward(0, x_TD)
        cut = storages.num_bytes()
    model, chunk, x_TD, _, storages = prepared(precision)
    with storages:
        step = micro_batches(model, batch(2, rows=8), 2)[0].make_step()
        h_TD = x_TD.clone().requires_grad_()
        for layer in MIDDLE:
            h_TD = model.layers[layer](h_TD, step)
        whole = storages.num_bytes() - 2 * x_TD.nbytes  # its input and output, which the stages beside it hold
    assert 10 * x_TD.nbytes < cut <= whole


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_left_after_the_weights(precision: str) -> None:
    """But what the step tells of its routing."""
    _, chunk, x_TD, gradient_TD, storages = prepared(precision)
    with storages:
        chunk.forward(0, x_TD)
        chunk.backward_input(0, gradient_TD)
        assert storages.num_bytes() > 5 * x_TD.nbytes
        chunk.backward_weight(0)
        chunk.steps.clear()
        assert storages.alive() == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_is_gone_after_the_inputs_part(precision: str) -> None:
    """What is left then is what the weights wait for: nothing where they are frozen."""
    model, chunk, x_TD, gradient_TD, storages = prepared(precision)
    model.requires_grad_(False)
    with storages:
        chunk.forward(0, x_TD)
        held = storages.num_bytes()
        chunk.backward_input(0, gradient_TD)
        left = storages.num_bytes()
        chunk.backward_weight(0)
        assert left == storages.num_bytes() < held / 3
        chunk.steps.clear()
        assert storages.alive() == []


class Remembers(SleepingChunk):
    """Knows how many of its outputs are alive."""

    most = 0

    def forward(self, micro_batch: int, x_TD: Tensor | None) -> Tensor | None:
        y_TD = super().forward(micro_batch, x_TD)
        if y_TD is not None:
            self.outputs = [*getattr(self, "outputs", ()), StorageWeakRef(y_TD.untyped_storage())]
            self.most = max(self.most, sum(not one.expired() for one in self.outputs))
        return y_TD


def test_an_output_is_forgotten_once_it_is_sent() -> None:
    plan = schedule("gpipe", 2, 24)

    def on_rank(rank: int, group: Any) -> int:
        chunk = Remembers(rank, 2, unit=0.005)
        executor = Executor(plan, rank, [chunk], group)
        executor.run(boundary(24))
        executor.close()
        return chunk.most

    assert 1 <= results(on_threads(2, on_rank))[0] <= 12
