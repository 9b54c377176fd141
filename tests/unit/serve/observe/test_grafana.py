"""Grafana's dashboard asks for what /metrics has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from abyssal.engine.wire import Statistics
from abyssal.serve.events import Usage
from abyssal.serve.observe.figures import Figures, Times
from abyssal.serve.observe.metrics import Metrics
from abyssal.serve.observe.totals import EngineTotals
from abyssal.serve.observer import Outcome
from tests.support.watched import StandIn

DASHBOARD = json.loads((Path(__file__).parents[4] / "deploy/grafana/abyssal.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """Labels by name, of a server that has served something."""
    service, figures = StandIn(statistics=Statistics(drafted=(2,), accepted=(1,))), Figures()
    figures.ended(figures.model("tiny"), "stop", Outcome(200, usage=Usage(1, 1, 0, 0)), Times(1.0, 0.5))
    figures.response("/v1/chat/completions", 200, 1.0)
    text = generate_latest(Metrics("tiny", service, EngineTotals(), figures, "USD").registry).decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            found.setdefault(one.name, set()).update(one.labels)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_is_of_metrics_and_labels_that_there_are(query: str, samples: dict[str, set[str]]) -> None:
    names = re.findall(r"[a-z]+:\w+", query)
    assert names
    for name in names:
        assert name in samples, name
    labels = set(re.findall(r"(\w+)=~?\"", query))
    labels |= {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
    for name in names:
        assert labels <= samples[name], (name, labels - samples[name])


def test_rates_are_of_counters_and_nothing_else_is(samples: dict[str, set[str]]) -> None:
    for query in QUERIES:
        rated = set(re.findall(r"(?:rate|increase)\((\w+:\w+)", query))
        assert all(re.search(r"_(total|bucket|sum|count)$", name) for name in rated), query
        assert not {name for name in re.findall(r"\w+:\w+", query) if name.endswith("_total")} - rated, query


def test_panels_lie_beside_each_other() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_it_holds_for_any_data_source() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert "vllm:num_requests_running, model_name" in variables["model"]["definition"]
    sources = {json.dumps(panel["datasource"]) for panel in DASHBOARD["panels"] if "datasource" in panel}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}
