"""Servers that are killed: whatever the moment, the log adds up, and what was promised is there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from abyssal.serve.accounts.keys import KeyRing
from abyssal.serve.accounts.store import Store
from abyssal.serve.accounts.usage import Ledger

KILLS = 20
START = 1_000_000
WRITER = """
import sys
from pathlib import Path
from abyssal.serve.accounts.keys import KeyRing
from abyssal.serve.accounts.store import Store
from abyssal.serve.accounts.usage import Ledger, Usage

store = Store(Path(sys.argv[1]))
account, ledger = KeyRing(store).find("alice"), Ledger(store)
for number in range(1_000_000):
    reference = f"{sys.argv[2]}-{number}"
    ledger.reserve(account, reference, 10)
    ledger.charge(account, Usage(reference, "m", 1, 2, 3), 1 + number % 7)
    ledger.reserve(account, reference + "-lost", 10)
    print(number, flush=True)
"""


def test_balances_and_log_agree_after_every_kill(tmp_path: Path) -> None:
    path = tmp_path / "accounts.sqlite"
    moments = random.Random(5)
    promised = 0
    with Store(path) as store:
        KeyRing(store).create("alice")
        ledger = Ledger(store)
        account_id = KeyRing(store).find("alice").account_id
        ledger.top_up(account_id, START)
        for run in range(KILLS):
            promised += run_until_killed(path, f"run{run}", moments.uniform(0, 0.05))
            rows = store.rows("SELECT reference, amount FROM log WHERE kind = 'usage'")
            balance = ledger.balance(account_id)
            assert balance.total == START + sum(row["amount"] for row in rows)
            assert balance.reserved == 0, "what a killed server had set aside is free again"
            assert promised <= len(rows) <= promised + run + 1, "at most one a kill was not promised yet"
            for row in rows:
                assert row["amount"] == -1 - int(row["reference"].split("-")[1]) % 7
    assert promised > KILLS
    assert not list(tmp_path.glob("*-holder-*")), "locks of the dead are cleared away"


def run_until_killed(path: Path, name: str, seconds: float) -> int:
    """How many charges it was told of, when it was killed so long after the first."""
    command = [sys.executable, "-c", WRITER, str(path), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, "the writer did not start"
        time.sleep(seconds)
        process.kill()
        return len([line for line in (first + process.stdout.read()).split("\n")[:-1] if line])
