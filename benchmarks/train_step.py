"""One training step (forward, backward, fused AdamW) beside transformers' and torchtitan's deepseek_v3, in one run.

    python benchmarks/train_step.py [--torchtitan-python PATH/bin/python] [--presets tiny small]
                                    [--dtypes fp32 bf16 mixed] [--repeats 3] [--smoke]

The same weights, batch and causal attention in all; no MTP.  The balance is the same too: none, neither an auxiliary
loss nor an update of the biases.  Parameters, gradients and moments have the named dtype; ``mixed`` keeps them in FP32
and multiplies in BF16, as ``abyssal train`` does and autocast does for the peers.  The losses of the first step have to
agree, or nothing is printed.

For each contestant: tokens a second (median); the share of this machine's measured matrix product peak that the step's
useful FLOPs reach; how many times as fast abyssal is (median over rounds, in each of which the contestants take turns);
the seconds of the first step, compilation included; and the most memory of its process beyond that before the model was
made (compiler processes not counted).  abyssal runs with glibc's allocator set as ``abyssal train`` sets it, the peers
as they come and with the same setting.

torchtitan lives in an environment of its own, made by
``pip install torch==2.13.0 torchtitan==0.3.0 triton==3.7.1 tyro`` (with the CPU build of torch); its compiled form
needs a C++ compiler.  Without ``--torchtitan-python`` it is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.limits import matmul_peak
from support.peer import write_model
from support.record import announce, header, save
from support.worker import ALLOCATOR_SET, Worker

from abyssal.spec.presets import preset

SHAPES = {"tiny": (8, 256), "small": (4, 512)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.bfloat16}
"""In which matrix products are computed."""
PEERS = {"transformers": ("grouped_mm", "eager"), "torchtitan": ("eager", "compiled")}
LARGEST_DIFFERENCE = 0.02
"""Between the losses of the first step."""


@dataclass(frozen=True)
class Contestant:
    """Who takes the step."""

    name: str
    module: str
    """Of ``support``."""
    form: str
    python: str
    allocator_set: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.form}".strip() + ", allocator set" * self.allocator_set

    def start(self, folder: Path, preset_name: str, dtype: str, cache: Path) -> Worker:
        """The process, under way.  ``cache`` keeps what was compiled, for the same form with the allocator set."""
        request = {"folder": str(folder), "shape": SHAPES[preset_name], "dtype": dtype, "form": self.form}
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), **(ALLOCATOR_SET if self.allocator_set else {})}
        return Worker(self.python, self.module, request, environment)


def contestants(torchtitan_python: str | None, allocators: str) -> list[Contestant]:
    """abyssal, then each peer as it comes, then with the allocator set."""
    pythons = {"transformers": sys.executable, "torchtitan": torchtitan_python}
    chosen = [Contestant("abyssal", "train_abyssal", "", sys.executable)]
    for allocator_set in {"both": (False, True), "as-it-comes": (False,)}[allocators]:
        for name, forms in PEERS.items():
            python = pythons[name]
            if python is not None:
                chosen += [Contestant(name, f"train_{name}", form, python, allocator_set) for form in forms]
    return chosen


def first_steps(workers: dict[str, Worker]) -> dict[str, dict[str, Any]]:
    """Each contestant's first step, one after another.

    Raises:
        SystemExit: their losses differ, so they do not train the same model.
    """
    first = {label: worker() for label, worker in workers.items()}
    losses = {label: answer["loss"] for label, answer in first.items()}
    if max(losses.values()) - min(losses.values()) > LARGEST_DIFFERENCE:
        raise SystemExit(f"the losses of the first step differ: {losses}")
    return first


def measure(name: str, dtype: str, repeats: int, chosen: list[Contestant], folder: Path) -> dict[str, Any]:
    """All contestants on one preset in one dtype: ``repeats`` rounds after one to warm up."""
    path, cache = write_model(name, folder), folder / f"compiled-{name}-{dtype}"
    started = {contestant.label: contestant.start(path, name, dtype, cache) for contestant in chosen}
    workers = {label: worker.ready() for label, worker in started.items()}
    first = first_steps(workers)
    rounds, peaks = [], []
    for _ in range(repeats + 1):
        rounds.append({label: worker() for label, worker in workers.items()})
        peaks.append(matmul_peak(DTYPES[dtype]))
    for worker in workers.values():
        worker.close()
    tokens = SHAPES[name][0] * SHAPES[name][1]
    peak, useful = max(peaks), preset(name).training_flops_per_token(SHAPES[name][1])
    rows = []
    for contestant in chosen:
        label = contestant.label
        times = [answers[label]["seconds"] for answers in rounds[1:]]
        ratios = [answers[label]["seconds"] / answers["abyssal"]["seconds"] for answers in rounds[1:]]
        rows.append(
            {
                "contestant": label,
                "tokens_per_second": [tokens / time for time in times],
                "share_of_peak": tokens / statistics.median(times) * useful / 1e9 / peak,
                "abyssal_is_faster_by": statistics.median(ratios),
                "first_step_seconds": first[label]["seconds"],
                "first_loss": first[label]["loss"],
                "memory_bytes": rounds[-1][label]["memory"],
            }
        )
    return {
        "preset": name,
        "dtype": dtype,
        "batch": list(SHAPES[name]),
        "matmul_peak_gflops": peak,
        "tokens_per_second_at_peak": peak * 1e9 / useful,
        "contestants": rows,
    }


def show(row: dict[str, Any]) -> None:
    """Print one preset and dtype as a table."""
    sequences, length = row["batch"]
    print(
        f"\n{row['preset']} {row['dtype']}, {sequences} x {length} tokens; "
        f"peak {row['matmul_peak_gflops']:,.0f} GFLOP/s = {row['tokens_per_second_at_peak']:,.0f} tokens/s"
    )
    print(f"{'':<40} tokens/s  of peak  abyssal is  first step    memory")
    for one in row["contestants"]:
        ratio = f"{one['abyssal_is_faster_by']:8.2f} x" if one["contestant"] != "abyssal" else ""
        speed = f"{statistics.median(one['tokens_per_second']):8,.0f}  {one['share_of_peak']:7.2f}  {ratio:>10}"
        cost = f"{one['first_step_seconds']:8.1f} s  {one['memory_bytes'] / 2**20:5,.0f} MiB"
        print(f"{one['contestant']:<40} {speed}  {cost}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3, help="rounds after one to warm up")
    parser.add_argument("--torchtitan-python", help="interpreter of an environment with torchtitan")
    parser.add_argument("--allocators", default="both", choices=["both", "as-it-comes"], help="settings of the peers")
    parser.add_argument("--smoke", action="store_true", help="one round on tiny in FP32, peers as they come; not saved")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.presets, chosen.dtypes, chosen.repeats, chosen.allocators = ["tiny"], ["fp32"], 1, "as-it-comes"
    return chosen


def main() -> None:
    options, about = arguments(), header()
    announce(about)
    if options.torchtitan_python is None:
        print("torchtitan is left out: give --torchtitan-python (how to make its environment: the head of this file)")
    chosen, rows = contestants(options.torchtitan_python, options.allocators), []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.presets:
            for dtype in options.dtypes:
                rows.append(measure(name, dtype, options.repeats, chosen, Path(folder)))
                show(rows[-1])
    if not options.smoke:
        print(f"\nsaved {save('train_step', {**about, 'rows': rows})}")


if __name__ == "__main__":
    main()
