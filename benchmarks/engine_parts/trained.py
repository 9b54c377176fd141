"""A model that was really trained: random weights do not do for speculation, since none of their drafts is accepted.

It is the quickstart's, on the standard library's own source, trained once into a folder; a run that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from abyssal.data.prepare import PrepareConfig, prepare_paths
from abyssal.data.shards import PreparedData
from abyssal.train.config import CheckpointConfig
from abyssal.train.data import fitted, pretraining_data
from abyssal.train.folder import RunFolder
from abyssal.train.quickstart import quickstart_config, quickstart_spec
from abyssal.train.run import Run, run_training

SAVE_EVERY = 250


@dataclass(frozen=True)
class Trained:
    """A model folder and the text that it was trained on, some of which was held out."""

    folder: Path
    data: PreparedData

    def prompts(self, count: int, length: int) -> list[tuple[int, ...]]:
        """Pieces of held-out documents, far from one another.

        Raises:
            ValueError: there are not as many.
        """
        held_out = self.data.held_out
        places = [
            (number, start)
            for number, tokens in enumerate(held_out.lengths.tolist())
            for start in range(0, tokens - length + 1, length)
        ]
        if len(places) < count:
            raise ValueError(f"{self.data.folder}: the held-out text has {len(places)} pieces of {length} tokens")
        chosen = places[:: len(places) // count][:count]
        return [tuple(held_out.document(number)[start : start + length].tolist()) for number, start in chosen]


def trained_model(folder: Path, steps: int | None = None) -> Trained:
    """The model in ``folder``, trained first if it is not there; ``steps``: the quickstart's, if None."""
    run = RunFolder(folder)
    config = quickstart_config() if steps is None else quickstart_config(steps)
    if not run.data.exists():
        prepare_paths(None, run.data, quickstart_spec().vocab_size, PrepareConfig(fim_rate=0.0))
    data = PreparedData.open(run.data)
    if not run.model.exists():
        print(f"training a model for {config.steps} steps into {folder}, once", flush=True)
        spec = fitted(quickstart_spec(), data.tokenizer())
        config = replace(config, checkpoint=CheckpointConfig(save_every=SAVE_EVERY, keep=1)).resolved(spec)
        run_training(run, Run(spec, config, pretraining_data([data], spec, config)), resume=run.record.exists())
    return Trained(run.model, data)
