"""Loads of experts are those of the routing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from abyssal.engine import loads
from abyssal.engine.core import Engine
from abyssal.engine.loads import ExpertLoads
from abyssal.engine.messages import Request, SamplingParams
from abyssal.model.router import Routing
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import SMALL
from tests.support.trained_model import TrainedModel


def test_shares_are_of_the_routing(trained_model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at every step and forgetting nothing, they are exact."""
    monkeypatch.setattr(loads, "EVERY", 1)
    monkeypatch.setattr(loads, "HALF_LIFE", float("inf"))
    engine = Engine(trained_model.model, trained_model.tokenizer)
    assert engine.expert_loads == ()
    engine.add(Request(0, tuple(range(300, 350)), SamplingParams(seed=1, max_tokens=20, return_experts=True)))
    outputs = []
    while engine.unfinished:
        outputs = engine.step()
    experts_TLK = outputs[0].outputs[0].experts
    assert len(engine.expert_loads) == experts_TLK.shape[1] == 2
    for layer, shares in enumerate(engine.expert_loads):
        counts = np.bincount(experts_TLK[:, layer].ravel(), minlength=8)
        assert shares == pytest.approx(counts / counts.sum())


def test_the_past_fades(trained_model: TrainedModel) -> None:
    found = ExpertLoads(trained_model.model)
    routed = {expert: _routing(expert) for expert in (0, 1)}
    for expert in (0, 1):
        for _ in range(loads.EVERY * 8):
            found.note({layer: routed[expert] for layer in (1, 2)})
    old, new = found.shares()[0][:2]
    assert old + new == pytest.approx(1.0) and old == pytest.approx(0.2, abs=0.05)


def _routing(expert: int) -> Routing:
    """512 tokens, to one expert twice."""
    ids_TK = torch.full((512, 2), expert)
    return Routing(ids_TK, torch.ones(512, 2), torch.ones(512, 8))


def test_a_model_without_experts_has_no_loads(trained_model: TrainedModel) -> None:
    spec = replace(SMALL, moe=None, num_dense_layers=0, mtp_depth=0)
    found = ExpertLoads(Transformer(spec))
    found.note({})
    assert found.shares() == ()
