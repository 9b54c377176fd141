"""``abyssal info MODEL``: what a model is, what it weighs and what a token costs, from its configuration alone.

Reads no weights and imports no torch, so it answers at once for a model of any size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from abyssal.cli.arguments import OneLineParser
from abyssal.spec import arithmetic
from abyssal.spec.lookup import resolve
from abyssal.spec.model import GroupedQueryAttentionSpec, ModelSpec

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_SEQ_LEN = 4096
_PART_NAMES = {"dense_ffn": "dense FFN", "mtp_projection": "MTP projection"}


def main(argv: list[str]) -> int:
    """Print a model's figures as a table, or with ``--json`` as one JSON object alone."""
    options = _parser().parse_args(argv)
    spec = resolve(options.model)
    seq_len = min(DEFAULT_SEQ_LEN, spec.max_positions) if options.seq_len is None else options.seq_len
    if not 1 <= seq_len <= spec.max_positions:
        raise ValueError(f"--seq-len is {seq_len}: {options.model} takes 1 to {spec.max_positions} positions")
    figures = describe(spec, seq_len)
    if options.json:
        json.dump({"model": options.model, **figures}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print_table(options.model, spec, figures)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="abyssal info", description="Size, cost and memory of a model.")
    parser.add_argument(
        "model", metavar="MODEL", help="a preset (deepseek-v3, tiny, ...), a model folder or its config.json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--seq-len", type=int, help=f"tokens a sequence, for FLOPs (default {DEFAULT_SEQ_LEN})")
    return parser


def describe(spec: ModelSpec, seq_len: int) -> dict[str, Any]:
    """Every figure of ``abyssal info``: parameters, bytes, and FLOPs a token at ``seq_len``."""
    return {
        "family": spec.family,
        "num_layers": spec.num_layers,
        "num_moe_layers": spec.num_moe_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "max_positions": spec.max_positions,
        "mtp_depth": spec.mtp_depth,
        "total_parameters": spec.total_parameters,
        "active_parameters": spec.active_parameters,
        "active_parameters_without_embedding": spec.active_parameters_without_embedding,
        "mtp_parameters": spec.mtp_parameters,
        "parameters_by_part": arithmetic.parameters_by_part(spec),
        "active_parameters_by_part": arithmetic.parameters_by_part(spec, active=True),
        "mtp_parameters_by_part": arithmetic.mtp_parameters_by_part(spec),
        "kv_cache_bytes_per_token": spec.kv_cache_bytes_per_token,
        "kv_cache_bytes_per_token_with_mtp": arithmetic.kv_cache_bytes_per_token(spec, include_mtp=True),
        "seq_len": seq_len,
        "training_flops_per_token": spec.training_flops_per_token(seq_len),
        "training_flops_per_token_with_mtp": arithmetic.training_flops_per_token(spec, seq_len, include_mtp=True),
        "prefill_flops_per_token": arithmetic.prefill_flops_per_token(spec, seq_len),
        "decode_flops_per_token": arithmetic.decode_flops_per_token(spec, seq_len),
        "weight_bytes": {
            "bf16": arithmetic.weight_bytes(spec, "bf16"),
            "fp8": arithmetic.weight_bytes(spec, "fp8"),
            "fp32": arithmetic.weight_bytes(spec, "fp32"),
        },
        "training_state_bytes": arithmetic.training_state_bytes(spec),
    }


def scaled(value: float, unit: str = "") -> str:
    """``value`` with three or more digits and a decimal prefix: 671.03B, 250.45 GFLOPs, 1.34 TB, 540."""
    prefixes = ["", "k", "M", "G", "T", "P"] if unit else ["", "K", "M", "B", "T", "Q"]
    magnitude = 0
    while value >= 999.995 and magnitude < len(prefixes) - 1:
        value /= 1000
        magnitude += 1
    number = f"{value:.2f}" if magnitude else f"{value:g}"
    return f"{number} {prefixes[magnitude]}{unit}" if unit else f"{number}{prefixes[magnitude]}"


def _facts(spec: ModelSpec) -> list[tuple[str, str]]:
    """What the model is, as label and text."""
    attention, moe = spec.attention, spec.moe
    if isinstance(attention, GroupedQueryAttentionSpec):
        heads = f"{attention.num_heads} heads of {attention.head_dim}, {attention.num_kv_heads} of keys and values"
    else:
        dims = f"{attention.qk_nope_head_dim}/{attention.qk_rope_head_dim}/{attention.v_head_dim}"
        query = "latent" if attention.q_lora_rank is None else f"latents {attention.q_lora_rank} /"
        heads = f"MLA, {attention.num_heads} heads of {dims} (nope/rope/v), {query} {attention.kv_lora_rank}"
    layers = f"{spec.num_layers} x {spec.hidden_size}"
    facts = [("layers", layers if moe is None else f"{layers}, {spec.num_dense_layers} dense"), ("attention", heads)]
    if moe is not None:
        groups = f" in {moe.num_kept_groups} of {moe.num_groups} groups" if moe.num_groups > 1 else ""
        experts = f"{moe.num_experts} + {moe.num_shared_experts} shared, top {moe.top_k}{groups}"
        facts.append(("experts", f"{experts}, {moe.expert_ffn_size} wide, {moe.scoring} gate"))
    yarn = "" if spec.yarn is None else f" (YaRN, {spec.yarn.factor:g} x {spec.yarn.original_max_positions:,})"
    facts.append(("positions", f"{spec.max_positions:,}{yarn}"))
    facts.append(("vocabulary", f"{spec.vocab_size:,}" + (", embedding tied to head" if spec.tie_embeddings else "")))
    return facts


def _costs(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What it costs, as label and text."""
    flops = {name: scaled(value, "FLOPs") for name, value in figures.items() if "_flops_" in name}
    with_mtp = bool(figures["mtp_depth"])
    parameters = f"{scaled(figures['active_parameters_without_embedding'])} multiply a token"
    cache = f"{figures['kv_cache_bytes_per_token']:,} B"
    training = flops["training_flops_per_token"]
    if with_mtp:
        parameters += f", {scaled(figures['mtp_parameters'])} more in MTP"
        cache += f" ({figures['kv_cache_bytes_per_token_with_mtp']:,} B with MTP)"
        training += f" ({flops['training_flops_per_token_with_mtp']} with MTP)"
    weights = [f"{scaled(size, 'B')} {name.upper()}" for name, size in figures["weight_bytes"].items()]
    return [
        ("parameters", parameters),
        ("KV cache a token, BF16", cache),
        ("cache at full length", scaled(figures["kv_cache_bytes_per_token"] * figures["max_positions"], "B")),
        ("training a token", training),
        ("prefill a token", flops["prefill_flops_per_token"]),
        ("decode a token", flops["decode_flops_per_token"]),
        ("weights without MTP" if with_mtp else "weights", ", ".join(weights)),
        (
            "training state",
            f"{scaled(figures['training_state_bytes'], 'B')} (BF16 weights, FP32 master, gradients, Adam)",
        ),
    ]


def _grid(rows: Sequence[tuple[str, str]]) -> RenderableType:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for label, text in rows:
        grid.add_row(label, text)
    return grid


def _parameter_table(figures: dict[str, Any]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_footer=True, header_style="bold", footer_style="bold"
    )
    total, active = figures["total_parameters"], figures["active_parameters"]
    table.add_column("parameters", "total", no_wrap=True, style="cyan")
    table.add_column("all", scaled(total), justify="right")
    table.add_column("share", "", justify="right")
    table.add_column("active", scaled(active), justify="right")
    for part, count in figures["parameters_by_part"].items():
        name = _PART_NAMES.get(part, part.replace("_", " "))
        active_count = figures["active_parameters_by_part"][part]
        table.add_row(name, scaled(count), f"{100 * count / total:.1f} %", scaled(active_count))
    return table


def _print_table(name: str, spec: ModelSpec, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    console.print(Text.assemble((name, "bold"), f" ({spec.family})"))
    console.print()
    console.print(_grid(_facts(spec)))
    console.print()
    console.print(_parameter_table(figures))
    console.print()
    console.print(_grid(_costs(figures)))
    console.print(
        f"FLOPs at {figures['seq_len']:,} tokens: causal training, mean prefill, decode at that context", style="dim"
    )
