"""Servers that every test here may ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.live_server import LiveServer, live_server
from tests.support.trained_model import TrainedModel


@pytest.fixture(scope="session")
def server(trained_model: TrainedModel) -> Iterator[LiveServer]:
    """Of the trained model, whose chat format is the plain one.  Leave it as it was."""
    with live_server(trained_model.folder, "--name", "trained") as running:
        yield running


@pytest.fixture(scope="session")
def family_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Of a model of DeepSeek-V3.1's family, with calls and reasoning.  Leave it as it was."""
    from tests.support.control_model import write_control_model

    folder = write_control_model(tmp_path_factory.mktemp("family") / "family")
    with live_server(folder, "--name", "family") as running:
        yield running
