"""What a layer keeps between its forward and its backward, tensor by tensor, as the recipe has it [V3 section 3.3.3].

The table that the memory planner adds up, and that a test holds against what a layer really keeps, to the byte.  It is
of latent attention and of feed-forwards that are dense or mixtures, on one rank.  Free of torch.

Not counted: the weights' operands (one byte a weight in FP8, two in BF16 beside FP32 parameters), the rotation that all
layers share, and what balance losses keep.  Sequences of several lengths (a mask between documents) attend group by
group: then attention and the product after it each keep their own copy of the output in the recipe's format.

Legend: T tokens, A rows at experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from abyssal.precision.recipe import Product, Recipe
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.spec.tile_format import TileFormat

Plain = Literal["bfloat16", "float32", "int64"]
BYTES: dict[Plain, int] = {"bfloat16": 2, "float32": 4, "int64": 8}

WEIGHTS_BLOCK = 64
"""Queries of a block of the CPU's training attention, which keeps their softmax weights over the keys up to its end."""


@dataclass(frozen=True)
class Kept:
    """One tensor."""

    stage: str
    """Of ``model/stages.py``."""
    name: str
    per: Literal["token", "row", "pair"]
    """What it has a row for: each of the T tokens; each of the A rows at experts; each kept pair of query and key."""
    columns: int
    form: TileFormat | Plain
    parts: int = 1
    """Matrices that the columns are, each in tiles of its own."""

    @property
    def row_bytes(self) -> int:
        """Of one token, row or pair."""
        if isinstance(self.form, TileFormat):
            return self.parts * self.form.num_bytes(1, self.columns // self.parts)
        return self.columns * BYTES[self.form]


def kept_bytes(table: Iterable[Kept], tokens: int, rows: int = 0, pairs: int = 0) -> int:
    """Bytes of a layer's table.

    Args:
        tokens: T.
        rows: A, tokens times chosen experts on one rank.
        pairs: :func:`kept_pairs` of the sequences.
    """
    number = {"token": tokens, "row": rows, "pair": pairs}
    return sum(kept.row_bytes * number[kept.per] for kept in table)


def kept_pairs(lengths: Sequence[int], block: int = WEIGHTS_BLOCK) -> int:
    """Pairs of query and key whose softmax weights the CPU's attention keeps for sequences of these lengths."""
    return sum(
        (min(start + block, length) - start) * min(start + block, length)
        for length in lengths
        for start in range(0, length, block)
    )


def kept_activations(spec: ModelSpec, recipe: Recipe, dense: bool) -> list[Kept]:
    """The table of a layer.

    Args:
        dense: whether its feed-forward is dense.

    Raises:
        ValueError: a family without latent attention, or activations in a dtype that is left open.
    """
    if not isinstance(spec.attention, LatentAttentionSpec):
        raise ValueError(f"family is {spec.family}: what is kept is known of latent attention")
    if recipe.activations == "parameter":
        raise ValueError("activations is 'parameter': name the dtype, bfloat16 or float32")
    layer = _Layer(spec, spec.attention, recipe, recipe.activations)
    return layer.attention_in() + layer.attention_out() + (layer.dense() if dense else layer.mixture())


@dataclass(frozen=True)
class _Layer:
    spec: ModelSpec
    sizes: LatentAttentionSpec
    recipe: Recipe
    dtype: Plain

    def attention_in(self) -> list[Kept]:
        sizes, hidden = self.sizes, self.spec.hidden_size
        first: Product = "q" if sizes.q_lora_rank is None else "q_a"
        kept = [self._plain("attention_in", "input of the norm", hidden)]
        kept += self._input("attention_in", "normalised input", hidden, (first, "kv_a"), "norm")
        kept += [self._plain("attention_in", "latent and rotary key before the norm", sizes.cache_values)]
        if sizes.q_lora_rank is not None:
            kept += [self._plain("attention_in", "query latent before the norm", sizes.q_lora_rank)]
            kept += self._input("attention_in", "normalised query latent", sizes.q_lora_rank, ("q_b",), "norm")
        return kept

    def attention_out(self) -> list[Kept]:
        sizes, heads = self.sizes, self.sizes.num_heads
        kept = self._input("attention_out", "normalised latent", sizes.kv_lora_rank, ("kv_b",))
        if "up_projection" in self.recipe.recompute:
            kept += [self._plain("attention_out", "rotary key", sizes.qk_rope_head_dim)]
        else:
            widths = {"queries": sizes.qk_head_dim, "keys": sizes.qk_head_dim, "values": sizes.v_head_dim}
            kept += [self._plain("attention_out", name, heads * width) for name, width in widths.items()]
        kept += [Kept("attention_out", "softmax weights", "pair", heads, self.dtype)]
        return kept + self._output(heads * sizes.v_head_dim)

    def _output(self, width: int) -> list[Kept]:
        """Of attention: one tensor for its own backward and the next product's where the recipe keeps it quantised."""
        form, product = self.recipe.kept_after_attention, self.recipe.product("out")
        attention = Kept("attention_out", "output of attention", "token", width, form or self.dtype)
        if form is not None and product.fp8 is not None:
            return [attention, self._plain("attention_out", "input of the norm", self.spec.hidden_size)]
        own = self._input("attention_out", "input of the output projection", width, ("out",))
        return [attention, *own, self._plain("attention_out", "input of the norm", self.spec.hidden_size)]

    def dense(self) -> list[Kept]:
        hidden, width = self.spec.hidden_size, self.spec.dense_ffn_size
        kept = self._input("shared", "normalised input", hidden, ("dense.gate_up",), "norm")
        return kept + self._feed_forward("shared", "token", width, "dense.down", None)

    def mixture(self) -> list[Kept]:
        moe, hidden = self.spec.moe, self.spec.hidden_size
        assert moe is not None
        kept = _routing(moe)
        readers: tuple[Product, ...] = ("gate", "shared.gate_up") if moe.num_shared_experts else ("gate",)
        kept += self._input("attention_out", "normalised input", hidden, readers, "norm")
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.expert_ffn_size
            kept += self._feed_forward("shared", "token", width, "shared.down", self.recipe.kept_swiglu)
        gate_up = self.recipe.product("experts.gate_up").fp8
        wire = self.recipe.dispatch
        form = self.dtype if gate_up is None else gate_up.kept if wire != gate_up.input else wire
        kept += [Kept("dispatch", "rows at experts", "row", hidden, form or self.dtype)]
        kept += [Kept("dispatch", "routing weights of rows", "row", 1, "float32")]
        return kept + self._feed_forward("experts", "row", moe.expert_ffn_size, "experts.down", self.recipe.kept_swiglu)

    def _feed_forward(
        self, stage: str, per: Literal["token", "row"], width: int, down: Product, form: TileFormat | None
    ) -> list[Kept]:
        kept = [Kept(stage, "gate and up", per, 2 * width, form or self.dtype, parts=2)]
        if form is not None or "swiglu" in self.recipe.recompute:
            return kept
        formats = self.recipe.product(down).fp8
        return [*kept, Kept(stage, "output of SwiGLU", per, width, self.dtype if formats is None else formats.kept)]

    def _input(
        self, stage: str, name: str, width: int, products: Sequence[Product], recomputed: str | None = None
    ) -> list[Kept]:
        """The input of some products: as it is for those that are not in FP8, in codes for those that are."""
        if recomputed is not None and recomputed in self.recipe.recompute:
            return []
        entries = [self.recipe.product(product) for product in products]
        kept = [self._plain(stage, name, width)] if any(entry.fp8 is None for entry in entries) else []
        formats = next((entry.fp8 for entry in entries if entry.fp8 is not None), None)
        return kept if formats is None else [*kept, Kept(stage, f"{name}, quantised", "token", width, formats.kept)]

    def _plain(self, stage: str, name: str, width: int) -> Kept:
        return Kept(stage, name, "token", width, self.dtype)


def _routing(moe: MoESpec) -> list[Kept]:
    """What the router keeps for its backward, and the plan of dispatch and combine."""
    kept = [
        Kept("attention_out", "scores", "token", moe.num_experts, "float32"),
        Kept("attention_out", "chosen experts", "token", moe.top_k, "int64"),
        Kept("attention_out", "routing weights", "token", moe.top_k, "float32"),
        Kept("dispatch", "order of rows and its inverse", "row", 2, "int64"),
    ]
    if moe.renormalise:
        kept += [Kept("attention_out", "chosen scores and their sum", "token", moe.top_k + 1, "float32")]
    return kept
