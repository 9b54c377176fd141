"""Pages hold what a pass without a cache sees: any chunking, any pages, prefill and decode in one step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from abyssal.cache.paged import PagedBatch, PagedCache, PagedTokens
from abyssal.cache.pages import PAGE
from abyssal.model.context import PackedBatch
from abyssal.model.transformer import Transformer
from abyssal.spec.arithmetic import kv_cache_bytes_per_token
from abyssal.spec.presets import preset
from tests.support.checkpoints import SMALL, random_model
from tests.support.forked import exit_status, fork
from tests.support.parity import draw_spec

LENGTH = PAGE + 20
FLOATS = (torch.float32, torch.bfloat16)
PAGE_DTYPES = ("model", "fp8")


def spec_of(family: str):
    spec = SMALL if family == "deepseek_v3" else draw_spec(family, 1)  # type: ignore[arg-type]
    return replace(spec, max_positions=max(spec.max_positions, 4 * PAGE))


def plain(model: Transformer, tokens_T: torch.Tensor) -> torch.Tensor:
    """Hidden states of a plain pass over the whole sequence, without a cache."""
    return model.hidden(tokens_T, model.step(PackedBatch([len(tokens_T)])))


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
def test_pages_give_what_a_plain_pass_gives(family: str) -> None:
    """Two sequences over scattered pages; one is prefilled in chunks while the other decodes in the same steps."""
    model = random_model(spec_of(family), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, model.spec.vocab_size, (LENGTH,), generator=generator) for _ in range(2))
    cache = PagedCache(model.spec, 7, torch.float64)
    pages = {0: (5, 2), 1: (3, 6)}
    with torch.inference_mode():
        wanted = plain(model, first), plain(model, second)
        got: dict[int, list[torch.Tensor]] = {0: [], 1: []}

        def run(*parts: tuple[int, int, int, bool]) -> None:
            tokens = torch.cat([(first, second)[which][start:stop] for which, start, stop, _ in parts])
            context = PagedBatch(
                cache,
                [
                    PagedTokens(start, stop - start, pages[which][: -(-stop // PAGE)], absorbed)
                    for which, start, stop, absorbed in parts
                ],
            )
            hidden = model.hidden(tokens, model.step(context)).split([stop - start for _, start, stop, _ in parts])
            for (which, *_), rows in zip(parts, hidden, strict=True):
                got[which].append(rows)

        run((0, 0, LENGTH - 4, False))
        cuts = [0, 7, PAGE, PAGE + 1, LENGTH]
        for number in range(4):
            decoded = LENGTH - 4 + number
            run((1, cuts[number], cuts[number + 1], False), (0, decoded, decoded + 1, True))
    for which in (0, 1):
        torch.testing.assert_close(torch.cat(got[which]), wanted[which], rtol=1e-10, atol=1e-10)


def test_pages_move_whole() -> None:
    cache = PagedCache(SMALL, 3, torch.float32)
    cache.entries_PLSX[1] = torch.randn(cache.entries_PLSX[1].shape)
    page = cache.entries_PLSX[1].clone()
    assert page.nbytes == cache.page_bytes == (SMALL.num_layers + SMALL.mtp_depth) * PAGE * 24 * 4
    cache.copy_pages([(1, 0)])
    cache.page_buffer(2)[:] = cache.page_buffer(1)
    cache.put_buffer(2, cache.page_buffer(2))
    assert torch.equal(cache.entries_PLSX[0], page) and torch.equal(cache.entries_PLSX[2], page)
    cache.entries_PLSX[1] = 0
    assert not torch.equal(page, cache.entries_PLSX[1])


def test_fp8_pages_to_the_byte() -> None:
    """[FlashMLA's FP8 cache]: 512 codes, 4 scales, 64 values of rotary key."""
    v3 = preset("deepseek-v3")
    cache = PagedCache(v3, 1, torch.bfloat16, page_dtype="fp8")
    assert cache.page_bytes == 62 * PAGE * 656 == cache.page_buffer(0).nbytes
    assert cache.page_bytes == PAGE * kv_cache_bytes_per_token(v3, include_mtp=True, fp8=True)
    assert PagedCache(SMALL, 1, torch.bfloat16, page_dtype="fp8").page_bytes == 3 * PAGE * (20 + 4 + 8)
    layouts = {PagedCache(SMALL, 1, dtype, page_dtype=name).layout for dtype in FLOATS for name in PAGE_DTYPES}
    assert len(layouts) == 3  # the bytes of FP8 pages are read as either dtype
    with pytest.raises(ValueError, match="page_dtype: 'int8' must be one of model, fp8"):
        PagedCache(SMALL, 1, torch.float32, page_dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
def test_fp8_pages_give_what_was_quantised_to_the_very_step_that_wrote_it(family: str) -> None:
    """Whether a token came in this step or an earlier one: the bits of prefill do not depend on its chunks."""
    model = random_model(spec_of(family))
    tokens_T = torch.randint(0, model.spec.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(0))
    results = []
    for cuts in ([0, LENGTH], [0, 7, PAGE, PAGE + 1, LENGTH]):
        cache = PagedCache(model.spec, 2, torch.float32, page_dtype="fp8")
        with torch.inference_mode():
            hidden = []
            for start, stop in itertools.pairwise(cuts):
                context = PagedBatch(cache, [PagedTokens(start, stop - start, (1, 0)[: -(-stop // PAGE)], False)])
                hidden.append(model.hidden(tokens_T[start:stop], model.step(context)))
        results.append((torch.cat(hidden), cache.entries_PLSX))
        entries_TX = cache.load(0, torch.arange(5))
        assert entries_TX.dtype == torch.float32 and entries_TX.shape == (5, model.spec.attention.cache_values)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_step_without_tokens() -> None:
    model = random_model(SMALL)
    with torch.inference_mode():
        context = PagedBatch(PagedCache(SMALL, 1, torch.float32), [])
        assert model.hidden(torch.empty(0, dtype=torch.long), model.step(context)).shape == (0, SMALL.hidden_size)


def test_a_fork_has_pages_of_its_own() -> None:
    cache = PagedCache(SMALL, 1, torch.float32)
    assert exit_status(fork(lambda: cache.entries_PLSX.fill_(1.0))) == 0
    assert not cache.entries_PLSX.any()
