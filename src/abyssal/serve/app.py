"""The server's front as an ASGI application: FastAPI's routes around the protocols, the accounts and a service.

    app = create_app(HttpSettings("mine"), service, lambda: served, desk)

Whoever runs it closes it with :func:`front_of`'s ``close``; the service, the desk and its store stay the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.http.apis import APIS
from abyssal.serve.http.dialect import dialect_of, encode
from abyssal.serve.http.envelope import Envelope
from abyssal.serve.http.front import Front
from abyssal.serve.http.openapi import describe
from abyssal.serve.http.output import error_headers
from abyssal.serve.http.routes import answers, lookups, texts
from abyssal.serve.http.settings import HttpSettings
from abyssal.serve.observer import Observer, Observers
from abyssal.serve.protocol.errors import ApiError
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
) -> FastAPI:
    """The application.

    Args:
        served: the model that runs here; called once the service is ready.
        desk: of the accounts; None: anybody may ask, and nothing is charged.
        observer: told of every request for an answer.
        routers: mounted beside the API: metrics, the page.
    """
    front = Front(settings, service, served, desk, routes, observer or Observers())
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
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Envelope, report=front.report, hosts=settings.hosts)
    describe(app, front)
    return app


def front_of(app: FastAPI) -> Front:
    """What its requests share."""
    return app.state.front


async def _failed(request: Request, error: Exception) -> Response:
    """An error of a route, or a path or method that there is not."""
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        error = _of_http(request, error)
    else:
        assert isinstance(error, ApiError)
        headers = {}
    body = encode(dialect_of(request.url.path).error(error))
    return Response(body, error.status, {**error_headers(error), **headers}, "application/json")


def _of_http(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"There is nothing at {request.url.path[:100]!r}", code="not_found")
    if error.status_code == 405:
        message = f"{request.method} is not for {request.url.path[:100]!r}; see the header Allow"
        return ApiError(405, message, code="method_not_allowed")
    return ApiError(error.status_code, str(error.detail))
