"""What drawing a token costs: by the definition, over the whole vocabulary, and by the few tokens that may win.

    python benchmarks/draws.py [--repeats 7] [--docs]

Both draw the same tokens, which is checked, from logits of standard deviation 2, which are flatter than a trained
model's.  They take turns; figures are medians.  Saved as RESULTS/draws.json (``--docs``: in docs/results).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from unittest.mock import patch

import numpy as np
from support.record import RESULTS, announce, header, interleaved, save, seconds

from abyssal.engine import sampler
from abyssal.engine.messages import SamplingParams
from abyssal.engine.quick_race import UNDECIDED
from abyssal.engine.sampler import Row, sample_rows

VOCABULARIES = (4096, 129280)
ROWS = (1, 32)
PARAMS = {
    "temperature 1": SamplingParams(),
    "temperature 0.7, top-p 0.95": SamplingParams(temperature=0.7, top_p=0.95),
    "top-k 50": SamplingParams(top_k=50),
}
DOCS = Path(__file__).parents[1] / "docs" / "results"


def by_definition(logits_TV: np.ndarray, rows: list[Row]) -> list[int]:
    with patch.object(sampler, "quick_race", lambda logits_RV, *_: np.full(len(logits_RV), UNDECIDED)):
        return sample_rows(logits_TV, rows).tokens_T.tolist()


def quickly(logits_TV: np.ndarray, rows: list[Row]) -> list[int]:
    return sample_rows(logits_TV, rows).tokens_T.tolist()


def measure(vocabulary: int, count: int, name: str, repeats: int) -> dict[str, object]:
    random = np.random.default_rng(0)
    logits_TV = (random.standard_normal((count, vocabulary)) * 2).astype(np.float32)
    rows = [Row(PARAMS[name], seed, position=5) for seed in range(count)]
    assert quickly(logits_TV, rows) == by_definition(logits_TV, rows)
    contestants = {
        "definition": lambda: seconds(lambda: by_definition(logits_TV, rows)),
        "quick": lambda: seconds(lambda: quickly(logits_TV, rows)),
    }
    found = interleaved(contestants, repeats)
    slow, quick = (statistics.median(found[each]) for each in contestants)
    print(
        f"{vocabulary:7} {count:4}  {name:<28} {slow * 1e3:9.2f} {quick * 1e3:9.2f} ms {slow / quick:6.2f}x", flush=True
    )
    return {"vocabulary": vocabulary, "rows": count, "params": name, "seconds": found, "ratio": slow / quick}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--docs", action="store_true", help="save in docs/results")
    chosen = parser.parse_args()
    about = header()
    announce(about)
    print(f"{'vocab':>7} {'rows':>4}  {'':<28} {'defined':>9} {'quick':>9}")
    cases = [(vocabulary, count, name) for vocabulary in VOCABULARIES for count in ROWS for name in PARAMS]
    table = [measure(*case, chosen.repeats) for case in cases]
    print(f"saved {save('draws', {**about, 'rows': table}, DOCS if chosen.docs else RESULTS)}")


if __name__ == "__main__":
    main()
