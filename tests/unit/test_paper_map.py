"""docs/paper.md says where each equation is; the tree must agree, and the checker must notice when it does not."""

from pathlib import Path

import pytest

from tests.support.paper_map import cited, parse, problems

ROOT = Path(__file__).parents[2]
GOOD = """\
- **[V3]** a report

| Paper | What | Files |
|---|---|---|
| [V3] §2.1.2, eq. 12–14 | routing | `src/router.py` |
| [V3] §4.2 | recipe | `src/router.py`, `src/other.py` |
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/router.py").write_text("# scores [V3 eq. 12]\n# gates [V3 eq. 13–14] and [V2 eq. 15]\n")
    (tmp_path / "src/other.py").write_text("")
    return tmp_path


def test_the_document_holds():
    assert problems((ROOT / "docs/paper.md").read_text(encoding="utf-8"), ROOT) == []


def test_the_document_is_read_in_full():
    document = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    rows, _ = parse(document)
    assert len(rows) == sum(line.startswith("| [") for line in document.splitlines()) > 0


def test_a_good_sample_holds(tree):
    assert problems(GOOD, tree) == []


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("eq. 12–14", "eq. 12–15", "src/router.py does not cite [V3 eq. 15]"),
        ("`src/other.py`", "`src/gone.py`", "`src/gone.py` does not exist"),
        ("`src/other.py`", "`src`", "src is not a file"),
        ("`src/other.py`", "src/other.py", "must be paths in backticks"),
        ("eq. 12–14", "eqs. 12–14", "cannot read the Paper cell"),
        ("eq. 12–14", "eq. 14–12", "run backwards"),
        ("[V3] §4.2", "[V9] §4.2", "[V9] is not defined"),
        ("| recipe |", "|", "2 cells instead of 3"),
        ("| Paper |", "| Where |", "a table's header must be"),
        (GOOD[GOOD.index("| Paper") :], "", "no table rows"),
    ],
)
def test_a_wrong_document_is_caught(tree, good, bad, complaint):
    assert good in GOOD
    found = problems(GOOD.replace(good, bad), tree)
    assert any(complaint in problem for problem in found), found


def test_a_path_in_the_prose_must_exist(tree):
    assert problems(GOOD + "\nSee `src/nowhere.py`.\n", tree) == ["`src/nowhere.py` does not exist"]


def test_citations_are_read_by_source():
    text = "[V3 eq. 3] [V3 eq. 5–7] [V3 eq. 14, 16–17; section 2.1.2] and not [V2 eq. 9] eq. 11 [V3 eq.12] [V3 eq. x]"
    assert cited(text, "V3") == {3, 5, 6, 7, 14, 16, 17}
