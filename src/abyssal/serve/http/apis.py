"""The APIs that let a model answer: of each, how a body is read and how its answer is written, and where it is.

A model whose name begins with a route's prefix is another provider's (chat and text completions); every other is looked
for here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from abyssal.serve.events import Prepared
from abyssal.serve.http.dialect import ANTHROPIC, OPENAI, RESPONSES, Dialect
from abyssal.serve.http.front import Front
from abyssal.serve.http.work import EngineWork, Reply, RoutedWork, Work
from abyssal.serve.protocol import anthropic, chat, completions, responses
from abyssal.serve.protocol.anthropic_reply import MessagesReply
from abyssal.serve.protocol.chat_reply import ChatReply
from abyssal.serve.protocol.common import Named, Unsupported
from abyssal.serve.protocol.completions import CompletionReply
from abyssal.serve.protocol.errors import bad_parameter
from abyssal.serve.protocol.responses_reply import ResponsesReply
from abyssal.serve.protocol.served import ServedModel
from abyssal.serve.routing import Kind


@dataclass(frozen=True)
class Api:
    """One of them."""

    paths: tuple[str, ...]
    """The first is the one by which it is known."""
    summary: str
    request: type[Named]
    unsupported: Mapping[str, Unsupported]
    prepare: Callable[[object, ServedModel], Prepared]
    reply: Callable[[Prepared, ServedModel, str, int], Reply]
    prefix: str
    """Of answers' ids."""
    dialect: Dialect = OPENAI
    kind: Kind | None = None
    """What routes know it as; None: they do not."""


def _messages_reply(prepared: Prepared, served: ServedModel, id: str, created: int) -> Reply:
    return MessagesReply(prepared, served, id)


CHAT = Api(
    ("/v1/chat/completions", "/chat/completions"),
    "Go on with a conversation",
    chat.ChatRequest,
    chat.UNSUPPORTED,
    chat.prepare,
    ChatReply,
    "chatcmpl-",
    kind="chat",
)
COMPLETIONS = Api(
    ("/v1/completions", "/completions"),
    "Go on with a text",
    completions.CompletionRequest,
    completions.UNSUPPORTED,
    completions.prepare,
    CompletionReply,
    "cmpl-",
    kind="completions",
)
APIS = (
    CHAT,
    COMPLETIONS,
    Api(
        ("/v1/responses", "/responses"),
        "Go on with a conversation (OpenAI's responses API)",
        responses.ResponsesRequest,
        responses.UNSUPPORTED,
        responses.prepare,
        ResponsesReply,
        "resp_",
        RESPONSES,
    ),
    Api(
        ("/beta/chat/completions", "/beta/v1/chat/completions"),
        "Go on with a conversation, or with the beginning of an answer (prefix)",
        chat.ChatRequest,
        chat.UNSUPPORTED,
        partial(chat.prepare, beta=True),
        ChatReply,
        "chatcmpl-",
    ),
    Api(
        ("/beta/completions", "/beta/v1/completions"),
        "Go on with a text, or fill in its middle (suffix)",
        completions.CompletionRequest,
        completions.UNSUPPORTED,
        completions.prepare,
        CompletionReply,
        "cmpl-",
    ),
    Api(
        ("/anthropic/v1/messages",),
        "Go on with a conversation (Anthropic's messages API)",
        anthropic.MessagesRequest,
        anthropic.UNSUPPORTED,
        anthropic.prepare,
        _messages_reply,
        "msg_",
        ANTHROPIC,
    ),
)


def make_work(front: Front, api: Api, body: Mapping[str, Any]) -> Work:
    """Of a body; runs in a thread.

    Raises:
        ApiError: what is wrong with it, by name; 503 the model does not run now.
    """
    provider = front.routes.provider(body.get("model")) if api.kind is not None else None
    if provider is not None and api.kind is not None:
        return RoutedWork(provider, provider.prepare(api.kind, body))
    served = front.served()
    prepared = api.prepare(body, served)
    if prepared.priority > 0 and not front.settings.free_priority:
        raise bad_parameter("priority", "nobody goes before others here; give 0, or less to let others go first")
    reply = api.reply(prepared, served, f"{api.prefix}{uuid4().hex}", int(time.time()))
    return EngineWork(front.service, prepared, reply, served.max_length)
