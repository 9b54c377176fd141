"""Rotary positions in a ``config.json``: the published layout and transformers 5's.

Published files have ``rope_theta`` beside a ``rope_scaling`` object (``{"type": "yarn", "factor": 40, ...}`` or null);
transformers 5 writes one ``rope_parameters`` object with ``rope_theta`` and ``rope_type`` in it.  Both are read, and a
file that has both must agree with itself.  The published layout is written, with the scaling's kind under both of its
names, because every reader understands that one.
"""

from __future__ import annotations

from typing import Any

from abyssal.spec.hf_fields import Fields
from abyssal.spec.parts import YarnSpec

DEFAULT_ROPE_THETA = 10000.0


def _read_kind(rope: Fields) -> str:
    kind, old_kind = rope.take("rope_type", None), rope.take("type", None)
    if kind is not None and old_kind is not None and kind != old_kind:
        raise rope.error("rope_type", f"it contradicts type {old_kind!r}; keep one of the two")
    return kind or old_kind or "default"


def _read_yarn(rope: Fields) -> YarnSpec:
    rope.only("attention_factor", None, "a scale set by hand is not computed here, mscale is")
    rope.only("truncate", True, "DeepSeek's YaRN rounds the bounds of its ramp to whole dimensions")
    mscale, mscale_all_dim = rope.number("mscale", None), rope.number("mscale_all_dim", None)
    # mscale 1 without the other is the formula's default, written out; it equals neither.
    if not mscale_all_dim and mscale in (None, 1.0):
        mscale = mscale_all_dim = None
    elif not mscale or not mscale_all_dim:
        raise rope.error("mscale", f"with mscale_all_dim {mscale_all_dim} readers differ in the scale; set both")
    return YarnSpec(
        factor=rope.number("factor"),
        original_max_positions=rope.integer("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def _read_scaling(rope: Fields) -> tuple[float | None, YarnSpec | None]:
    """(rope_theta if the object has one, scaling)"""
    kind = _read_kind(rope)
    theta = rope.number("rope_theta", None)
    rope.only("partial_rotary_factor", 1, "positions turn the whole rotary part")
    if kind not in ("default", "yarn"):
        name = "rope_type" if rope.given("rope_type") else "type"
        raise rope.error(
            name, "only 'default' and 'yarn' are supported; no DeepSeek model of these families has others"
        )
    yarn = _read_yarn(rope) if kind == "yarn" else None
    rope.finish()
    return theta, yarn


def read_rope(fields: Fields) -> tuple[float, YarnSpec | None]:
    """(rope_theta, YaRN or None) of a whole configuration.

    Raises:
        ValueError: another kind of scaling, a part that changes the maths, or two layouts that disagree.
    """
    fields.only("partial_rotary_factor", 1, "positions turn the whole rotary part")
    thetas = {fields.number("rope_theta", None)}
    scalings: list[YarnSpec | None] = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.nested(name)
        if rope is not None:
            theta, yarn = _read_scaling(rope)
            thetas.add(theta)
            scalings.append(yarn)
    if any(scaling != scalings[0] for scaling in scalings):
        raise fields.error("rope_scaling", "it contradicts rope_parameters; remove one of the two")
    stated = sorted(theta for theta in thetas if theta is not None)
    if len(stated) > 1:
        raise fields.error("rope_theta", f"the file states {stated[0]} and {stated[1]}; keep the right one")
    return (stated[0] if stated else DEFAULT_ROPE_THETA), (scalings[0] if scalings else None)


def write_rope(rope_theta: float, yarn: YarnSpec | None) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` in the published layout."""
    if yarn is None:
        return {"rope_theta": rope_theta, "rope_scaling": None}
    scaling: dict[str, Any] = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if yarn.mscale is not None:
        scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    return {"rope_theta": rope_theta, "rope_scaling": scaling}
