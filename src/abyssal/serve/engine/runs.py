"""The answers under way in the engine: which of its numbers are whose, and which choices have not ended."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from abyssal.engine.wire import Delta
from abyssal.serve.engine.mailbox import Mailbox
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.protocol.errors import ApiError, of_value_error


@dataclass(eq=False)
class Run:
    """One answer under way."""

    mailbox: Mailbox
    num_choices: int
    """Of each prompt."""
    prompts: dict[int, int] = field(default_factory=dict)
    """By number of the engine's requests that have not ended: which prompt each is of."""
    choices_left: dict[int, int] = field(default_factory=dict)
    """Of each of those."""


class Runs:
    """All of them.  A number is never used twice, so that what is told of a dead process's requests, or of those whose
    reader has gone, reaches nobody else."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._runs: dict[int, Run] = {}

    def __len__(self) -> int:
        """Engine requests that have not ended."""
        return len(self._runs)

    @staticmethod
    def begin(prepared: Prepared) -> Run:
        """An answer, as yet without requests."""
        return Run(Mailbox(prepared.num_choices), prepared.params.n)

    def enter(self, run: Run, prompt: int) -> int:
        """The number of the engine's request for a prompt of it."""
        number = next(self._numbers)
        run.prompts[number], run.choices_left[number] = prompt, run.num_choices
        self._runs[number] = run
        return number

    def leave(self, run: Run) -> tuple[int, ...]:
        """Nobody reads it any more: the requests that had not ended."""
        left = tuple(run.prompts)
        for number in left:
            self._end(run, number)
        return left

    def deliver(self, delta: Delta) -> bool:
        """Hand news to their reader; whether the rest of the request has become useless and is to be cancelled."""
        run = self._runs.get(delta.request_id)
        if run is None:  # its reader has gone
            return False
        number, prompt = delta.request_id, run.prompts[delta.request_id]
        if delta.finish_reason is not None:
            run.choices_left[number] -= 1
        others = run.choices_left[number] > 0
        failed = bool(delta.error) or delta.finish_reason == "error"
        if failed or not others:
            self._end(run, number)
        if failed:
            run.mailbox.fail(_failure(delta))
        else:
            run.mailbox.put(_event(delta, prompt))
        return failed and others

    def fail_all(self, error: ApiError) -> None:
        """The engine has none of them any more."""
        for run in dict.fromkeys(self._runs.values()):
            self.leave(run)
            run.mailbox.fail(error)

    def _end(self, run: Run, number: int) -> None:
        del self._runs[number], run.prompts[number], run.choices_left[number]


def _event(delta: Delta, prompt: int) -> EngineEvent:
    return EngineEvent(
        prompt,
        delta.index,
        delta.text,
        delta.token_ids,
        delta.logprobs,
        delta.prompt_logprobs,
        delta.finish_reason,
        delta.stop_reason,
        delta.cached_tokens,
        delta.discarded_tokens,
        began=delta.began,
    )


def _failure(delta: Delta) -> ApiError:
    if delta.refused:
        return of_value_error(ValueError(delta.error))
    return ApiError(500, f"The engine could not go on with this request: {delta.error}")
