"""The index work of a dispatch in two hops, with every rank's part of it done in one process.

Legend: T tokens, K chosen experts, E choices, R peers, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.row_sums import row_sums
from abyssal.model.dispatch import SlotMap
from abyssal.parallel.dispatch.order import inverse, sorting
from abyssal.parallel.dispatch.routes import (
    MOST_CHUNKS,
    Departure,
    Held,
    chunk_size,
    copies_held,
    depart,
    summands,
    tokens_held,
)
from abyssal.spec.placement import Placement


@dataclass(frozen=True)
class Case:
    nodes: int
    ranks: int
    slots: int
    chunk_tokens: int | None
    slots_TK: list[Tensor]
    """Of each rank, numbered through all nodes."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nodes, ranks, slots = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    choices, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    tokens = [draw(st.integers(0, 7)) for _ in range(nodes * ranks)]
    some = draw(st.integers(1, nodes * ranks * slots))
    return Case(
        nodes,
        ranks,
        slots,
        draw(st.sampled_from([None, 1, 2, 3, 50])),
        [torch.randint(0, some, (count, choices), generator=generator) for count in tokens],
    )


def hop(
    held: list[Held], groups: list[list[int]], slots_per_peer: int, num_sources: int, chunks: list[int]
) -> tuple[list[Held], list[Departure], list[list[tuple[int, int]]]]:
    """One hop of all ranks: what they hold then, how they departed, and of each the (sender, row) of its buffer."""
    departures = [
        depart(one, len(group), slots_per_peer, num_sources, count)
        for one, group, count in zip(held, groups, chunks, strict=True)
    ]
    arrived, buffers = [], []
    for rank, group in enumerate(groups):
        here, most = group.index(rank), max(chunks[peer] for peer in group)
        sizes_RS2 = torch.stack([departures[peer].sizes_RS2[here] for peer in group])
        codes = []
        for peer in group:
            choices_R = departures[peer].sizes_RS2[..., 1].sum(1)
            begin = int(choices_R[:here].sum())
            codes.append(departures[peer].codes_E[begin : begin + int(choices_R[here])])
        arrived.append(copies_held(torch.cat(codes), sizes_RS2, most))
        buffers.append(_buffer(departures, group, here, most))
    return arrived, departures, buffers


def _buffer(departures: list[Departure], group: list[int], here: int, chunks: int) -> list[tuple[int, int]]:
    """By chunk and then by sender, where each row came from: the sender and the row of what it sent."""
    rows = []
    for chunk in range(chunks):
        for peer in group:
            copies_RC = departures[peer].copies_RC
            if chunk < copies_RC.shape[1]:
                begin = int(copies_RC[:, :chunk].sum() + copies_RC[:here, chunk].sum())
                rows += [(peer, begin + row) for row in range(int(copies_RC[here, chunk]))]
    return rows


def across_groups(case: Case) -> list[list[int]]:
    everyone = range(case.nodes * case.ranks)
    return [[node * case.ranks + rank % case.ranks for node in range(case.nodes)] for rank in everyone]


def inside_groups(case: Case) -> list[list[int]]:
    everyone = range(case.nodes * case.ranks)
    return [[rank // case.ranks * case.ranks + index for index in range(case.ranks)] for rank in everyone]


@settings(max_examples=30, deadline=None)
@given(cases())
def test_every_choice_arrives_once_with_its_token_and_a_token_crosses_once_a_node(case: Case) -> None:
    own = [-(-len(ids) // chunk_size(len(ids), case.chunk_tokens)) or 1 for ids in case.slots_TK]
    held = [tokens_held(ids, case.chunk_tokens) for ids in case.slots_TK]
    groups = across_groups(case)
    middle, first, buffers = hop(held, groups, case.ranks * case.slots, 1, own)
    most = [max(own[peer] for peer in group) for group in groups]
    last, second, handed = hop(middle, inside_groups(case), case.slots, case.nodes, most)

    for rank, departure in enumerate(first):
        slots_TK = case.slots_TK[rank].tolist()
        crossings = sum(len({slot // (case.ranks * case.slots) for slot in slots}) for slots in slots_TK)
        assert len(departure.gather_Q) == crossings
    seen = []
    for rank, one in enumerate(last):
        origin = []
        for hand, row in handed[rank]:
            source, place = buffers[hand][int(second[hand].gather_Q[row])]
            origin.append((source, int(first[source].gather_Q[place])))
        assert len(set(origin)) == len(origin), "a token came twice to one rank"
        places = one.place_P[one.copy_E].tolist()
        seen += [
            (*origin[place], rank * case.slots + slot) for place, slot in zip(places, one.slot_E.tolist(), strict=True)
        ]
    expected = [
        (rank, token, slot)
        for rank, ids in enumerate(case.slots_TK)
        for token, slots in enumerate(ids.tolist())
        for slot in slots
    ]
    assert sorted(seen) == sorted(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.lists(st.integers(0, 5), max_size=12), st.booleans())
def test_summands_add_the_items_of_each_row(spare: int, rows: list[int], shuffled: bool) -> None:
    row_I, num_rows = torch.tensor(rows, dtype=torch.int64), 6 + spare
    place_I = torch.randperm(len(rows)) if shuffled else torch.arange(len(rows))
    items_ID = torch.randint(-9, 9, (len(rows), 2)).float()
    buffer_ID = torch.zeros(len(rows) + 1, 2)
    buffer_ID[place_I] = items_ID
    expected = torch.zeros(num_rows, 2).index_add_(0, row_I, items_ID)
    assert torch.equal(row_sums(buffer_ID, summands(row_I, num_rows, place_I if shuffled else None)), expected)


def test_short_keys_are_sorted_as_long_ones_are() -> None:
    for bound in (2, 256, 257, 2**15, 2**15 + 1, 2**20):
        keys_I = torch.randint(0, bound, (500,))
        keys_I[:3] = bound - 1
        order_I = sorting(keys_I, bound)
        assert torch.equal(order_I, keys_I.argsort(stable=True))
        assert torch.equal(order_I[inverse(order_I)], torch.arange(500))


def test_chunks_can_be_numbered() -> None:
    assert chunk_size(100, None) == 100 and chunk_size(0, None) == 1 and chunk_size(100, 7) == 7
    size = chunk_size(10 * MOST_CHUNKS, 1)
    assert -(-10 * MOST_CHUNKS // size) <= MOST_CHUNKS


def test_ranks_with_a_token_each_do_not_all_choose_the_first_replica() -> None:
    placement, one_token = Placement(2, (0, 1, 0, 0)), torch.zeros(1, 1, dtype=torch.int64)
    chosen = [int(SlotMap(placement, first_turn=rank)(one_token)) for rank in range(6)]
    assert chosen == [0, 2, 3, 0, 2, 3]
