"""Which of the storages that operations made inside a block are still alive, whether Python holds them or autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """A context manager.

    Args:
        others: tensors from before, whose storages operations may hand through.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._seen: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._others:
                storage = value.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), str(function)
        return result

    def alive(self) -> list[tuple[int, str]]:
        """Bytes of each, and the operation that made it."""
        return [(size, name) for reference, size, name in self._seen.values() if not reference.expired()]

    def num_bytes(self) -> int:
        return sum(size for size, _ in self.alive())
