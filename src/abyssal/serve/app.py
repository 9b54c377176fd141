"""The server's front as an ASGI application: FastAPI's routes around the protocols, the accounts and a service.

    app = create_app(HttpSettings("mine"), service, lambda: served, desk)

Whoever runs it closes it with :func:`front_of`'s ``close``; the service, the desk and its store stay the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.prices import PriceTable
from abyssal.serve.http.apis import APIS
from abyssal.serve.http.dialect import dialect_of, encode
from abyssal.serve.http.envelope import Envelope
from abyssal.serve.http.front import Front
from abyssal.serve.http.openapi import describe
from abyssal.serve.http.output import error_headers
from abyssal.serve.http.routes import answers, lookups, texts
from abyssal.serve.http.settings import HttpSettings
from abyssal.serve.observer import Observer, Observers
from abyssal.serve.protocol.errors import ApiError, bad_parameter
from abyssal.serve.protocol.served import ServedModel
from abyssal.serve.routing import NO_ROUTES, Routes
from abyssal.serve.service import Service


def create_app(
    settings: HttpSettings,
    service: Service,
    served: Callable[[], ServedModel],
    desk: Desk | None = None,
    routes: Routes = NO_ROUTES,
    observer: Observer | None = None,
    routers: Sequence[APIRouter] = (),
    prices: PriceTable | None = None,
) -> FastAPI:
    """The application.

    Args:
        served: the model that runs here; called once the service is ready.
        desk: of the accounts; None: anybody may ask, and nothing is charged.
        observer: told of every request for an answer.
        routers: mounted beside the API: metrics, the page.
        prices: on an open server, where nobody pays: what answers would cost, for ``observer``.
    """
    front = Front(settings, service, served, desk, routes, Observers([observer] if observer else []), prices)
    app = FastAPI(title="abyssal", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.front = front
    for api in APIS:
        app.include_router(answers(front, api))
    app.include_router(texts(front))
    app.include_router(lookups(front))
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(RequestValidationError, _failed)
    if settings.cors_origins:
        app.add_middleware(
            _Cors,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Envelope, report=front.report, draining=lambda: front.gate.draining, hosts=settings.hosts)
    describe(app, front)
    return app


def front_of(app: FastAPI) -> Front:
    """What its requests share."""
    return app.state.front


class _Cors(CORSMiddleware):
    """Starlette's, whose refusals have the shape of all others."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        problem = ApiError(400, "Scripts of this origin may not ask so; see --cors-origin", code="origin_not_allowed")
        return Response(encode(problem.openai()), 400, {"vary": "Origin"}, "application/json")


async def _failed(request: Request, error: Exception) -> Response:
    """An error of a route, or a path or method that there is not."""
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    told = _told(request, error)
    body = encode(dialect_of(request.url.path).error(told))
    return Response(body, told.status, {**error_headers(told), **headers}, "application/json")


def _told(request: Request, error: Exception) -> ApiError:
    path = request.url.path[:100]
    match error:
        case ApiError():
            return error
        case RequestValidationError():  # of a router that lets FastAPI read its parameters
            first = error.errors()[0]
            return bad_parameter(str(first["loc"][-1]), str(first["msg"]))
        case HTTPException(status_code=404):
            return ApiError(404, f"There is nothing at {path!r}", code="not_found")
        case HTTPException(status_code=405):
            message = f"{request.method} is not for {path!r}; see the header Allow"
            return ApiError(405, message, code="method_not_allowed")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
    raise error
