"""The paths: of the APIs that let a model answer, of text and tokens, and of what there is to know."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from abyssal.serve.accounts.money import format_money
from abyssal.serve.http.apis import Api, make_work
from abyssal.serve.http.dialect import OPENAI
from abyssal.serve.http.exchange import Exchange
from abyssal.serve.http.front import Front
from abyssal.serve.http.tokens import make_detokenized, make_tokenized
from abyssal.serve.protocol.errors import unknown_model
from abyssal.serve.service import State

_SCHEMELESS: dict[str, Any] = {"include_in_schema": False}
"""Of routes: :mod:`.openapi` describes them all by hand, as their bodies are read by hand."""


def answers(front: Front, api: Api) -> APIRouter:
    """The paths of an API."""
    router = APIRouter()

    async def answer(request: Request) -> Response:
        return Exchange(front, api.dialect, api.paths[0], partial(make_work, front, api))

    for path in api.paths:
        router.add_api_route(path, answer, methods=["POST"], **_SCHEMELESS)
    return router


def texts(front: Front) -> APIRouter:
    """Text and tokens."""
    router = APIRouter()

    @router.post("/tokenize", **_SCHEMELESS)
    async def tokenize(request: Request) -> Response:
        return Exchange(front, OPENAI, "/tokenize", partial(make_tokenized, front))

    @router.post("/detokenize", **_SCHEMELESS)
    async def detokenize(request: Request) -> Response:
        return Exchange(front, OPENAI, "/detokenize", partial(make_detokenized, front))

    return router


def lookups(front: Front) -> APIRouter:
    """What there is to know."""
    router = APIRouter()

    @router.get("/v1/models", **_SCHEMELESS)
    @router.get("/models", **_SCHEMELESS)
    async def models(request: Request) -> Response:
        front.authenticate(request.headers)
        return JSONResponse({"object": "list", "data": [_model(front)]})

    @router.get("/v1/models/{name:path}", **_SCHEMELESS)
    @router.get("/models/{name:path}", **_SCHEMELESS)
    async def model(request: Request, name: str) -> Response:
        front.authenticate(request.headers)
        if name != front.settings.model:
            raise unknown_model(name, [front.settings.model])
        return JSONResponse(_model(front))

    @router.get("/user/balance", **_SCHEMELESS)
    async def balance(request: Request) -> Response:
        return JSONResponse(await _balance(front, request))

    @router.head("/health", include_in_schema=False)
    @router.get("/health", **_SCHEMELESS)
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", **_SCHEMELESS)
    async def ready() -> Response:
        state = front.state()
        if state == State.READY.value:
            return JSONResponse({"status": state})
        return JSONResponse({"status": state}, 503, {"retry-after": "1"})

    return router


def _model(front: Front) -> dict[str, Any]:
    described = {"id": front.settings.model, "object": "model", "created": front.created, "owned_by": "abyssal"}
    if front.service.state is State.READY:
        described["max_model_len"] = front.served().max_length
    return described


async def _balance(front: Front, request: Request) -> dict[str, Any]:
    """DeepSeek's shape; what was granted is not told from what was paid."""
    account = front.authenticate(request.headers)
    if front.desk is None or account is None:
        return {"is_available": True, "balance_infos": []}
    desk = front.desk
    found = await front.threads.desk(lambda: desk.balance(account))
    total = format_money(found.total)
    infos = {"total_balance": total, "granted_balance": "0.00", "topped_up_balance": total}
    available = found.postpaid or found.available > 0
    return {"is_available": available, "balance_infos": [{"currency": found.currency, **infos}]}
