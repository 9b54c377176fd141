"""Verbs that may run on ranks, where nothing started any."""

from __future__ import annotations

import pytest

from abyssal.cli.train import main


def test_a_mesh_of_many_ranks_in_one_process_says_both_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that many ranks began may be gone on with by one, but not unasked."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"--mesh dp=2,ep=2 is of 2 ranks.*torchrun --nproc-per-node 2.*--mesh dp=1"):
        main(["--out", "never-made", "--mesh", "dp=2,ep=2"])
