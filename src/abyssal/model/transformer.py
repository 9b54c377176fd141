"""The model: one module that trains, serves and rolls out, for every family that a ``ModelSpec`` describes.

It works on flat tokens and knows neither batches nor caches nor ranks: a :class:`~abyssal.model.step.Step` says how
attention sees earlier tokens and how tokens reach experts.  The plain call ``model(tokens_BS)`` is there for parity
checks and for looking at a model by hand.

Legend: B sequences, S positions, T tokens (flat), D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abyssal.model.block import Block
from abyssal.model.context import AttentionContext, PackedBatch
from abyssal.model.dispatch import Dispatcher, LocalDispatcher
from abyssal.model.experts import Experts
from abyssal.model.mtp import MTPModule
from abyssal.model.norm import RMSNorm
from abyssal.model.part import ModelPart
from abyssal.model.rope import rope_frequencies, rotation
from abyssal.model.step import Step
from abyssal.precision.linear import Linear, gradient_dtype, linear
from abyssal.precision.recipe import Recipe
from abyssal.spec.model import ModelSpec
from abyssal.spec.placement import Placement

ACTIVATION_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(
        self, vocab_size: int, hidden_size: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype))

    def forward(self, tokens_T: Tensor) -> Tensor:
        if self.weight.requires_grad and gradient_dtype(self.weight) != self.weight.dtype:
            return _WideGradientEmbedding.apply(tokens_T, self.weight)  # type: ignore[no-any-return]
        return nn.functional.embedding(tokens_T, self.weight)


class _WideGradientEmbedding(torch.autograd.Function):
    """Of a BF16 table: the gradients of a token that stands in a batch many times are added up in FP32."""

    @staticmethod
    def forward(ctx: Any, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.rows, ctx.dtype = len(weight_VD), gradient_dtype(weight_VD)
        return nn.functional.embedding(tokens_T, weight_VD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (tokens_T,) = ctx.saved_tensors
        dx_TD = gradients[0].to(ctx.dtype)
        return None, torch.ops.aten.embedding_dense_backward(dx_TD, tokens_T, ctx.rows, -1, False)


class Transformer(nn.Module):
    """A DeepSeek-class language model.  Parameters are uninitialised: load them, or call :meth:`init_weights`.

    Args:
        spec: what the model is.
        recipe: the formats of its matrix products.
        placements: by layer, where the routed experts are; the identity where absent.
        device, dtype: of the parameters.
        expert_rank: which of the placements' ranks this is: it holds the experts in that rank's slots.
        part: the layers to hold; the others are on the meta device, and are not trained.

    Raises:
        ValueError: a placement of another number of experts, or for a layer without experts.
    """

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe | None = None,
        placements: Mapping[int, Placement] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        expert_rank: int = 0,
        part: ModelPart | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.part = part
        self.recipe = recipe = recipe or Recipe()
        self.expert_rank = expert_rank
        placements = placements or {}
        begin, end = (
            (device, device)
            if part is None
            else (device if part.has_embedding(spec) else "meta", device if part.end else "meta")
        )

        def block(layer: int) -> Block:
            on = device if part is None or layer in part.layers else "meta"
            return Block(
                spec, layer, not spec.is_moe_layer(layer), recipe, placements.get(layer), on, dtype, expert_rank
            )

        self.embed = Embedding(spec.vocab_size, spec.hidden_size, begin, dtype)
        self.layers = nn.ModuleList(block(layer) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, end, dtype)
        self.head = (
            None
            if spec.tie_embeddings
            else Linear(spec.hidden_size, spec.vocab_size, recipe.product("head"), device=end, dtype=dtype)
        )
        self.mtp = nn.ModuleList(
            MTPModule(spec, depth, recipe, placements.get(spec.num_layers + depth), end, dtype, expert_rank)
            for depth in range(spec.mtp_depth)
        )
        if part is not None:
            for parameter in self.parameters():
                parameter.requires_grad_(not parameter.is_meta)

        self._dispatcher: LocalDispatcher | None = None
        self._frequencies: Tensor | None = None
        self._check_layers("placements", placements)

    def _check_layers(self, argument: str, by_layer: Mapping[int, object]) -> None:
        if by_layer and (stray := sorted(by_layer.keys() - self.placements().keys())):
            raise ValueError(f"{argument}: layers {stray[:8]} have no experts; those that do: {[*self.placements()]}")

    @property
    def device(self) -> torch.device:
        """Of what it holds."""
        return next((one.device for one in self.parameters() if not one.is_meta), torch.device("meta"))

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices normal with standard deviation ``spec.init_std``, norms one, correction biases zero.

        Experts are drawn one after another, and what is elsewhere too, so that a rank that holds some of a model has
        those values of the whole model.
        """
        for name, parameter in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif isinstance(owner, Experts):
                self._draw_experts(parameter, owner, generator)
            else:
                drawn = torch.empty_like(parameter, device=generator.device) if parameter.is_meta else parameter
                drawn.normal_(0.0, self.spec.init_std, generator=generator)
        for buffer in self.buffers():
            buffer.zero_()

    def _draw_experts(self, stacked_E: Tensor, experts: Experts, generator: torch.Generator) -> None:
        """As one draw over all logical experts, of which those in local slots are kept."""
        num_experts, slots = experts.placement.num_experts, () if stacked_E.is_meta else experts.slots
        if slots == tuple(range(num_experts)):
            stacked_E.normal_(0.0, self.spec.init_std, generator=generator)
            return
        # torch draws sixteen numbers at a time: in pieces of so many, one draw and many are the same.
        together = 1 if stacked_E[0].numel() % 16 == 0 else num_experts
        drawn = torch.empty(together, *stacked_E.shape[1:], dtype=stacked_E.dtype, device=generator.device)
        for first in range(0, num_experts, together):
            drawn.normal_(0.0, self.spec.init_std, generator=generator)
            for slot, expert in enumerate(slots):
                if first <= expert < first + together:
                    stacked_E[slot].copy_(drawn[expert - first])

    def blocks(self) -> list[Block]:
        """The blocks of the main model, then those of the MTP modules: index is layer number."""
        modules: list[Any] = [*self.layers, *(module.block for module in self.mtp)]
        return modules

    def placements(self) -> dict[int, Placement]:
        """Where each MoE layer's experts are."""
        return {block.layer: block.placement for block in self.blocks() if block.placement is not None}

    def refresh(self, version: int) -> None:
        """The parameters were changed in place and are of ``version`` now: whatever a kernel made from them is void.

        Only addresses are kept (``model/native_layer.py``), which this forgets; weights are read where they lie.
        """
        for block in self.blocks():
            block.native.forget()

    def local_dispatcher(self) -> LocalDispatcher:
        """The dispatcher of a single rank for the present placements."""
        placements, device = self.placements(), self.device
        found = self._dispatcher
        if found is None or found.device != device or found.placements != placements:
            with torch.inference_mode(False):  # it outlives the pass that asked first
                found = self._dispatcher = LocalDispatcher(placements, device)
        return found

    def step(self, context: AttentionContext, dispatcher: Dispatcher | None = None, **fields: Any) -> Step:
        """A step over ``context``; every expert is on this rank unless a dispatcher is given.

        ``fields`` are those of :class:`~abyssal.model.step.Step`: queue, balance, forced_routing.

        Raises:
            ValueError: routing forced on a layer without experts.
        """
        self._check_layers("forced_routing", fields.get("forced_routing") or {})
        dispatcher = dispatcher or self.local_dispatcher()
        if self._frequencies is None or self._frequencies.device != context.positions_T.device:
            with torch.inference_mode(False):
                self._frequencies = rope_frequencies(self.spec, context.positions_T.device)
        turns = rotation(self.spec, context.positions_T, self.embed.weight.dtype, self._frequencies)
        return Step(context, dispatcher, turns, wire=self.recipe.dispatch, **fields)

    def embedded(self, tokens_T: Tensor) -> Tensor:
        """(T, D) in the recipe's activation dtype."""
        x_TD = self.embed(tokens_T)
        return x_TD.to(ACTIVATION_DTYPES.get(self.recipe.activations, x_TD.dtype))

    def hidden(self, tokens_T: Tensor, step: Step) -> Tensor:
        """Hidden state after the final norm, (T, D)."""
        x_TD = self.embedded(tokens_T)
        for block in self.layers:
            x_TD = block(x_TD, step)
        return self.norm(x_TD)

    def mtp_hidden(self, depth: int, tokens_T: Tensor, hidden_TD: Tensor, step: Step) -> Tensor:
        """Hidden state of MTP module ``depth`` (from zero), after its norm, (T, D).

        Args:
            tokens_T: at position i, token i + depth + 1 of its sequence.
            hidden_TD: of the previous depth; of the main model for depth zero.
        """
        return self.mtp[depth](self.embedded(tokens_T), hidden_TD, step)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) in the activation dtype."""
        return linear(hidden_TD, self.head_weight, self.recipe.product("head"))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of sequences of one length, without cache.

        Raises:
            ValueError: tokens that are no (B, S) batch, lie outside the vocabulary, or are longer than the model.
        """
        self.check_tokens(tokens_BS)
        batch, length = tokens_BS.shape
        step = self.step(PackedBatch([length] * batch, device=tokens_BS.device))
        return self.logits(self.hidden(tokens_BS.flatten(), step)).view(batch, length, -1)

    def check_tokens(self, tokens_BS: Tensor) -> None:
        """Raise ``ValueError`` for a batch that this model cannot take, saying why."""
        if tokens_BS.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens_BS: dtype {tokens_BS.dtype}; token ids are int64 (tokens.long())")
        if tokens_BS.dim() != 2 or tokens_BS.numel() == 0:
            raise ValueError(f"tokens_BS: shape {tuple(tokens_BS.shape)}; give a batch (sequences, positions)")
        if tokens_BS.shape[1] > self.spec.max_positions:
            raise ValueError(
                f"tokens_BS: {tokens_BS.shape[1]} positions are past the model's max_positions "
                f"{self.spec.max_positions}; shorten the sequence or extend the model with YaRN"
            )
        low, high = int(tokens_BS.min()), int(tokens_BS.max())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(
                f"tokens_BS: ids {low}..{high} lie outside the vocabulary 0..{self.spec.vocab_size - 1}; "
                "use the tokenizer that belongs to the model"
            )
