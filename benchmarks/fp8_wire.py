"""What formats on the wire do to what travels between ranks, captured from a training run [V3 section 3.3.3].

    python benchmarks/fp8_wire.py [--steps 60] [--threads 1] [--results FOLDER]

A small model trains in FP32.  In the last step everything that dispatch and combine move is kept, forward and backward,
in every layer, and then goes through each format: relative error (norm of the difference over the norm), bias of the
magnitudes (mean difference over the mean magnitude), and bytes a token.  V3 sends E4M3 with power-of-two scales to
dispatch and BF16 through combine; LogFMT is DeepSeek's experiment for combine [ISCA section 3.2].
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ablation.text import prepared
from fp8_training.arms import BASE, FULL, MODEL
from support.record import RESULTS, announce, header, save
from torch import Tensor

from abyssal.kernels import logfmt
from abyssal.kernels.fp8_tiles import round_trip
from abyssal.kernels.logfmt import encode_log
from abyssal.model.dispatch import LocalDispatcher
from abyssal.precision.wire import bytes_per_token
from abyssal.spec.tile_format import CodeName, ScaleName, TileFormat
from abyssal.train.data import fitted, pretraining_data
from abyssal.train.loop import build_model
from abyssal.train.step import Trainer

Captured = dict[str, list[Tensor]]
"""By what travels, a tensor a layer."""
DISPATCHED, COMBINED = "activations to experts", "outputs of experts"
DISPATCHED_BACK, COMBINED_BACK = "gradients to experts", "gradients from experts"


@dataclass(frozen=True)
class WireFormat:
    """One way to send a row."""

    name: str
    through: Callable[[Tensor], Tensor]
    """What arrives of what is sent."""
    row_bytes: Callable[[int], float]


def _tiles(name: str, code: CodeName, scale: ScaleName) -> WireFormat:
    form = TileFormat(code, "1x128", scale)
    return WireFormat(
        name, lambda x: round_trip(x, form, torch.float32), lambda columns: bytes_per_token(columns, form)
    )


def _log(name: str, bits: int, **options: Any) -> WireFormat:
    return WireFormat(
        name, lambda x: encode_log(x, bits, **options).values(), lambda columns: logfmt.bytes_per_token(columns, bits)
    )


FORMATS = (
    WireFormat("BF16", lambda x: x.bfloat16().float(), lambda columns: 2.0 * columns),
    _tiles("E4M3, powers of two", "e4m3", "ue8m0"),
    _tiles("E4M3, FP32 scales", "e4m3", "float32"),
    _tiles("E5M2, powers of two", "e5m2", "ue8m0"),
    _log("LogFMT-8", 8),
    _log("LogFMT-8, rounded in log", 8, rounding="log"),
    _log("LogFMT-10", 10),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of training before anything is captured")
    parser.add_argument("--threads", type=int, default=None, help="of torch (the machine's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of fp8-wire.json")
    chosen = parser.parse_args()
    if chosen.steps < 1:
        parser.error(f"--steps is {chosen.steps}; give at least 1")
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    about = header()
    announce(about)
    found = {what: measured(tensors) for what, tensors in captured(chosen.steps).items()}
    print(*described(found), sep="\n")
    data = {**about, "steps": chosen.steps, "width": MODEL.hidden_size, "found": found}
    print(f"saved {save('fp8-wire', data, chosen.results)}")
    return 0


def captured(steps: int) -> Captured:
    """What travels in the last of ``steps`` steps."""
    scale = replace(FULL, steps=steps)
    config = replace(scale.config(BASE, seed=0), compute="float32")
    with tempfile.TemporaryDirectory() as folder:
        source = prepared(Path(folder) / "data", None, scale.vocab_size, smoke=True)
        spec = fitted(MODEL, source.tokenizer())
        stream = pretraining_data([source], spec, config).stream
        trainer = Trainer(build_model(spec, config), config)
        kept: Captured = {}
        for step in range(steps):
            if step == steps - 1:
                kept = _watched(trainer.model.local_dispatcher())
            trainer.step(stream.rows(step * scale.batch_size, scale.batch_size))
    return kept


def _watched(dispatcher: LocalDispatcher) -> Captured:
    """What ``dispatcher`` is given from now on.  Forward and backward are told apart by the weights, which travel with
    the tokens of a forward's dispatch and of a backward's combine."""
    kept: Captured = {name: [] for name in (DISPATCHED, COMBINED, DISPATCHED_BACK, COMBINED_BACK)}

    def watch(method: str, with_weights: str, without: str) -> None:
        original = getattr(dispatcher, method)

        def watching(rows: Tensor, weights: Tensor | None, *others: Any) -> Any:
            kept[without if weights is None else with_weights].append(rows.detach().float().clone())
            return original(rows, weights, *others)

        setattr(dispatcher, method, watching)

    watch("start_dispatch", DISPATCHED, DISPATCHED_BACK)
    watch("start_combine", COMBINED_BACK, COMBINED)
    return kept


def measured(tensors: list[Tensor]) -> dict[str, dict[str, float]]:
    """Errors of each format over the layers' rows together; of zero rows nothing is known."""
    rows = torch.cat(tensors).double()
    found = {}
    for form in FORMATS:
        arrived = torch.cat([form.through(tensor) for tensor in tensors]).double()
        found[form.name] = {
            "relative_error": ((arrived - rows).norm() / rows.norm()).item(),
            "bias": ((arrived.abs() - rows.abs()).mean() / rows.abs().mean()).item(),
            "bytes_per_row": form.row_bytes(rows.shape[1]),
        }
    return found


def described(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    lines = []
    for what, by_format in found.items():
        lines.append(f"{what:<28} {'relative error':>14} {'bias':>10} {'bytes a row':>12}")
        for name, figures in by_format.items():
            error, bias = f"{100 * figures['relative_error']:.3f} %", f"{100 * figures['bias']:+.4f} %"
            lines.append(f"  {name:<26} {error:>14} {bias:>10} {figures['bytes_per_row']:>12,.0f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
