"""One training step (forward, backward, fused AdamW) beside transformers', same weights, no MTP, no auxiliary loss.

Prints tokens a second, the ratio to transformers' fastest implementation as it comes, the ratio to the same with the
allocator set as ``abyssal train`` sets it, and the share of this machine's measured matrix product peak that the step's
useful FLOPs reach.  Each contestant has a process of its own; their steps take turns.  Parameters, gradients and
moments have the named dtype in all.

    python benchmarks/train_step.py [--presets tiny small] [--dtypes fp32 bf16] [--repeats 5]
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.peer import DTYPES, load_ours, load_theirs, write_model
from support.record import announce, header, interleaved, options, ratio_to_best, save, seconds
from support.worker import Worker

from abyssal.model.context import PackedBatch
from abyssal.precision.head import linear_cross_entropy
from abyssal.spec.presets import preset

SHAPES = {"tiny": (8, 256), "small": (4, 512)}
PEERS = ("grouped_mm", "eager")

Step = Callable[[], tuple[float, float]]
"""One step: seconds and loss."""


def batch_of(vocab_size: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(2, vocab_size, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(0))


def timed(step: Callable[[], float]) -> Step:
    losses: list[float] = []
    return lambda: (seconds(lambda: losses.append(step())), losses[-1])


def our_step(path: Path, dtype: str, shape: tuple[int, int]) -> Step:
    model = load_ours(path, dtype)
    tokens = batch_of(model.spec.vocab_size, shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        hidden = model.hidden(inputs, model.step(PackedBatch([shape[1]] * shape[0])))
        loss = linear_cross_entropy(hidden, model.head_weight, targets, model.recipe.head) / len(targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return timed(step)


def their_step(path: Path, dtype: str, shape: tuple[int, int], experts: str) -> Step:
    model = load_theirs(path, dtype, experts)
    model.train()
    tokens = batch_of(model.config.vocab_size, shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return timed(step)


def matmul_peak(dtype: str) -> float:
    """GFLOP/s of the best of several shapes, large and of the model's size."""
    best = 0.0
    for m, k, n in ((2048, 512, 512), (2048, 512, 1408), (2048, 2048, 2048)):
        a, b = torch.randn(m, k, dtype=DTYPES[dtype]), torch.randn(k, n, dtype=DTYPES[dtype])
        best = max(best, 2 * m * k * n / min(seconds(lambda a=a, b=b: a @ b) for _ in range(20)) / 1e9)
    return best


def contestants(path: Path, dtype: str, shape: tuple[int, int]) -> dict[str, Worker]:
    workers = {"abyssal": Worker(our_step, path, dtype, shape, keeps_memory=True)}
    for peer in PEERS:
        for keeps in (False, True):
            name = f"{peer}{', allocator set' * keeps}"
            workers[name] = Worker(their_step, path, dtype, shape, peer, keeps_memory=keeps)
    return workers


def measure(name: str, dtype: str, repeats: int, folder: Path) -> dict[str, Any]:
    path, shape = write_model(name, folder), SHAPES[name]
    workers = contestants(path, dtype, shape)
    first = {who: worker()[1] for who, worker in workers.items()}
    if max(first.values()) - min(first.values()) > 0.02:
        raise SystemExit(f"the losses of the first step differ: {first}")
    num_tokens = shape[0] * shape[1]
    rates = interleaved({who: lambda w=worker: num_tokens / w()[0] for who, worker in workers.items()}, repeats)
    for worker in workers.values():
        worker.close()
    shipped = {who: rates[who] for who in PEERS}
    alike = {who: values for who, values in rates.items() if who.endswith("allocator set")}
    peer, ratio = ratio_to_best(rates["abyssal"], shipped)
    useful, peak = preset(name).training_flops_per_token(shape[1]), matmul_peak(dtype)
    return {
        "preset": name,
        "dtype": dtype,
        "batch": list(shape),
        "tokens_per_second": rates,
        "best_peer": peer,
        "ratio": ratio,
        "ratio_allocator_set": ratio_to_best(rates["abyssal"], alike)[1],
        "matmul_peak_gflops": peak,
        "share_of_peak": statistics.median(rates["abyssal"]) * useful / 1e9 / peak,
        "first_loss": first,
    }


def main() -> None:
    arguments = options(__doc__, SHAPES, list(SHAPES), DTYPES)
    about = header()
    announce(about)
    print(f"{'':<11} abyssal  transformers          ratio  allocator set  of peak   (tokens/s, medians)")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.presets:
            for dtype in arguments.dtypes:
                row = measure(name, dtype, arguments.repeats, Path(folder))
                rows.append(row)
                ours, theirs = (
                    statistics.median(row["tokens_per_second"][who]) for who in ("abyssal", row["best_peer"])
                )
                print(
                    f"{name + ' ' + dtype:<11} {ours:7.0f}  {theirs:7.0f} {row['best_peer']:<12} {row['ratio']:6.2f}  "
                    f"{row['ratio_allocator_set']:13.2f}  {row['share_of_peak']:7.2f}",
                    flush=True,
                )
    print(f"saved {save('train_step', {**about, 'rows': rows})}")


if __name__ == "__main__":
    main()
