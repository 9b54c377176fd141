"""What FP8 pages change, measured on a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.page_error import held_out_texts, page_error

if TYPE_CHECKING:
    from tests.support.trained_model import TrainedModel


def test_the_error_of_fp8_pages_on_a_trained_model(trained_model: TrainedModel) -> None:
    """Three or so times what ``python -m tests.support.page_error`` finds over more text; docs/cache.md has that."""
    error = page_error(trained_model.model, held_out_texts(trained_model.data, 12))
    assert error.tokens == 12 * 255
    assert abs(error.loss_difference) < 0.002
    assert 0.0003 < error.mean_logprob_difference < 0.006, "the two read the same pages, or others' text"
    assert error.largest_logprob_difference < 1.0, "a changed route moves a token so far"
    assert error.same_likeliest > 0.99
    assert error.written_alike > 0.75 and error.largest_written_difference < 1.0
    assert 0.015 < error.latent_error < 0.03, "three bits of mantissa: 2.4% of normally distributed values"
    assert 0.0005 < error.rotary_error < 0.0025, "seven bits: 0.17%"
