"""What the request schemas share: strict reading, and the parameters of sampling.

No parameter is ignored.  A schema knows those that work; ``unsupported`` lists the API's others, each with the values
that mean what happens anyway (``store: false``) and what to do instead of the rest; whatever else comes is unknown.
A parameter that is ``null`` is absent, as clients send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from abyssal.engine.messages import SamplingParams, StructuredOutput
from abyssal.serve.protocol.errors import (
    ApiError,
    bad_parameter,
    far_too_long,
    not_supported,
    of_validation,
    of_value_error,
    too_long,
    unknown_model,
    unknown_parameter,
)
from abyssal.serve.protocol.served import ServedModel

MOST_STOPS = 16
"""Stop texts of one request: DeepSeek's limit (OpenAI's is 4)."""
MOST_STOP_CHARACTERS = 1024
"""Of one stop text: the end of the output is held against each at every step."""
MOST_FIELDS = 1000
"""Of an object with a schema, known or not."""
INT64 = 1 << 63


class Unsupported(NamedTuple):
    """A parameter of the API that this server does not have."""

    harmless: tuple[Any, ...]
    """Values that ask for nothing."""
    hint: str


class _FirstAlone(FailFast):
    """A list of millions may hold as many mistakes, and to gather them would hold up everybody else."""

    def __hash__(self) -> int:  # a member of a union needs one
        return hash(_FirstAlone)


Item = TypeVar("Item")
Listed = Annotated[list[Item], _FirstAlone()]
"""A list, whose first wrong item is the only one that is told of."""


class Strict(BaseModel):
    """Unknown fields, other types and numbers that are none are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        """As :class:`_FirstAlone`: unknown fields too are told of one by one."""
        if isinstance(value, Mapping) and len(value) > MOST_FIELDS:
            raise ValueError(f"an object of {len(value)} fields; it may have {', '.join(cls.model_fields)}")
        return value


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's, which benchmarks ask for: each chunk has the usage so far."""
    include_obfuscation: bool | None = None
    """OpenAI pads its chunks to hide lengths; this server does not."""

    @field_validator("include_obfuscation")
    @classmethod
    def _not_here(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("not supported; give false, or leave it out")
        return value


class Named(Strict):
    """A request of some model."""

    model: str


class SamplingFields(Named):
    """Parameters that chat and text completions have in common."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: str | Listed[str] | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = Field(default="", max_length=512)
    # vLLM's, which DeepSeek's and OpenAI's APIs do not have
    top_k: int = Field(default=0, ge=-1, lt=INT64)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    min_tokens: int = Field(default=0, ge=0, lt=INT64)
    ignore_eos: bool = False
    stop_token_ids: Listed[int] | None = None
    include_stop_str_in_output: bool = False
    priority: int = Field(default=0, ge=-INT64, lt=INT64)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        """As :class:`_FirstAlone`."""
        for key, bias in value.items() if isinstance(value, Mapping) else ():
            if type(bias) not in (int, float):
                raise ValueError(f"that of token {key[:20]!r} must be a number")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of it has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


Request = TypeVar("Request", bound=Named)


def read(schema: type[Request], body: object, unsupported: Mapping[str, Unsupported], served: ServedModel) -> Request:
    """A request's body by its schema.

    Raises:
        ApiError: 400 for no object, 404 for another model, 422 for a parameter.
    """
    if not isinstance(body, Mapping):
        raise ApiError(400, "The body must be a JSON object", code="invalid_json")
    check_texts(body)
    for name in body:
        if name not in schema.model_fields and name not in unsupported:
            raise unknown_parameter(name)
    given = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in given if name in unsupported]:
        known = unsupported[name]
        if not any(type(given[name]) is type(value) and given[name] == value for value in known.harmless):
            raise not_supported(name, known.hint)
        del given[name]
    try:
        request = schema.model_validate(given)
    except ValidationError as error:
        raise of_validation(error) from None
    if request.model != served.name:
        raise unknown_model(request.model, [served.name])
    if isinstance(request, SamplingFields) and request.stream_options is not None and not request.stream:
        raise bad_parameter("stream_options", "only a stream has options; set stream to true, or leave it out")
    if isinstance(request, SamplingFields) and request.continuous_usage and not request.include_usage:
        raise bad_parameter("stream_options.continuous_usage_stats", "needs include_usage: true")
    return request


def sampling_params(
    request: SamplingFields,
    served: ServedModel,
    *,
    max_tokens: int | None,
    best_of: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    structured: StructuredOutput | None = None,
) -> SamplingParams:
    """The engine's parameters.

    Raises:
        ApiError: values that the engine refuses, alone or together.
    """
    try:
        return SamplingParams(
            temperature=request.temperature,
            top_k=max(0, request.top_k),
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=_logit_bias(request.logit_bias, served.vocab_size),
            seed=request.seed,
            max_tokens=max_tokens,
            min_tokens=request.min_tokens,
            stop=_stops(request.stop),
            stop_token_ids=checked_tokens("stop_token_ids", request.stop_token_ids or [], served.vocab_size),
            include_stop=request.include_stop_str_in_output,
            ignore_eos=request.ignore_eos,
            n=request.n,
            best_of=best_of,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured=structured,
        )
    except ValueError as error:
        raise of_value_error(error) from None


def check_length(num_prompt: int, max_tokens: int | None, served: ServedModel) -> None:
    """Whether prompt and output fit, an output without a limit being one token at least.

    Raises:
        ApiError: 400, OpenAI's ``context_length_exceeded``.
    """
    num_new = 1 if max_tokens is None else max_tokens
    if num_prompt + num_new > served.max_length:
        raise too_long(num_prompt, num_new, served.max_length)


def check_bytes(num_bytes: int, served: ServedModel) -> None:
    """Whether a text may fit at all, before work is spent on it.

    Raises:
        ApiError: 400, OpenAI's ``context_length_exceeded``.
    """
    if (least := served.least_tokens(num_bytes)) > served.max_length:
        raise far_too_long(least, served.max_length)


def num_bytes(value: object) -> int:
    """Of all texts in a JSON value, names included."""
    total = 0
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, str):
            total += len(each.encode())
        elif isinstance(each, Mapping):
            stack += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            stack += each
    return total


def checked_tokens(name: str, tokens: list[int], vocab_size: int) -> tuple[int, ...]:
    """Token ids that the model has.

    Raises:
        ApiError: another number.
    """
    for index, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise bad_parameter(f"{name}[{index}]", f"{token} is no token id; those are 0..{vocab_size - 1}")
    return tuple(tokens)


def check_texts(body: Mapping[str, Any]) -> None:
    """Whether each text is one: JSON can spell half of a surrogate pair, which no encoding of text can express.

    Raises:
        ApiError: by the name of the parameter.
    """
    for name, value in body.items():
        stack: list[object] = [name, value]
        while stack:
            each = stack.pop()
            if isinstance(each, str) and not _is_text(each):
                raise bad_parameter(_shown(name), "a text holds half of a surrogate pair; repair it")
            if isinstance(each, Mapping):
                stack += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                stack += each


def _shown(name: str) -> str:
    return name[:60].encode("utf-8", "replace").decode()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MOST_STOPS:
        raise bad_parameter("stop", f"{len(stops)} texts; give at most {MOST_STOPS}")
    for text in stops:
        if len(text) > MOST_STOP_CHARACTERS:
            raise bad_parameter("stop", f"a text of {len(text)} characters; give at most {MOST_STOP_CHARACTERS}")
    return stops


def _logit_bias(biases: Mapping[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not biases:
        return None
    by_token: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            raise bad_parameter("logit_bias", f"key {key[:20]!r} is no token id; those are 0..{vocab_size - 1}")
        if not -100 <= bias <= 100:
            raise bad_parameter("logit_bias", f"{bias} of token {key} must lie in -100..100")
        by_token[int(key)] = bias
    return by_token
