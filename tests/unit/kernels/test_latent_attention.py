"""Latent attention: within its bound of FP64 on every instruction set, whatever the threads and the other queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import latent_attention as op
from abyssal.kernels.attention import attention_reference
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library

pytestmark = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 256, 300]))


def isas() -> range:
    name = isa_name()
    assert name is not None
    return range(ISA_NAMES.index(name) + 1)


def draw(seed: int, heads: int, length: int, width: int, dtype: torch.dtype, entries_dtype: torch.dtype):
    """A query and entries that lie in wider rows, as those of a cache may."""
    generator = torch.Generator().manual_seed(seed)
    q_BSHC = torch.randn(1, 1, heads, width, generator=generator).to(dtype)
    return q_BSHC, torch.randn(1, length, width + 5, generator=generator).to(entries_dtype)[..., 5:]


def native(q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, scale: float, isa: int = -1) -> Tensor:
    out_BSHC = op.native(q_BSHC, latent_BLC, value_dim, scale, isa_limit=isa)
    assert out_BSHC is not None
    return out_BSHC


def exact(q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, scale: float) -> Tensor:
    shared_BLHC = latent_BLC.double()[:, :, None].expand(-1, -1, q_BSHC.shape[2], -1)
    past = latent_BLC.shape[1] - q_BSHC.shape[1]
    return attention_reference(q_BSHC.double(), shared_BLHC, shared_BLHC[..., :value_dim], past, scale)


def assert_within_bound(out_BSHC: Tensor, q_BSHC: Tensor, latent_BLC: Tensor, value_dim: int, scale: float) -> None:
    distance = (out_BSHC.double() - exact(q_BSHC, latent_BLC, value_dim, scale)).abs()
    worst = float((distance / op.error_bound(q_BSHC, latent_BLC, value_dim, scale)).max())
    assert worst <= 1, f"error is {worst:.3g} times the bound"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), LENGTHS, st.integers(1, 150), st.data(), FLOATS, FLOATS)
def test_it_is_within_its_bound_on_every_instruction_set(seed, heads, length, width, data, dtype, entries_dtype):
    value_dim = data.draw(st.integers(1, width))
    scale = data.draw(st.sampled_from([0.05, 1.0]))
    q_BSHC, latent_BLC = draw(seed, heads, length, width, dtype, entries_dtype)
    for isa in isas():
        out_BSHC = native(q_BSHC, latent_BLC, value_dim, scale, isa)
        assert out_BSHC.shape == (1, 1, heads, value_dim) and out_BSHC.dtype == dtype
        assert_within_bound(out_BSHC, q_BSHC, latent_BLC, value_dim, scale)
        alone = [native(q_BSHC[:, :, [head]], latent_BLC, value_dim, scale, isa) for head in range(heads)]
        assert torch.equal(out_BSHC, torch.cat(alone, 2))


def test_the_bound_catches_weights_rounded_to_bf16():
    q_BSHC, latent_BLC = draw(0, 4, 200, 144, torch.bfloat16, torch.bfloat16)
    q_BSHC, latent_BLC = q_BSHC.float(), latent_BLC.float()
    lossy_BSHC = op.reference(q_BSHC.bfloat16(), latent_BLC.bfloat16(), 128, 199, 0.2).float()
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within_bound(lossy_BSHC, q_BSHC, latent_BLC, 128, 0.2)


def test_an_entry_far_above_the_others_takes_all_the_weight():
    q_BSHC, latent_BLC = torch.ones(1, 1, 2, 8), torch.zeros(1, 300, 8)
    latent_BLC[0, 277] = torch.arange(8) * 1000.0
    assert torch.equal(native(q_BSHC, latent_BLC, 6, 1.0)[0, 0, 1], torch.arange(6) * 1000.0)
    latent_BLC[0, :277] = -1e9
    assert torch.equal(native(q_BSHC, latent_BLC, 6, 1.0)[0, 0, 0], torch.arange(6) * 1000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    q_BSHC, latent_BLC = draw(3, 8, 1900, 144, dtype, dtype)  # above the size at which threads are used
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(q_BSHC, latent_BLC, 128, 0.1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert_within_bound(results[0], q_BSHC, latent_BLC, 128, 0.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(1, 8), LENGTHS, FLOATS)
def test_a_query_is_the_same_alone_and_beside_others(seed, sequences, queries, heads, past, dtype):
    generator = torch.Generator().manual_seed(seed)
    q_BSHC = torch.randn(sequences, queries, heads, 40, generator=generator).to(dtype)
    latent_BLC = torch.randn(sequences, past + queries, 45, generator=generator).to(dtype)[..., 5:]
    for isa in isas():
        out_BSHC = native(q_BSHC, latent_BLC, 33, 0.3, isa)
        assert_within_bound(out_BSHC, q_BSHC, latent_BLC, 33, 0.3)
        for b in range(sequences):
            for s in range(queries):
                seen_BLC = latent_BLC[[b], : past + s + 1]
                assert torch.equal(out_BSHC[b, s], native(q_BSHC[[b], [s]][:, None], seen_BLC, 33, 0.3, isa)[0, 0])


def test_more_queries_than_the_scratch_holds_are_joined_in_turns():
    q_BSHC, latent_BLC = torch.randn(1, 40, 4, 72), torch.randn(1, 16 * 128, 72)
    out_BSHC = native(q_BSHC, latent_BLC, 64, 0.1)
    assert torch.equal(out_BSHC[:, [7]], native(q_BSHC[:, [7]], latent_BLC[:, : 16 * 128 - 32], 64, 0.1))
    assert_within_bound(out_BSHC, q_BSHC, latent_BLC, 64, 0.1)


SEQUENCES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 62, 63, 64, 127, 128, 129, 200])), max_size=5)


def scattered(seed: int, sequences: list[tuple[int, int]], page_tokens: int, dtype: torch.dtype):
    """Sequences of (queries, past) with their queries, over shuffled pages of the middle one of three layers."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-(queries + past) // page_tokens) for queries, past in sequences]
    order = torch.randperm(sum(pages) + 2, generator=generator).tolist()
    entries_PLSX = torch.randn(len(order), 3, page_tokens, 40, generator=generator).to(dtype)
    q_THC = torch.randn(sum(queries for queries, _ in sequences), 5, 40, generator=generator).to(dtype)
    rows = [
        (queries, queries + past, [order.pop() for _ in range(count)])
        for (queries, past), count in zip(sequences, pages, strict=True)
    ]
    return q_THC, entries_PLSX[:, 1], rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), SEQUENCES, st.sampled_from([64, 64, 16, 100]), FLOATS)
def test_pages_change_no_bit(seed, sequences, page_tokens, dtype):
    q_THC, entries_PSX, rows = scattered(seed, sequences, page_tokens, dtype)
    table = op.PageTable.of(rows)
    for isa in isas():
        out_THC = op.paged_native(q_THC, entries_PSX, table, 33, 0.3, isa_limit=isa)
        assert out_THC is not None and out_THC.shape == (len(q_THC), 5, 33)
        begin = 0
        for queries, length, pages in rows:
            latent_1LC = entries_PSX[pages].reshape(1, -1, 40)[:, :length]
            if queries:
                wanted = native(q_THC[None, begin : begin + queries], latent_1LC, 33, 0.3, isa)
                assert torch.equal(out_THC[begin : begin + queries], wanted[0])
            begin += queries
    reference_THC = op.paged_reference(q_THC.double(), entries_PSX.double(), table, 33, 0.3)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        op.paged_latent_attention(q_THC, entries_PSX, table, 33, 0.3).double(),
        reference_THC,
        rtol=4 * rounding,
        atol=16 * rounding,
    )


def test_threads_share_short_queries_whole_and_long_ones_by_chunks():
    before = torch.get_num_threads()
    for sequences in ([(1, 700)] * 40, [(1, 6000), (2, 40)]):
        q_THC, entries_PSX, rows = scattered(5, sequences, 64, torch.float32)
        try:
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(op.paged_latent_attention(q_THC, entries_PSX, op.PageTable.of(rows), 33, 0.3))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*results)


def test_pages_that_do_not_exist_are_refused():
    q_THC, entries_PSX, rows = scattered(5, [(1, 70)], 64, torch.float32)
    for wrong in ([0, len(entries_PSX)], [-1, 0]):
        with pytest.raises(AssertionError, match="returned"):
            op.paged_native(q_THC, entries_PSX, op.PageTable.of([(1, 71, wrong)]), 33, 0.3)
    assert op.paged_native(q_THC, entries_PSX, op.PageTable.of([(1, 129, rows[0][2])]), 33, 0.3) is None


def test_gradients_and_fp64_are_left_to_torch():
    q_BSHC, latent_BLC = torch.randn(1, 1, 3, 8), torch.randn(1, 9, 8)
    assert op.native(q_BSHC.double(), latent_BLC.double(), 6, 0.3) is None
    assert op.native(q_BSHC, latent_BLC.requires_grad_(), 6, 0.3) is None
    op.latent_attention(q_BSHC, latent_BLC, 6, 8, 0.3).sum().backward()
    assert latent_BLC.grad is not None
