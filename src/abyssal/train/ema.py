"""An exponential moving average of the parameters in host memory, updated beside training [V3 section 3.2.3].

The average is ready right after a step without waiting for it: a thread adds the new parameters while the next step
computes its forward and backward, which only read them; before the parameters change again, :meth:`HostAverage.wait`
makes sure that it is done.  On a GPU the thread also brings the parameters to the host.  The thread's additions are
the same whenever it runs, so the average is a function of the parameters alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class HostAverage:
    """average ← decay · average + (1 − decay) · parameter, of every parameter, in FP32 at least.

    Args:
        parameters: the live tensors, by any name: whole parameters, or this rank's part of their masters.  It is read
            at each addition: masters may become other tensors when experts are placed anew.
        decay: of one step.  V3 does not say its own.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._parameters = parameters
        self.tensors = {name: self._copy(parameter) for name, parameter in self._parameters.items()}
        """By the parameters' names, on the host.  Call :meth:`wait` before reading."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None

    @staticmethod
    def _copy(parameter: Tensor) -> Tensor:
        return parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32), copy=True)

    def start(self) -> None:
        """Begin to add the present parameters.  They must not change until :meth:`wait` returns."""
        self.wait()
        self._pending = self._executor.submit(self._add)

    def wait(self) -> None:
        """Until the addition under way is done."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    @torch.no_grad()
    def _add(self) -> None:
        for name, average in self.tensors.items():
            average.lerp_(self._parameters[name].detach().to("cpu", average.dtype), 1 - self.decay)
