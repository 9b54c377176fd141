"""``abyssal chat MODEL``: talk to a model.

On a terminal an answer appears as it is written, and Ctrl-C stops it without ending the chat.  From a pipe each line is
a turn, and standard output holds the answers alone.  The whole conversation is each turn's prompt, so the engine finds
the pages of what was said before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from abyssal.cli.arguments import parse
from abyssal.cli.main import description
from abyssal.cli.sampling_options import EngineOptions, SamplingOptions

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.engine.messages import SamplingParams
    from abyssal.text.template import ChatTemplate
    from abyssal.text.tokenizer import Tokenizer

DEFAULTS = SamplingOptions(max_tokens=2048, temperature=0.6, top_p=0.95, seed=None)
"""DeepSeek's recommendation for its reasoning models."""


@dataclass(frozen=True)
class Options:
    """Talk to a model. Lines that begin with / are commands: /help lists them."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model, with its tokenizer and its chat template."""
    system: str | None = None
    """System prompt."""
    template: Literal["deepseek-v3", "deepseek-r1", "deepseek-v3.1"] | None = None
    """Chat format; the model's own template by default."""
    thinking: bool | None = None
    """Let the model reason first, or not, where its format has the choice (R1, V3.1)."""
    reasoning: Literal["show", "fold"] | None = None
    """Show the reasoning (dimmed on a terminal) or only how long it was; by default shown on a terminal alone."""
    verbose: bool = False
    """Say after each answer, on standard error, how fast it was and what the caches held."""
    sampling: Annotated[SamplingOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: DEFAULTS)
    engine: Annotated[EngineOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=EngineOptions)


def main(argv: list[str]) -> int:
    """Run the verb; bad input raises ValueError or OSError."""
    options = parse(Options, argv, "chat")
    params = options.sampling.params()

    from abyssal.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(options.model)
    template = _template(options, tokenizer)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _on_terminal(options, params, template, tokenizer)
    else:
        _in_pipe(options, params, template, tokenizer)
    return 0


def _template(options: Options, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat format, whose marks the tokenizer must have."""
    from abyssal.text.template import ChatTemplate

    if options.template is None:
        template = ChatTemplate.from_folder(options.model, tokenizer)
    else:
        template = ChatTemplate.builtin(options.template, tokenizer)
    missing = [name for name in template.format_tokens if name not in tokenizer.control_tokens]
    if missing:
        raise ValueError(
            f"{options.model}: its tokenizer lacks {missing[0]}, which the chat format {template.name} is made of: the "
            "model has not learned to talk; fine-tune it with `abyssal sft`, or let it write with `abyssal generate`"
        )
    return template


def _on_terminal(options: Options, params: SamplingParams, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    from rich.console import Console

    from abyssal.cli.chat_session import ChatSession
    from abyssal.cli.chat_view import TerminalView

    console = Console()
    with console.status(f"loading {options.model}"):
        llm = options.engine.load(options.model, tokenizer)
    view = TerminalView(console, options.reasoning != "fold")
    with llm:
        session = ChatSession(llm, template, params, view, options.system, options.thinking, options.verbose, True)
        view.say(f"{options.model}: /help lists the commands, Ctrl-D ends\n")
        for line in _typed(console):
            try:
                if not session.take(line):
                    return
            except (ValueError, OSError) as error:
                view.complain(description(error))


def _in_pipe(options: Options, params: SamplingParams, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    from abyssal.cli.chat_session import ChatSession
    from abyssal.cli.chat_view import PipeView

    view = PipeView(options.reasoning == "show")
    with options.engine.load(options.model, tokenizer) as llm:
        session = ChatSession(llm, template, params, view, options.system, options.thinking, options.verbose, False)
        for line in sys.stdin:
            if not session.take(line.removesuffix("\n")):
                return


def _typed(console: Console) -> Iterator[str]:
    """What the user types until Ctrl-D; a backslash at a line's end joins the next."""
    import readline  # noqa: F401 - gives input() its line editing and its history

    lines: list[str] = []
    while True:
        try:
            line = input(_mark(console, "…" if lines else ">"))
        except KeyboardInterrupt:
            lines.clear()
            console.print("\n(Ctrl-D ends)", style="dim", highlight=False)
            continue
        except EOFError:
            console.print()
            return
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(lines)
            lines.clear()


def _mark(console: Console, sign: str) -> str:
    """The prompt; \\1 and \\2 tell readline what takes no room."""
    return f"{sign} " if console.color_system is None else f"\x01\x1b[1;36m\x02{sign}\x01\x1b[0m\x02 "
