"""A server in this process, spoken to without sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.store import Store
from abyssal.serve.app import create_app
from abyssal.serve.http.settings import HttpSettings
from tests.support.scripted_service import ScriptedService
from tests.support.serving import MODEL, served


class HastyStore(Store):
    """One that waits for no disk."""

    def transaction(self, durable: bool = True) -> Any:
        return super().transaction(durable=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with HastyStore(tmp_path / "accounts.sqlite") as store:
        yield store


@pytest.fixture
def desk(store: Store) -> Iterator[Desk]:
    desk = Desk(store)
    yield desk
    desk.close()


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def app_of(service: ScriptedService) -> Callable[..., FastAPI]:
    """``app_of(desk=..., body_bytes=...)``: an application over the scripted service."""

    def make(desk: Desk | None = None, routes: Any = None, observer: Any = None, **settings: Any) -> FastAPI:
        more = {} if routes is None else {"routes": routes}
        return create_app(HttpSettings(MODEL, **settings), service, served, desk, observer=observer, **more)

    return make


@pytest.fixture
def client_of(app_of: Callable[..., FastAPI]) -> Callable[..., httpx.AsyncClient]:
    """``client_of(desk=..., key=...)``: a client of such an application."""

    def make(key: str | None = None, **options: Any) -> httpx.AsyncClient:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app_of(**options), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)

    return make
