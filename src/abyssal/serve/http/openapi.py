"""``/openapi.json``: every endpoint, its body by the schema that reads it, and its errors."""

from __future__ import annotations

from fastapi import FastAPI

from abyssal.serve.http.front import Front


def describe(app: FastAPI, front: Front) -> None:
    pass
