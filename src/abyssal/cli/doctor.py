"""``abyssal doctor``: what this machine has, for many ranks too, which implementation each operator uses and why, and
what FP8 costs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from abyssal.cli.arguments import OneLineParser
from abyssal.cli.info import scaled

if TYPE_CHECKING:
    from rich.console import RenderableType

    from abyssal.cli.machine import Machine
    from abyssal.cli.operators import Operator
    from abyssal.cli.rank_support import RankSupport

NO_GPU_KERNELS = "there are no kernels of our own for GPUs yet: PyTorch's run there, and FP8 is emulated"


def main(argv: list[str]) -> int:
    """Print tables, or with ``--json`` one JSON object alone."""
    options = _parser().parse_args(argv)
    from abyssal.cli.fp8_cost import measure
    from abyssal.cli.machine import this_machine
    from abyssal.cli.operators import operators
    from abyssal.cli.rank_support import rank_support

    machine, ranks, found, cost = this_machine(), rank_support(), operators(), measure()
    fp8 = {"emulated": True, "step_ratio": cost.ratio, **asdict(cost)}
    if options.json:
        figures = {
            "machine": asdict(machine),
            "ranks": asdict(ranks),
            "operators": [asdict(each) for each in found],
            "fp8": fp8,
        }
        json.dump(figures, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(machine, ranks, found, fp8)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="abyssal doctor", description="What this machine has, and which implementation each operator uses."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _print(machine: Machine, ranks: RankSupport, found: list[Operator], fp8: dict[str, Any]) -> None:
    from rich.console import Console

    from abyssal.cli.operators import ROW_INVARIANT

    console = Console(highlight=False)
    console.print(_grid([*_facts(machine), *_rank_facts(ranks)]))
    console.print()
    console.print(_operator_table(found))
    console.print(f"why: of training; of inference. Row-invariant: {ROW_INVARIANT}", style="dim")
    console.print()
    console.print(_grid(_fp8_facts(fp8)))


def _facts(machine: Machine) -> list[tuple[str, str]]:
    """The machine, as label and text."""
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.1f} GiB of memory"
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    native = machine.native_instructions or f"{machine.native_problem}; PyTorch runs instead, slower"
    return [
        ("processor", f"{machine.processor} ({machine.architecture}), {cores}{memory}"),
        ("torch", f"{machine.torch}, {machine.torch_instructions}, {threads}"),
        ("native kernels", native),
        ("products in FP32", f"{scaled(machine.flops_float32, 'FLOP/s')}, measured"),
        ("products in BF16", f"{scaled(machine.flops_bfloat16, 'FLOP/s')}, {_bf16(machine)}"),
        ("GPU", _gpus(machine)),
    ]


def _bf16(machine: Machine) -> str:
    if machine.bf16_products:
        return "by the processor's own BF16 products"
    return "computed in FP32: this processor has no BF16 products (AVX-512) that torch uses"


def _gpus(machine: Machine) -> str:
    if not machine.gpus:
        return "none that torch sees"
    names = [f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, {gpu.capability}" for gpu in machine.gpus]
    return f"{'; '.join(names)}. {NO_GPU_KERNELS}"


def _rank_facts(ranks: RankSupport) -> list[tuple[str, str]]:
    """What there is for runs on many ranks."""
    if not ranks.backends or ranks.torchrun is None:
        return [("many ranks", "not with this torch, which was built without torch.distributed")]
    wanted = {"gloo": "CPUs", "nccl": "NVIDIA GPUs"}
    backends = [f"{name} for {wanted[name]}" if name in wanted else name for name in ranks.backends]
    lacking = [f"no {name}" for name in wanted if name not in ranks.backends]
    deep_ep = "not installed; --dispatch alltoall or hierarchical" if ranks.deep_ep is None else ranks.deep_ep
    return [
        ("between ranks", ", ".join([*backends, *lacking])),
        ("starts ranks", ranks.torchrun),
        ("DeepEP", deep_ep),
    ]


def _fp8_facts(fp8: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("FP8", "emulated on this CPU: the same bytes and scales as anywhere, never faster than BF16"),
        (
            "a step in FP8",
            f"about {fp8['step_ratio']:.1f} times a BF16 step ({1000 * fp8['fp8_seconds']:.0f} and "
            f"{1000 * fp8['bf16_seconds']:.0f} ms, a small model, measured now)",
        ),
        ("on GPUs", "kernels of our own and of vendors are not there yet"),
    ]


def _operator_table(found: list[Operator]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("operator", no_wrap=True, style="cyan")
    table.add_column("training", no_wrap=True)
    table.add_column("inference", no_wrap=True)
    table.add_column("why")
    for each in found:
        table.add_row(each.name, each.training or "", each.inference or "", each.why)
    return table


def _grid(rows: list[tuple[str, str]]) -> RenderableType:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for label, text in rows:
        grid.add_row(label, text)
    return grid
