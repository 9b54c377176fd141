"""Low-rank adapters (LoRA, arXiv 2106.09685) on attention, routed experts, and dense and shared feed-forwards.

An adapted product is y = x Wᵀ + (α/r) (x Aᵀ) Bᵀ: the base W is frozen, A starts random and B at zero.  Both added
products go through ``precision.linear`` and ``grouped_linear`` as the base's does, so formats, kernels and a split
backward reach them too, and a frozen W is given no gradient.  W + (α/r) B A is made only to merge, and where absorbed
attention folds a weight (every step there: merge before serving).

An adapted module is the same object with another class and a few more parameters.  The base's keep their names, so
checkpoints and state dicts still fit; adapters are named ``….q_a.lora_a``, ``….experts.gate_up_lora_a``.  Gate and up
are one product here and share one A.  Experts have an adapter a *logical* expert, whichever slots hold it, so replicas
agree and ``load_slots`` needs to know nothing; where experts are spread over ranks, one a local slot, like the base.

Trade-offs not taken: a wrapper around each module, which would rename the base's parameters; dropout on x, which the
experts' rows would draw anew after each dispatch.

Legend: T tokens, I input and O output features, r rank, E logical experts, A rows sorted by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from abyssal.model.experts import Experts
from abyssal.model.step import Step
from abyssal.model.transformer import Transformer
from abyssal.precision.linear import Linear, WeightQueue, grouped_linear, linear
from abyssal.precision.operand import Activation, kept_source

Target = Literal["attention", "experts", "ffn"]


@dataclass(frozen=True)
class LoraConfig:
    """Which products get an adapter, and how wide.

    Raises:
        ValueError: a field that cannot be, by name.
    """

    rank: int = 16
    """Width r of the adapters."""
    alpha: float = 32.0
    """α: what an adapter adds is scaled by α / rank."""
    targets: tuple[Target, ...] = ("attention", "experts")
    """``attention``: all its projections; ``experts``: the routed; ``ffn``: dense layers and shared experts."""
    mtp: bool = True
    """Adapt the multi-token-prediction modules too."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank!r}: set it to an integer of at least 1")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha is {self.alpha!r}: set it to a number above 0")
        known = get_args(Target)
        if not self.targets or any(target not in known for target in self.targets):
            raise ValueError(f"lora.targets is {self.targets!r}: name one or more of {', '.join(known)}")


class Adapted:
    """What an adapted module has beside its base."""

    weights: ClassVar[Mapping[str, str]]
    """The base parameters that have an adapter, and the prefix of that adapter's names."""
    lora_rank: int
    lora_alpha: float

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    def adapter(self, weight: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A (…, r, I) and B (…, O, r) of a base parameter; stacked by logical expert where the base is stacked."""
        prefix = self.weights[weight]
        return getattr(self, f"{prefix}lora_a"), getattr(self, f"{prefix}lora_b")

    def merged(self, weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor) -> Tensor:
        """W + (α/r) B A, added in FP32 at least and rounded once to the dtype of W."""
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        return (weight_OI.to(wide) + (b_Or.to(wide) @ a_rI.to(wide)) * self.lora_scale).to(weight_OI.dtype)


class AdaptedLinear(Adapted, Linear):
    """A :class:`Linear` with an adapter."""

    weights: ClassVar[Mapping[str, str]] = {"weight": ""}

    def forward(self, x_TI: Activation, queue: WeightQueue | None = None) -> Tensor:
        a_rI, b_Or = self.adapter("weight")
        narrow_Tr = linear(x_TI, a_rI, self.entry.plain, queue) * self.lora_scale
        return super().forward(x_TI, queue) + linear(narrow_Tr, b_Or, self.entry.plain, queue)

    def source(self, x_TI: Activation) -> Callable[[], Activation]:
        return kept_source(x_TI, keeps_handle=True)  # the adapter reads and keeps it as it is

    def effective_weight(self) -> Tensor:
        return self.merged(super().effective_weight(), *self.adapter("weight"))

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into the base, whose own values stay as exact as they are."""
        self.weight.copy_(self.merged(self.weight, *self.adapter("weight")))


class AdaptedExperts(Adapted, Experts):
    """:class:`Experts` with an adapter on each logical expert's products."""

    weights: ClassVar[Mapping[str, str]] = {"w_gate_up_EFD": "gate_up_", "w_down_EDF": "down_"}

    def gate_up(self, rows_AD: Activation, counts: Sequence[int], step: Step) -> Tensor:
        return super().gate_up(rows_AD, counts, step) + self._low_rank(rows_AD, "w_gate_up_EFD", counts, step)

    def down(self, rows_AF: Activation, counts: Sequence[int], step: Step) -> Tensor:
        return super().down(rows_AF, counts, step) + self._low_rank(rows_AF, "w_down_EDF", counts, step)

    def _low_rank(self, rows_AI: Activation, weight: str, counts: Sequence[int], step: Step) -> Tensor:
        a, b = (self._by_slot(factor) for factor in self.adapter(weight))
        entry = (self.gate_up_entry if weight == "w_gate_up_EFD" else self.down_entry).plain
        narrow_Ar = grouped_linear(rows_AI, a, counts, entry, step.queue) * self.lora_scale
        return grouped_linear(narrow_Ar, b, counts, entry, step.queue)

    def _by_slot(self, stacked_E: Tensor) -> Tensor:
        """From logical experts to slots.  The gradients of an expert's slots add up on the way back."""
        if self.placement.is_identity or adapted_by_slot(self):
            return stacked_E
        return stacked_E.index_select(0, torch.tensor(self.slots, device=stacked_E.device))

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapters into the base, slot by slot: the memory of one expert more."""
        for weight in self.weights:
            a_ErI, b_EOr = self.adapter(weight)
            numbers = range(len(self.slots)) if adapted_by_slot(self) else self.slots
            for matrix_OI, number in zip(getattr(self, weight), numbers, strict=True):
                matrix_OI.copy_(self.merged(matrix_OI, a_ErI[number], b_EOr[number]))


def adapted_by_slot(experts: Experts) -> bool:
    """Whether adapters of ``experts`` are stacked by local slot, and not by logical expert."""
    return experts.placement.num_ranks > 1


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLinear | AdaptedExperts]:
    """The modules that have adapters, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, AdaptedLinear | AdaptedExperts)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in the model; empty for a model without."""
    found = {}
    for name, module in adapted_modules(model).items():
        for prefix in module.weights.values():
            for factor in ("lora_a", "lora_b"):
                found[f"{name}.{prefix}{factor}"] = getattr(module, f"{prefix}{factor}")
    return found


def add_lora(model: Transformer, config: LoraConfig, generator: torch.Generator) -> None:
    """Give ``model`` fresh adapters and freeze everything else; its results are as before until B moves.

    A is uniform in ±1/√I, as PEFT draws it, and B zero; both in FP32 at least.

    Raises:
        ValueError: a model that has adapters already, or none of the targets.  Nothing is changed then.
    """
    names = [name for name, target in _adaptable(model) if target in config.targets]
    if not config.mtp:
        names = [name for name in names if not name.startswith("mtp.")]
    if not names:
        raise ValueError(f"lora.targets is {config.targets!r}: the model has none of these; add another target")
    attach_lora(model, names, config.rank, config.alpha)
    for module in adapted_modules(model).values():
        for weight in module.weights:
            a, b = module.adapter(weight)
            bound = a.shape[-1] ** -0.5
            shape, kept = a.shape, slice(None)
            if isinstance(module, Experts) and adapted_by_slot(module):
                shape, kept = (module.placement.num_experts, *a.shape[1:]), list(module.slots)
            drawn = torch.empty(shape, device=generator.device).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                a.copy_(drawn[kept])
                b.zero_()


def attach_lora(model: Transformer, names: Collection[str], rank: int, alpha: float) -> None:
    """Give the modules ``names`` adapters with undefined values, and freeze everything else.

    Raises:
        ValueError: a model that has adapters already.
    """
    if adapted_modules(model):
        raise ValueError("the model has adapters already: merge them (merge_lora) or load the base model again")
    adaptable = dict(_adaptable(model))
    assert adaptable.keys() >= set(names), f"no adapters on {sorted(set(names) - adaptable.keys())[:3]}"
    model.requires_grad_(False)
    for name in names:
        _attach(model.get_submodule(name), rank, alpha)


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its base weight (W + (α/r) B A, in FP32 at least) and remove it.

    All parameters can be trained again afterwards, as those of a model just loaded.
    """
    for module in adapted_modules(model).values():
        module.merge()
    remove_lora(model)


def remove_lora(model: nn.Module) -> None:
    """Take the adapters off without folding them in: the base model as it was, all its parameters trainable."""
    for module in adapted_modules(model).values():
        for prefix in module.weights.values():
            delattr(module, f"{prefix}lora_a")
            delattr(module, f"{prefix}lora_b")
        del module.lora_rank, module.lora_alpha
        base: Any = module
        base.__class__ = Linear if isinstance(module, Linear) else Experts
    model.requires_grad_(True)


def _adaptable(model: nn.Module) -> Iterator[tuple[str, Target]]:
    """Modules that may have an adapter; head, router and MTP projection may not."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name, "experts"
        elif isinstance(module, Linear) and ".attention." in name:
            yield name, "attention"
        elif isinstance(module, Linear) and ".ffn." in name:
            yield name, "ffn"


def _attach(module: nn.Module, rank: int, alpha: float) -> None:
    stack: tuple[int, ...] = ()
    if isinstance(module, Experts):
        count = len(module.slots) if adapted_by_slot(module) else module.placement.num_experts
        stack, module.__class__ = (count,), AdaptedExperts
    else:
        module.__class__ = AdaptedLinear
    assert isinstance(module, AdaptedLinear | AdaptedExperts)
    module.lora_rank, module.lora_alpha = rank, alpha
    for weight, prefix in module.weights.items():
        base: Tensor = getattr(module, weight)
        rows, columns = base.shape[-2:]
        dtype = torch.promote_types(base.dtype, torch.float32)
        for factor, shape in (("lora_a", (rank, columns)), ("lora_b", (rows, rank))):
            empty = torch.empty(*stack, *shape, dtype=dtype, device=base.device)
            module.register_parameter(f"{prefix}{factor}", nn.Parameter(empty))
