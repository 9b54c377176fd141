"""Prefill on one engine, decode on another: what crosses between them.

A request that ends after its prompt (``prefill_only``) leaves its pages, its first token and its drafts behind.  They
cross as two things: a :class:`Prefilled` record, small, and the pages' contents layer by layer (:class:`LayerPages`),
so that a layer can be on its way while the next is read.  With both, the other engine goes on as if it had prefilled
itself: tokens, log-probabilities and accepted drafts are the same, bit for bit.

    exported = prefill.export_pages(request_id)
    decode.import_pages(exported.prefilled, exported.layers())
    prefill.release_pages(request_id)               once the layers have been taken

Everything here is numbers, texts, bytes and small records, for whatever serialiser carries them; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.cache.paged import PagedCache
from abyssal.engine.messages import Path, Request, TokenLogprobs


@dataclass(frozen=True)
class TensorBytes:
    """A tensor as bytes, in this machine's order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(tensor: Tensor) -> TensorBytes:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return TensorBytes(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)

    def tensor(self) -> Tensor:
        """A copy of its own.

        Raises:
            ValueError: the bytes are not those of such a tensor.
        """
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: {self.dtype!r} is none of torch's")
        try:
            flat = torch.frombuffer(bytearray(self.data), dtype=dtype) if self.data else torch.empty(0, dtype=dtype)
            return flat.view(self.shape)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"data: {len(self.data)} bytes are no {self.dtype} tensor of {self.shape}") from error


@dataclass(frozen=True)
class LayerPages:
    """What a request's pages hold in one layer, those of the MTP modules after the last."""

    layer: int
    entries: TensorBytes
    """(pages, 64, X); behind the last token the last page holds anything."""


@dataclass(frozen=True)
class DraftState:
    """Where drafting stood after the prompt."""

    drafts: tuple[int, ...]
    """To be verified in the next step."""
    stop: int
    """Position after the last hidden state."""
    hidden_TD: TensorBytes | None
    """Of the main model, at the last positions before ``stop``, whose MTP entries were made with drafts."""


@dataclass(frozen=True)
class Prefilled:
    """A request after its prompt, but for the contents of its pages."""

    request: Request
    """With its first token in ``output_ids`` and ``imported_tokens`` set, as it is to go on."""
    layout: str
    """Of the pages (:attr:`~abyssal.cache.paged.PagedCache.layout`)."""
    num_layers: int
    weights: str
    """Of the model (:func:`~abyssal.engine.weights.weights_fingerprint`)."""
    seed: int
    """Of the request's random numbers."""
    path: Path
    """By which the pages were computed: "decode" if any was."""
    cached_tokens: int
    """Prompt tokens that came from a cache there."""
    seconds_left: float | None
    """Until the request's deadline, when it was exported: clocks of two machines are not alike."""
    draft: DraftState | None
    logprobs: tuple[TokenLogprobs, ...]
    """Of the first token, where asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    versions: tuple[tuple[int, int], ...]
    """Of the weights that sampled it (:attr:`~abyssal.engine.messages.CompletionOutput.versions`)."""
    experts: tuple[TensorBytes | None, ...]
    """By position, (layers, K), where asked for."""


@dataclass(frozen=True)
class Exported:
    """A prefilled request and its pages, which stay until they are released."""

    prefilled: Prefilled
    pages: tuple[int, ...]
    cache: PagedCache
    held: Callable[[], bool]
    """Whether the pages are still the request's."""

    def layers(self) -> Iterator[LayerPages]:
        """The pages' contents, a layer at a time, read as they are asked for.

        Raises:
            ValueError: they were released meanwhile, or the engine has other weights now; the layers read before are
                right.
        """
        for layer in range(self.prefilled.num_layers):
            entries = TensorBytes.of(self.cache.export_layer(self.pages, layer)) if self.held() else None
            if entries is None or not self.held():  # another thread may have let go of them while they were read
                raise ValueError(
                    f"pages: those of request {self.prefilled.request.request_id} are gone, with layer {layer} and "
                    "later ones unread; take the layers before release_pages(), update_weights() and sleep()"
                )
            yield LayerPages(layer, entries)


@dataclass(frozen=True)
class IncomingLayers:
    """Layers of another engine on their way into this one's pages: a
    :class:`~abyssal.engine.moving.RemoteSource`."""

    layers: Iterable[LayerPages]
    num_layers: int
    path: Path

    def fill(self, write: Callable[[int, Tensor], None]) -> Path:
        """Write each layer as it arrives.

        Raises:
            ValueError: a layer is missing, comes twice, or is of another shape.
        """
        missing = set(range(self.num_layers))
        for each in self.layers:
            if each.layer not in missing:
                raise ValueError(f"layer {each.layer} comes twice, or is none of {self.num_layers}")
            write(each.layer, each.entries.tensor())
            missing.remove(each.layer)
        if missing:
            raise ValueError(f"layers {sorted(missing)[:8]} did not come")
        return self.path
