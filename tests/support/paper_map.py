"""Reads ``docs/paper.md`` and holds it to the tree.

The notation, in the document: every table has the header ``| Paper | What | Files |``.  A Paper cell is ``[V3] §2.1.1``
or ``[V3] §2.1.1, eq. 1–11`` (also ``eq. 12``; the section may be left out); the sources are defined in the document by
lines such as ``- **[V3]** DeepSeek-V3 Technical Report``.  A Files cell lists paths in backticks, from the root of the
repository, separated by commas.

In a file: ``[V3 eq. 12]``, ``[V3 eq. 12–16]`` or ``[V3 eq. 14, 16; section 2.1.2]``.  A row's equations must each be
covered so, by each file of the row.  Every path in backticks anywhere in the document must exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HEADER = ["Paper", "What", "Files"]
_SOURCE = re.compile(r"^- \*\*\[(?P<label>\w+)\]\*\*", re.MULTILINE)
_PAPER = re.compile(
    r"\[(?P<source>\w+)\](?: §(?P<section>[\d.]+))?(?:(?(section),) eq\. (?P<first>\d+)(?:–(?P<last>\d+))?)?"
)
_FILES = re.compile(r"`[^`\s]+`(?:, `[^`\s]+`)*")
_PATH = re.compile(r"`([\w.\-]+(?:/[\w.\-]+)+/?|[\w.\-]+\.(?:md|py|cpp|toml|txt))`")
_NUMBERS = r"\d+(?:–\d+)?"
_CITATION = re.compile(rf"\[(?P<source>\w+) eq\. (?P<numbers>{_NUMBERS}(?:, {_NUMBERS})*)(?:; [^\]\n]*)?\]")


@dataclass(frozen=True)
class Row:
    """One line of a table of the document."""

    line: int
    source: str
    equations: tuple[int, ...]
    files: tuple[str, ...]


def problems(document: str, root: Path) -> list[str]:
    """Everything in which the document does not hold, one line each; empty if it holds."""
    found: list[str] = []
    for path in sorted(set(_PATH.findall(document))):
        if not (root / path).exists():
            found.append(f"`{path}` does not exist")
    rows, malformed = parse(document)
    found += malformed
    for row in rows:
        for file in row.files:
            if not (root / file).is_file():
                found.append(f"line {row.line}: {file} is not a file")
                continue
            missing = sorted(set(row.equations) - cited((root / file).read_text(encoding="utf-8"), row.source))
            if missing:
                found.append(f"line {row.line}: {file} does not cite [{row.source} eq. {', '.join(map(str, missing))}]")
    return found


def parse(document: str) -> tuple[list[Row], list[str]]:
    """The rows of every table, and what is malformed."""
    sources = set(_SOURCE.findall(document))
    rows: list[Row] = []
    malformed: list[str] = []
    table_line = 0  # lines into the present table; 0 outside
    for number, line in enumerate(document.splitlines(), start=1):
        if not line.startswith("|"):
            table_line = 0
            continue
        table_line += 1
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if table_line == 1 and cells != HEADER:
            malformed.append(f"line {number}: a table's header must be {HEADER}, not {cells}")
        if table_line > 2:
            row, problem = _parse_row(number, cells, sources)
            rows += [row] if row else []
            malformed += [problem] if problem else []
    if not rows and not malformed:
        malformed.append("no table rows were found")
    return rows, malformed


def cited(text: str, source: str) -> set[int]:
    """Numbers of the equations of ``source`` that a file's text cites."""
    numbers: set[int] = set()
    for match in _CITATION.finditer(text):
        if match["source"] == source:
            for item in match["numbers"].split(", "):
                first, _, last = item.partition("–")
                numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _parse_row(number: int, cells: list[str], sources: set[str]) -> tuple[Row | None, str | None]:
    if len(cells) != len(HEADER):
        return None, f"line {number}: {len(cells)} cells instead of {len(HEADER)}"
    paper = _PAPER.fullmatch(cells[0])
    if paper is None:
        return None, f"line {number}: cannot read the Paper cell {cells[0]!r}; write '[V3] §2.1.1, eq. 1–11'"
    if paper["source"] not in sources:
        return None, f"line {number}: the source [{paper['source']}] is not defined in the document"
    if _FILES.fullmatch(cells[2]) is None:
        return None, f"line {number}: the Files cell {cells[2]!r} must be paths in backticks, separated by commas"
    equations: tuple[int, ...] = ()
    if paper["first"]:
        first, last = int(paper["first"]), int(paper["last"] or paper["first"])
        if last < first:
            return None, f"line {number}: the equations {first}–{last} run backwards"
        equations = tuple(range(first, last + 1))
    return Row(number, paper["source"], equations, tuple(re.findall(r"`([^`]+)`", cells[2]))), None
