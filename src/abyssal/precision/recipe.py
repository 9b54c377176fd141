"""Which numbers are computed in which format: the one table that model, planner and communication read.

A recipe names, for each matrix product, the formats of its operands, its accumulation and what the backward keeps, and,
for what travels between ranks, the format on the wire.  Everything that changes a result is here and nowhere else, so
that one rank and many ranks compute the same thing [V3 section 3.3].  Free of torch.

:func:`fp8_recipe` is the paper's: every Linear of attention and feed-forwards in E4M3, activations by 1x128 tiles,
weights by 128x128 blocks, and the embedding, head, gate, norms and attention as they are [V3 section 3.3.1].  What it
may be asked to do otherwise is :class:`Fp8Options`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from abyssal.spec.model import LatentAttentionSpec, ModelSpec
from abyssal.spec.tile_format import ScaleName, TileFormat

Recomputed = Literal["norm", "up_projection", "swiglu"]
"""Activations that a backward may compute again: RMSNorm outputs, queries, keys and values from their latents, SwiGLU
outputs."""

Product = Literal[
    "q", "q_a", "q_b", "kv_a", "kv_b", "k", "v", "out",
    "dense.gate_up", "dense.down", "shared.gate_up", "shared.down", "experts.gate_up", "experts.down",
    "mtp", "gate", "head",
]  # fmt: skip
"""The model's matrix products: attention's projections by their names in ``model/attention.py`` (``out`` follows the
attention), the feed-forwards of dense layers, shared and routed experts, the projection of an MTP module, the router's
gate, the output head."""

NEVER_FP8: frozenset[Product] = frozenset({"mtp", "gate", "head"})
"""V3 keeps gate and head out of FP8, and its checkpoints the MTP projection."""

Accumulation = Literal["float32", "promoted", "tensor_core"]
"""How an FP8 product adds up: ``float32``; as Hopper's tensor cores do, in about 14 bits (``tensor_core``); so, but
moved to FP32 every 128 products (``promoted``) [V3 section 3.3.2]."""


_ROWS, _COLUMNS, _BLOCKS = TileFormat(tile="1x128"), TileFormat(tile="128x1"), TileFormat(tile="128x128")


@dataclass(frozen=True)
class ProductFormats:
    """Operands of the three products of a Linear: Fprop y = x Wᵀ, Dgrad dx = dy W, Wgrad dW = dyᵀ x.

    Raises:
        ValueError: a format that no such product can have, by field.
    """

    input: TileFormat = _ROWS
    """x in Fprop."""
    weight: TileFormat = _BLOCKS
    """W in Fprop and Dgrad."""
    gradient: TileFormat = _ROWS
    """dy in Dgrad."""
    turned_input: TileFormat = _COLUMNS
    """x in Wgrad, made from what was kept."""
    turned_gradient: TileFormat = _COLUMNS
    """dy in Wgrad."""
    kept: TileFormat = _ROWS
    """What the backward keeps of x."""
    accumulation: Accumulation = "float32"

    def __post_init__(self) -> None:
        tiles = {
            "input": ("1x128", "tensor"),
            "weight": ("128x128", "tensor"),
            "gradient": ("1x128", "128x128", "tensor"),
            "turned_input": ("128x1", "tensor"),
            "turned_gradient": ("128x1", "tensor"),
            "kept": ("1x128", "tensor"),
        }
        for name, allowed in tiles.items():
            form: TileFormat = getattr(self, name)
            if form.tile not in allowed:
                raise ValueError(f"{name} has {form.tile} tiles: its product wants {' or '.join(allowed)}")
            if form.code == "e5m6" and name != "kept":
                raise ValueError(f"{name} is e5m6, which no tensor core multiplies: choose e4m3 or e5m2")
        if self.accumulation not in get_args(Accumulation):
            raise ValueError(
                f"accumulation is {self.accumulation!r}: choose one of {', '.join(get_args(Accumulation))}"
            )
        if self.accumulation == "tensor_core":
            for name in ("input", "weight", "gradient", "turned_input", "turned_gradient"):
                form = getattr(self, name)
                if form.scale == "float32" and form.tile != "tensor":
                    raise ValueError(
                        f"{name} has a float32 scale a tile, which a sum in one register (accumulation tensor_core) "
                        "can't apply: choose ue8m0 scales, one a tensor, or accumulation promoted"
                    )


@dataclass(frozen=True)
class LinearEntry:
    """The recipe of one matrix product."""

    operands: Literal["activation", "float32"] = "activation"
    """``activation``: operands in the dtype of the incoming activation (the weight is cast to it when it differs).
    ``float32``: operands are raised to FP32 at least; FP64 stays FP64."""
    fp8: ProductFormats | None = None
    """Formats of operands that are quantised; the result is in the dtype of the activation."""

    @property
    def plain(self) -> LinearEntry:
        """The same product without FP8."""
        return LinearEntry(self.operands)


@dataclass(frozen=True)
class Recipe:
    """The formats of the model.

    Raises:
        ValueError: a product that there is not, or one in FP8 that is never.
    """

    activations: Literal["parameter", "float32", "bfloat16"] = "parameter"
    """Dtype of the residual stream; ``parameter`` keeps that of the embedding."""
    fp8: ProductFormats | None = None
    """Of every product that is in FP8; None: of none."""
    high_precision: frozenset[Product] = NEVER_FP8
    """Products that are not, beside ``fp8``."""
    kept_after_attention: TileFormat | None = None
    """What attention and the product after it keep of what lies between them; None: as attention made it, and the
    product its own ``kept``."""
    kept_swiglu: TileFormat | None = None
    """What the experts keep of SwiGLU's input; its output is computed again from that.  None: both as they are."""
    dispatch: TileFormat | None = None
    """Tokens on their way to experts, and their gradients on the way back through combine; None: as they are.  Combine
    and the gradients of dispatch travel in the activation's dtype."""
    recompute: frozenset[Recomputed] = frozenset()
    """What is forgotten after the forward and computed again in the backward [V3 section 3.2.3]."""

    def __post_init__(self) -> None:
        for name in self.high_precision:
            _check_product(name)
        if self.fp8 is not None and (missing := NEVER_FP8 - self.high_precision):
            raise ValueError(f"high_precision lacks {', '.join(sorted(missing))}, which are never in FP8; name them")
        for name in ("kept_after_attention", "kept_swiglu", "dispatch"):
            form: TileFormat | None = getattr(self, name)
            if form is not None and form.tile != "1x128":
                raise ValueError(f"{name} has {form.tile} tiles: a token's values are kept and sent in 1x128")
            if form is not None and name == "dispatch" and form.code == "e5m6":
                raise ValueError("dispatch is e5m6, which no tensor core multiplies on arrival: choose e4m3 or e5m2")

    def identity(self) -> str:
        """A text that equal recipes share in every process, which the order of a set does not."""
        return json.dumps(asdict(self), default=sorted, sort_keys=True)

    def product(self, name: Product) -> LinearEntry:
        """The entry of one product.  The gate is in FP32 always [V3 section 3.3.1].

        Raises:
            ValueError: a product that there is not.
        """
        _check_product(name)
        operands: Literal["activation", "float32"] = "float32" if name == "gate" else "activation"
        if self.fp8 is None or name in self.high_precision:
            return LinearEntry(operands)
        return LinearEntry(operands, self.fp8)


def products_of(spec: ModelSpec) -> frozenset[Product]:
    """The products that a model has."""
    found: set[Product] = {"out", "head"}
    if isinstance(spec.attention, LatentAttentionSpec):
        found |= {"kv_a", "kv_b"}
        found |= {"q"} if spec.attention.q_lora_rank is None else {"q_a", "q_b"}
    else:
        found |= {"q", "k", "v"}
    found |= {"mtp"} if spec.mtp_depth else set()
    found |= {"dense.gate_up", "dense.down"} if spec.moe is None or spec.num_dense_layers else set()
    if spec.moe is not None:
        found |= {"gate", "experts.gate_up", "experts.down"}
        found |= {"shared.gate_up", "shared.down"} if spec.moe.num_shared_experts else set()
    return frozenset(found)


def _check_product(name: str) -> None:
    if name not in get_args(Product):
        raise ValueError(f"no product is named {name!r}: choose among {', '.join(get_args(Product))}")


@dataclass(frozen=True)
class Fp8Options:
    """What FP8 training may do otherwise than the paper.

    Raises:
        ValueError: a name that there is not, by field.
    """

    scales: Annotated[ScaleName, arg(name="fp8-scales")] = "ue8m0"
    """Scales of tiles and blocks: ue8m0, powers of two, as DeepSeek-V3.1 trains with; or float32, V3's."""
    gradients: Annotated[Literal["e4m3", "e5m2"], arg(name="fp8-gradients")] = "e4m3"
    """Code of gradients; e5m2 is the hybrid of earlier FP8 training."""
    gradient_tile: Annotated[Literal["1x128", "128x128"], arg(name="fp8-gradient-tile")] = "1x128"
    """Tiles of gradients in Dgrad; V3 saw 128x128 diverge."""
    granularity: Annotated[Literal["tile", "tensor"], arg(name="fp8-granularity")] = "tile"
    """One scale a tile or block, or one a tensor."""
    accumulation: Annotated[Accumulation, arg(name="fp8-accumulation")] = "float32"
    """How products add up; promoted and tensor_core imitate Hopper, and are slow."""
    high_precision: Annotated[tuple[str, ...], arg(name="fp8-high-precision")] = ()
    """Products that stay out of FP8, such as kv_b or experts.down."""
    after_attention: Annotated[Literal["e5m6", "e4m3", "activation"], arg(name="fp8-after-attention")] = "e5m6"
    """What is kept between attention and its output projection."""
    swiglu_input: Annotated[Literal["e4m3", "activation"], arg(name="fp8-swiglu-input")] = "e4m3"
    """What experts keep for the backward of SwiGLU."""
    dispatch: Annotated[Literal["e4m3", "activation"], arg(name="fp8-dispatch")] = "e4m3"
    """Tokens on their way to experts."""

    def __post_init__(self) -> None:
        for name in self.high_precision:
            if name not in get_args(Product):
                raise ValueError(f"fp8.high_precision: no product is named {name!r}: choose among {_CHOICES}")
        if self.granularity == "tensor" and self.gradient_tile != "1x128":
            raise ValueError(
                f"fp8.gradient_tile is {self.gradient_tile} and fp8.granularity tensor, which has no tiles: "
                "leave one of the two out"
            )
        fp8_recipe(self)


_CHOICES = ", ".join(name for name in get_args(Product) if name not in NEVER_FP8)


def fp8_recipe(
    options: Fp8Options | None = None,
    activations: Literal["float32", "bfloat16"] = "bfloat16",
    recompute: Iterable[Recomputed] = (),
) -> Recipe:
    """The paper's recipe [V3 section 3.3], but for ``options``.

    Raises:
        ValueError: a format that is impossible where it is asked for.
    """
    options = options or Fp8Options()
    scale = options.scales
    by_tensor = options.granularity == "tensor"
    one, turned, block = ("tensor",) * 3 if by_tensor else ("1x128", "128x1", "128x128")
    formats = ProductFormats(
        input=TileFormat("e4m3", one, scale),
        weight=TileFormat("e4m3", block, scale),
        gradient=TileFormat(options.gradients, "tensor" if by_tensor else options.gradient_tile, scale),
        turned_input=TileFormat("e4m3", turned, scale),
        turned_gradient=TileFormat(options.gradients, turned, scale),
        kept=TileFormat("e4m3", one, scale),
        accumulation=options.accumulation,
    )
    kept = None if options.after_attention == "activation" else TileFormat(options.after_attention, "1x128", "ue8m0")
    return Recipe(
        activations=activations,
        fp8=formats,
        high_precision=NEVER_FP8 | frozenset(options.high_precision),  # pyright: ignore[reportArgumentType]
        kept_after_attention=kept,
        kept_swiglu=None if options.swiglu_input == "activation" else TileFormat("e4m3", "1x128", scale),
        dispatch=None if options.dispatch == "activation" else TileFormat("e4m3", "1x128", "ue8m0"),
        recompute=frozenset(recompute),
    )
