"""The native library is optional: without it one line is logged and PyTorch runs."""

import ctypes
import logging

import pytest
import torch

from abyssal.kernels import latent_attention, native, rms_norm, swiglu
from abyssal.kernels.gemm import gemm


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
    for _ in range(2):
        assert gemm(torch.ones(2, 3), torch.ones(1, 4, 3), [2]).tolist() == [[3.0] * 4] * 2
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert native.isa_name() is None


def test_without_the_library_every_operator_still_runs(without_library):
    x_TD, weights_T = torch.linspace(-2, 2, 12).view(3, 4), torch.ones(3)
    assert rms_norm.native(x_TD, torch.ones(4), 1e-6) is None and swiglu.native(x_TD, weights_T) is None
    torch.testing.assert_close(
        rms_norm.rms_norm(x_TD, torch.ones(4), 1e-6), rms_norm.rms_norm_reference(x_TD, torch.ones(4), 1e-6)
    )
    torch.testing.assert_close(swiglu.swiglu(x_TD, weights_T), swiglu.swiglu_reference(x_TD, weights_T))
    assert latent_attention.native(x_TD[None, None, :1], x_TD[None], 2, 1.0) is None
    assert latent_attention.latent_attention(x_TD[None, None, :1], x_TD[None], 2, 2, 1.0).shape == (1, 1, 1, 2)


def test_a_library_of_another_interface_is_refused(monkeypatch):
    if native.native_library() is None:
        pytest.skip("installed without a C++ compiler")
    native.native_library.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", -1)
    with pytest.raises(RuntimeError, match="pip install"):
        native.native_library()
    native.native_library.cache_clear()
