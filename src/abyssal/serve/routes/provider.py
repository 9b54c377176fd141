"""Other providers through LiteLLM, as :class:`~abyssal.serve.routing.Provider`.

A request goes out once: retries would hide a provider's troubles and could be billed twice.  The stream's usage is
asked for whether the client wants it or not, since it is what is charged.  The prompt counts from when the request goes
out, because the provider bills it from then; if it is refused, or fails before a word of an answer, nothing counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from abyssal.serve.events import Usage
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.routes.answers import tidy
from abyssal.serve.routes.counting import Estimate, shown_usage, usage_of
from abyssal.serve.routes.failures import of_failure, timed_out
from abyssal.serve.routes.options import RouteOption
from abyssal.serve.routes.request import checked, most_output_tokens, prompt_tokens
from abyssal.serve.routing import Kind, Piece, Routed
from abyssal.serve.service import Origin


@dataclass(frozen=True)
class Patience:
    """Seconds that a provider is waited for."""

    whole: float = 600.0
    """For an answer that does not stream."""
    first: float = 300.0
    """For a stream's first chunk: models may think in silence."""
    next: float = 120.0
    """For each later one."""


class LiteLLMProvider:
    """Models behind one prefix.

    Args:
        litellm: the module, as :func:`~abyssal.serve.routes.library.load` gives it.
    """

    def __init__(self, litellm: Any, option: RouteOption, patience: Patience | None = None) -> None:
        self._litellm = litellm
        self._option = option
        self._patience = patience or Patience()

    def prepare(self, kind: Kind, body: Mapping[str, Any]) -> Routed:
        """See :meth:`~abyssal.serve.routing.Provider.prepare`."""
        given = checked(kind, body)
        return Routed(
            model=given["model"],
            kind=kind,
            body=given,
            stream=given.get("stream", False),
            prompt_tokens=prompt_tokens(kind, given),
            most_output_tokens=most_output_tokens(given),
        )

    async def run(self, routed: Routed, origin: Origin) -> AsyncGenerator[Piece, None]:
        """See :meth:`~abyssal.serve.routing.Provider.run`."""
        estimate = Estimate(routed.prompt_tokens)
        yield Piece(usage=estimate.usage)
        said = False
        pieces = self._stream(routed, estimate) if routed.stream else self._whole(routed, estimate)
        try:
            async for piece in pieces:
                said = True
                yield piece
        except ApiError:
            if not said:
                yield Piece(usage=Usage())
            raise
        finally:
            await pieces.aclose()

    async def close(self) -> None:
        """Connections that are kept open."""
        await self._litellm.close_litellm_async_clients()

    async def _whole(self, routed: Routed, estimate: Estimate) -> AsyncGenerator[Piece, None]:
        async with _failures(routed.model), asyncio.timeout(self._patience.whole):
            answer = _plain(await self._ask(routed, {}))
        body = tidy(answer, routed.model)
        estimate.add(body)
        usage = usage_of(answer.get("usage"))
        shown = shown_usage(answer.get("usage") or {}, usage or estimate.usage)
        yield Piece({**body, "usage": shown}, usage or estimate.usage)

    async def _stream(self, routed: Routed, estimate: Estimate) -> AsyncGenerator[Piece, None]:
        wanted = (routed.body.get("stream_options") or {}).get("include_usage", False)
        usage: Usage | None = None
        given: Mapping[str, Any] = {}
        head: Mapping[str, Any] = {}
        stream: Any = None
        try:
            async with _failures(routed.model), asyncio.timeout(self._patience.first):
                stream = await self._ask(routed, {"stream_options": {"include_usage": True}})
            chunks = aiter(stream)
            patience = self._patience.first
            while (chunk := await self._next(chunks, routed.model, patience)) is not None:
                patience = self._patience.next
                given = chunk.get("usage") or given
                usage = usage_of(given)
                body = tidy(chunk, routed.model)
                head = {name: value for name, value in body.items() if name != "choices"}
                if body["choices"]:
                    estimate.add(body)
                    yield Piece({**body, **({"usage": None} if wanted else {})}, usage or estimate.usage)
            counted = usage or estimate.usage
            yield Piece({**head, "choices": [], "usage": shown_usage(given, counted)} if wanted else None, counted)
        finally:
            await _close(stream)

    async def _next(self, chunks: AsyncIterator[Any], model: str, seconds: float) -> dict[str, Any] | None:
        async with _failures(model), asyncio.timeout(seconds):
            chunk = await anext(chunks, None)
        return None if chunk is None else _plain(chunk)

    async def _ask(self, routed: Routed, changes: Mapping[str, Any]) -> Any:
        ask = self._litellm.acompletion if routed.kind == "chat" else self._litellm.atext_completion
        name = self._option.target + routed.model[len(self._option.prefix) :]
        return await ask(**{**routed.body, **changes, "model": name}, max_retries=0, timeout=self._patience.whole)


@asynccontextmanager
async def _failures(model: str) -> AsyncIterator[None]:
    """Whatever LiteLLM raises, as an ApiError."""
    try:
        yield
    except TimeoutError:
        raise timed_out(model) from None
    except Exception as error:
        raise of_failure(error, model) from None


def _plain(answer: Any) -> dict[str, Any]:
    return answer.model_dump(mode="json")


async def _close(stream: Any) -> None:
    """End a stream at once, if there is one; LiteLLM wraps that of text completions in another that cannot."""
    inner = stream if hasattr(stream, "aclose") else getattr(stream, "completion_stream", None)
    if inner is not None:
        await inner.aclose()
