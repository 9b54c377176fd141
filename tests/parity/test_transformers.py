"""Logits, losses, gradients and generated tokens against transformers' own DeepSeek and Llama models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.generation import candidate_generator
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from abyssal.checkpoint.hf import load_model, save_model
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from abyssal.model.context import PackedBatch
from abyssal.model.transformer import Transformer
from abyssal.precision.head import linear_cross_entropy
from abyssal.spec.hf_config import write_config
from abyssal.spec.model import Family, YarnSpec
from tests.support.parity import (
    compared_gradients,
    draw_spec,
    in_transformers,
    random_model,
    random_tokens,
    relative_difference,
)

LOGITS_BOUND, GRADIENT_BOUND = 1e-4, 1e-3
FAMILIES: list[Family] = ["deepseek_v3", "deepseek_v2", "llama"]
DRAWS = [(family, seed) for family in FAMILIES for seed in range(6)]


def mean_loss(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token loss of equal sequences, as transformers defines it."""
    batch, length = tokens.shape
    step = model.step(PackedBatch([length - 1] * batch))
    hidden = model.hidden(tokens[:, :-1].flatten(), step)
    total = linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten(), model.recipe.product("head"))
    return total / (batch * (length - 1))


@pytest.mark.parametrize(("family", "seed"), DRAWS)
def test_same_logits_loss_and_gradients(family: Family, seed: int, tmp_path: Path) -> None:
    spec = draw_spec(family, seed)
    ours = random_model(spec, seed)
    theirs = in_transformers(ours, tmp_path / "saved")
    tokens = random_tokens(spec, 2, 40, seed)

    output = theirs(input_ids=tokens, labels=tokens)
    assert relative_difference(ours(tokens), output.logits) < LOGITS_BOUND

    loss = mean_loss(ours, tokens)
    assert abs(loss.item() - output.loss.item()) < GRADIENT_BOUND * output.loss.item()
    loss.backward()
    output.loss.backward()
    differences = compared_gradients(ours, theirs)
    assert len(differences) > 10
    assert [pair for pair in differences if not pair[1] < GRADIENT_BOUND] == []


VARIANTS: dict[str, dict[str, Any]] = {
    "both mscales": {"yarn": YarnSpec(40.0, 16, 32.0, 1.0, 1.0, 0.707)},
    "no mscale": {"yarn": YarnSpec(4.0, 16)},
    "large epsilon": {"rms_norm_eps": 0.01},  # the latent norms keep theirs
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_same_logits_where_checkpoints_set_traps(family: Family, variant: str, tmp_path: Path) -> None:
    spec = replace(draw_spec(family, 1), **VARIANTS[variant])
    ours, tokens = random_model(spec, 1), random_tokens(spec, 2, 60)
    if variant == "large epsilon":  # latents as small as it
        for name, parameter in ours.named_parameters():
            if name.endswith(("attention.q_a.weight", "attention.kv_a.weight")):
                parameter.mul_(0.02)
    theirs = in_transformers(ours, tmp_path / "saved")
    assert relative_difference(ours(tokens), theirs(input_ids=tokens).logits) < LOGITS_BOUND


@pytest.mark.parametrize(("family", "seed"), [(family, seed) for family in FAMILIES for seed in (1, 2)])
def test_their_checkpoint_loads_here(family: Family, seed: int, tmp_path: Path) -> None:
    """The other direction: a folder that transformers wrote, read here, gives its logits and holds its tensors."""
    spec = draw_spec(family, seed)
    first = in_transformers(random_model(spec, seed), tmp_path / "ours")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.1)
    first.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    tokens = random_tokens(spec, 2, 24, seed)
    with torch.no_grad():
        assert relative_difference(ours(tokens), first(input_ids=tokens).logits) < LOGITS_BOUND

    save_model(ours, tmp_path / "again", "fp32")
    theirs, again = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert theirs.keys() - {"lm_head.weight"} == again.keys() - {"lm_head.weight"}
    assert all(torch.equal(again[name], theirs[name]) for name in again)


@pytest.mark.parametrize("mtp_depth", [0, 1, 2])
def test_no_key_missing_or_unexpected_in_transformers(mtp_depth: int, tmp_path: Path) -> None:
    spec = replace(draw_spec("deepseek_v3", 3), mtp_depth=mtp_depth)
    model = random_model(spec)
    _, info = in_transformers(model, tmp_path / "with", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    layers = [f"model.layers.{spec.num_layers + depth}." for depth in range(mtp_depth)]
    unexpected = set(info["unexpected_keys"])
    assert all(any(name.startswith(layer) for layer in layers) for name in unexpected)
    assert bool(unexpected) == bool(mtp_depth)

    save_model(model, tmp_path / "without", "fp32", include_mtp=False)
    load: Any = AutoModelForCausalLM.from_pretrained
    _, info = load(tmp_path / "without", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((tmp_path / "without" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_same_greedy_tokens(family: Family, tmp_path: Path) -> None:
    spec = draw_spec(family, 5)
    ours = random_model(spec, 5)
    theirs = in_transformers(ours, tmp_path / "saved")
    prompt = random_tokens(spec, 1, 9)
    expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    output = LLM(ours).generate([prompt[0].tolist()], SamplingParams(temperature=0, max_tokens=24))[0]
    assert list(output.token_ids) == expected


class DraftRecorder:
    """Keeps what transformers' MTP drafts: the tokens so far and the logits of each depth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drafts: list[tuple[torch.Tensor, torch.Tensor]] = []
        original = candidate_generator.MTPCandidateGenerator.get_candidates

        def record(generator: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            ids, logits = original(generator, input_ids, *args, **kwargs)
            if logits is not None:
                self.drafts.append((ids.clone(), logits.clone()))
            return ids, logits

        monkeypatch.setattr(candidate_generator.MTPCandidateGenerator, "get_candidates", record)


def draft_logits(model: Transformer, ids: torch.Tensor, depth_count: int) -> list[torch.Tensor]:
    """Each depth's logits for its last position; ``ids`` end with the ``depth_count`` drafted tokens."""
    length = len(ids) - depth_count - 1
    step = model.step(PackedBatch([length]))
    hidden, logits = model.hidden(ids[:length], step), []
    for depth in range(depth_count):
        hidden = model.mtp_hidden(depth, ids[depth + 1 : depth + 1 + length], hidden, step)
        logits.append(model.logits(hidden[-1:])[0])
    return logits


@pytest.mark.parametrize(("num_layers", "depth"), [(61, 1), (3, 1), (3, 2)])
def test_same_mtp_drafts(num_layers: int, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers only finds MTP weights at layer 61; elsewhere its pattern is set to the layers that exist."""
    spec = replace(draw_spec("deepseek_v3", 3), num_layers=num_layers, mtp_depth=depth, tie_embeddings=False)
    if num_layers != 61:
        patterns = [rf"model\.layers\.{num_layers + k}\..*" for k in range(depth)]
        base = modeling_deepseek_v3.DeepseekV3PreTrainedModel
        monkeypatch.setattr(base, "_keys_to_ignore_on_load_unexpected", patterns)
    ours = random_model(spec, 11)
    theirs = in_transformers(ours, tmp_path / "saved")
    recorder = DraftRecorder(monkeypatch)
    prompt = random_tokens(spec, 1, 8)
    theirs.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, use_mtp=True)
    assert len(recorder.drafts) >= 2
    for ids, logits in recorder.drafts:
        with torch.no_grad():
            expected = draft_logits(ours, ids[0], depth)
        for k in range(depth):
            assert relative_difference(expected[k], logits[0, k]) < LOGITS_BOUND


def test_config_alone_builds_the_same_model(tmp_path: Path) -> None:
    """transformers' own config class, given ours, has as many parameters."""
    spec = draw_spec("deepseek_v3", 2)
    config = modeling_deepseek_v3.DeepseekV3Config(**write_config(spec))
    theirs = modeling_deepseek_v3.DeepseekV3ForCausalLM(config)
    count = sum(tensor.numel() for tensor in theirs.parameters()) + sum(
        tensor.numel() for name, tensor in theirs.named_buffers() if name.endswith("e_score_correction_bias")
    )
    assert count == spec.total_parameters
