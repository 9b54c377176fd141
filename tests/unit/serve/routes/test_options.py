"""``--route``: which names go where, and what is refused at the start."""

from __future__ import annotations

import builtins
import subprocess
import sys
from typing import Any

import pytest

from abyssal.serve.routes.options import RouteOption, open_routes


def test_the_longest_prefix_answers_and_the_rest_stays_here() -> None:
    pytest.importorskip("litellm")
    routes = open_routes(["openai/=litellm", "openai/o=litellm:azure/o"], "mine")
    assert routes.provider("mine") is None and routes.provider(None) is None
    assert routes.provider("openai/gpt-4o") is routes.providers["openai/"]
    assert routes.provider("openai/o3") is routes.providers["openai/o"]


def test_the_target_stands_in_the_prefixs_place() -> None:
    assert RouteOption.parse("openai/=litellm") == RouteOption("openai/", "openai/")
    assert RouteOption.parse("house/=litellm:hosted_vllm/") == RouteOption("house/", "hosted_vllm/")


@pytest.mark.parametrize("text", ["openai/", "openai/=other", "=litellm", "x=litellm:", "", "x=litellms"])
def test_options_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--route"):
        RouteOption.parse(text)


def test_a_route_may_not_hide_the_model_that_runs_here_nor_another_route() -> None:
    pytest.importorskip("litellm")
    with pytest.raises(ValueError, match="'gpt-mine'"):
        open_routes(["gpt-=litellm"], "gpt-mine")
    with pytest.raises(ValueError, match="twice"):
        open_routes(["x=litellm", "x=litellm:y"], "mine")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without_litellm(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "litellm":
            raise ModuleNotFoundError("No module named 'litellm'", name="litellm")
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_litellm)
    with pytest.raises(ValueError, match=r'pip install "abyssal\[litellm\]"'):
        open_routes(["openai/=litellm"], "mine")


def test_without_routes_litellm_is_not_loaded() -> None:
    code = (
        "import sys; from abyssal.serve.routes.options import open_routes; open_routes([], 'mine');"
        "assert 'litellm' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
