"""Options of the verbs that let a model write: how tokens are chosen, and the engine that does it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from abyssal.engine.limits import SchedulerConfig
from abyssal.engine.messages import SamplingParams, StructuredOutput

if TYPE_CHECKING:
    from abyssal.engine.llm import LLM
    from abyssal.text.tokenizer import Tokenizer

MOST_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and where the text ends."""

    max_tokens: int = 128
    """New tokens at most; an end-of-sequence token ends the text earlier."""
    min_tokens: int = 0
    """New tokens at least."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples as the model was trained."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probability adds up to this."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that prompt or text hold already less likely."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the text holds already."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token once for each time the text holds it."""
    seed: int | None = 0
    """Seed of the sampling; None draws another each time."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text that ends the output and is left out of it; may be given several times."""
    ignore_eos: bool = False
    """Go on past end-of-sequence tokens."""
    json_schema: Path | None = None
    """File with a JSON schema that the text must meet."""
    regex: str | None = None
    """A regular expression that the text must match."""
    choice: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text that the output may be; give two or more."""
    grammar: Path | None = None
    """File with a grammar in Lark's syntax that the text must follow."""

    def params(self, **more: Any) -> SamplingParams:
        """For the engine; ``more`` are fields of :class:`SamplingParams` that not every verb has as options.

        Raises:
            ValueError, OSError: a value out of range, options that contradict each other, a file that cannot be read.
        """
        if self.seed is not None and not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"--seed is {self.seed}; give 0 to {MOST_SEED}")
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            structured=self._structured(),
            **more,
        )

    def _structured(self) -> StructuredOutput | None:
        forms: dict[str, Any] = {
            "--json-schema": self.json_schema,
            "--regex": self.regex,
            "--choice": self.choice or None,
            "--grammar": self.grammar,
        }
        given = [name for name, value in forms.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: the text can have one form; give one of them")
        if self.json_schema is not None:
            return StructuredOutput("json_schema", _json(self.json_schema))
        if self.regex is not None:
            return StructuredOutput("regex", self.regex)
        if self.choice:
            return StructuredOutput("choice", self.choice)
        if self.grammar is not None:
            return StructuredOutput("grammar", self.grammar.read_text(encoding="utf-8"))
        return None


@dataclass(frozen=True)
class EngineOptions:
    """The engine: its numbers, its memory, its caches."""

    dtype: Literal["checkpoint", "float32", "bfloat16"] = "checkpoint"
    """Dtype of weights and activations."""
    num_drafts: int | Literal["auto"] = 0
    """Tokens that the model's MTP modules draft a step, to be verified in one pass; they change speed, no text.  auto:
    one a module, as long as that is measured to be faster."""
    cache_tokens: int | None = None
    """Tokens that the cache in memory holds; by default what 256 MiB hold, and the model's length in any case."""
    page_dtype: Literal["model", "fp8"] = "model"
    """What the cache holds: values as they are, or FP8 in about half the room (DeepSeek-V3 and V2)."""
    disk_cache: bool = True
    """Keep what was computed on disk, for later calls with the same model; `abyssal cache` shows and clears it."""
    disk_cache_folder: Path | None = None
    """Where; ~/.cache/abyssal/pages by default."""
    disk_cache_bytes: int | None = None
    """How large it may become; by default a tenth of what is free on the disk, at most 64 GiB."""
    max_sequences: int = 64
    """Texts that are written at once."""
    deterministic: bool = False
    """The same bits whatever runs beside a text and whatever the caches hold."""

    def load(self, model: str | Path, tokenizer: Tokenizer | None = None) -> LLM:
        """The engine over the model folder; imports torch.

        Raises:
            ValueError, OSError: what :class:`~abyssal.engine.llm.LLM` raises.
        """
        import torch

        from abyssal.engine.config import EngineConfig
        from abyssal.engine.llm import LLM

        fields = self.fields()
        dtype = fields.pop("dtype", None)
        return LLM(model, None if dtype is None else getattr(torch, dtype), EngineConfig(**fields), tokenizer)

    def fields(self) -> dict[str, Any]:
        """Fields of :class:`~abyssal.engine.config.EngineConfig`, and ``dtype`` where it is not the checkpoint's: what
        an engine in another process is told.  Without torch.

        Raises:
            ValueError: options that contradict each other.
        """
        if not self.disk_cache and (self.disk_cache_folder is not None or self.disk_cache_bytes is not None):
            raise ValueError("--no-disk-cache and a folder or a size for it contradict each other; give one")
        folder = self.disk_cache_folder
        fields: dict[str, Any] = {
            "cache_tokens": self.cache_tokens,
            "token_budget": max(SchedulerConfig.token_budget, self.max_sequences),  # a token a step for each
            "max_sequences": self.max_sequences,
            "deterministic": self.deterministic,
            "num_drafts": self.num_drafts,
            "page_dtype": self.page_dtype,
            "disk_cache": self.disk_cache,
            "disk_cache_folder": None if folder is None else str(folder),
            "disk_cache_bytes": self.disk_cache_bytes,
        }
        return fields if self.dtype == "checkpoint" else {**fields, "dtype": self.dtype}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
