"""grouped_gemv: every implementation within the stated bound of FP64, and no row ever seen by another."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.kernels import grouped_gemv as op
from abyssal.kernels.native import ISA_NAMES, isa_name, native_library

needs_native = pytest.mark.skipif(native_library() is None, reason="installed without a C++ compiler")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 255, 512]))


def available_isas() -> range:
    name = isa_name()
    return range(0 if name is None else ISA_NAMES.index(name) + 1)


def draw(seed: int, rows: int, slots: int, outputs: int, inputs: int, x_dtype=torch.float32, w_dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x_RI = torch.randn(rows, inputs, generator=generator).to(x_dtype)
    weight_EOI = torch.randn(slots, outputs, inputs, generator=generator).to(w_dtype)
    return x_RI, weight_EOI, torch.randint(slots, (rows,), generator=generator)


def as_view(weight_EOI: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The same values as rows (or, transposed, columns) of a wider and longer stack filled with NaN."""
    stored = weight_EOI.transpose(1, 2) if transposed else weight_EOI
    slots, lines, width = stored.shape
    around = torch.full((slots, lines + 3, width + 5), float("nan"), dtype=weight_EOI.dtype)
    view = around[:, 2 : 2 + lines, 3 : 3 + width].copy_(stored)
    return view.transpose(1, 2) if transposed else view


def assert_within_bound(y_RO, x_RI, weight_EOI, slots_R):
    exact_RO = op.reference(x_RI.double(), weight_EOI.double(), slots_R, torch.float64)
    bound_RO = op.error_bound(x_RI, weight_EOI, slots_R, y_RO.dtype)
    worst = ((y_RO.double() - exact_RO).abs() / bound_RO).max()
    assert worst <= 1, f"error is {worst:.3g} times the bound"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 4), SIZES, SIZES, FLOATS, FLOATS, FLOATS)
def test_all_implementations_are_within_the_bound_of_fp64(seed, rows, slots, outputs, inputs, x_dtype, w_dtype, dtype):
    x_RI, weight_EOI, slots_R = draw(seed, rows, slots, outputs, inputs, x_dtype, w_dtype)
    assert_within_bound(op.reference(x_RI, weight_EOI, slots_R, dtype), x_RI, weight_EOI, slots_R)
    for isa in available_isas():
        y_RO = op.native(x_RI, weight_EOI, slots_R, dtype, isa_limit=isa)
        assert_within_bound(y_RO, x_RI, weight_EOI, slots_R)


@needs_native
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 4), SIZES, SIZES, FLOATS, FLOATS, st.booleans())
def test_a_view_of_a_weight_is_read_where_it_lies(seed, rows, slots, outputs, inputs, w_dtype, dtype, transposed):
    x_RI, weight_EOI, slots_R = draw(seed, rows, slots, outputs, inputs, w_dtype=w_dtype)
    view_EOI = as_view(weight_EOI, transposed)
    for isa in available_isas():
        y_RO = op.native(x_RI, view_EOI, slots_R, dtype, isa_limit=isa)
        assert_within_bound(y_RO, x_RI, weight_EOI, slots_R)
        if not transposed:
            assert torch.equal(y_RO, op.native(x_RI, weight_EOI, slots_R, dtype, isa_limit=isa))
        alone_RO = [op.native(x_RI[[r]], view_EOI, slots_R[[r]], dtype, isa_limit=isa) for r in range(rows)]
        assert torch.equal(y_RO, torch.cat(alone_RO))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_without_slots_the_rows_are_divided_equally(implementation):
    x_RI, weight_EOI, _ = draw(2, 6, 3, 5, 7)
    expected_RO = op.grouped_gemv(x_RI, weight_EOI, torch.tensor([0, 0, 1, 1, 2, 2]), implementation=implementation)
    assert torch.equal(op.grouped_gemv(x_RI, weight_EOI, None, implementation=implementation), expected_RO)
    with pytest.raises(ValueError, match="multiple of E"):
        op.grouped_gemv(x_RI[:4], weight_EOI, None, implementation=implementation)


@needs_native
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70), FLOATS, st.booleans())
def test_rows_of_x_may_overlap_or_lie_apart(seed, inputs, dtype, transposed):
    wide_RI, weight_EOI, slots_R = draw(seed, 4, 3, 9, inputs + 2, dtype, dtype)
    for x_RI in (wide_RI[:, 2:], wide_RI[0, 2:].expand(4, inputs)):
        view_EOI = as_view(weight_EOI[..., 2:], transposed)
        expected_RO = op.native(x_RI.contiguous(), view_EOI, slots_R, dtype)
        assert torch.equal(op.grouped_gemv(x_RI, view_EOI, slots_R, implementation="native"), expected_RO)


def test_the_bound_catches_a_sum_kept_in_bf16():
    x_RI, weight_EOI, slots_R = draw(0, 4, 2, 8, 512)
    lossy_RO = op.reference(x_RI, weight_EOI, slots_R, torch.bfloat16).float()
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within_bound(lossy_RO, x_RI, weight_EOI, slots_R)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 4), SIZES, SIZES, FLOATS)
def test_a_row_alone_equals_the_row_in_a_batch_bit_for_bit(seed, rows, slots, outputs, inputs, w_dtype):
    x_RI, weight_EOI, slots_R = draw(seed, rows, slots, outputs, inputs, w_dtype=w_dtype)
    implementations: list[op.Implementation] = ["reference"] if native_library() is None else ["reference", "native"]
    for implementation in implementations:
        together = op.grouped_gemv(x_RI, weight_EOI, slots_R, implementation=implementation)
        for row in range(rows):
            one = slice(row, row + 1)
            alone = op.grouped_gemv(x_RI[one], weight_EOI, slots_R[one], implementation=implementation)
            assert torch.equal(alone[0], together[row])


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype, transposed):
    x_RI, weight_EOI, slots_R = draw(3, 6, 5, 1030, 300, w_dtype=dtype)  # above the size at which threads are used
    weight_EOI = as_view(weight_EOI, transposed)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(op.native(x_RI, weight_EOI, slots_R, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
def test_native_rounds_to_bf16_as_torch_does():
    special = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, float("inf"), float("nan"), 1e-40, 0.0])
    rounded = op.native(special.reshape(-1, 1), torch.ones(1, 1, 1), None, torch.bfloat16)
    torch.testing.assert_close(rounded[:, 0], special.bfloat16(), rtol=0, atol=0, equal_nan=True)


@needs_native
def test_values_after_the_end_of_a_row_are_not_read_into_it():
    for isa, inputs, dtype in itertools.product(available_isas(), (1, 17, 31), (torch.float32, torch.bfloat16)):
        weight_EOI = torch.ones(1, 5, inputs, dtype=dtype)
        weight_EOI[0, 1::2] = float("nan")
        y_RO = op.native(torch.ones(1, inputs), weight_EOI, None, torch.float32, isa_limit=isa)
        assert y_RO[0, ::2].tolist() == [inputs] * 3


def test_gemv_is_one_slot():
    x_RI, weight_EOI, slots_R = draw(5, 3, 1, 40, 50)
    assert torch.equal(op.gemv(x_RI, weight_EOI[0]), op.grouped_gemv(x_RI, weight_EOI, slots_R))


def test_no_rows_give_no_rows():
    x_RI, weight_EOI, slots_R = draw(5, 0, 2, 4, 6)
    implementations: list[op.Implementation] = ["auto", "reference"]
    for implementation in implementations:
        assert op.grouped_gemv(x_RI, weight_EOI, slots_R, implementation=implementation).shape == (0, 4)


def test_auto_keeps_gradients_and_fp64():
    x_RI, weight_EOI, slots_R = draw(6, 3, 2, 4, 5)
    weight_EOI.requires_grad_()
    op.grouped_gemv(x_RI, weight_EOI, slots_R).sum().backward()
    expected = torch.zeros_like(weight_EOI)
    for slot, x_I in zip(slots_R.tolist(), x_RI, strict=True):
        expected[slot] += x_I
    torch.testing.assert_close(weight_EOI.grad, expected)
    assert op.grouped_gemv(x_RI.double(), weight_EOI.detach(), slots_R).dtype == torch.float64


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_slot_out_of_range_is_named(implementation):
    x_RI, weight_EOI, slots_R = draw(7, 3, 2, 4, 5)
    slots_R[1] = 9
    with pytest.raises(ValueError, match=r"slots \[9\] are outside the 2 slots"):
        op.grouped_gemv(x_RI, weight_EOI, slots_R, implementation=implementation)


def test_shapes_that_do_not_fit_are_named():
    x_RI, weight_EOI, slots_R = draw(8, 3, 2, 4, 5)
    with pytest.raises(ValueError, match=r"x \(3, 4\)"):
        op.grouped_gemv(x_RI[:, :4], weight_EOI, slots_R)
    with pytest.raises(ValueError, match="int64"):
        op.grouped_gemv(x_RI, weight_EOI, slots_R.int())


@needs_native
def test_native_refuses_what_it_cannot_do_with_the_reason():
    x_RI, weight_EOI, slots_R = draw(9, 3, 2, 4, 4)
    with pytest.raises(ValueError, match="not contiguous"):
        op.grouped_gemv(x_RI[:, :2], weight_EOI[..., ::2], slots_R, implementation="native")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        op.grouped_gemv(x_RI.double(), weight_EOI, slots_R, implementation="native")
    with pytest.raises(ValueError, match="no backward"):
        op.grouped_gemv(x_RI, weight_EOI.requires_grad_(), slots_R, implementation="native")


@needs_native
def test_try_native_gives_nothing_where_it_does_not_apply():
    x_RI, weight_EOI, slots_R = draw(10, 3, 2, 4, 4)
    assert op.try_native(x_RI.double(), weight_EOI, slots_R, torch.float32) is None
    assert op.try_native(x_RI, weight_EOI, slots_R.int(), torch.float32) is None
    assert op.try_native(x_RI[:, :2], weight_EOI[..., ::2], slots_R, torch.float32) is None
    assert op.try_native(x_RI.to("meta"), weight_EOI, slots_R, torch.float32) is None
    y_RO = op.try_native(x_RI, weight_EOI[1], None, torch.float32)
    assert y_RO is not None and torch.equal(y_RO, op.gemv(x_RI, weight_EOI[1]))
