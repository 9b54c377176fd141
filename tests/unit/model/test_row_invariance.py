"""Without gradients on CPU a token's hidden state has the same bits in any batch and however its prompt is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.kernels.native import native_library
from abyssal.model.context import PackedBatch
from abyssal.model.transformer import Transformer
from tests.support.cached import CachedSequence
from tests.support.parity import draw_spec, random_model

pytestmark = pytest.mark.skipif(native_library() is None, reason="torch's own products depend on the number of rows")
LENGTHS = [70, 1, 9, 70, 33]


def in_chunks(model: Transformer, tokens_T: Tensor, cuts: list[int], absorbed: bool, dtype: torch.dtype) -> Tensor:
    """Hidden states of one sequence, computed chunk after chunk over a cache."""
    cache = CachedSequence(model.spec, len(tokens_T), dtype)
    return torch.cat(
        [
            model.hidden(chunk_T, model.step(cache.extend(len(chunk_T), absorbed), model.local_dispatcher()))
            for chunk_T in tokens_T.split(cuts)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
@torch.inference_mode()
def test_neither_batch_nor_chunks_change_a_bit(family: str, absorbed: bool, dtype: torch.dtype) -> None:
    spec = draw_spec(family, 3)  # type: ignore[arg-type]
    model = random_model(spec, 3, dtype)
    tokens_T = torch.randint(spec.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    step = model.step(PackedBatch(LENGTHS, absorbed=absorbed), model.local_dispatcher())
    together = model.hidden(tokens_T, step).split(LENGTHS)
    for sequence_T, hidden_TD in zip(tokens_T.split(LENGTHS), together, strict=True):
        length = len(sequence_T)
        for first in {length, min(length, 5), (length + 1) // 2}:
            cuts = [1] * first if first == 5 else [first]
            cuts += [length - first] * (first < length)
            chunked_TD = in_chunks(model, sequence_T, cuts, absorbed, dtype)
            assert torch.equal(chunked_TD, hidden_TD), f"{length} tokens cut {cuts}"
    logits_TV = model.logits(together[0])
    assert torch.equal(model.logits(together[0][[-1]])[0], logits_TV[-1])
