"""LiteLLM on both sides: as a client of this server, by its ``openai/`` and ``deepseek/`` providers; and inside a
server, whose ``--route`` leads to this one as the other provider."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest

from abyssal.serve.accounts.keys import KeyRing
from abyssal.serve.accounts.money import NANO
from abyssal.serve.accounts.store import Store
from abyssal.serve.accounts.usage import Ledger
from tests.support.live_server import LiveServer, live_server, start_server
from tests.support.standin_provider import WORDS, StandIn, standing_in
from tests.support.trained_model import TrainedModel

CODE: Any = [{"role": "user", "content": "def decode(self, text):"}]
PRICES = """
currency = "USD"
[models.trained]
hit = 0
miss = 0
output = 0
[models."elsewhere/*"]
hit = 1.0
miss = 2.0
output = 10.0
"""


@pytest.fixture(scope="module")
def litellm() -> Any:
    if find_spec("litellm") is None:  # importorskip would load it before it is told to keep off the network
        pytest.skip("LiteLLM is not installed")
    from abyssal.serve.routes.library import load

    return load()


@pytest.mark.parametrize("provider", ["openai", "deepseek"])
def test_it_is_litellms_provider(litellm: Any, server: LiveServer, provider: str) -> None:
    ask: Any = {"model": f"{provider}/trained", "messages": CODE, "max_tokens": 12, "temperature": 0}
    ask |= {"api_base": server.api, "api_key": "any", "max_retries": 0}
    plain = litellm.completion(**ask)
    chunks = [*litellm.completion(**ask, stream=True, stream_options={"include_usage": True})]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert plain.choices[0].message.content.strip() == text.strip() != ""
    assert plain.usage.completion_tokens == 12 and chunks[-1].usage.completion_tokens == 12
    with pytest.raises(openai.NotFoundError):
        litellm.completion(**{**ask, "model": f"{provider}/other"})


@pytest.mark.parametrize("provider", ["openai", "deepseek"])
def test_tools_and_reasoning_through_it(litellm: Any, family_server: LiveServer, provider: str) -> None:
    ask: Any = {"model": f"{provider}/family", "messages": CODE, "api_base": family_server.api, "api_key": "any"}
    schema = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "weather"}}
    ask["seed"] = 1  # random weights may write white space up to max_tokens
    done = litellm.completion(**ask, tools=[tool], tool_choice=choice, max_tokens=1500)
    (call,) = done.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["days"] in (1, 2)
    thinking = {"extra_body": {"thinking": {"type": "enabled"}}}
    if provider == "deepseek":
        thinking = {"thinking": {"type": "enabled"}}
    thought = litellm.completion(**ask, max_tokens=12, **thinking)
    assert thought.choices[0].message.reasoning_content


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[StandIn]:
    with standing_in() as other:
        yield other


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Files of keys and of prices, and a key with a balance of 1."""
    folder = tmp_path_factory.mktemp("accounts")
    (folder / "prices.toml").write_text(PRICES)
    with Store(folder / "accounts.sqlite") as store:
        secret = KeyRing(store).create("ada")
        Ledger(store).top_up(KeyRing(store).find("ada").account_id, NANO)
    return folder / "accounts.sqlite", folder / "prices.toml", secret


@pytest.fixture(scope="module")
def routing(trained_model: TrainedModel, elsewhere: StandIn, accounts: tuple[Path, Path, str]) -> Iterator[LiveServer]:
    keys, prices, _ = accounts
    options = ("--name", "trained", "--keys", str(keys), "--prices", str(prices))
    environment = {"OPENAI_API_BASE": elsewhere.url, "OPENAI_API_KEY": "sk-operator"}
    route = ("--route", "elsewhere/=litellm:openai/")
    with live_server(trained_model.folder, *options, *route, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(routing: LiveServer, accounts: tuple[Path, Path, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=routing.api, api_key=accounts[2], max_retries=0, timeout=60)


def balance(accounts: tuple[Path, Path, str]) -> int:
    """Once nothing is set aside any more."""
    with Store(accounts[0]) as store:
        ledger, account = Ledger(store), KeyRing(store).find("ada").account_id
        end = time.monotonic() + 5
        while (found := ledger.balance(account)).reserved and time.monotonic() < end:
            time.sleep(0.02)
        assert found.reserved == 0 and ledger.disagreements() == []
        return found.total


def test_a_routed_model_is_answered_and_charged_as_counted_elsewhere(
    client: openai.OpenAI, elsewhere: StandIn, accounts: tuple[Path, Path, str]
) -> None:
    before = balance(accounts)
    done = client.chat.completions.create(model="elsewhere/large", messages=CODE)
    assert done.choices[0].message.content == "".join(WORDS) and done.model == "elsewhere/large"
    cost = 3 * 1_000 + 8 * 2_000 + 4 * 10_000  # billionths: 3 cached, 8 computed, 4 written
    assert before - balance(accounts) == cost
    chunks = [*client.chat.completions.create(model="elsewhere/large", messages=CODE, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(WORDS)
    assert before - balance(accounts) == 2 * cost
    text = client.completions.create(model="elsewhere/large", prompt="2 + 2")
    assert text.choices[0].text == "".join(WORDS)
    assert before - balance(accounts) == 3 * cost
    assert all(
        asked["authorization"] == "Bearer sk-operator" and asked["model"] == "large" for asked in elsewhere.requests
    )


def test_the_model_that_runs_here_still_does(client: openai.OpenAI, elsewhere: StandIn) -> None:
    asked = len(elsewhere.requests)
    done = client.chat.completions.create(model="trained", messages=CODE, max_tokens=4)
    assert done.usage is not None and done.usage.completion_tokens == 4 and len(elsewhere.requests) == asked


def test_the_providers_refusal_of_the_operator_is_not_the_clients(client: openai.OpenAI, elsewhere: StandIn) -> None:
    elsewhere.status = 401
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="elsewhere/large", messages=CODE)
    finally:
        elsewhere.status = 200
    assert caught.value.status_code == 502 and caught.value.code == "provider_refused_server"


def test_a_client_that_leaves_ends_the_work_elsewhere_and_pays_for_what_came(
    client: openai.OpenAI, elsewhere: StandIn, accounts: tuple[Path, Path, str]
) -> None:
    before = balance(accounts)
    elsewhere.pause, elsewhere.gone = 0.2, threading.Event()
    try:
        with client.chat.completions.create(model="elsewhere/large", messages=CODE, stream=True) as stream:
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
        assert elsewhere.gone.wait(3), "the provider works on"
    finally:
        elsewhere.pause = 0.0
    assert 0 < before - balance(accounts) < 1_000_000


def test_a_route_that_hides_the_model_is_refused_at_the_start(trained_model: TrainedModel) -> None:
    with pytest.raises(AssertionError, match="would hide the model 'trained'"):
        start_server(trained_model.folder, "--name", "trained", "--route", "tr=litellm")
