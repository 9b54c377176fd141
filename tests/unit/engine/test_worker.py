"""What the engine's process is told on its command line."""

from __future__ import annotations

import json

import pytest
import torch

from abyssal.engine.config import EngineConfig
from abyssal.engine.worker import read_options


def test_options() -> None:
    config, dtype = read_options('{"num_drafts": "auto", "cache_tokens": 640, "dtype": "bfloat16"}')
    assert (config, dtype) == (EngineConfig(num_drafts="auto", cache_tokens=640), torch.bfloat16)
    assert read_options("{}") == (EngineConfig(), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": "many"}, "token_budget"),
        ({"num_drafts": "some"}, "num_drafts"),
        ({"page_dtype": "int4"}, "page_dtype"),
        ({"cache_tokens": 0}, "cache_tokens: 0"),
        ({"budget": 3}, "'budget' is unknown; there are dtype, cache_tokens, token_budget"),
        ({"dtype": "int8"}, "dtype 'int8' must be float32 or bfloat16"),
        ([], "array"),
    ],
)
def test_options_that_cannot_be(options: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(json.dumps(options))
