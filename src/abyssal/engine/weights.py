"""New values for a model's weights, from a trainer that holds its own copy.

A trainer in the engine's process changes the parameters themselves and nothing is copied.  One elsewhere sends tensors
by name.  All of them are checked before the first is written, so an update happens whole or not at all: a model with
half of its weights replaced writes fluent nonsense, and nothing would say why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from abyssal.model.transformer import Transformer


@torch.no_grad()
def copy_weights(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into the parameters and buffers of ``model``, which stay where they are.

    Args:
        state: by the names of ``model.state_dict()``, every one of them.  The MTP modules may be left out together:
            then they stay as they are, and their drafts are accepted less often.

    Raises:
        ValueError: names, shapes or dtypes that do not fit.  Nothing is written then.
    """
    own = model.state_dict()
    _check_names(own.keys(), state.keys())
    for name, tensor in state.items():
        _check_tensor(name, tensor, own[name])
    for name, tensor in state.items():
        own[name].copy_(tensor)


_SAMPLES = 64


@torch.no_grad()
def weights_fingerprint(model: Transformer) -> str:
    """Names the weights: a digest of names, dtypes, shapes and some values of each tensor, evenly spread.

    Two engines that hand pages to each other have to compute alike.  A step of training moves nearly every value, so
    that a few of each tensor tell two versions apart, in a millisecond a hundred tensors; digests of whole files, which
    the disk cache is keyed by, are not there in time, and know nothing of weights changed in place.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        flat = tensor.flatten()
        values = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _check_names(own: Collection[str], given: Collection[str]) -> None:
    if unknown := sorted(set(given) - set(own)):
        raise ValueError(f"state: the model has no {', '.join(unknown[:4])}; use the names of model.state_dict()")
    missing = set(own) - set(given)
    if all(not name.startswith("mtp.") for name in given):
        missing = {name for name in missing if not name.startswith("mtp.")}
    if missing:
        raise ValueError(
            f"state: lacks {', '.join(sorted(missing)[:4])} ({len(missing)} in all); give every tensor, so that no old "
            "one stays among new ones"
        )


def _check_tensor(name: str, tensor: Tensor, own: Tensor) -> None:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if not plain:
        raise ValueError(f"state: {name} is no plain tensor with values of its own; gather it first (full_tensor())")
    if tensor.shape != own.shape:
        raise ValueError(f"state: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(own.shape)}")
    if tensor.dtype != own.dtype:
        raise ValueError(
            f"state: {name} is {tensor.dtype}, the model's is {own.dtype}; cast it, so that you choose how"
        )
