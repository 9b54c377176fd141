"""abyssal's training step, as ``support/contestant.py`` serves it: the allocator set as ``abyssal train`` sets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from abyssal.cli.allocator import keep_freed_memory

keep_freed_memory()  # before torch takes its first block

import torch  # noqa: E402

from abyssal.checkpoint.hf import load_model  # noqa: E402
from abyssal.model.context import PackedBatch  # noqa: E402
from abyssal.precision.head import linear_cross_entropy  # noqa: E402
from support.contestant import DTYPES, batch, serve, training_step  # noqa: E402


def build(request: dict[str, Any]) -> Callable[[], float]:
    shape = tuple(request["shape"])
    model = load_model(request["folder"], dtype=DTYPES[request["dtype"]])
    if request["dtype"] == "mixed":
        model.recipe = replace(model.recipe, activations="bfloat16")
    inputs, targets = (tokens.flatten() for tokens in batch(model.spec.vocab_size, shape))

    def loss() -> torch.Tensor:
        hidden = model.hidden(inputs, model.step(PackedBatch([shape[1]] * shape[0])))
        return linear_cross_entropy(hidden, model.head_weight, targets, model.recipe.product("head")) / len(targets)

    return training_step(model.parameters(), loss)


if __name__ == "__main__":
    serve(build)
