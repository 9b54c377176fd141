"""The native part of the build: ``csrc/*.cpp`` becomes ``abyssal/kernels/_native.so``, when a C++ compiler is there.

All else is in ``pyproject.toml``.  The library has a plain C interface and is loaded by ctypes, so it needs neither
torch nor Python headers and one build serves every Python version.  It is optional: without a compiler the
installation succeeds and every operator runs its PyTorch implementation.  No ``-march`` flags: a built wheel may
travel, so the sources choose their instruction set when they run.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.cpp"))
# No contraction: the elementwise loops give the same bits on every instruction set.  The other two change no result,
# but without them compilers leave loops with a comparison or a square root as they are.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-fvisibility=hidden", "-g0"]
if sys.platform == "win32":
    FLAGS = ["/O2", "/std:c++17", "/EHsc"]


class BuildPlainLibrary(build_ext):
    """Build a shared library that is not a Python module: no ABI tag in its name, no ``PyInit`` export."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext) -> list[str]:
        return list(ext.export_symbols)


setup(
    ext_modules=[
        Extension(
            "abyssal.kernels._native",
            sources=SOURCES,
            depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.h")),
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildPlainLibrary},
)
