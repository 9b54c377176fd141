"""One training step (forward, backward, fused AdamW) beside transformers', same weights, no MTP, no auxiliary loss.

Prints tokens a second, the ratio to transformers' fastest implementation, and the share of this machine's measured
matrix product peak that the step's useful FLOPs reach.  Parameters, gradients and moments have the named dtype in both.

    python benchmarks/train_step.py [--presets tiny small] [--dtypes fp32 bf16] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.peer import DTYPES, load_ours, load_theirs, write_model
from support.record import header, interleaved, ratio_to_best, save, seconds

from abyssal.cli.allocator import keep_freed_memory
from abyssal.model.context import PackedBatch
from abyssal.precision.head import linear_cross_entropy

SHAPES = {"tiny": (8, 256), "small": (4, 512)}
PEERS = ("grouped_mm", "eager")


def our_step(model: Any, tokens: torch.Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    inputs, targets = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        hidden = model.hidden(inputs, model.step(PackedBatch([length] * batch)))
        loss = linear_cross_entropy(hidden, model.head_weight, targets, model.recipe.head) / len(targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def their_step(model: Any, tokens: torch.Tensor) -> Callable[[], float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def matmul_peak(dtype: str) -> float:
    """GFLOP/s of the best of several shapes, large and of the model's size."""
    best = 0.0
    for m, k, n in ((2048, 512, 512), (2048, 512, 1408), (2048, 2048, 2048)):
        a, b = torch.randn(m, k, dtype=DTYPES[dtype]), torch.randn(k, n, dtype=DTYPES[dtype])
        best = max(best, 2 * m * k * n / min(seconds(lambda a=a, b=b: a @ b) for _ in range(20)) / 1e9)
    return best


def measure(name: str, dtype: str, repeats: int, folder: Path) -> dict[str, Any]:
    path = write_model(name, folder)
    batch, length = SHAPES[name]
    ours = load_ours(path, dtype)
    tokens = torch.randint(2, ours.spec.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    steps = {"abyssal": our_step(ours, tokens)}
    for peer in PEERS:
        steps[peer] = their_step(load_theirs(path, dtype, peer), tokens)
    first = {name: step() for name, step in steps.items()}
    if max(first.values()) - min(first.values()) > 0.02:
        raise SystemExit(f"the losses of the first step differ: {first}")
    rates = interleaved({name: lambda s=step: batch * length / seconds(s) for name, step in steps.items()}, repeats)
    peer, ratio = ratio_to_best(rates["abyssal"], {name: rates[name] for name in PEERS})
    useful = ours.spec.training_flops_per_token(length)
    peak = matmul_peak(dtype)
    return {
        "preset": name,
        "dtype": dtype,
        "batch": [batch, length],
        "tokens_per_second": rates,
        "best_peer": f"transformers {peer}",
        "ratio": ratio,
        "matmul_peak_gflops": peak,
        "share_of_peak": statistics.median(rates["abyssal"]) * useful / 1e9 / peak,
        "first_loss": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()  # as ``abyssal train`` does; the peers run in this process and have it too
    about = header()
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    print(f"{'':<12} {'abyssal':>9} {'best peer':>10} {'':<24} {'ratio':>6} {'of peak':>8}   (tokens/s, medians)")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.presets:
            for dtype in arguments.dtypes:
                row = measure(name, dtype, arguments.repeats, Path(folder))
                rows.append(row)
                medians = {key: statistics.median(values) for key, values in row["tokens_per_second"].items()}
                peer = row["best_peer"]
                print(
                    f"{name + ' ' + dtype:<12} {medians['abyssal']:9.0f} {medians[peer.split()[-1]]:10.0f} "
                    f"{peer:<24} {row['ratio']:6.2f} {row['share_of_peak']:8.2f}",
                    flush=True,
                )
    print(f"saved {save('train_step', {**about, 'rows': rows})}")


if __name__ == "__main__":
    main()
