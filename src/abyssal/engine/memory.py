"""Pages for sequences: admitting, growing, forking, letting go.  The scheduler's policy says for whom.

A sequence gets the pages of all its known tokens when it is admitted, so a prompt that has begun never stalls half-way
for memory; only growing output can run out.  (Taking pages chunk by chunk would use them a few steps later, at the
price of prompts that hold pages and wait for each other.)  Idle pages of the prefix cache are taken back when free ones
do not suffice.

Where the model has MTP layers, as many last tokens of a hit are computed again, in a copy of their page: the k-th MTP
layer's entry depends on the k tokens after its own, which may differ, and drafting needs the hidden states.  They count
as found in the cache.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Row
from typing import Protocol

from abyssal.cache.pages import PAGE, PagePool
from abyssal.cache.prefix import Match, PrefixCache
from abyssal.engine.messages import FinishedPrefix, Path, Transfer
from abyssal.engine.request import Sequence, Status, pages_for

NOTHING = Match((), 0, "prompt")


class StoredPrefixes(Protocol):
    """What the scheduler asks of a cache on disk."""

    def lookup(self, tokens: Row[int], namespace: bytes, paths: Collection[Path]) -> int:
        """Leading tokens, a multiple of the page size, whose pages it can deliver; 0 where fetching does not pay."""
        ...


class SequenceMemory:
    """The pages of running sequences in ``pool``, and what they share through ``prefix`` and ``stored``.

    Args:
        deterministic: share pages of the prompt path alone.
        draft_layers: MTP layers that are to draft; less than a page has tokens.
    """

    def __init__(
        self,
        pool: PagePool,
        prefix: PrefixCache | None,
        stored: StoredPrefixes | None,
        deterministic: bool,
        draft_layers: int,
    ) -> None:
        self.pool = pool
        self.prefix = prefix
        self.copies: list[tuple[int, int]] = []
        """Of the step being planned."""
        self.finished: list[FinishedPrefix] = []
        """Since the last step was planned."""
        self._stored = stored
        self._deterministic = deterministic
        self._draft_layers = draft_layers
        self._paths: tuple[Path, ...] = ("prompt",) if deterministic else ("prompt", "decode")

    @property
    def available(self) -> int:
        """Pages that can be had without taking them from a sequence; at most, since some idle ones may be needed."""
        return self.pool.free + (self.pool.idle if self.prefix is not None else 0)

    def admit(self, sequence: Sequence, spare: int) -> bool:
        """Give a waiting sequence the pages of all its tokens, shared where cached; False, changing nothing, where they
        and ``spare`` more cannot be had.  Afterwards :meth:`incoming` says what is to be filled from elsewhere."""
        total = pages_for(len(sequence.tokens))
        match = self._match(sequence, total)
        shares_last = bool(self._draft_layers and match.pages)
        needed = total - len(match.pages) + shares_last
        if needed + spare > self.available or not self._free(needed):
            self.pool.release(match.pages)
            return False
        sequence.pages = list(match.pages)
        sequence.computed = match.num_tokens - (self._draft_layers if match.pages else 0)
        if not sequence.offloaded:
            sequence.prompt_path = match.num_tokens if match.path == "prompt" else 0
        sequence.published = match.num_tokens
        if shares_last:
            self._own(sequence, len(match.pages) - 1)
        sequence.pages += self.pool.allocate(total - len(sequence.pages))
        return True

    def incoming(self, sequence: Sequence) -> Transfer | None:
        """The pages of a sequence just admitted that another place can fill: asked once."""
        start = 0
        if sequence.offloaded:
            kind, stop, sequence.offloaded = "offload", sequence.offloaded, 0
        elif sequence.to_import:
            kind, stop, sequence.to_import = "remote", sequence.to_import, 0
        else:
            kind, start, stop = "stored", sequence.published, self._on_disk(sequence)
        if stop <= start:
            return None
        pages = tuple(sequence.pages[start // PAGE : pages_for(stop)])
        return Transfer(sequence.number, kind, start, stop - start, pages)

    def arrived(self, sequence: Sequence, transfer: Transfer, num_tokens: int, path: Path) -> None:
        """``num_tokens`` of a transfer are in its pages."""
        stop = transfer.start + num_tokens
        if transfer.kind == "offload":
            sequence.prompt_path = min(sequence.prompt_path, stop)
        elif path == "prompt" and sequence.prompt_path >= transfer.start:
            sequence.prompt_path = stop
        if num_tokens:
            sequence.computed = stop - (self._draft_layers if transfer.kind == "stored" else 0)

    def grow(self, sequence: Sequence, stop: int) -> bool:
        """Make positions ``computed`` .. ``stop`` of a running sequence its own to write; False, changing nothing,
        where no page is to be had."""
        more = max(0, pages_for(stop) - len(sequence.pages))
        first = sequence.computed // PAGE
        shared = first < len(sequence.pages) and self._is_shared(sequence.pages[first])
        if not more and not shared:
            return True
        if not self._free(more + shared):
            return False
        if shared:
            self._own(sequence, first)
        sequence.pages += self.pool.allocate(more)
        return True

    def owns_next(self, sequence: Sequence) -> bool:
        """Whether a sequence decodes and its next token needs no copy of a page."""
        first = sequence.computed // PAGE
        return sequence.decoding and not (first < len(sequence.pages) and self._is_shared(sequence.pages[first]))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child begins with the parent's prompt, in the same pages; whoever writes first to the last one copies."""
        child.pages = parent.pages[: pages_for(parent.num_prompt)]
        self.pool.share(child.pages)
        child.computed = child.scored = child.charged = parent.num_prompt
        child.prompt_path = min(parent.prompt_path, child.computed)
        child.published, child.cached_tokens = parent.published, parent.cached_tokens

    def release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []

    def publish(self, sequence: Sequence) -> None:
        """Offer a sequence's full pages to other requests and to the disk."""
        whole = min(sequence.computed, len(sequence.tokens)) // PAGE * PAGE
        of_prompt = min(whole, sequence.prompt_path // PAGE * PAGE)
        if self._deterministic:
            whole = of_prompt
        if whole <= sequence.published:
            return
        namespace = sequence.request.namespace.encode()
        if self.prefix is not None and of_prompt > sequence.published:
            self.prefix.insert(sequence.tokens[:of_prompt], sequence.pages, "prompt", namespace)
        if self.prefix is not None and whole > of_prompt:
            self.prefix.insert(sequence.tokens[:whole], sequence.pages, "decode", namespace)
        sequence.published = whole
        pages = tuple(sequence.pages[: whole // PAGE])
        self.finished.append(
            FinishedPrefix(tuple(sequence.tokens[:whole]), pages, of_prompt, sequence.request.namespace)
        )

    def check(self, sequences: Collection[Sequence]) -> None:
        """Assert that pages and sequences account for each other exactly."""
        self.pool.check([sequence.pages for sequence in sequences])
        for sequence in sequences:
            assert bool(sequence.pages) == sequence.holds_pages, (sequence.number, sequence.status)
            assert sequence.computed <= len(sequence.pages) * PAGE
            assert sequence.status is Status.HELD or sequence.computed < len(sequence.tokens) <= sequence.limit

    def _match(self, sequence: Sequence, total: int) -> Match:
        request = sequence.request
        if self.prefix is None or request.params.whole_prompt or sequence.offloaded or sequence.to_import:
            return NOTHING
        match = self.prefix.match(self._shareable(sequence), request.namespace.encode(), self._paths)
        if self._draft_layers and match.pages and total >= self.pool.num_pages:
            self.pool.release(match.pages)  # no room for the copy of the last one
            return NOTHING
        return match

    def _on_disk(self, sequence: Sequence) -> int:
        if self._stored is None or sequence.request.params.whole_prompt:
            return 0
        known = self._shareable(sequence)
        most = (len(known) - 1) // PAGE * PAGE
        if sequence.published >= most:  # memory has it all: the disk need not be asked
            return 0
        if sequence.stored is None:
            found = self._stored.lookup(known, sequence.request.namespace.encode(), self._paths)
            sequence.stored = min(found, most)
        return sequence.stored

    def _shareable(self, sequence: Sequence) -> list[int]:
        """Tokens whose entries may be another's: where paths matter, those of the prompt."""
        return sequence.tokens[: sequence.num_prompt] if self._deterministic else sequence.tokens

    def _is_shared(self, page: int) -> bool:
        return self.pool.references(page) > 1 or self.pool.kept(page)

    def _own(self, sequence: Sequence, index: int) -> None:
        page, source = self.pool.writable(sequence.pages[index])
        if source is not None:
            self.copies.append((source, page))
        sequence.pages[index] = page

    def _free(self, count: int) -> bool:
        """Whether so many pages are free, if need be after taking idle ones back."""
        short = count - self.pool.free
        if 0 < short <= self.pool.idle and self.prefix is not None:
            self.prefix.evict(short)
        return self.pool.free >= count
