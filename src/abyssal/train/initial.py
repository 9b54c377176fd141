"""Weights that a run begins from other than the seed's: those of a model folder."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch

from abyssal.checkpoint.hf import load_model
from abyssal.model.share import ExpertShare
from abyssal.model.transformer import Transformer
from abyssal.spec.hf_config import read_config
from abyssal.spec.model import ModelSpec
from abyssal.train.config import TrainConfig
from abyssal.train.loop import training_recipe


class Start(Protocol):
    """Makes the model of step 0, with one rank's share of the experts or all of them, alike whatever the share."""

    def __call__(self, spec: ModelSpec, config: TrainConfig, share: ExpertShare | None = None, /) -> Transformer: ...


def start_from(folder: Path) -> tuple[Start, dict[str, Any]]:
    """How to make the model of step 0 from a folder's weights, and what to record of them.

    The spec may read further than the folder's (YaRN, ``max_positions``); all else is the folder's.
    """
    folder_spec = read_config(folder)

    def start(spec: ModelSpec, config: TrainConfig, share: ExpertShare | None = None) -> Transformer:
        share = share or ExpertShare({}, 0)
        longer = replace(folder_spec, yarn=spec.yarn, max_positions=spec.max_positions)
        if longer != spec:
            raise ValueError(f"{folder}: its model is another than the one to be trained; give the spec of the folder")
        dtype = torch.float64 if config.compute == "float64" else torch.float32
        where = {"placements": share.placements, "expert_rank": share.rank, "part": share.part}
        loaded = load_model(folder, dtype=dtype, **where)
        model = Transformer(
            spec, training_recipe(spec, config), loaded.placements(), device="meta", expert_rank=share.rank
        )
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.part = share.part
        return model

    return start, {"folder": str(folder), "weights": _weights_digest(folder)}


def _weights_digest(folder: Path) -> str:
    """Of the folder's safetensors, by name, size and first megabyte: told apart without reading all of them."""
    state = blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            state.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return state.hexdigest()
