"""The native library is optional: without it one line is logged and PyTorch runs."""

import ctypes
import logging

import pytest
import torch

from abyssal.kernels import native
from abyssal.kernels.grouped_gemv import grouped_gemv


@pytest.fixture
def without_library(monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: no such file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    native.native_library.cache_clear()
    yield
    native.native_library.cache_clear()


def test_without_the_library_one_line_is_logged_and_the_reference_runs(without_library, caplog):
    caplog.set_level(logging.INFO, logger="abyssal.kernels.native")
    x_RI, weight_EOI, slots_R = torch.ones(2, 3), torch.ones(1, 4, 3), torch.zeros(2, dtype=torch.int64)
    for _ in range(2):
        assert grouped_gemv(x_RI, weight_EOI, slots_R).tolist() == [[3.0] * 4] * 2
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert native.isa_name() is None
    with pytest.raises(ValueError, match="was not built"):
        grouped_gemv(x_RI, weight_EOI, slots_R, implementation="native")


def test_a_library_of_another_interface_is_refused(monkeypatch):
    if native.native_library() is None:
        pytest.skip("installed without a C++ compiler")
    native.native_library.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", -1)
    with pytest.raises(RuntimeError, match="pip install"):
        native.native_library()
    native.native_library.cache_clear()
