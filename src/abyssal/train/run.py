"""A run in its folder: its record first, metrics and checkpoints while it goes, the model at the end; and going on.

On many ranks each writes its part of the checkpoints and of the model; the record, the tokenizer, the metrics and
whatever else there is one of are rank 0's, which alone has observers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from abyssal.checkpoint.hf import save_model
from abyssal.checkpoint.ranks import Ranks
from abyssal.model.transformer import Transformer
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.watch import Watch
from abyssal.spec.model import ModelSpec
from abyssal.train.checkpoints import Checkpoints, SavedCheckpoint, newest_checkpoint, saved_checkpoints
from abyssal.train.config import TrainConfig
from abyssal.train.data import TrainingData
from abyssal.train.export import save_result_from_state
from abyssal.train.fault import TrainingFault
from abyssal.train.folder import RunFolder, write_json
from abyssal.train.initial import Start
from abyssal.train.loop import DTYPES, Loop, TrainResult, build_model
from abyssal.train.metrics import MetricsFile, Observer, environment
from abyssal.train.peak import matmul_peak
from abyssal.train.progress import ProgressDisplay
from abyssal.train.ranks import check_fits, expert_share
from abyssal.train.stages import plan_pipeline
from abyssal.train.step import Trainer
from abyssal.train.ticker import Ticker

CHANGES_NO_NUMBER = ("validate_every", "validation_batches", "checkpoint", "model_format", "parallel")
"""Fields of the config that a resumed run may have otherwise."""


@dataclass(frozen=True)
class Run:
    """What is trained, on what, how."""

    spec: ModelSpec
    config: TrainConfig
    data: TrainingData
    start: Start = build_model
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
    mesh: Mesh | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """Train, with a progress display, ``metrics.jsonl`` and checkpoints, and save the model with its tokenizer.

    All ranks of ``mesh`` call it together; without one, this process trains alone.

    Args:
        folder: free (:meth:`RunFolder.check_free`) unless ``resume``.
        observers: told besides, on rank 0.
        resume: go on from the newest checkpoint in ``folder``, or from the beginning where there is none.
        save: writes the result in place of :func:`save_result`; on many ranks
            :func:`~abyssal.train.export.save_result_from_state` does, of adapters too.
        measure_peak: first measure the machine, a third of a second, so that steps are told the share they reach.
        watch: of the mesh's ranks: told how far the run is.

    Raises:
        ValueError: no room for model and checkpoints on the disk (nothing is written then), or a resume with another
            config, model or data than the run had (naming the first difference).
        TrainingFault: a loss or gradient that is not finite; what was saved stays.
    """
    config = run.config.resolved(run.spec)
    record = json.loads(json.dumps(replace(run, config=config).record()))
    group = None if mesh is None else mesh.control
    ranks = Ranks(group)
    if resume:
        ranks.first(lambda: _check_resume(folder, record))
    torch.manual_seed(config.seed)  # nothing draws from it yet; whatever will, will be resumed with it
    with _trainer(replace(run, config=config), mesh, watch) as trainer, _reporting(watch):
        result = _trained(folder, run.data, record, trainer, observers, resume, measure_peak, watch, ranks)
        with _patient(watch, "writing the model"):
            if mesh is not None:
                save_result_from_state(folder, trainer.steps_done, trainer.tensors(), config.model_format, group)
            elif save is None:
                save_result(folder, result, run.data)
            else:
                save(result)
    return result


@contextmanager
def _trainer(run: Run, mesh: Mesh | None, watch: Watch | None) -> Iterator[Trainer]:
    """A trainer of the run's model, or of this rank's share of it."""
    share, pipeline = None, None
    if mesh is not None:
        check_fits(run.spec, run.config.parallel, mesh.spec)
        pipeline = plan_pipeline(run.spec, run.config, mesh.spec)
        part = None if pipeline is None else pipeline.part(mesh.place.stage)
        share = expert_share(run.spec, run.config.parallel, mesh.spec, mesh.rank, part)
    with _patient(watch, "building the model"):
        model = run.start(run.spec, run.config, share)
        if mesh is not None:
            _move(model, mesh.device)
        trainer = Trainer(model, run.config, mesh, pipeline=pipeline)
    try:
        yield trainer
    finally:
        if mesh is not None:
            trainer.close()


def _move(model: Transformer, device: torch.device) -> None:
    """What the model holds to ``device``; what it does not hold stays nowhere."""
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def _trained(
    folder: RunFolder,
    data: TrainingData,
    record: dict[str, Any],
    trainer: Trainer,
    observers: Sequence[Observer],
    resume: bool,
    measure_peak: bool,
    watch: Watch | None,
    ranks: Ranks,
) -> TrainResult:
    """The loop, with everything around it that is open while it goes."""
    group, config = None if trainer.mesh is None else trainer.mesh.control, trainer.config.checkpoint
    _check_room(folder, trainer, ranks)
    ranks.first(lambda: folder.path.mkdir(parents=True, exist_ok=True))
    with ExitStack() as stack:
        checkpoints = None
        if config.save_every:
            checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.keep, group=group))
        saved = newest_checkpoint(folder.checkpoints, group) if resume else None
        if saved is not None:
            with _patient(watch, "reading the checkpoint"):
                restore(trainer, saved, group)
        ranks.first(lambda: _write_record(folder, data, record))
        watching: list[Observer] = []
        if ranks.is_first:
            display = ProgressDisplay(trainer.plan.num_steps, num_tokens=trainer.plan.num_tokens)
            metrics = MetricsFile(folder.metrics, None if saved is None else trainer.steps_done)
            watching = [stack.enter_context(display), stack.enter_context(metrics), *observers]
        if saved is not None:
            for observer in watching:
                observer.on_event({"event": "resume", "step": trainer.steps_done})
        if watch is not None:
            ticker = stack.enter_context(Ticker(watch, trainer, tuple(watching)))
            watching, data = [*watching, ticker], ticker.told(data)
        peak = _measured_peak(trainer, ranks) if measure_peak else None
        with _reporting(watch):
            return Loop(trainer, data, watching, checkpoints, peak).run()


@contextmanager
def _reporting(watch: Watch | None) -> Iterator[None]:
    """Let the other ranks know of an exception before what is open here is closed, which may have to wait for them."""
    try:
        yield
    except BaseException as error:
        if watch is not None:
            watch.report(ValueError(str(error)) if isinstance(error, TrainingFault) else error)
        raise


def _patient(watch: Watch | None, phase: str) -> AbstractContextManager[None]:
    return nullcontext() if watch is None else watch.patient(phase)


def _write_record(folder: RunFolder, data: TrainingData, record: dict[str, Any]) -> None:
    data.tokenizer.save(folder.tokenizer)
    write_json(folder.record, record)


def _measured_peak(trainer: Trainer, ranks: Ranks) -> float | None:
    """FLOP/s of a rank, the mean over all, each measured while the others are; None on others than the first."""
    dtype, device = DTYPES[trainer.config.compute or "float32"], trainer.model.device
    peaks = ranks.gather(lambda: matmul_peak(dtype, device))
    return sum(peaks) / len(peaks) if peaks else None


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


def restore(trainer: Trainer, saved: SavedCheckpoint, group: distributed.ProcessGroup | None = None) -> None:
    """Put a trainer where the checkpoint stands; all ranks of ``group`` together.

    Raises:
        ValueError: a checkpoint that is damaged or of another model, by name.
    """
    tensors = trainer.tensors(saving=False)
    fields, generator = saved.load(tensors, group=group), tensors["generator/torch"]
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


def _check_room(folder: RunFolder, trainer: Trainer, ranks: Ranks) -> None:
    """Room for the model and for one checkpoint more than is kept, before anything is trained."""
    tensors = trainer.tensors()
    model = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(("model/", "average/")))
    by_rank = ranks.gather(lambda: (model, sum(tensor.nbytes for tensor in tensors.values())))
    config = trainer.config.checkpoint

    def check() -> None:
        models, states = map(sum, zip(*by_rank, strict=True))
        folder.check_room(models, (config.keep + 1) * states if config.save_every else 0)

    ranks.first(check)
