"""A chat's turns: messages to the model, and the commands that begin with a slash."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from abyssal.cli.chat_view import AnswerParts, PipeView, TerminalView
from abyssal.cli.conversation import Conversation
from abyssal.cli.statistics import Statistics
from abyssal.engine.messages import CompletionOutput, RequestOutput, SamplingParams
from abyssal.text.template_parts import encode_parts

if TYPE_CHECKING:
    from abyssal.engine.llm import LLM
    from abyssal.text.template import ChatTemplate

HELP = """\
/reset            forget what was said
/system [TEXT]    set the system prompt, or remove it; what was said stays
/save FILE        write the conversation as JSON
/load FILE        go on with one that was saved
/quit             end, as Ctrl-D does
//TEXT            say something that begins with /
A backslash at a line's end goes on with the next. Ctrl-C stops an answer."""


class ChatSession:
    """One conversation with a model.

    Args:
        thinking: what the template is told.
        verbose: whether to say how fast each answer was.
        stoppable: whether an interrupt ends the answer instead of the process.
    """

    def __init__(
        self,
        llm: LLM,
        template: ChatTemplate,
        params: SamplingParams,
        view: PipeView | TerminalView,
        system: str | None = None,
        thinking: bool | None = None,
        verbose: bool = False,
        stoppable: bool = False,
    ) -> None:
        self.conversation = Conversation(system)
        self._llm = llm
        self._template = template
        self._params = params
        self._view = view
        self._thinking = thinking
        self._verbose = verbose
        self._stoppable = stoppable

    def take(self, line: str) -> bool:
        """A command or a message; False where the chat is to end.

        Raises:
            ValueError, OSError: what is wrong with it; the conversation is as before.
        """
        if line.startswith("/") and not line.startswith("//"):
            return self._command(line)
        if line.strip():
            self._answer(line[1:] if line.startswith("//") else line)
        return True

    def _command(self, line: str) -> bool:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        conversation = self.conversation
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            self._view.say(HELP)
        elif name == "/reset":
            conversation.reset()
            self._view.say("forgotten")
        elif name == "/system":
            conversation.set_system(argument)
            self._view.say("system prompt set" if argument else "no system prompt")
        elif name == "/save":
            conversation.save(_path(name, argument))
            self._view.say(f"{len(conversation.messages)} messages written to {argument}")
        elif name == "/load":
            conversation.load(_path(name, argument))
            self._view.say(f"{len(conversation.messages)} messages read from {argument}")
        else:
            raise ValueError(f"there is no command {name}; /help lists them, and //... says what begins with /")
        return True

    def _answer(self, text: str) -> None:
        prompt_ids, statistics = self._prompt_ids(text), Statistics()
        assert self._llm.tokenizer is not None, "a model folder has its tokenizer"
        parts = AnswerParts(self._llm.tokenizer, prompt_ids)
        output = None
        self._view.begin()
        try:
            for output in self._outputs(prompt_ids):
                statistics.note(output)
                self._view.update(*parts.split(output.outputs[0]))
            assert output is not None, "a stream has an output"
            if output.error is not None:
                raise ValueError(output.error)
        except BaseException:
            self._view.settle()
            raise
        figures = statistics.line([output], self._llm.engine.draft_acceptance) if self._verbose else ""
        self._view.end(_note(output.outputs[0], self._params), figures)
        if output.token_ids:
            self.conversation.answered(text, *parts.split(output.outputs[0]))

    def _prompt_ids(self, text: str) -> list[int]:
        """The conversation with one more message of the user, up to where the model goes on."""
        tokenizer, longest = self._llm.tokenizer, self._llm.model.spec.max_positions
        assert tokenizer is not None, "a model folder has its tokenizer"
        parts = self._template.render_prompt(self.conversation.asked(text), thinking=self._thinking)
        ids = encode_parts(tokenizer, parts).ids.tolist()
        if len(ids) >= longest:
            raise ValueError(
                f"the conversation has {len(ids)} tokens by now, and the model reads {longest} at most; /reset "
                "forgets it"
            )
        return ids

    def _outputs(self, prompt_ids: Sequence[int]) -> Iterator[RequestOutput]:
        """The growing output, until it is whole or the user has enough of it."""
        stream = self._llm.stream(prompt_ids, self._params)
        if not self._stoppable:
            yield from stream
            return
        with _interrupts() as interrupted:
            for output in stream:
                yield output
                if interrupted():
                    stream.close()
                    return


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed.  It is asked between the engine's steps, since a step that is broken off leaves the
    engine's books open; a second Ctrl-C breaks off."""
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise ValueError(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def _note(output: CompletionOutput, params: SamplingParams) -> str:
    """Why an answer is not whole; empty where it is."""
    if output.finish_reason is None:
        return "stopped"
    if output.finish_reason != "length":
        return ""
    if len(output.token_ids) == params.max_tokens:
        return f"cut off after {params.max_tokens} tokens; --max-tokens allows more"
    return "cut off: the model's length, or its cache, is full; /reset forgets what was said"
