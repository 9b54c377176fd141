"""``abyssal chat`` as a user sees it: on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from abyssal.checkpoint.hf import save_model
from abyssal.text.template import ChatTemplate
from abyssal.text.tokenizer import train_bpe
from abyssal.train.config import TrainConfig
from abyssal.train.data import fitted
from abyssal.train.loop import build_model
from tests.unit.train.test_step import SPEC


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.text = ""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ.update(TERM="xterm-256color", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, "-m", "abyssal", *arguments])

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What appeared up to ``text``, which is taken off."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.text!r}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.text += os.read(self._terminal, 1 << 16).decode(errors="replace")
        before, _, self.text = self.text.partition(text)
        return before

    def status(self) -> int:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._pid = 0
        return status

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pid:  # a test that failed leaves nothing behind
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._terminal)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template; what it says is up to ``--regex``."""
    plain = train_bpe(["alpha beta gamma delta"], 300)
    tokenizer = ChatTemplate.builtin("deepseek-v3", plain).attach(plain)
    folder = tmp_path_factory.mktemp("talker") / "model"
    save_model(build_model(fitted(SPEC, tokenizer), TrainConfig()), folder, "fp32", tokenizer)
    return folder


PROMPT = "\x1b[1;36m>\x1b[0m "


def test_a_chat_goes_on_after_an_answer_is_stopped(talker: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the answer, what was said of it is kept, and the next question is answered; Ctrl-D ends the chat."""
    with Terminal("chat", str(talker), "--regex", "(na )+", "--min-tokens", "2000") as terminal:
        terminal.wait_for(PROMPT)
        for _ in range(2):
            terminal.type("sing \\\nto me\n")
            terminal.wait_for("na na na na na ")
            terminal.type("\x03")
            terminal.wait_for("[stopped]")
            terminal.wait_for(PROMPT)
        terminal.type(f"/save {tmp_path / 'kept.json'}\n")
        terminal.wait_for("4 messages written to")
        terminal.type("/nothing\n")
        terminal.wait_for("\x1b[31mthere is no command /nothing")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.status() == 0
    question, answer, *_ = json.loads((tmp_path / "kept.json").read_text())["messages"]
    assert question["content"] == "sing \nto me"
    assert answer["content"].startswith("na na na na na ") and len(answer["content"]) < 5000
