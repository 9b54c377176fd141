"""Supervised fine-tuning [V3 section 5.1]: a model that was trained already, conversations, and the same loop.

What differs from pre-training is handed to the run: where the weights of step 0 come from, a stream of packed
conversations with masks, and for LoRA what is saved.  MTP modules go on being trained with the rest.

A model whose vocabulary lacks the template's control tokens (``<｜User｜>`` in a model trained here) gets them: rows of
the embedding drawn like the others, and rows of the head at their mean, so that a new token is neither forced nor
forbidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.checkpoint.adapters import load_adapter, save_adapter
from abyssal.checkpoint.hf import save_model
from abyssal.data.chat import encode_conversations, read_conversations, split_conversations
from abyssal.data.chat_stream import ChatStream, SampleRows
from abyssal.model.lora import LoraConfig, add_lora, merge_lora, remove_lora
from abyssal.model.share import ExpertShare
from abyssal.model.transformer import Transformer
from abyssal.spec.hf_config import read_config
from abyssal.spec.model import ModelSpec
from abyssal.text.template import ChatTemplate
from abyssal.text.tokenizer import Tokenizer
from abyssal.train.config import TrainConfig
from abyssal.train.data import TrainingData
from abyssal.train.folder import RunFolder
from abyssal.train.initial import Start, start_from
from abyssal.train.loop import TrainResult
from abyssal.train.run import Run, save_result


@dataclass(frozen=True)
class ChatData:
    """What to fine-tune on."""

    paths: tuple[Path, ...]
    """Files of JSON lines."""
    held_out: float = 0.05
    """Share of the conversations to validate on."""
    truncate: bool = False
    """Cut off what is longer than ``seq_len``; otherwise it is left out."""
    thinking: bool | None = None
    """For the template; None shows the reasoning that the messages hold."""


def sft_run(
    folder: Path,
    data: ChatData,
    config: TrainConfig,
    template_name: str | None = None,
    epochs: float | None = None,
    lora: LoraConfig | None = None,
    options: dict[str, Any] | None = None,
) -> Run:
    """Everything that a fine-tuning needs, read and found to fit.

    Args:
        folder: of the model, with its tokenizer.
        config: rows are packed with sample masks, whatever ``document_mask`` says.
        template_name: a builtin; the folder's own template by default.
        epochs: passes over the conversations, if ``config`` names neither steps nor tokens.
        lora: train adapters of this kind and nothing else.

    Raises:
        ValueError: what is wrong with the folder, the template, a conversation (with file and line) or a size.
    """
    if lora is not None and config.ema_decay is not None:
        raise ValueError(f"ema_decay is {config.ema_decay}, but adapters are not averaged; leave one of the two out")
    if lora is not None and config.balance.bias_speed > 0:
        raise ValueError(
            f"bias_speed is {config.balance.bias_speed}, but adapters hold no bias of the router; give 0, or train the "
            "whole model"
        )
    base_spec, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
    tokenizer.check_fits(base_spec)
    config.check_fits(base_spec)
    if template_name is None:
        template = ChatTemplate.from_folder(folder, tokenizer)
    else:
        template = ChatTemplate.builtin(template_name, tokenizer)
    tokenizer = template.attach(tokenizer)
    spec = replace(base_spec, vocab_size=max(base_spec.vocab_size, tokenizer.vocab_size))
    config = replace(config, document_mask=True)
    chat, rows = _chat_data(data, template, tokenizer, spec, config)
    if config.steps is None and config.tokens is None and epochs is not None:
        config = replace(config, steps=max(1, math.ceil(epochs * rows / config.batch_size)))
    config = config.resolved(spec)
    chat.record["epochs"] = round(chat.stream.epoch(config.plan().first_rows[-1]), 4)
    start, origin = start_from(folder)
    origin = {**origin, "lora": None if lora is None else _json_fields(lora)}
    return Run(spec, config, chat, _start(start, base_spec, lora), options or {}, origin)


def _json_fields(lora: LoraConfig) -> dict[str, Any]:
    """The config as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(lora).items()}


def save_adapted(folder: RunFolder, base: Path, data: TrainingData) -> Callable[[TrainResult], None]:
    """What saves a run of adapters: RUN/adapter in PEFT's format, and RUN/model with them merged.

    Where the vocabulary had to grow, RUN/base is the model that the adapter belongs to.
    """
    adapter, own_base = folder.path / "adapter", folder.path / "base"

    def save(result: TrainResult) -> None:
        model = result.model
        grown = model.spec.vocab_size > read_config(base).vocab_size
        save_adapter(model, adapter, str(own_base if grown else base), overwrite=True)
        if grown:
            remove_lora(model)
            save_model(model, own_base, "fp32", data.tokenizer, overwrite=True)
            load_adapter(model, adapter)
        merge_lora(model)
        save_result(folder, result, data)

    return save


def _chat_data(
    data: ChatData, template: ChatTemplate, tokenizer: Tokenizer, spec: ModelSpec, config: TrainConfig
) -> tuple[TrainingData, int]:
    """What the run reads, and the rows of one epoch."""
    sides = split_conversations(read_conversations(data.paths), data.held_out)
    pad = _padding(tokenizer)
    samples, packed = [], []
    for side in sides:
        encoded = encode_conversations(side, template, tokenizer, config.seq_len + 1, data.truncate, data.thinking)
        samples.append(encoded)
        packed.append(SampleRows(encoded, config.seq_len, config.seed, pad, spec.mtp_depth))
    train, held_out = packed
    stream = ChatStream(train, config.seed)
    record = {
        "tokenizer": tokenizer.content_hash(),
        "template": template.name,
        "train": samples[0].record() | {"rows": len(train), "fill": round(train.fill, 4)},
        "held_out": samples[1].record() | {"rows": len(held_out)},
        "stream": stream.fingerprint,
    }
    chat = TrainingData(stream, lambda batches: held_out.spread(config.batch_size, batches), tokenizer, record)
    return chat, len(train)


def _padding(tokenizer: Tokenizer) -> int:
    """Any id does: nothing sees it and nothing learns it."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token_id for token_id in found if token_id is not None), 0)


def _start(start: Start, base_spec: ModelSpec, lora: LoraConfig | None) -> Start:
    """The model of step 0: the folder's, with room for the template's tokens, and adapters if asked for."""

    def adapted(spec: ModelSpec, config: TrainConfig, share: ExpertShare | None = None) -> Transformer:
        generator = torch.Generator().manual_seed(config.seed)
        model = with_vocabulary(start(base_spec, config, share), spec.vocab_size, generator)
        if lora is not None:
            add_lora(model, lora, generator)
        return model

    return adapted


def with_vocabulary(model: Transformer, vocab_size: int, generator: torch.Generator) -> Transformer:
    """The model with a vocabulary of at least its own size; the rows that are there stay."""
    old_size = model.spec.vocab_size
    if vocab_size == old_size:
        return model
    assert vocab_size > old_size
    spec = replace(model.spec, vocab_size=vocab_size)
    larger = Transformer(spec, model.recipe, model.placements(), device="meta", expert_rank=model.expert_rank)
    weights = model.state_dict()
    for name, tensor in larger.state_dict().items():
        if tensor.shape != weights[name].shape:
            new = _drawn_rows if name == "embed.weight" else _mean_rows
            weights[name] = torch.cat([weights[name], new(weights[name], vocab_size - old_size, generator)])
    larger.load_state_dict(weights, assign=True)
    larger.part = model.part
    return larger


def _drawn_rows(weight_VD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    drawn_ND = torch.randn(count, weight_VD.shape[1], generator=generator, dtype=weight_VD.dtype)
    if weight_VD.is_meta:  # it is on another rank, which draws the same
        return weight_VD.new_empty(drawn_ND.shape)
    return weight_VD.mean(0) + drawn_ND * weight_VD.std(0)


def _mean_rows(weight_VD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return weight_VD.mean(0).repeat(count, 1)
