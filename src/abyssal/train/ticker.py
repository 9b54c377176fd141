"""What a rank's loop tells those that watch over it: an observer that feeds :class:`abyssal.parallel.watch.Watch`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.hooks import RemovableHandle

from abyssal.data.batch import Batch, RowStream
from abyssal.parallel.watch import Watch
from abyssal.train.data import TrainingData
from abyssal.train.metrics import Observer, StepRecord, ValidationRecord
from abyssal.train.step import Trainer

TRAINING, VALIDATING, SAVING = "training", "validating", "saving a checkpoint"


class Ticker:
    """Tells a watch each step, each micro-batch, and what the loop does next; a context manager.

    On rank 0 it passes on what the watch has found about slow ranks.

    Args:
        observers: told of slow ranks.
    """

    def __init__(self, watch: Watch, trainer: Trainer, observers: Sequence[Observer] = ()) -> None:
        self._watch = watch
        self._trainer = trainer
        self._observers = observers
        self._seconds = trainer.seconds
        self._phase = VALIDATING if trainer.steps_done == 0 else TRAINING
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Ticker:
        # A forward pass begins there, on a pipeline's first rank: steps of many micro-batches are seen to get on.
        self._hook = self._trainer.model.embed.register_forward_pre_hook(lambda *_: self.get_on())
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def told(self, data: TrainingData) -> TrainingData:
        """The data, which lets this know when a step or a validation asks for it: there a wait for something else,
        such as a checkpoint's writing, is over."""

        def held_out(num_batches: int | None) -> Iterator[Batch]:
            for batch in data.held_out(num_batches):
                self.get_on()
                yield batch

        return replace(data, stream=_ToldStream(data.stream, self), held_out=held_out)

    def get_on(self) -> None:
        """The main thread got on."""
        self._watch.mark(self._phase)

    def on_step(self, record: StepRecord) -> None:
        ranks = record.result.ranks
        own = record.seconds - self._seconds - (0.0 if ranks is None else ranks.waited)
        self._seconds = record.seconds
        self._watch.step_done(record.step, max(0.0, own))
        config, last = self._trainer.config, record.step == self._trainer.plan.num_steps
        self._phase = VALIDATING if last or record.step % config.validate_every == 0 else TRAINING
        self._watch.mark(self._phase)
        for slow, peer in self._watch.slow_ranks():
            event = {"event": "slow_rank", "step": record.step, "rank": slow.rank, "host": peer.host, "pid": peer.pid}
            seconds = {"own_seconds": round(slow.own_seconds, 6), "median_seconds": round(slow.median_seconds, 6)}
            for observer in self._observers:
                observer.on_event({**event, **seconds})

    def on_validation(self, record: ValidationRecord) -> None:
        self._phase = TRAINING
        self._watch.mark(self._phase)

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "checkpoint":
            self._watch.mark(SAVING, patient=True)  # until rows are asked for


@dataclass(frozen=True)
class _ToldStream:
    """A stream that tells its ticker when rows are asked for."""

    stream: RowStream
    ticker: Ticker

    @property
    def row_length(self) -> int:
        return self.stream.row_length

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint

    def rows(self, first: int, count: int) -> Batch:
        self.ticker.get_on()
        return self.stream.rows(first, count)

    def epoch(self, num_rows: int) -> float:
        return self.stream.epoch(num_rows)
