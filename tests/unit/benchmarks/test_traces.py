"""Traces scaled down: lengths, times, conversations kept whole, blocks of the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine_parts.traces import (
    TraceRequest,
    at_rate,
    chosen,
    jobs_of,
    prompt_of,
    read_azure,
    read_mooncake,
    scaled,
)


def test_azure_is_read_in_the_order_of_times(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
    )
    first, second = read_azure(path)
    assert first == TraceRequest(0.0, 374, 44)
    assert (second.at, second.prompt_tokens, second.new_tokens) == (pytest.approx(4.314579), 396, 109)


def test_mooncake_is_read_with_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]},
        {"timestamp": 0, "input_length": 500, "output_length": 6, "hash_ids": [0]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_mooncake(path) == [TraceRequest(0.0, 500, 6, (0,)), TraceRequest(3.0, 600, 5, (0, 7))]


def test_scaled_lengths_are_at_least_one_token() -> None:
    assert scaled(TraceRequest(1.0, 100, 3, (0,)), 8) == TraceRequest(1.0, 12, 1, (0,))


def test_the_first_that_fit_are_chosen_where_texts_are_unknown() -> None:
    requests = [TraceRequest(at, prompt, 10) for at, prompt in ((0.0, 50), (1.0, 91), (2.0, 90), (3.0, 1))]
    assert [each.at for each in chosen(requests, 2, longest=100)] == [0.0, 2.0]


def test_conversations_are_chosen_whole() -> None:
    turns = [TraceRequest(float(at), 10, 1, (0, at % 7, *range(100, 100 + at // 7))) for at in range(70)]
    taken = chosen(turns, 30, longest=100)
    assert len(taken) == 30 and [each.at for each in taken] == sorted(each.at for each in taken)
    second = {each.blocks[1] for each in taken}
    assert len(second) == 3 and taken == [each for each in turns if each.blocks[1] in second]


def test_a_conversation_with_a_turn_too_long_is_left_out() -> None:
    turns = [TraceRequest(float(at), 10 + 90 * (at == 5), 1, (0, at % 2)) for at in range(8)]
    assert {each.blocks[1] for each in chosen(turns, 100, longest=50)} == {0}


def test_times_are_compressed_to_a_rate_and_keep_their_proportions() -> None:
    requests = [TraceRequest(at, 1, 1) for at in (100.0, 100.0, 130.0, 200.0)]
    assert [each.at for each in at_rate(requests, per_second=2.0)] == [0.0, 0.0, pytest.approx(0.6), 2.0]
    assert [each.at for each in at_rate(requests[:2], per_second=2.0)] == [0.0, 0.0]


def test_prompts_share_as_many_tokens_as_blocks() -> None:
    first = prompt_of(TraceRequest(0.0, 200, 1, (0, 1, 2, 3)), 0, 8, 1000)
    second = prompt_of(TraceRequest(0.0, 190, 1, (0, 1, 5)), 1, 8, 1000)
    assert len(first) == 200 and len(second) == 190
    assert first[:128] == second[:128] and first[128:190] != second[128:190]
    assert all(2 <= token < 1000 for token in first)


def test_prompts_without_blocks_share_nothing() -> None:
    jobs = jobs_of([TraceRequest(0.0, 64, 1), TraceRequest(1.0, 64, 2)], 4, 1000)
    assert [len(each.prompt) for each in jobs] == [64, 64] and jobs[0].prompt[:8] != jobs[1].prompt[:8]
    assert [(each.number, each.at, each.new_tokens) for each in jobs] == [(0, 0.0, 1), (1, 1.0, 2)]
