"""The offline API: a model folder, prompts in, outputs out.

    llm = abyssal.LLM("runs/mine/model")
    out = llm.generate(["Once upon a time"], abyssal.SamplingParams(temperature=0, max_tokens=64))[0]
    out.text, out.token_ids, out.finish_reason, out.cached_tokens, out.logprobs

All prompts of a call go through the engine together; the order of the outputs is that of the prompts.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.interrupts import unbroken
from abyssal.engine.messages import Request, RequestOutput, SamplingParams, TokenLogprobs
from abyssal.engine.opening import open_folder
from abyssal.engine.outputs import GrowingOutput
from abyssal.engine.stored import StoredPages
from abyssal.model.transformer import Transformer
from abyssal.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]

NO_TOKENIZER = "prompt: is text, and the model has no tokenizer; give token ids"


class LLM:
    """An engine over a model folder.

    Args:
        path: a model folder with its tokenizer; or a model, with ``tokenizer``.
        dtype: of weights and activations; the folder's by default.
        tokenizer: of a model that is in memory already; without one, prompts are token ids and outputs have no text.
        stored: where pages are kept beyond this process; by default a model folder's are kept on disk, as ``config``
            says, and those of a model in memory, whose weights nobody else knows, nowhere.  It is closed with the rest.

    Raises:
        ValueError, FileNotFoundError: what :func:`~abyssal.checkpoint.hf.load_model` and the tokenizer raise; a folder
            for the disk cache that cannot be used.

    :meth:`close` it, or use it in a ``with`` statement, to be sure that everything is on disk; the end of the process
    does so too.
    """

    def __init__(
        self,
        path: str | Path | Transformer,
        dtype: torch.dtype | None = None,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        stored: StoredPages | None = None,
    ) -> None:
        config = config or EngineConfig()
        if isinstance(path, Transformer):
            self.model = path
            if config.disk_cache_folder is not None and stored is None:
                raise ValueError(
                    "disk_cache_folder: the weights of a model in memory cannot be known again; give the folder of the "
                    "model, or stored="
                )
            if tokenizer is not None:
                tokenizer.check_fits(self.model.spec)
        else:
            opened = open_folder(path, config, dtype, tokenizer, stored)
            self.model, tokenizer, stored = opened.model, opened.tokenizer, opened.stored
        self.tokenizer = tokenizer
        self.stored = stored
        self.engine = Engine(self.model, tokenizer, config, stored=stored)
        self._numbers = itertools.count()
        self._news: dict[int, dict[int, RequestOutput]] = {}
        """By request: where the call that asked for it looks for its newest output.  Several calls may be under way,
        and whichever takes a step takes it for all."""

    def close(self) -> None:
        """Write what is to be kept on disk, and end the threads.  Further calls work, without the disk."""
        self.engine.close()
        if self.stored is not None:
            self.stored.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Outputs of the prompts, in their order.

        Args:
            prompts: texts, or lists of token ids; one or many.
            params: for all, or one a prompt.

        A prompt that cannot run (empty, too long, a structure that cannot be met) has an output with ``error`` and does
        not disturb the others.

        Raises:
            ValueError: as many parameters as there are prompts were not given, text without a tokenizer, or the engine
                sleeps.
        """
        outputs = dict(self.as_finished(prompts, params))
        return [outputs[number] for number in range(len(outputs))]

    def as_finished(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """:meth:`generate` with each output as soon as it is whole, beside its prompt's number.  Closing
        it cancels the others.

        Raises:
            ValueError: as there.
        """
        self._check_awake()
        several = _several(prompts)
        each = [params or SamplingParams()] * len(several) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(several):
            raise ValueError(f"params: {len(each)} for {len(several)} prompts; give one for all, or one each")
        if self.tokenizer is None and any(isinstance(prompt, str) for prompt in several):
            raise ValueError(NO_TOKENIZER)
        return self._finished(several, each)

    def _finished(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        running: dict[int, int] = {}
        news: dict[int, RequestOutput] = {}
        try:
            for number, (prompt, parameters) in enumerate(zip(prompts, params, strict=True)):
                request_id = next(self._numbers)
                running[request_id] = number
                try:
                    self._begin(Request(request_id, self._ids(prompt), parameters), news)
                except ValueError as error:
                    news[request_id] = RequestOutput(request_id, (), (), error=str(error))
            while running:
                if not news:
                    self._step_for(news)
                ended = [output for output in news.values() if output.finished]
                news.clear()
                for output in ended:
                    self._news.pop(output.request_id, None)
                for output in ended:
                    number = running.pop(output.request_id)
                    yield number, self._with_prompt(output, prompts[number], params[number])
        except BaseException:
            self._abandon(news)
            raise

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[RequestOutput, None, None]:
        """The output of one prompt as it grows, a step at a time; the last is finished.  Closing it cancels
        the request.

        Raises:
            ValueError: the prompt cannot run, or the engine sleeps.
        """
        self._check_awake()
        params = params or SamplingParams()
        request = Request(next(self._numbers), self._ids(prompt), params)
        news: dict[int, RequestOutput] = {}
        self._begin(request, news)
        try:
            while self._news.get(request.request_id) is news:
                if not news:
                    self._step_for(news)
                    continue
                output = news.pop(request.request_id)
                if output.finished:
                    del self._news[request.request_id]
                grown = output.snapshot() if isinstance(output, GrowingOutput) else output
                yield self._with_prompt(grown, prompt, params)
        except BaseException:
            self._abandon(news)
            raise

    def _begin(self, request: Request, news: dict[int, RequestOutput]) -> None:
        """Queue a request, whose outputs go to ``news``."""
        self.engine.add(request)
        self._news[request.request_id] = news

    def _step(self) -> None:
        """One step of the engine, for every call under way; an interrupt waits for its end."""
        with unbroken():
            for output in self.engine.step():
                if output.request_id in self._news:
                    self._news[output.request_id][output.request_id] = output

    def _step_for(self, news: dict[int, RequestOutput]) -> None:
        """A step for a call that waits for something to come into ``news``."""
        self._check_awake()
        self._step()
        if not news and not self.engine.unfinished:
            raise RuntimeError(
                "the engine has nothing left to do, and this call did not hear of its requests: somebody else called "
                "engine.step(); while calls of LLM are under way, leave the steps to them"
            )

    def _abandon(self, news: dict[int, RequestOutput]) -> None:
        """The reader of ``news`` wants no more: its requests end, and those of others go on."""
        left = {request_id for request_id, whose in self._news.items() if whose is news}
        try:
            for request_id in left:
                self.engine.cancel(request_id)
            while left:
                self._step()
                left -= {output.request_id for output in news.values() if output.finished}
                if not self.engine.unfinished:
                    break
        finally:
            self._news = {request_id: whose for request_id, whose in self._news.items() if whose is not news}

    def score(self, prompts: Prompt | Iterable[Prompt]) -> list[tuple[TokenLogprobs | None, ...]]:
        """Log-probabilities of each prompt's own tokens; None for the first, which nothing precedes.

        Raises:
            ValueError: a prompt that cannot run.
        """
        outputs = self.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        for output in outputs:
            if output.error is not None:
                raise ValueError(output.error)
        return [output.prompt_logprobs or () for output in outputs]

    def _check_awake(self) -> None:
        if self.engine.asleep:
            raise ValueError("engine: is asleep, its pages have no memory; call engine.wake() first")

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, (bytes, bytearray)):
            raise ValueError("prompt: is bytes; decode it to text, or give token ids")
        if not isinstance(prompt, str):
            try:
                return tuple(map(operator.index, prompt))
            except TypeError as error:
                raise ValueError(f"prompt: its tokens must be whole numbers ({error})") from error
        if self.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        add_bos = self.tokenizer.bos_token_id is not None
        return tuple(self.tokenizer.encode(prompt, add_bos=add_bos))

    def _with_prompt(self, output: RequestOutput, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        """The output with its prompt's text, before that of its completions where they are to echo it."""
        text = prompt if isinstance(prompt, str) else ""
        if not isinstance(prompt, str) and self.tokenizer is not None and output.prompt_ids:
            text = self.tokenizer.decode(prompt)
        outputs = output.outputs
        if params.echo:
            outputs = tuple(replace(completion, text=text + completion.text) for completion in outputs)
        return replace(output, prompt=text, outputs=outputs)


def _several(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or many, as many."""
    if isinstance(prompts, (str, bytes, bytearray)):
        return [prompts]
    several: list[Any] = list(prompts)
    return [several] if several and _is_token(several[0]) else several


def _is_token(value: object) -> bool:
    """Whether it is a whole number, NumPy's and torch's among them, and no row of one."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0
