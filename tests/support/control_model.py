"""A small model folder of DeepSeek-V3.1's family with random weights: its tokens for roles, reasoning and calls, its
template.  What it writes makes no sense, and has the right form wherever a grammar guides it."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

from abyssal.checkpoint.hf import save_model
from abyssal.model.transformer import Transformer
from abyssal.text.chat_format import ChatFormat
from abyssal.text.tokenizer import train_bpe
from tests.support.trained_model import SPEC

FAMILY = "deepseek-v3.1"


def write_control_model(folder: Path) -> Path:
    """Make it; a second or two."""
    import torch

    source = Path(sysconfig.get_path("stdlib"), "json", "decoder.py").read_text(encoding="utf-8")
    template = ChatFormat.named(FAMILY).template
    tokenizer = train_bpe([source], 600).with_control_tokens(template.format_tokens)
    spec = replace(SPEC, vocab_size=tokenizer.vocab_size, mtp_depth=0, max_positions=4096)
    spec = replace(spec, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = Transformer(spec)
    model.init_weights(torch.Generator().manual_seed(5))
    save_model(model, folder, "fp32")
    tokenizer.with_chat_template(template.source).save(folder)
    return folder
