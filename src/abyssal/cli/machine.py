"""What a machine has, as far as it decides how fast a model runs on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from abyssal.kernels.matmul import multiplies_bf16
from abyssal.kernels.native import isa_name, native_library
from abyssal.train.peak import matmul_peak

_UNBUILT = "not there: `pip install -e .` builds it where there is a C++ compiler"


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """One machine, and this process's share of it."""

    processor: str
    architecture: str
    cores: int
    """That this process may run on."""
    memory_bytes: int | None
    """Of the machine, or what a container is allowed of it."""
    system: str
    python: str
    torch: str
    torch_instructions: str
    """The instruction set that torch's own CPU kernels use."""
    threads: int
    """Of torch."""
    native_instructions: str | None
    """The instruction set that the native kernels use; None without them."""
    native_problem: str | None
    """Why there are none."""
    bf16_products: bool
    """Whether BF16 products are faster than FP32's; if not, they are computed in FP32."""
    flops_float32: float
    """Measured, of matrix products in FP32."""
    flops_bfloat16: float
    """Of operands in BF16."""
    gpus: tuple[Gpu, ...]


def this_machine() -> Machine:
    """Look and measure; about a second."""
    native, problem = _native()
    return Machine(
        processor=_processor(),
        architecture=platform.machine(),
        cores=_cores(),
        memory_bytes=_memory(),
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        torch_instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        native_instructions=native,
        native_problem=problem,
        bf16_products=multiplies_bf16(),
        flops_float32=matmul_peak(torch.float32, seconds=0.2),
        flops_bfloat16=matmul_peak(torch.bfloat16, seconds=0.2),
        gpus=_gpus(),
    )


def _native() -> tuple[str | None, str | None]:
    """The native kernels' instruction set, or why there are none."""
    try:
        return (isa_name(), None) if native_library() is not None else (None, _UNBUILT)
    except (RuntimeError, AttributeError) as error:  # of another version than these Python files
        return None, str(error)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
    return min(found, default=None)


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(Gpu(device.name, device.total_memory, f"{device.major}.{device.minor}") for device in devices)
