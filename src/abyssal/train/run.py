"""A run in its folder: its record first, metrics while it goes, the model at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

from abyssal.checkpoint.hf import save_model
from abyssal.spec.model import ModelSpec
from abyssal.train.config import TrainConfig
from abyssal.train.folder import RunFolder, write_json
from abyssal.train.loop import TrainResult, open_stream, train
from abyssal.train.metrics import MetricsFile, Observer, environment
from abyssal.train.progress import ProgressDisplay
from abyssal.train.text import TokenisedCorpus


def run_training(
    folder: RunFolder,
    spec: ModelSpec,
    config: TrainConfig,
    text: TokenisedCorpus,
    observers: Sequence[Observer] = (),
) -> TrainResult:
    """Train, with a progress display and ``metrics.jsonl``, and save the model in FP32 with its tokenizer.

    ``folder`` is free (:meth:`RunFolder.check_free`); a run that lies there already is an error, never overwritten.

    Raises:
        ValueError: what :func:`~abyssal.train.loop.open_stream` raises, or no room for the model on the disk; nothing
            is written then.
    """
    config = config.resolved(spec)
    stream = open_stream(spec, config, text)
    folder.check_room(4 * (spec.total_parameters + spec.mtp_parameters))
    folder.path.mkdir(parents=True, exist_ok=True)
    record = {
        "config": asdict(config),
        "model": asdict(spec),
        "environment": environment(),
        "text": {
            "train_documents": len(text.corpus.train_documents),
            "held_out_documents": len(text.corpus.held_out_documents),
            "duplicates_left_out": text.corpus.num_duplicates,
            "train_bytes": text.corpus.train_bytes,
            "held_out_bytes": text.corpus.held_out_bytes,
            "train_tokens": len(text.train_tokens),
            "held_out_tokens": len(text.held_out_tokens),
            "epochs": round(stream.epoch(config.steps), 4),
            "tokenizer": text.tokenizer.content_hash(),
        },
    }
    write_json(folder.record, record)
    with ExitStack() as stack:
        display = stack.enter_context(ProgressDisplay(config.steps))
        metrics = stack.enter_context(MetricsFile(folder.metrics))
        result = train(spec, config, text, [display, metrics, *observers])
    save_model(result.model, folder.model, "fp32", text.tokenizer)
    return result
