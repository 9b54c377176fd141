"""A tokenizer saved here is the same tokenizer in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from abyssal.text.tokenizer import BOS, EOS, FIM_BEGIN, Tokenizer, train_bpe

TEXTS = [
    Path(json.__file__).read_text(encoding="utf-8"),
    "Straße, 東京タワー, naïve — 1234567 ½ ² ٣\r\n\r\n\tdon't  stop…  🙂\u200d\u0301 \x00 \u3000x",
    "",
    "  leading and trailing  \n",
]


@pytest.fixture(scope="module", params=["bare folder", "beside config.json"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 1000).save(folder)
    if request.param == "beside config.json":  # its model_type makes AutoTokenizer choose a class by the model
        (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "vocab_size": 1000}))
    return folder


def test_same_ids_and_text(folder: Path) -> None:
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_same_control_tokens(folder: Path) -> None:
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == ours.vocab_size
    text = f"{BOS}def{FIM_BEGIN} x{EOS}"
    assert theirs(text)["input_ids"] == ours.encode(text, parse_control=True)
    ids = ours.encode(text, parse_control=True)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_control=True) == "def x"


def test_text_that_spells_a_control_token(folder: Path) -> None:
    ours = Tokenizer.from_folder(folder)
    theirs = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert theirs(f"a{EOS}b")["input_ids"] == ours.encode(f"a{EOS}b")
