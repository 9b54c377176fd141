"""A run in its folder: its record first, metrics and checkpoints while it goes, the model at the end; and going on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from abyssal.checkpoint.hf import save_model
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec
from abyssal.train.checkpoints import Checkpoints, SavedCheckpoint, saved_checkpoints
from abyssal.train.config import TrainConfig
from abyssal.train.data import TrainingData
from abyssal.train.folder import RunFolder, write_json
from abyssal.train.loop import DTYPES, Loop, TrainResult, build_model
from abyssal.train.metrics import MetricsFile, Observer, environment
from abyssal.train.peak import matmul_peak
from abyssal.train.progress import ProgressDisplay
from abyssal.train.step import Trainer

CHANGES_NO_NUMBER = ("validate_every", "validation_batches", "checkpoint", "model_format", "parallel")
"""Fields of the config that a resumed run may have otherwise."""


@dataclass(frozen=True)
class Run:
    """What is trained, on what, how."""

    spec: ModelSpec
    config: TrainConfig
    data: TrainingData
    start: Callable[[ModelSpec, TrainConfig], Transformer] = build_model
    """Makes the model of step 0; also of a resumed run, whose checkpoint then fills it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the command line, as JSON: what ``--resume`` starts from."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the weights of step 0 come from, as JSON; empty when they are drawn from the seed."""

    def record(self) -> dict[str, Any]:
        """As ``run.json`` has it."""
        return {
            "config": asdict(self.config),
            "model": asdict(self.spec),
            "origin": self.origin,
            "data": self.data.record,
            "options": self.options,
            "environment": environment(),
        }


def run_training(
    folder: RunFolder,
    run: Run,
    observers: Sequence[Observer] = (),
    resume: bool = False,
    save: Callable[[TrainResult], None] | None = None,
    measure_peak: bool = True,
) -> TrainResult:
    """Train, with a progress display, ``metrics.jsonl`` and checkpoints, and save the model with its tokenizer.

    Args:
        folder: free (:meth:`RunFolder.check_free`) unless ``resume``.
        observers: told besides.
        resume: go on from the newest checkpoint in ``folder``, or from the beginning where there is none.
        save: writes the result in place of :func:`save_result`.
        measure_peak: first measure the machine, a third of a second, so that steps are told the share they reach.

    Raises:
        ValueError: no room for model and checkpoints on the disk (nothing is written then), or a resume with another
            config, model or data than the run had (naming the first difference).
        TrainingFault: a loss or gradient that is not finite; what was saved stays.
    """
    config = run.config.resolved(run.spec)
    record = json.loads(json.dumps(replace(run, config=config).record()))
    if resume:
        _check_resume(folder, record)
    torch.manual_seed(config.seed)  # nothing draws from it yet; whatever will, will be resumed with it
    with ExitStack() as stack:
        trainer = Trainer(run.start(run.spec, config), config)
        checkpoints = None
        _check_room(folder, trainer)
        folder.path.mkdir(parents=True, exist_ok=True)
        if config.checkpoint.save_every:
            checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.checkpoint.keep))
        saved = max(saved_checkpoints(folder.checkpoints), default=None) if resume else None
        if saved is not None:
            restore(trainer, saved)
        run.data.tokenizer.save(folder.tokenizer)
        write_json(folder.record, record)
        display = stack.enter_context(ProgressDisplay(trainer.plan.num_steps, num_tokens=trainer.plan.num_tokens))
        metrics = stack.enter_context(MetricsFile(folder.metrics, None if saved is None else trainer.steps_done))
        watching = [display, metrics, *observers]
        if saved is not None:
            for observer in watching:
                observer.on_event({"event": "resume", "step": trainer.steps_done})
        device = trainer.model.embed.weight.device
        peak = matmul_peak(DTYPES[config.compute or "float32"], device) if measure_peak else None
        result = Loop(trainer, run.data, watching, checkpoints, peak).run()
    if save is None:
        save_result(folder, result, run.data)
    else:
        save(result)
    return result


def save_result(folder: RunFolder, result: TrainResult, data: TrainingData) -> None:
    """RUN/model, and RUN/model-average where the run kept an average; each whole or not at all."""
    form = result.trainer.config.model_format
    save_model(result.model, folder.model, form, data.tokenizer, overwrite=True)
    if result.trainer.average is not None:
        result.trainer.average.wait()
        averaged = with_tensors(result.model, result.trainer.average.tensors)
        save_model(averaged, folder.average, form, data.tokenizer, overwrite=True)


def with_tensors(model: Transformer, tensors: Mapping[str, torch.Tensor]) -> Transformer:
    """Another model with some of its tensors replaced; the rest is shared."""
    other = Transformer(model.spec, model.recipe, placements=model.placements(), device="meta")
    other.load_state_dict({**model.state_dict(), **tensors}, assign=True)
    return other


def restore(trainer: Trainer, saved: SavedCheckpoint) -> None:
    """Put a trainer where the checkpoint stands.

    Raises:
        ValueError: a checkpoint that is damaged or of another model, by name.
    """
    tensors = trainer.tensors(saving=False)
    fields, generator = saved.load(tensors), tensors["generator/torch"]
    assert isinstance(generator, torch.Tensor)
    trainer.restore(fields, generator)


def _check_resume(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Refuse to go on with another run than the folder's.

    Raises:
        ValueError: naming the first field that differs, and both values; or that checkpoints lie there unexplained.
    """
    if folder.record.exists():
        check_same_run(folder.record, record)
    elif saved_checkpoints(folder.checkpoints):
        raise ValueError(
            f"{folder.path}: has checkpoints and no {folder.record.name} that says of what; put it back, or give "
            "another --out"
        )


def check_same_run(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with another run than the one recorded at ``path``.

    Raises:
        ValueError: naming the first field that differs, and both values.
    """
    before = json.loads(path.read_text(encoding="utf-8"))
    found = next(_differences("", _compared(before), _compared(record)), None)
    if found is not None:
        name, old, new = found
        raise ValueError(
            f"{path}: the run that is there has {name} {json.dumps(old)}, and this one {json.dumps(new)}; resume with "
            "what it had, or give another --out"
        )


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree: first what a user sets, then what follows from it.

    Left out are what changes no number, and the name of the folder that the weights of step 0 came from, which may have
    been moved: their digest tells.  A field of the config that the record is older than has its default.
    """
    config, origin, data = (dict(record.get(part) or {}) for part in ("config", "origin", "data"))
    config = {**json.loads(json.dumps(asdict(TrainConfig()))), **config}
    for name in CHANGES_NO_NUMBER:
        config.pop(name, None)
    origin.pop("folder", None)
    tokenizer, stream = data.pop("tokenizer", None), data.pop("stream", None)
    data.pop("epochs", None)
    return {
        "data.tokenizer": tokenizer,
        "config": config,
        "model": record.get("model"),
        "origin": origin,
        "data": data,
        "data.stream": stream,
    }


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ, in order: name, both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(f"{name}.{key}".lstrip("."), old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, both in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{name}[{number}]", *both)
    elif old != new:
        yield name, old, new


def _check_room(folder: RunFolder, trainer: Trainer) -> None:
    """Room for the model and for one checkpoint more than is kept, before anything is trained."""
    tensors = trainer.tensors()
    model = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(("model/", "average/")))
    config = trainer.config.checkpoint
    states = (config.keep + 1) * sum(tensor.nbytes for tensor in tensors.values()) if config.save_every else 0
    folder.check_room(model, states)
