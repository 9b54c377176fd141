"""``abyssal serve MODEL``: answer the OpenAI, DeepSeek and Anthropic APIs with a model, until a signal ends it.

Torch is loaded by the engine's process alone; this one speaks HTTP.  Standard output gets one line, once the model is
ready; everything else is the log, on standard error.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import sqlite3
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from abyssal.cli.arguments import parse
from abyssal.cli.sampling_options import EngineOptions

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

    from abyssal.serve.accounts.desk import Desk
    from abyssal.serve.accounts.prices import PriceTable
    from abyssal.serve.engine.service import EngineService
    from abyssal.serve.http.settings import HttpSettings
    from abyssal.serve.lifecycle import Lifecycle
    from abyssal.serve.observe.observability import Observability
    from abyssal.serve.observe.routes import Check
    from abyssal.serve.routing import Routes

EXIT_ENGINE = 1
_WATCH_SECONDS = 0.5
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+|null")
"""As the header Origin has it: without a path, not even its slash, and in small letters."""

log = logging.getLogger("abyssal.serve")


@dataclass(frozen=True)
class Options:
    """Serve a model over HTTP, as OpenAI's, DeepSeek's and Anthropic's APIs have it.

    With API keys (made by `abyssal keys create`) whoever asks needs one. Without any, only this machine is listened to.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model, with its tokenizer."""
    port: int = 8000
    """To listen on; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's, which needs keys, or --open."""
    name: str | None = None
    """By which requests call the model; its folder's by default."""
    keys: Path | None = None
    """File of `abyssal keys`; by default the one where it keeps them, if that is there."""
    open: bool = False
    """Ask for no keys, whoever can reach the server."""
    prices: Path | None = None
    """TOML file with prices a 1M tokens; nothing costs anything by default."""
    operator: str | None = None
    """Name of the key that alone may see the board and record traces; by default any key sees the board, and traces
    are recorded on a server without keys alone."""
    open_metrics: bool = False
    """Ask for no key at /metrics."""
    route: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PREFIX=litellm: models whose names begin so are other providers'; may be given several times."""
    max_requests: int = 1024
    """Requests at a time, those that wait included; beyond it comes 503."""
    max_body_mib: int = 16
    """Of a request's body."""
    drain_seconds: float = 60.0
    """For requests that run to be finished, when the server is told to end."""
    keep_alive_seconds: float = 10.0
    """After which a client that waits gets a sign of life."""
    cors_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Origin of web pages whose scripts may ask, such as https://chat.example; may be given several times, * is all."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Of the log; auto is text on a terminal."""
    log_prompts: bool = False
    """Write prompts and answers into the log."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector that gets traces, such as http://127.0.0.1:4318."""
    engine: Annotated[EngineOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: EngineOptions(num_drafts="auto")
    )


@dataclass(frozen=True)
class _Opened:
    """What a server needs besides its options."""

    listener: socket.socket
    desk: Desk | None
    """None: no keys are asked for."""
    prices: PriceTable | None
    routes: Routes


def main(argv: list[str]) -> int:
    """Run the verb; bad input raises ValueError or OSError."""
    options = parse(Options, argv, "serve")
    _check(options)
    try:
        import fastapi
        import uvicorn
        import zmq

        _ = fastapi, uvicorn, zmq
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}: pip install 'abyssal[serve]'") from None

    from abyssal.serve.lifecycle import listen
    from abyssal.serve.routes.options import open_routes

    with ExitStack() as held:
        routes = open_routes(options.route, _name(options))
        desk, prices = _accounts(options, held)
        listener = held.enter_context(listen(options.host, options.port))
        _check_reach(options, desk, listener)
        return asyncio.run(_serve(options, _Opened(listener, desk, prices, routes)))


def _check(options: Options) -> None:
    for name in ("max_requests", "max_body_mib", "drain_seconds", "keep_alive_seconds"):
        value = getattr(options, name)
        if not (value >= 0 if name == "drain_seconds" else value > 0):
            least = "of 0 or more" if name == "drain_seconds" else "above 0"
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give a number {least}")
    if not _name(options).isprintable():
        raise ValueError(f"--name is {_name(options)!r}; give one of printable characters")
    for origin in options.cors_origin:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"--cors-origin: {origin!r} is no origin; write it as browsers do, https://chat.example, or *"
            )
    if not 0 <= options.port < 1 << 16:
        raise ValueError(f"--port is {options.port}; give 0 to 65535")
    if not options.model.is_dir():
        raise ValueError(
            f"{options.model}: is no folder; give the folder of a model, such as `abyssal quickstart` makes"
        )
    if options.open and options.keys is not None:
        raise ValueError("--open and --keys contradict each other; give one")


def _accounts(options: Options, held: ExitStack) -> tuple[Desk | None, PriceTable | None]:
    """The desk, None on an open server; and prices."""
    from abyssal.serve.accounts.desk import Desk
    from abyssal.serve.accounts.prices import read_prices
    from abyssal.serve.accounts.store import Store, default_path

    prices = None if options.prices is None else read_prices(options.prices)
    if prices is not None:
        prices.price(_name(options))
    path = options.keys
    if path is None and not options.open and default_path().exists():
        path = default_path()
    if path is None:
        if options.operator is not None:
            raise ValueError("--operator names a key, and the server has none; give --keys")
        return None, prices
    if not path.exists():
        raise ValueError(f"{path}: there are no keys here; make one with `abyssal keys create NAME --file {path}`")
    try:
        desk = Desk(held.enter_context(Store(path)), prices)
    except sqlite3.OperationalError as error:
        raise OSError(f"{path}: {error}") from None
    held.callback(desk.close)
    if options.operator is not None:
        desk.keys.find(options.operator)
    return desk, prices


def _check_reach(options: Options, desk: Desk | None, listener: socket.socket) -> None:
    from abyssal.serve.lifecycle import is_loopback

    if desk is None and not options.open and not is_loopback(listener):
        raise ValueError(
            f"--host {options.host} is within reach of other machines, and the server has no keys: make one with "
            "`abyssal keys create NAME`, or let everybody ask with --open"
        )


async def _serve(options: Options, opened: _Opened) -> int:
    from abyssal.serve.app import front_of
    from abyssal.serve.engine.service import EngineService
    from abyssal.serve.http.connection import raise_file_limit
    from abyssal.serve.lifecycle import Lifecycle, url_of
    from abyssal.serve.observe.logs import configure, log_handler

    raise_file_limit()
    service = await EngineService.start(options.model, _name(options), options.engine.fields())
    configure(log_handler(options.log_format))
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # that it starts and ends is told here
    async with AsyncExitStack() as open_ended:
        try:
            app, seen = _app(options, opened, service)
            try:
                await open_ended.enter_async_context(seen.running())
                lifecycle = Lifecycle(app, options.drain_seconds)
                where = (
                    f"{_name(options)} at {url_of(opened.listener)} ({'open' if opened.desk is None else 'with keys'})"
                )
                watching = asyncio.create_task(_watch(service, lifecycle, where))
                await lifecycle.serve(opened.listener, open_ended)
                watching.cancel()
                return watching.result() if watching.done() and not watching.cancelled() else 0
            finally:
                await front_of(app).close()
        finally:
            await service.stop()


async def _watch(service: EngineService, lifecycle: Lifecycle, where: str) -> int:
    """Say when the model is ready, and end the server when it cannot run any more; the exit status then.

    Raises:
        ValueError: it could not be loaded.
    """
    from abyssal.serve.service import State

    try:
        await service.ready()
    except ValueError:
        lifecycle.hurry()
        raise
    print(where, flush=True)
    while service.state is not State.FAILED:
        await asyncio.sleep(_WATCH_SECONDS)
    log.error("the engine does not run any more, and the server ends: %s", service.problem)
    lifecycle.hurry()
    return EXIT_ENGINE


def _app(options: Options, opened: _Opened, service: EngineService) -> tuple[FastAPI, Observability]:
    from abyssal.serve.app import create_app
    from abyssal.serve.observe.observability import Observability
    from abyssal.serve.observe.tracing import Tracing, otlp_exporter
    from abyssal.serve.web.pages import page_router

    name = _name(options)
    tracing = None if options.otlp_endpoint is None else Tracing(otlp_exporter(options.otlp_endpoint))
    seen = Observability(
        name,
        service,
        None if opened.prices is None else opened.prices.currency,
        tracing,
        (lambda tokens: service.served.decode(tokens)) if options.log_prompts else None,
    )
    app = create_app(
        _settings(options, opened),
        service,
        lambda: service.served,
        opened.desk,
        opened.routes,
        seen.observer,
        [page_router(), _observe_router(options, service, opened.desk, seen)],
        opened.prices,
    )
    return app, seen


def _observe_router(options: Options, service: EngineService, desk: Desk | None, seen: Observability) -> APIRouter:
    from abyssal.serve.http.operator import any_key, key_named
    from abyssal.serve.observe.routes import anybody

    if desk is None:
        return seen.router(record=service.record)
    operator: Check = any_key(desk) if options.operator is None else key_named(desk, options.operator)
    scraper = anybody if options.open_metrics else any_key(desk)
    return seen.router(operator, scraper, None if options.operator is None else service.record)


def _settings(options: Options, opened: _Opened) -> HttpSettings:
    from abyssal.serve.http.settings import HttpSettings
    from abyssal.serve.lifecycle import is_loopback

    body_bytes = options.max_body_mib << 20
    local = opened.desk is None and not options.open and is_loopback(opened.listener)
    return HttpSettings(
        _name(options),
        most_requests=options.max_requests,
        body_bytes=body_bytes,
        bodies_bytes=max(HttpSettings.bodies_bytes, 4 * body_bytes),
        keep_alive_seconds=options.keep_alive_seconds,
        cors_origins=options.cors_origin,
        hosts=("localhost", "127.0.0.1", "[::1]", options.host.lower()) if local else (),
        free_priority=opened.desk is None,
        log_prompts=options.log_prompts,
    )


def _name(options: Options) -> str:
    return options.name or options.model.resolve().name
