"""What a verb that writes text says about it under ``--verbose``: one line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from abyssal.engine.messages import RequestOutput


@dataclass
class Statistics:
    """Of everything written since it was made."""

    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    """When the first token of a stream was there."""

    def note(self, output: RequestOutput) -> None:
        """A stream has come this far."""
        if self.first is None and output.token_ids:
            self.first = time.perf_counter()

    def line(self, outputs: Sequence[RequestOutput], acceptance: float | None) -> str:
        """``acceptance``: share of drafts accepted, of the whole engine."""
        seconds = time.perf_counter() - self.began
        tokens = sum(len(each.token_ids) for output in outputs for each in output.outputs)
        prompt = sum(len(output.prompt_ids) for output in outputs)
        cached = sum(output.cached_tokens for output in outputs)
        parts = [f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:,.1f} tokens/s)"]
        if self.first is not None:
            parts.append(f"first after {self.first - self.began:.3f} s")
        parts.append(f"prompt {prompt} tokens, {cached} from the cache")
        if acceptance is not None:
            parts.append(f"{acceptance:.0%} of drafts accepted")
        return "; ".join(parts)
