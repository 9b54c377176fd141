"""A block's decode step as one native call, where that is the same as its stages (``kernels/layer.py``).

The stages of ``model/stages.py`` are what a layer means.  A step without gradients whose tokens all decode over pages,
few of them, on CPU, with every expert in its own slot on this rank, takes the short way, and has the same bits.
Everything else (replicas, forced routing, adapters, hooks, FP8 pages, FP64) takes the stages.

The call is given the weights' addresses, collected once.  Before each use they are compared with those of the tensors
that the modules hold now, so a weight that was replaced or moved is never read at its old place.

Legend: T tokens, D model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from abyssal.kernels.layer import LayerPages, LayerSizes, LayerTensors, layer, weights_record
from abyssal.kernels.native import DTYPE_CODES, native_library
from abyssal.model.attention import LatentAttention
from abyssal.model.dispatch import LocalDispatcher
from abyssal.model.experts import FFN, Experts, MoE
from abyssal.model.norm import RMSNorm
from abyssal.model.router import Router, Routing
from abyssal.model.step import Step
from abyssal.precision.linear import Linear
from abyssal.precision.recipe import LinearEntry

if TYPE_CHECKING:
    from abyssal.model.block import Block

MOST_TOKENS = 256
"""Of a step: beyond, the way to the operators no longer matters, and what lies between them would be kept."""

_KINDS = (LatentAttention, RMSNorm, Linear, FFN, MoE, Router, Experts)
"""The modules whose operators the native layer calls; a subclass may do something else."""


class NativeLayer:
    """What one block keeps for its native calls."""

    def __init__(self) -> None:
        self._held: _Held | None = None

    def __reduce__(self) -> tuple[type[NativeLayer], tuple[()]]:
        return NativeLayer, ()  # a copy of the block collects addresses of its own

    def forget(self) -> None:
        """Collect the weights' addresses anew at the next step."""
        self._held = None

    def run(self, block: Block, x_TD: Tensor, step: Step) -> Tensor | None:
        """The block's output (T, D), its routing left in ``step``; None where the stages have to run."""
        paged = step.context.paged
        if paged is None or not 0 < len(x_TD) <= MOST_TOKENS or paged.entries_PLSX.dtype is not x_TD.dtype:
            return None
        if not (x_TD.is_cpu and x_TD.is_contiguous()) or step.rotation.turns.dtype is not torch.complex64:
            return None
        if self._held is None or not self._held.current(x_TD.dtype):
            self._held = _Held(block, x_TD.dtype)
        record, sizes = self._held.record, self._held.sizes
        if record is None or sizes is None or self._held.hooked() or not _routes_here(block, step):
            return None
        pages = LayerPages(paged.entries_PLSX[:, block.layer], paged.slots_T, paged.table)
        y_TD, routing = layer(record, sizes, x_TD, step.rotation.turns, pages)
        if routing is not None:
            step.routings[block.layer] = Routing(*routing)
        return y_TD


def _routes_here(block: Block, step: Step) -> bool:
    """Whether this step's tokens go to the experts of the router's choice, each in the slot of its number."""
    if isinstance(block.ffn, FFN):
        return True
    forced = step.forced_routing is not None and block.layer in step.forced_routing
    return not forced and isinstance(step.dispatcher, LocalDispatcher) and step.dispatcher.is_identity(block.layer)


class _Held:
    """A block as it was found, and its record if the native layer can run it."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        modules = list(block.named_modules(remove_duplicate=False))
        parents = {name: module for name, module in modules}
        self._dtype = dtype
        self._modules = [module for _, module in modules[1:]]
        self._kinds = [type(module) for module in self._modules]
        owners = [
            (owner, name, tensor)
            for _, module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._tensors = [tensor for _, _, tensor in owners]
        self._storages = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in self._tensors]
        self._places = [(owner, name) for owner, name, _ in owners]
        self._places += [
            (parents[name.rpartition(".")[0]]._modules, name.rpartition(".")[2]) for name, _ in modules[1:]
        ]
        self._found = [*map(id, self._tensors), *map(id, self._modules)]
        self.sizes: LayerSizes | None = None
        self.record: bytes | None = None
        if _fits(block, dtype):
            self.sizes = _sizes(block)
            self.record = weights_record(_tensors(block), self.sizes, dtype)

    def current(self, dtype: torch.dtype) -> bool:
        """Whether every module and tensor is still the one that was found, where it was found."""
        return (
            dtype is self._dtype
            and [id(owner.get(name)) for owner, name in self._places] == self._found
            and [type(module) for module in self._modules] == self._kinds
            and [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in self._tensors] == self._storages
        )

    def hooked(self) -> bool:
        """Whether somebody wants to see or change what goes through one of the modules."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)


def _fits(block: Block, dtype: torch.dtype) -> bool:
    """Whether the native layer has operators for all of ``block`` with activations in ``dtype``."""
    modules = [module for module in block.modules() if module is not block]
    if native_library() is None or dtype not in DTYPE_CODES or not isinstance(block.attention, LatentAttention):
        return False
    if any(type(module) not in _KINDS for module in modules):
        return False
    if block.attention.sizes.kv_lora_rank < 2:
        return False
    tensors = [*block.parameters(), *block.buffers()]
    if not all(tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in DTYPE_CODES for tensor in tensors):
        return False
    return all(_product_fits(module, dtype) for module in modules)


def _product_fits(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a product's operands are those of its recipe: activations and weights as they are."""
    if isinstance(module, Router):
        found = module.bias_E is None or module.bias_E.dtype is torch.float32
        return found and (dtype is torch.float32 or module.entry.operands == "float32")
    if isinstance(module, Linear):
        return _weight_fits(module.weight, module.entry, dtype)
    if isinstance(module, Experts):
        products = (module.w_gate_up_EFD, module.gate_up_entry), (module.w_down_EDF, module.down_entry)
        fit = all(_weight_fits(weight, entry, dtype) for weight, entry in products)
        return fit and len(module.slots) == module.placement.num_experts
    return True


def _weight_fits(weight: Tensor, entry: LinearEntry, dtype: torch.dtype) -> bool:
    kept = entry.fp8 is None and (dtype is torch.float32 or entry.operands == "activation")
    return kept and weight.dtype in (dtype, torch.bfloat16)  # BF16 weights are widened as they are read


def _tensors(block: Block) -> LayerTensors:
    attention, ffn = block.attention, block.ffn
    assert isinstance(attention, LatentAttention)
    shared = ffn if isinstance(ffn, FFN) else ffn.shared
    direct = attention.sizes.q_lora_rank is None
    routed = {}
    if isinstance(ffn, MoE):
        routed = {
            "router_ED": ffn.router.weight,
            "bias_E": ffn.router.bias_E,
            "w_gate_up_EFD": ffn.experts.w_gate_up_EFD,
            "w_down_EDF": ffn.experts.w_down_EDF,
        }
    return LayerTensors(
        attention_norm_D=block.attention_norm.weight,
        kv_norm_C=attention.kv_norm.weight,
        ffn_norm_D=block.ffn_norm.weight,
        q_b=(attention.q if direct else attention.q_b).weight,
        kv_a=attention.kv_a.weight,
        kv_b=attention.kv_b.weight,
        out=attention.out.weight,
        q_a=None if direct else attention.q_a.weight,
        q_norm=None if direct else attention.q_norm.weight,
        shared_gate_up=None if shared is None else shared.gate_up.weight,
        shared_down=None if shared is None else shared.down.weight,
        **routed,
    )


def _sizes(block: Block) -> LayerSizes:
    attention = block.attention
    assert isinstance(attention, LatentAttention)
    sizes = attention.sizes
    routed = {}
    if isinstance(block.ffn, MoE):
        moe = block.ffn.router.moe
        grouped = moe.num_groups > 1
        routed = {
            "num_experts": moe.num_experts,
            "top_k": moe.top_k,
            "num_groups": moe.num_groups if grouped else 1,
            "num_kept_groups": moe.num_kept_groups if grouped else 1,
            "softmax": moe.scoring == "softmax",
            "renormalise": moe.renormalise,
            "route_scale": moe.route_scale,
        }
    return LayerSizes(
        num_heads=sizes.num_heads,
        nope_dim=sizes.qk_nope_head_dim,
        rope_dim=sizes.qk_rope_head_dim,
        value_dim=sizes.v_head_dim,
        latent_dim=sizes.kv_lora_rank,
        interleaved=attention.rope_interleaved,
        softmax_scale=attention.scale,
        norm_eps=block.attention_norm.eps,
        latent_norm_eps=attention.kv_norm.eps,
        **routed,
    )
