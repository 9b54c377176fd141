"""Bits per byte and MTP acceptance, counted again by hand from plain logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from abyssal.train.evaluate import _Drafts, evaluate
from abyssal.train.loss import hidden_and_targets, packed_step
from tests.unit.train.test_loss import small_model

VOCAB, SEQ_LEN = 40, 6


@pytest.mark.parametrize("mtp_depth", [0, 1])
def test_evaluation_is_what_plain_logits_give(mtp_depth: int) -> None:
    model = small_model(mtp_depth, torch.float32)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 5 * SEQ_LEN + 1 + mtp_depth).astype(np.uint16)
    token_bytes = np.arange(VOCAB)
    found = evaluate(model, tokens, token_bytes, SEQ_LEN, batch_size=2)
    rows = torch.from_numpy(tokens[: 5 * SEQ_LEN].astype(np.int64)).view(5, SEQ_LEN)
    targets = torch.from_numpy(tokens[1 : 5 * SEQ_LEN + 1].astype(np.int64)).view(5, SEQ_LEN)
    with torch.no_grad():
        loss = float(F.cross_entropy(model(rows).flatten(0, 1), targets.flatten()))
    assert found.num_tokens == 5 * SEQ_LEN
    assert found.num_bytes == int(targets.sum())
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(loss * 5 * SEQ_LEN / math.log(2) / int(targets.sum()), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (found.mtp_acceptance is None) == (mtp_depth == 0)
    assert set(found.loads) == set(range(model.spec.num_dense_layers, model.spec.num_layers + mtp_depth))
    for layer, load_E in found.loads.items():
        assert int(load_E.sum()) == 5 * SEQ_LEN * 2, layer


def test_drafts_and_their_loss_are_the_first_mtp_depths() -> None:
    model = small_model(2, torch.float32)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 40 * SEQ_LEN + 3).astype(np.uint16)
    found = evaluate(model, tokens, np.ones(VOCAB, np.int64), SEQ_LEN, batch_size=8)
    rows = torch.from_numpy(np.stack([tokens[i * SEQ_LEN :][: SEQ_LEN + 3] for i in range(40)]).astype(np.int64))
    with torch.no_grad():
        step = packed_step(model, rows)
        main, first, _ = hidden_and_targets(model, rows, step)
        choices, drafts = (model.logits(hidden).argmax(-1).view(40, SEQ_LEN) for hidden, _ in (main, first))
        mtp_loss = float(F.cross_entropy(model.logits(first[0]), first[1]))
    accepted = float((choices[:, 1:] == drafts[:, :-1]).float().mean())
    assert accepted != float((choices[:, 1:] == choices[:, :-1]).float().mean())
    assert found.mtp_acceptance == pytest.approx(accepted, abs=1e-6)
    assert found.mtp_loss == pytest.approx(mtp_loss, rel=1e-5) and found.mtp_loss != pytest.approx(found.loss, rel=1e-4)


def test_a_draft_is_compared_with_the_choice_one_position_on() -> None:
    drafts = _Drafts(vocab_size=10)
    main = torch.tensor([[9, 3, 3, 5], [9, 3, 4, 4]])
    draft = torch.tensor([[3, 3, 7, 5], [3, 9, 4, 4]])  # pairs: 3-3 3-3 5-7 | 3-3 4-9 4-4
    drafts.add(main, draft)
    assert drafts.rates() == (4 / 6, 3 / 6)
