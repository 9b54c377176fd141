"""``/tokenize`` and ``/detokenize``, as vLLM has them: what a prompt is in tokens, and what tokens are as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from abyssal.serve.http.front import Front
from abyssal.serve.http.work import Done
from abyssal.serve.protocol.chat import MOST_TOOLS, checked_messages
from abyssal.serve.protocol.common import Listed, Named, Unsupported, checked_tokens, read
from abyssal.serve.protocol.errors import bad_parameter, of_value_error
from abyssal.serve.protocol.served import ServedModel
from abyssal.text.template_parts import encode_parts

TOKENIZE_UNSUPPORTED: Mapping[str, Unsupported] = {
    "add_generation_prompt": Unsupported((True,), "the prompt is shown as a model would get it; leave it out"),
    "continue_final_message": Unsupported((False,), "end with a message that has prefix: true"),
    "chat_template": Unsupported((), "the model's own is used; leave it out"),
    "chat_template_kwargs": Unsupported(({},), "the model's own template is used; leave it out"),
}


_MOST_LENGTHS = 8
"""Of a model's length: so many tokens are counted, or shown as text, for nothing."""


class TokenizeRequest(Named):
    """A text, or a conversation."""

    model: str = ""
    """By default the one that runs here."""
    prompt: str | None = None
    add_special_tokens: bool = True
    """Put the token first that prompts begin with, where the model has one; of a text alone."""
    messages: Listed[dict[str, Any]] | None = Field(default=None, min_length=1)
    tools: Listed[dict[str, Any]] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Named):
    """Tokens."""

    model: str = ""
    """By default the one that runs here."""
    tokens: Listed[int]


def make_tokenized(front: Front, body: Mapping[str, Any]) -> Done:
    """Of a body; runs in a thread.

    Raises:
        ApiError: what is wrong with it, by name.
    """
    served = front.served()
    request = read(TokenizeRequest, _named(body, served), TOKENIZE_UNSUPPORTED, served)
    tokens = _tokens(request, served)
    names = [served.tokenizer.decode([token]) for token in tokens] if request.return_token_strs else None
    answer = {"count": len(tokens), "max_model_len": served.max_length, "tokens": tokens, "token_strs": names}
    return Done(request.model, answer)


def make_detokenized(front: Front, body: Mapping[str, Any]) -> Done:
    """Of a body; runs in a thread.

    Raises:
        ApiError: what is wrong with it, by name.
    """
    served = front.served()
    request = read(DetokenizeRequest, _named(body, served), {}, served)
    if len(request.tokens) > _MOST_LENGTHS * served.max_length:
        raise bad_parameter("tokens", f"{len(request.tokens)} tokens; give at most {_MOST_LENGTHS * served.max_length}")
    tokens = checked_tokens("tokens", request.tokens, served.vocab_size)
    return Done(request.model, {"prompt": served.tokenizer.decode(tokens)})


def _named(body: Mapping[str, Any], served: ServedModel) -> Mapping[str, Any]:
    return body if body.get("model") is not None else {**body, "model": served.name}


def _tokens(request: TokenizeRequest, served: ServedModel) -> Sequence[int]:
    if (request.prompt is None) == (request.messages is None):
        raise bad_parameter("prompt", "give either prompt or messages")
    if request.messages is None:
        assert request.prompt is not None
        if request.tools is not None:
            raise bad_parameter("tools", "they go with messages; leave them out")
        if (least := served.least_tokens(len(request.prompt.encode()))) > _MOST_LENGTHS * served.max_length:
            most = _MOST_LENGTHS * served.max_length
            raise bad_parameter("prompt", f"{least} tokens or more; give at most {most} at a time")
        return served.encode_all([request.prompt], begin=request.add_special_tokens)[0]
    if len(request.tools or []) > MOST_TOOLS:
        raise bad_parameter("tools", f"{len(request.tools or [])} tools; give at most {MOST_TOOLS}")
    try:
        prompt = served.chat.prompt(checked_messages(request.messages, True), request.tools)
    except ValueError as error:
        raise of_value_error(error) from None
    return encode_parts(served.tokenizer, prompt.parts).ids.tolist()
