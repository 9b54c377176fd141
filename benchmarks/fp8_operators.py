"""Why DeepSeek-V3 trains in FP8 as it does, shown on single operators [V3 sections 3.3.2, 3.5.2, appendix B.2].

    python benchmarks/fp8_operators.py [--threads 1] [--results docs/results] [--smoke]

Three reasons: sums on tensor cores of 14 bits want promotion every 128 products; an outlier wants tiles instead of one
scale a tensor; gradients want tiles of 1x128 instead of 128x128.  The last is shown on gradients captured from a
training run of some minutes, which is made here.  None says what becomes of a training; ``benchmarks/fp8_loss.py``
does.

Prints a table each, and saves fp8-operators.json and fp8-operators.png.  ``--smoke`` does the same with next to
nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fp8_operator_parts import accumulation, gradients, underflow
from fp8_operator_parts.capture import captured
from fp8_operator_parts.draw import draw
from support.record import announce, header, save

DOCS = Path(__file__).parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    outputs: int
    """Rows and columns of products whose sums are compared."""
    lengths: tuple[int, ...]
    rows: int
    """Of 1024 values, one of which is an outlier."""
    outliers: tuple[float, ...]
    """In standard deviations; and how many times larger one token's gradient is made."""
    steps: tuple[int, ...]
    """At which gradients are captured; the run ends with the last."""
    batch_size: int
    seq_len: int


WHOLE = Scale(512, (128, 256, 512, 1024, 2048, 4096), 512, (10, 100, 1e3, 1e4, 1e5, 1e6), (20, 100, 200), 4, 256)
SMOKE = Scale(16, (128, 512), 8, (10, 1e4), (1, 2), 1, 140)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=None, help="of torch (the machine's)")
    parser.add_argument("--results", type=Path, default=None, help="folder of the JSON and PNG files (docs/results)")
    parser.add_argument("--smoke", action="store_true", help="next to nothing of everything: does it run?")
    chosen = parser.parse_args(argv)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    scale = SMOKE if chosen.smoke else WHOLE
    results = chosen.results or (Path("runs/fp8-operators-smoke") if chosen.smoke else DOCS)
    about = header()
    announce(about)
    data = {**about, "scale": asdict(scale)}
    data["accumulation"] = accumulation.measure(scale.outputs, scale.lengths)
    accumulation.tell(data["accumulation"])
    data["underflow"] = underflow.measure(scale.rows, 1024, scale.outliers)
    underflow.tell(data["underflow"])
    with tempfile.TemporaryDirectory() as folder:
        capture = captured(Path(folder), scale.steps, scale.batch_size, scale.seq_len, chosen.smoke)
    data["losses"] = {step: capture.losses[step - 1] for step in scale.steps}
    data["gradients"] = gradients.measure(capture.taken.values(), scale.seq_len)
    gradients.tell(data["gradients"])
    data["uneven"] = gradients.uneven(capture.taken.values(), scale.outliers)
    gradients.tell_uneven(data["uneven"])
    print(save("fp8-operators", data, results))
    picture = results / "fp8-operators.png"
    draw(picture, data)
    print(picture)


if __name__ == "__main__":
    main()
