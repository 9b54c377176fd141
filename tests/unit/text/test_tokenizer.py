"""Tokenizer: lossless, deterministic, deaf to control tokens spelt out in text, and clear about bad files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from abyssal.spec.model import GroupedQueryAttentionSpec, ModelSpec
from abyssal.text import tokenizer as text_tokenizer
from abyssal.text.tokenizer import BOS, CONTROL_TOKENS, EOS, FIM_HOLE, MIN_VOCAB_SIZE, PAD, Tokenizer, train_bpe

TEXTS = [
    "def sum_of(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n",
    "the other day the weather was rather better than the day before; 1234567 birds sang 東京タワー.\n",
]
SPEC = ModelSpec(
    family="llama",
    vocab_size=400,
    hidden_size=8,
    num_layers=1,
    dense_ffn_size=8,
    attention=GroupedQueryAttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4),
    rope_interleaved=False,
)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=330)


text_with_control_tokens = st.lists(st.one_of(st.text(), st.sampled_from(CONTROL_TOKENS))).map("".join)


@settings(max_examples=50, deadline=None)
@given(text=text_with_control_tokens)
def test_any_text_survives_and_forges_no_control_token(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(len(CONTROL_TOKENS) <= token_id < trained.vocab_size for token_id in ids)
    assert trained.token_bytes()[ids].sum() == len(text.encode())
    assert trained.encode_batch([text, ""]) == [ids, []]


def test_control_tokens_come_first_then_bytes_then_merges(trained: Tokenizer) -> None:
    assert [trained.token_id(token) for token in CONTROL_TOKENS] == list(range(6))
    assert (trained.bos_token_id, trained.eos_token_id, trained.pad_token_id) == (0, 1, 2)
    sizes = trained.token_bytes()
    assert sizes.tolist()[:MIN_VOCAB_SIZE] == [0] * 6 + [1] * 256
    assert trained.vocab_size == 330 and (sizes[MIN_VOCAB_SIZE:] >= 2).all()


def test_control_tokens_on_request(trained: Tokenizer) -> None:
    assert trained.encode("the", add_bos=True) == [0, *trained.encode("the")]
    assert trained.encode_batch(["the"], add_bos=True) == [[0, *trained.encode("the")]]
    assert trained.encode(f"a{FIM_HOLE}", parse_control=True) == [*trained.encode("a"), trained.token_id(FIM_HOLE)]
    assert trained.decode([0, *trained.encode("the"), 1]) == f"{BOS}the{EOS}"
    assert trained.decode([0, *trained.encode("the"), 1], skip_control=True) == "the"


def test_half_a_character_decodes_to_the_replacement_character(trained: Tokenizer) -> None:
    ids = trained.encode("é")
    assert len(ids) == 2
    assert trained.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("x=foo.bar(1)", ["x", "=foo", ".bar", "(", "1", ")"]),
        ("two  words\n\n  next", ["two", " ", " words", "\n\n", " ", " next"]),
        ("見たTokyo東京", ["見た", "Tokyo", "東京"]),
        ("don't stop...\n", ["don", "'t", " stop", "...\n"]),
    ],
)
def test_pre_tokenizer_splits_as_deepseek_v3(text: str, pieces: list[str]) -> None:
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in text_tokenizer.SPLIT_PATTERNS]
    assert [piece for piece, _ in pre_tokenizers.Sequence(list(splits)).pre_tokenize_str(text)] == pieces


def test_no_token_crosses_a_split() -> None:
    trained = train_bpe(["ab 12345\n" * 50, "東京abc" * 50], vocab_size=MIN_VOCAB_SIZE + 60)
    vocabulary = {trained.decode([i]) for i in range(MIN_VOCAB_SIZE, trained.vocab_size)}
    assert {"123", "45", " ", "ab", "東京", "abc"} - vocabulary == {" "}
    assert not vocabulary & {"1234", "345", "東京a", "b 1", "b 12", "5\n"}


def test_same_corpus_same_bytes_in_any_order_and_process(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "here")
    train_bpe(reversed(TEXTS), 330).save(tmp_path / "reversed")
    program = (
        "import sys, json; from abyssal.text.tokenizer import train_bpe;"
        "train_bpe(json.loads(sys.argv[1]), 330).save(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", program, json.dumps(TEXTS), str(tmp_path / "process")],
        check=True,
        env={**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        written = {(tmp_path / folder / name).read_bytes() for folder in ("here", "reversed", "process")}
        assert len(written) == 1


def test_save_and_load_round_trip(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert loaded.content_hash() == trained.content_hash()
    assert loaded.encode(TEXTS[0] + BOS, add_bos=True) == trained.encode(TEXTS[0] + BOS, add_bos=True)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    np.testing.assert_array_equal(loaded.token_bytes(), trained.token_bytes())


def test_content_hash_tells_tokenizers_apart(trained: Tokenizer) -> None:
    assert train_bpe(TEXTS, 329).content_hash() != trained.content_hash()


def test_config_fields_survive_and_name_the_tokens(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    config = {"bos_token": {"content": EOS, "lstrip": False}, "eos_token": PAD, "pad_token": None, "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.from_folder(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, None)
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == config
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).bos_token_id == 0


def test_added_tokens_that_are_not_special_stay_text_and_truncation_is_off(trained: Tokenizer, tmp_path: Path) -> None:
    # Published DeepSeek tokenizers add <think> without marking it special, past the vocabulary's other ids.
    trained.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 330, "content": "<think>", "special": False})
    path.write_text(json.dumps(content).replace("330", "340"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: added token '<think>' has id 340, which loads as 330"):
        Tokenizer.from_folder(tmp_path)
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(content))
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.encode("<think> and more") == trained.encode("<think> and more")
    assert loaded.encode("<think> and", parse_control=True) == [330, *trained.encode(" and")]
    assert loaded.vocab_size == 331 and len(loaded.token_bytes()) == 331 and loaded.token_bytes()[330] == 0


def test_failed_save_leaves_nothing(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        trained.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_check_fits_names_both_sizes(trained: Tokenizer) -> None:
    trained.check_fits(dataclasses.replace(SPEC, vocab_size=330))
    trained.check_fits(SPEC)
    with pytest.raises(ValueError, match="330 token ids but the model's vocab_size is 329"):
        trained.check_fits(dataclasses.replace(SPEC, vocab_size=329))


def test_bad_training_input() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 261; .* at least 262"):
        train_bpe(TEXTS, 261)
    with pytest.raises(ValueError, match="no text"):
        train_bpe(["", ""], 300)
    with pytest.raises(ValueError, match=r"lone surrogate, '.ud800', at character 3"):
        train_bpe(["abc\ud800"], 300)


def test_bad_text_and_unknown_token(trained: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        trained.encode("\udfff")
    with pytest.raises(ValueError, match="no token '<nothing>'"):
        trained.token_id("<nothing>")


def test_bad_files_are_named(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable"):
        Tokenizer.from_folder(tmp_path)
    trained.save(tmp_path)
    for content, message in (
        ("{", "tokenizer_config.json: not JSON"),
        ("[]", "holds a list"),
        ('{"bos_token": "<s>"}', "bos_token is '<s>', which tokenizer.json does not have"),
        ('{"bos_token": 3}', "bos_token is 3"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(tmp_path)


def test_token_bytes_refuses_what_is_not_byte_level() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "東": 1}, merges=[]))
    with pytest.raises(ValueError, match=r"token 1 .* not byte-level"):
        Tokenizer(backend).token_bytes()


def test_no_bos_token() -> None:
    nameless = Tokenizer(tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    assert nameless.bos_token_id is None
    with pytest.raises(ValueError, match="names no bos_token"):
        nameless.encode("a", add_bos=True)


def test_text_and_data_do_not_import_torch() -> None:
    program = (
        "import sys, abyssal.data.baselines, abyssal.data.batches, abyssal.text.tokenizer;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_bytes_of_tokens_are_those_that_decode_reads(trained: Tokenizer) -> None:
    """Control tokens stand for their names, or for nothing; ``tests/unit/engine/test_detokenizer.py`` has any ids."""
    byte_strings = trained.byte_strings()
    assert b"".join(byte_strings[token] for token in trained.encode("naïve 東")) == "naïve 東".encode()
    assert byte_strings[trained.token_id(FIM_HOLE)] == FIM_HOLE.encode()
    assert trained.byte_strings(skip_control=True)[trained.token_id(FIM_HOLE)] == b""
    assert len(byte_strings) == trained.vocab_size
    sizes = [len(byte_string) for byte_string in trained.byte_strings(skip_control=True)]
    assert sizes == trained.token_bytes().tolist()
    assert tokenizers.Tokenizer.from_str(trained.to_json()).to_str() == trained.to_json()


def test_bytes_need_a_byte_level_tokenizer() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="use a byte-level BPE"):
        Tokenizer(words).byte_strings()


def _pieces(metaspace: bool) -> Tokenizer:
    """Sentencepiece's kind, as Llama's tokenizer.json spells it: a mark for spaces, and bytes for what has no piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc1{}\n", "▁a", "ab", "▁ab"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = decoders.Metaspace(prepend_scheme="first") if metaspace else decoders.Replace("▁", " ")
    rest = [decoders.ByteFallback(), decoders.Fuse()]
    rest += [] if metaspace else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([spaces, *rest])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("text", ["ab c", "a 中文 é🙂 <0x41> \n\tb", "  two ", "</s> as text"])
def test_pieces_with_byte_fallback_have_their_bytes(text: str, metaspace: bool) -> None:
    tokenizer = _pieces(metaspace)
    byte_strings = tokenizer.byte_strings()
    ids = tokenizer.encode(text)
    assert b"".join(byte_strings[token] for token in ids) == b" " + text.encode()
    assert tokenizer.decode(ids) == text
    assert byte_strings[:4] == (b"<unk>", b"<s>", b"</s>", b"\x00")
    assert tokenizer.byte_strings(skip_control=True)[:4] == (b"", b"", b"", b"\x00")
