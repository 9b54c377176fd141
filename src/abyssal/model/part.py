"""Which of a model's layers a rank holds, when a pipeline spreads them over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abyssal.spec.model import ModelSpec


@dataclass(frozen=True)
class ModelPart:
    """Some of the model.  What is not held is there by name and shape alone, on the meta device.

    The last stage has the final norm, the head and the MTP modules; it needs the embedding where a module of MTP, or a
    tied head, reads it.
    """

    layers: frozenset[int]
    begin: bool
    """The first stage is among it."""
    end: bool
    """The last stage is among it."""

    @classmethod
    def of(cls, stages: Sequence[range], held: Sequence[int]) -> ModelPart:
        """What the stages ``held`` are, of a model cut into ``stages``."""
        layers = frozenset(layer for stage in held for layer in stages[stage])
        return cls(layers, 0 in held, len(stages) - 1 in held)

    def has_embedding(self, spec: ModelSpec) -> bool:
        return self.begin or (self.end and (spec.mtp_depth > 0 or spec.tie_embeddings))


def cut_layers(num_layers: int, num_stages: int, sizes: Sequence[int] | None = None) -> tuple[range, ...]:
    """The layers of each stage, in order.

    Args:
        sizes: layers of each stage; as many in each by default.

    Raises:
        ValueError: layers that do not divide over the stages, or sizes that do not add up.
    """
    if sizes is None:
        if num_layers % num_stages:
            raise ValueError(
                f"the model's {num_layers} layers do not divide over {num_stages} stages; say how many each has "
                f"(--stage-layers, {num_stages} numbers that add up to {num_layers})"
            )
        sizes = [num_layers // num_stages] * num_stages
    if len(sizes) != num_stages or sum(sizes) != num_layers or min(sizes) < 1:
        raise ValueError(
            f"stage_layers is {' '.join(map(str, sizes))}: give {num_stages} numbers of at least 1 that add up to "
            f"{num_layers}"
        )
    ends = [sum(sizes[: stage + 1]) for stage in range(num_stages)]
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))
