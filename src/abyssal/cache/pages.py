"""Which pages of the paged cache are free, and who holds the others: numbers alone, the tensors are the runner's.

A page holds what every layer stores of :data:`PAGE` consecutive tokens of one sequence.  Sequences that begin alike
share pages, so a page has one reference for each holder and is free again when the last lets go.  The prefix cache
*keeps* pages besides: a kept page without a reference is *idle*; it still holds text that may be asked for again, and
is taken back, longest idle first, when pages run short.  The pool orders idle pages by the moment their last holder let
go, so that least-recently-used costs nothing to maintain; a scheme with time stamps would search for the oldest.

Nothing here is atomic over threads: the scheduler owns the pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

PAGE = 64
"""Tokens a page, and the unit of the context cache [API: units of 64 tokens]."""


class OutOfPages(ValueError):
    """Fewer pages are free than were asked for."""


class PagePool:
    """Accounts for pages ``0..num_pages - 1``.

    Raises:
        ValueError: memory for no page at all.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(
                f"num_pages is {num_pages}: the cache needs memory for one page of {PAGE} tokens or more; "
                "give it more memory, or choose a smaller model"
            )
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._kept = [False] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the order in which they became idle

    @property
    def free(self) -> int:
        """Pages that :meth:`allocate` can hand out."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Pages that nobody but the prefix cache holds: at most so many can be evicted."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody besides the prefix cache holds."""
        return self.num_pages - self.free - self.idle

    def allocate(self, count: int) -> list[int]:
        """``count`` pages with one reference each, the caller's.  Their content is whatever was left in them.

        Raises:
            OutOfPages: fewer are free; then none is taken.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each page."""
        for page in pages:
            assert self._references[page] or self._kept[page], f"page {page} is free"
            self._references[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page; give them in the order of their tokens, so that the last become idle first."""
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is held by nobody"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._kept[page]:
                self._idle[page] = None
            else:
                self._free.append(page)

    def references(self, page: int) -> int:
        """Holders of a page, the prefix cache not counted."""
        return self._references[page]

    def writable(self, page: int) -> tuple[int, int | None]:
        """Before a holder writes to ``page``: the page to write to, and the page to copy into it first, if any.

        A page that others hold or that the prefix cache keeps is left to them, and the caller's reference moves to a
        new page.  The copies of a step are carried out in the order of these calls, before the step writes anything.

        Raises:
            OutOfPages: a copy is needed and no page is free.
        """
        assert self._references[page] > 0, f"page {page} is held by nobody"
        if self._references[page] == 1 and not self._kept[page]:
            return page, None
        (copy,) = self.allocate(1)
        self.release([page])
        return copy, page

    def keep(self, page: int) -> None:
        """The prefix cache keeps a held page beyond its holders."""
        assert self._references[page] > 0 and not self._kept[page], page
        self._kept[page] = True

    def kept(self, page: int) -> bool:
        return self._kept[page]

    def drop(self, page: int) -> None:
        """The prefix cache no longer keeps a page; it is free if nobody holds it."""
        assert self._kept[page], page
        self._kept[page] = False
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def idle_pages(self) -> Iterator[int]:
        """Idle pages, longest idle first.  Void as soon as the pool changes."""
        return iter(self._idle)

    def check(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Assert that each page is exactly one of held, idle or free, and with ``holders``, the pages of every holder,
        that there are as many references as holders."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        free = set(self._free)
        for page, references in enumerate(self._references):
            assert references >= 0, (page, references)
            assert (page in free) == (not references and not self._kept[page]), f"page {page} leaked or freed in use"
            assert (page in self._idle) == (not references and self._kept[page]), f"page {page}: idle or not?"
        if holders is not None:
            counted = [0] * self.num_pages
            for pages in holders:
                for page in pages:
                    counted[page] += 1
            assert counted == self._references, [
                (page, counted[page], self._references[page])
                for page in range(self.num_pages)
                if counted[page] != self._references[page]
            ]
