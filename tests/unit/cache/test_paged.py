"""Pages hold what a contiguous cache holds: any chunking, any pages, prefill and decode in one step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from abyssal.cache.latent import LatentCache
from abyssal.cache.paged import PagedBatch, PagedCache, PagedTokens
from abyssal.cache.pages import PAGE
from abyssal.model.transformer import Transformer
from tests.support.checkpoints import SMALL, random_model
from tests.support.parity import draw_spec

LENGTH = PAGE + 20


def spec_of(family: str):
    spec = SMALL if family == "deepseek_v3" else draw_spec(family, 1)  # type: ignore[arg-type]
    return replace(spec, max_positions=max(spec.max_positions, 4 * PAGE))


def contiguous(model: Transformer, tokens_T: torch.Tensor, cut: int) -> torch.Tensor:
    """Hidden states of prefill up to ``cut``, then of one token after another on the decode path."""
    cache, hidden = LatentCache(model.spec, len(tokens_T), torch.float64), []
    for start, stop in [(0, cut), *((position, position + 1) for position in range(cut, len(tokens_T)))]:
        step = model.step(cache.extend(stop - start, absorbed=start > 0))
        hidden.append(model.hidden(tokens_T[start:stop], step))
    return torch.cat(hidden)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "llama"])
def test_pages_are_the_contiguous_cache(family: str) -> None:
    """Two sequences over scattered pages; one is prefilled in chunks while the other decodes in the same steps."""
    model = random_model(spec_of(family), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, model.spec.vocab_size, (LENGTH,), generator=generator) for _ in range(2))
    cache = PagedCache(model.spec, 7, torch.float64)
    pages = {0: (5, 2), 1: (3, 6)}
    with torch.inference_mode():
        wanted = contiguous(model, first, LENGTH - 4), contiguous(model, second, LENGTH)
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
    page = cache.export_page(1)
    assert page.nbytes == cache.page_bytes == (SMALL.num_layers + SMALL.mtp_depth) * PAGE * 24 * 4
    cache.copy_pages([(1, 0)])
    cache.import_page(2, page)
    assert torch.equal(cache.entries_PLSX[0], page) and torch.equal(cache.entries_PLSX[2], page)
    cache.entries_PLSX[1] = 0
    assert not torch.equal(page, cache.entries_PLSX[1])


def test_a_step_without_tokens() -> None:
    model = random_model(SMALL)
    with torch.inference_mode():
        context = PagedBatch(PagedCache(SMALL, 1, torch.float32), [])
        assert model.hidden(torch.empty(0, dtype=torch.long), model.step(context)).shape == (0, SMALL.hidden_size)
