"""Text to token ids and back: byte-level BPE in the ``tokenizer.json`` format, and training one.

DeepSeek's models use byte-level BPE (V3 report section 4.1: 128K tokens, a pre-tokenizer that keeps punctuation with
the letters after it).  The ``tokenizers`` library runs and trains it; this module adds what a language model needs:

- **Text stays text.**  A document that happens to contain ``<｜end▁of▁sentence｜>`` is encoded as those characters.
  Control tokens are added by id, so nothing that a user or a corpus says can forge one.  (``tokenizers`` and
  transformers do the reverse unless told otherwise.)
- **Lossless**: ``decode(encode(text)) == text`` for every string, since every byte is a token and text is not
  normalised (a ``tokenizer.json`` from elsewhere with a normalizer of its own keeps it, and loses what that loses).
- **Bytes of a token**, so that losses over different vocabularies compare as bits per byte.

Not here: chat templates and tool calls; they render to text around control tokens (``parse_control=True``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from abyssal.spec.model import ModelSpec

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"
CONTROL_TOKENS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)
"""Ids 0..5 of a tokenizer trained here, with DeepSeek-V3's names; the first three have V3's ids too."""

SPLIT_PATTERNS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+".replace(r"\"", '"')
    + "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
"""DeepSeek-V3's pre-tokenizer, applied in this order: up to three digits; runs of Chinese and Japanese; then one
punctuation mark with the letters after it, words with their leading space, punctuation, line ends, spaces."""

_PRINTED_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER_BYTES = (byte for byte in range(256) if byte not in _PRINTED_BYTES)
_BYTE_OF_CHARACTER = {
    **{chr(byte): byte for byte in _PRINTED_BYTES},
    **{chr(256 + number): byte for number, byte in enumerate(_OTHER_BYTES)},
}
"""GPT-2's alphabet, in which byte-level BPE names its tokens."""

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")

MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS)


class Tokenizer:
    """A byte-level BPE tokenizer with its control tokens.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id: ids, or None where the tokenizer names no such token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        """``config``: the content of ``tokenizer_config.json``; None takes DeepSeek's names where they exist."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain = _without_control_tokens(backend)
        self._config = dict(config) if config is not None else _default_config(backend)
        self.bos_token_id = self._configured_id("bos_token")
        self.eos_token_id = self._configured_id("eos_token")
        self.pad_token_id = self._configured_id("pad_token")
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, and ``tokenizer_config.json`` where there is one.

        Raises:
            ValueError: no ``tokenizer.json`` in the folder, or a file that is not what its name says.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a model folder needs its tokenizer.json")
        try:
            content = path.read_text(encoding="utf-8")
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a readable tokenizer.json ({error}); copy it again") from error
        _check_added_ids(path, content, backend)
        return cls(backend, _read_config(Path(folder) / "tokenizer_config.json"))

    def encode(self, text: str, add_bos: bool = False, parse_control: bool = False) -> list[int]:
        """Token ids of ``text``.

        ``parse_control`` turns the names of control tokens inside the text into those tokens.  Only for text that this
        program composed (a rendered chat template), never for what a user or a document said.
        """
        backend = self._backend if parse_control else self._plain
        ids: list[int] = backend.encode(_valid(text), add_special_tokens=False).ids
        return [self._required_bos(), *ids] if add_bos else ids

    def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
        """:meth:`encode` of each text, on all cores."""
        encodings = self._plain.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)
        prefix = [self._required_bos()] if add_bos else []
        return [prefix + encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Text of the ids; ``skip_control`` leaves out tokens marked special.

        Bytes that are not UTF-8 (a sequence cut inside a character) become U+FFFD; ids past the vocabulary, which a
        model with a padded vocabulary can sample, stand for nothing.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_control)

    def token_id(self, token: str) -> int:
        """Id of a token by its name, such as :data:`FIM_HOLE`.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return token_id

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for: int64 of shape [vocab_size]; 0 for control tokens and unused ids.

        The bytes of ``encode(text)`` add up to ``len(text.encode())``, so a loss in nats summed over predicted tokens
        becomes bits per byte by division: see :func:`abyssal.data.batches.bits_per_byte`.

        Raises:
            ValueError: the tokenizer is not byte-level.
        """
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        control = self._backend.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self._backend.get_vocab(with_added_tokens=False).items():
            if token_id in control:
                continue
            if not alphabet.issuperset(token):
                raise ValueError(f"token {token_id} ({token!r}) is not byte-level; use a byte-level BPE tokenizer.json")
            sizes[token_id] = len(token)
        return sizes

    def byte_strings(self, skip_control: bool = False) -> tuple[bytes, ...]:
        """The bytes of each token, so that ``decode(ids)`` is the bytes of the ids in a row, read as UTF-8 with U+FFFD
        for what is not.  ``skip_control`` empties tokens marked special.

        Of byte-level BPE, and of sentencepiece's pieces with byte fallback (Llama's).  The decoder of the latter drops
        a space at the beginning of a text, which is kept here since what a model writes goes on after a prompt; and of
        bytes that are not UTF-8 it replaces their whole run.

        Raises:
            ValueError: a tokenizer of another kind.
        """
        bytes_of = _bytes_of if isinstance(self._backend.decoder, decoders.ByteLevel) else self._bytes_of_piece()
        names = {number: token for token, number in self._backend.get_vocab(with_added_tokens=True).items()}
        special = {number for number, token in self._backend.get_added_tokens_decoder().items() if token.special}
        skipped = special if skip_control else set()
        return tuple(b"" if number in skipped else bytes_of(names.get(number, "")) for number in range(self.vocab_size))

    def _bytes_of_piece(self) -> Callable[[str], bytes]:
        """For sentencepiece's pieces: a mark stands for a space, and ``<0x0A>`` for a byte."""
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        parts = {part["type"]: part for part in decoder.get("decoders", [decoder]) if part}
        known = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
        replaced = parts.get("Replace", {"pattern": {}, "content": " "})
        space = parts.get("Metaspace", {}).get("replacement") or replaced["pattern"].get("String")
        if "ByteFallback" not in parts or not parts.keys() <= known or not space or replaced["content"] != " ":
            raise ValueError(
                f"its decoder is {self._backend.decoder}; use a byte-level BPE tokenizer.json or one with byte fallback"
            )
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}

        def bytes_of(piece: str) -> bytes:
            if piece in added:
                return piece.encode()
            byte = _BYTE_PIECE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(space, " ").encode()

        return bytes_of

    def to_json(self) -> str:
        """The content of ``tokenizer.json``."""
        return self._backend.to_str()

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Names that ``encode(..., parse_control=True)`` turns into tokens, by id."""
        added = self._backend.get_added_tokens_decoder()
        return tuple(added[token_id].content for token_id in sorted(added))

    def with_control_tokens(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer and those of the names that it lacks as control tokens, numbered from the end of the
        vocabulary.  As in DeepSeek's tokenizers, they are not marked special, so that a model's text shows them to
        whoever looks for calls in it.

        Raises:
            ValueError: the vocabulary has gaps in its numbers, so that new ids would not follow its last.
        """
        known = set(self.control_tokens)
        missing = [name for name in dict.fromkeys(names) if name not in known]
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_tokens([tokenizers.AddedToken(name, normalized=False, special=False) for name in missing])
        for expected, name in enumerate(missing, self.vocab_size):
            if backend.token_to_id(name) != expected:
                raise ValueError(
                    f"control token {name!r} would get id {backend.token_to_id(name)}, not {expected}, which follows "
                    "the vocabulary; add it to tokenizer.json by hand"
                )
        return Tokenizer(backend, self._config)

    def showing(self, names: Collection[str]) -> Tokenizer:
        """This tokenizer with those of its control tokens not marked special, so that text shows them."""
        content = json.loads(self._backend.to_str())
        hidden = [token for token in content["added_tokens"] if token["special"] and token["content"] in names]
        if not hidden:
            return self
        for token in hidden:
            token["special"] = False
        return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), self._config)

    def with_chat_template(self, template: str | Sequence[Mapping[str, str]]) -> Tokenizer:
        """This tokenizer with another ``chat_template`` in its ``tokenizer_config.json``: text, or named ones."""
        return Tokenizer(self._backend, {**self._config, "chat_template": template})

    def check_fits(self, spec: ModelSpec) -> None:
        """Refuse a tokenizer that could produce ids which the model has no embedding for.

        Raises:
            ValueError: the vocabulary is larger than the model's, with both sizes.
        """
        if self.vocab_size > spec.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} token ids but the model's vocab_size is {spec.vocab_size}; "
                f"use the model's own tokenizer, or a vocab_size of at least {self.vocab_size}"
            )

    def content_hash(self) -> str:
        """Hex digest that changes whenever any text could encode differently."""
        state = f"{self._backend.to_str()}\n{self.bos_token_id} {self.eos_token_id}"
        return hashlib.sha256(state.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers' ``AutoTokenizer`` loads.

        The same tokenizer gives the same bytes.  Each file appears whole or not at all.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        config = json.dumps(self._config, indent=2, ensure_ascii=False, sort_keys=True)
        _write_whole(folder / "tokenizer_config.json", config + "\n")

    def _configured_id(self, field: str) -> int | None:
        value = self._config.get(field)
        token = value.get("content") if isinstance(value, Mapping) else value
        if token is None:
            return None
        token_id = self._backend.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise ValueError(
                f"tokenizer_config.json: {field} is {token!r}, which tokenizer.json does not have; "
                "take both files from the same model"
            )
        return token_id

    def _required_bos(self) -> int:
        if self.bos_token_id is None:
            raise ValueError("the tokenizer names no bos_token; set it in tokenizer_config.json")
        return self.bos_token_id


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with DeepSeek-V3's pre-tokenizer on all of ``texts``.

    Ids: :data:`CONTROL_TOKENS`, the 256 bytes, then merges, most frequent first.  The same texts, in any order, give
    the same tokenizer.  A small corpus may run out of pairs and give fewer than ``vocab_size`` tokens.  Time grows
    linearly (about 0.15 s a megabyte on two cores), so hand in a sample of a corpus of gigabytes:
    :mod:`abyssal.data.survey`.

    Raises:
        ValueError: ``vocab_size`` below the bytes and control tokens, or no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; byte-level BPE needs at least {MIN_VOCAB_SIZE} "
            f"(256 bytes and {len(CONTROL_TOKENS)} control tokens)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in SPLIT_PATTERNS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield _valid(text)

    backend.train_from_iterator(counted(), trainer)
    if seen == 0:
        raise ValueError("no text to train a tokenizer on; the corpus is empty")
    return Tokenizer(backend)


def _bytes_of(token: str) -> bytes:
    """Of a token's name: each byte is written as one character; a name with any other character stands for itself."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _without_control_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same model and pre-tokenizer (shared, not copied), knowing no control token by its name."""
    plain = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _check_added_ids(path: Path, content: str, backend: tokenizers.Tokenizer) -> None:
    """The library renumbers added tokens whose ids leave a gap, without a word."""
    for added in json.loads(content).get("added_tokens") or ():
        token_id = backend.token_to_id(added["content"])
        if token_id != added["id"]:
            raise ValueError(
                f"{path}: added token {added['content']!r} has id {added['id']}, which loads as {token_id}; "
                "number added tokens from the end of the vocabulary without gaps"
            )


def _default_config(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """A ``tokenizer_config.json`` that names those of DeepSeek's tokens that the vocabulary has."""
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{field: token if backend.token_to_id(token) is not None else None for field, token in named.items()},
    }


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, expected a JSON object")
    return config


def _valid(text: str) -> str:
    """Python strings may hold half a surrogate pair, which no encoding of text can express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate, {text[error.start]!r}, at character {error.start}; repair the text"
        ) from error
    return text


def _write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
