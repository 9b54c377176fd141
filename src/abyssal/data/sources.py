"""Where text comes from: plain text files, JSON lines, folders of them, and Python's own standard library.

Everything becomes a :class:`Document`, the unit of the held-out split and of packing.  Nothing is skipped in silence:
a named file that cannot be read as text is an error that says which file, and which line.

The default corpus is the standard library's source because it is on every machine that can run this package (12 MB,
no download, no licence question).  Documents are held in memory by the callers; a corpus of many gigabytes is better
tokenised ahead of time, which is another tool's work.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

PIECE_CHARACTERS = 32_768
"""A plain text file longer than this is cut into documents of at most this many characters, at blank lines where it
has them: a book is many documents, some of which can be held out."""

_COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SNIFFED_BYTES = 8192
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    text: str
    id: str
    """``path``, ``path#piece`` of a long text file, or ``path:line`` of JSON lines."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def digest(self) -> bytes:
        """16 bytes that depend on the text alone."""
        return blake2b(self.text.encode(), digest_size=16).digest()


def read_sources(paths: str | Path | Iterable[str | Path]) -> Iterator[Document]:
    """Documents of the files and folders, in the order given; a folder's files sorted by path.

    ``.jsonl``: one document a line, its field ``text``.  Any other file is UTF-8 text (a ``.py`` file: what its coding
    line says), cut into pieces when long.  ``.gz``, ``.bz2`` and ``.xz`` around either.  In folders, hidden entries and
    ``__pycache__`` are passed over, and files with NUL bytes (binary) too, with a warning that counts them.  Texts that
    are empty or only white space are passed over.

    Raises:
        ValueError: a path that does not exist, a file that is not text, a JSON line without ``text``, with file and
            line; in a folder, one that cannot be listed and a link to a folder, which is not followed.
    """
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        if path.is_dir():
            yield from _read_folder(path)
        elif path.exists():
            yield from _read_file(path)
        else:
            raise ValueError(f"{path}: no such file or folder")


def standard_library(folder: str | Path | None = None) -> Iterator[Document]:
    """The source of the running Python's standard library without its tests, one file a document, sorted by path.

    ``folder``: another library's folder, for tests.  Ids are paths inside it.  Files that Python's own rules cannot
    decode (deliberately broken samples) are left out.

    Raises:
        ValueError: this Python has no source files on disk (a frozen or stripped installation).
    """
    root = Path(folder if folder is not None else sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(_walk(root, _SKIPPED_FOLDERS), key=lambda path: path.relative_to(root).as_posix()):
        # _sysconfigdata records where this interpreter was compiled: different on every machine.
        if path.suffix != ".py" or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = _decode(path, path.read_bytes())
        except ValueError:
            continue
        if text.strip():
            found = True
            yield Document(text, path.relative_to(root).as_posix())
    if not found:
        raise ValueError(
            f"{root}: this Python's standard library has no source here; give text of your own with --data"
        )


def _read_folder(folder: Path) -> Iterator[Document]:
    binary = []
    for path in sorted(_walk(folder, frozenset({"__pycache__"})), key=Path.as_posix):
        if not path.is_file():
            raise ValueError(f"{path}: a link to a folder or to nothing, or a pipe; name its target, or remove it")
        if _is_binary(path):
            binary.append(path)
        else:
            yield from _read_file(path)
    if binary:
        logging.getLogger(__name__).warning("%s: left out %d binary files (%s, ...)", folder, len(binary), binary[0])


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    """Everything below but folders that are really there; a link to a folder is not followed but given."""
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in [*names, *links] if not name.startswith("."))


def _refuse(error: OSError) -> None:
    """``os.walk`` would pass over a folder that it cannot list."""
    raise ValueError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _read_file(path: Path) -> Iterator[Document]:
    if _content_suffix(path) == ".jsonl":
        yield from _read_json_lines(path)
        return
    try:
        with _open(path) as file:
            text = _decode(path, file.read())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    pieces = cut_at_blank_lines(text, PIECE_CHARACTERS)
    for number, piece in enumerate(pieces):
        if piece.strip():
            yield Document(piece, str(path) if len(pieces) == 1 else f"{path}#{number}")


def _read_json_lines(path: Path) -> Iterator[Document]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text = _text_of_line(line, f"{path}:{number}")
                    if text.strip():
                        yield Document(text, f"{path}:{number}")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read ({error})") from error


def _text_of_line(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{where}: not a JSON object ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a JSON object (nested too deeply)") from error
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError(f'{where}: no field "text"; each line must be an object like {{"text": "..."}}')
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f'{where}: field "text" is {type(text).__name__}, expected a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}: field "text" holds half a surrogate pair at character {error.start}') from error
    return text


def cut_at_blank_lines(text: str, limit: int) -> list[str]:
    """Consecutive pieces of at most ``limit`` characters whose concatenation is ``text``.

    A piece ends after a blank line in its second half where there is one, else after a line, else at the limit.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        middle, end = start + limit // 2, start + limit
        for mark in ("\n\n", "\n"):
            found = text.rfind(mark, middle, end)
            if found >= 0:
                end = found + len(mark)
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _decode(path: Path, data: bytes) -> str:
    """Text of a file's bytes, line ends untouched, without a byte order mark."""
    try:
        encoding = "utf-8-sig"
        if _content_suffix(path) == ".py":
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert it, or leave it out") from error


def _content_suffix(path: Path) -> str:
    """The suffix that says what is inside: ``.jsonl`` of ``a.jsonl.gz``."""
    return (Path(path.stem) if path.suffix in _COMPRESSED else path).suffix


def _open(path: Path) -> IO[bytes]:
    return _COMPRESSED.get(path.suffix, open)(path, "rb")  # type: ignore[return-value]


def _is_binary(path: Path) -> bool:
    try:
        with _open(path) as file:
            return b"\0" in file.read(_SNIFFED_BYTES)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
