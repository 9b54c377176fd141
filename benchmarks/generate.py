"""Single-stream greedy decoding beside transformers', same weights, no speculation.

Prints new tokens a second after the first, the ratio to transformers' fastest implementation, and the share of this
machine's memory bandwidth at which the weights of a token are read.

    python benchmarks/generate.py [--presets tiny small] [--dtypes fp32 bf16] [--repeats 5]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.peer import DTYPES, load_ours, load_theirs, write_model
from support.record import announce, header, interleaved, options, ratio_to_best, save, seconds

from abyssal.engine.generate import generate

PRESETS = ("tiny", "small", "medium")
PEERS = ("eager", "grouped_mm", "batched_mm")
PROMPT, NEW = 128, 64


def rate(times: list[float]) -> float:
    """Tokens a second after the first."""
    return (len(times) - 1) / (times[-1] - times[0])


def our_rate(model: Any, prompt: list[int]) -> float:
    return rate([time.perf_counter() for _ in generate(model, prompt, NEW)])


def their_rate(model: Any, prompt: list[int]) -> float:
    """Timed by a streamer, which generate() calls for the prompt and then for each token."""

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            return None

    clock, tokens = Clock(), torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
    return rate(clock.times[1:])


def memory_bandwidth() -> float:
    """GB/s at which torch sums 1 GiB."""
    array = torch.ones(1 << 28)
    return array.numel() * 4 / min(seconds(array.sum) for _ in range(10)) / 1e9


def measure(name: str, dtype: str, repeats: int, folder: Path) -> dict[str, Any]:
    path = write_model(name, folder)
    ours = load_ours(path, dtype)
    prompt = torch.randint(2, ours.spec.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    ours.spec = replace(ours.spec, eos_token_id=None)  # decode all the tokens, as the peers do
    peers = {peer: load_theirs(path, dtype, peer).eval() for peer in PEERS}
    rates = interleaved(
        {
            "abyssal": lambda: our_rate(ours, prompt),
            **{peer: lambda m=model: their_rate(m, prompt) for peer, model in peers.items()},
        },
        repeats,
    )
    peer, ratio = ratio_to_best(rates["abyssal"], {name: rates[name] for name in PEERS})
    read = ours.spec.active_parameters_without_embedding * DTYPES[dtype].itemsize
    return {
        "preset": name,
        "dtype": dtype,
        "tokens_per_second": rates,
        "best_peer": f"transformers {peer}",
        "ratio": ratio,
        "weight_gigabytes_per_second": statistics.median(rates["abyssal"]) * read / 1e9,
    }


def main() -> None:
    arguments = options(__doc__, PRESETS, ["tiny", "small"], DTYPES)
    bandwidth = memory_bandwidth()
    about = {**header(), "memory GB/s": round(bandwidth, 1)}
    announce(about)
    print(f"{'':<12} {'abyssal':>9} {'best peer':>10} {'':<24} {'ratio':>6} {'of memory':>10}   (tokens/s, medians)")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.presets:
            for dtype in arguments.dtypes:
                row = measure(name, dtype, arguments.repeats, Path(folder))
                rows.append(row)
                medians = {key: statistics.median(values) for key, values in row["tokens_per_second"].items()}
                peer = row["best_peer"]
                print(
                    f"{name + ' ' + dtype:<12} {medians['abyssal']:9.1f} {medians[peer.split()[-1]]:10.1f} "
                    f"{peer:<24} {row['ratio']:6.2f} {row['weight_gigabytes_per_second'] / bandwidth:10.2f}",
                    flush=True,
                )
    print(f"saved {save('generate', {**about, 'rows': rows})}")


if __name__ == "__main__":
    main()
