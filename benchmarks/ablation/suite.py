"""Running arms: the text prepared once, one run folder an arm and a seed.

    OUT/data/                    the tokens
    OUT/runs/ARM/seed-N/         as support/runs.py says

Pairing.  Rows are read for the deepest MTP of any arm and cut for each, so that arms of one seed see the same tokens at
the same step whatever their depth.  Every initial tensor comes from one reference model of the seed wherever name and
shape are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from support.record import header
from support.runs import Runs, steps

from abyssal.data.batch import Batch, RowStream
from abyssal.data.shards import PreparedData
from abyssal.model.share import ExpertShare
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec
from abyssal.train.balance import max_violation
from abyssal.train.config import TrainConfig
from abyssal.train.data import TrainingData, fitted, pretraining_data
from abyssal.train.folder import RunFolder
from abyssal.train.loop import TrainResult, build_model
from abyssal.train.run import Run

from .arms import LARGEST_DEPTH, Arm, Scale, model


@dataclass(frozen=True)
class CutRows:
    """A stream whose rows lose what only deeper models read."""

    stream: RowStream
    row_length: int

    @property
    def fingerprint(self) -> str:
        return blake2b(f"{self.stream.fingerprint} {self.row_length}".encode(), digest_size=16).hexdigest()

    def rows(self, first: int, count: int) -> Batch:
        return Batch(self.stream.rows(first, count).tokens_BX[:, : self.row_length])

    def epoch(self, num_rows: int) -> float:
        return self.stream.epoch(num_rows)


def paired_data(source: PreparedData, spec: ModelSpec, config: TrainConfig) -> TrainingData:
    """Training and held-out rows whose first ``seq_len + 1`` tokens are the same for any depth of MTP."""
    deepest = pretraining_data([source], replace(spec, mtp_depth=LARGEST_DEPTH), config)
    length = config.seq_len + 1 + spec.mtp_depth
    stream = CutRows(deepest.stream, length)

    def held_out(num_batches: int | None) -> Iterator[Batch]:
        return (Batch(batch.tokens_BX[:, :length]) for batch in deepest.held_out(num_batches))

    record = {**deepest.record, "stream": stream.fingerprint}
    return TrainingData(stream, held_out, deepest.tokenizer, record)


def paired_weights(spec: ModelSpec, config: TrainConfig, share: ExpertShare | None = None) -> Transformer:
    """The model of step 0, with the tensors of the seed's reference model wherever it has one like it."""
    assert share is None, "ablations run on one rank"
    started = build_model(spec, config)
    reference = replace(model(mtp_depth=LARGEST_DEPTH), vocab_size=spec.vocab_size)
    tensors = build_model(reference, config).state_dict()
    with torch.no_grad():
        for name, tensor in started.state_dict().items():
            if name in tensors and tensors[name].shape == tensor.shape:
                tensor.copy_(tensors[name])
    return started


@dataclass(frozen=True)
class Suite:
    """Where runs lie and how long they are."""

    out: Path
    scale: Scale
    data: PreparedData

    @property
    def runs(self) -> Runs:
        return Runs(self.out / "runs")

    def results(self, arm: Arm, seeds: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Those of the seeds that are finished."""
        return self.runs.results(arm.name, seeds)

    def train(self, arm: Arm, seed: int) -> bool:
        """Bring a run to its end; False if it was there.

        Raises:
            ValueError: the folder holds another run.
        """
        spec = fitted(arm.model, self.data.tokenizer())
        config = self.scale.config(arm, seed)
        run = Run(spec, config, paired_data(self.data, spec, config), paired_weights, origin={"paired": True})
        return self.runs.train(arm.name, seed, run, found)


def found(result: TrainResult, folder: RunFolder) -> dict[str, Any]:
    """What the ablations need of a finished run, as JSON."""
    evaluation, spec = result.evaluation, result.model.spec
    return {
        **header(),
        "seconds": round(result.seconds, 1),
        "tokens": result.tokens,
        "total_parameters": spec.total_parameters,
        "active_parameters": spec.active_parameters,
        "loss": evaluation.loss,
        "bits_per_byte": evaluation.bits_per_byte,
        "max_violation": sum(
            max_violation(load_E) for layer, load_E in evaluation.loads.items() if layer < spec.num_layers
        )
        / spec.num_moe_layers,
        "mtp_acceptance": list(evaluation.mtp_acceptance),
        "mtp_chain": list(evaluation.mtp_chain),
        "mtp_unigram_rate": list(evaluation.mtp_unigram_rate),
        "held_out_tokens": evaluation.num_tokens,
        "batch_violations": batch_violations(folder),
    }


def batch_violations(folder: RunFolder) -> list[float]:
    """MaxVio_batch of every step, mean over layers."""
    return [round(line["max_violation"], 4) for line in steps(folder)]
