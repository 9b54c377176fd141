"""``--route PREFIX=litellm``: models whose names begin with a prefix are run by other providers.

    --route openai/=litellm                    openai/gpt-4o             is LiteLLM's openai/gpt-4o
    --route gpt-=litellm:openai/gpt-           gpt-4o                    is LiteLLM's openai/gpt-4o
    --route house/=litellm:hosted_vllm/        house/qwen                is LiteLLM's hosted_vllm/qwen

Behind ``litellm:`` stands what takes the prefix's place in LiteLLM's name of the model; without it the name is passed
on as it is.  Keys and addresses come from the environment, by the names that LiteLLM reads there (``OPENAI_API_KEY``,
``OPENAI_API_BASE``, ``HOSTED_VLLM_API_BASE``, ...); a client can name neither.  Prices are the server's own table, by
the name that the client wrote: ``[models."openai/*"]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abyssal.serve.routing import NO_ROUTES, Provider, Routes


@dataclass(frozen=True)
class RouteOption:
    """One ``--route``."""

    prefix: str
    target: str
    """What LiteLLM's names have in the place of the prefix."""

    @classmethod
    def parse(cls, text: str) -> RouteOption:
        """``PREFIX=litellm`` or ``PREFIX=litellm:TARGET``.

        Raises:
            ValueError: it is neither.
        """
        prefix, equals, provider = text.partition("=")
        kind, colon, target = provider.partition(":")
        if not equals or kind != "litellm":
            raise ValueError(f"--route: {text!r} is not understood; write PREFIX=litellm or PREFIX=litellm:TARGET")
        if not prefix:
            raise ValueError(f"--route: {text!r} has no prefix, and would let clients choose any provider; name one")
        if colon and not target:
            raise ValueError(f"--route: {text!r} has nothing behind the colon; leave it out to keep names as they are")
        return cls(prefix, target if colon else prefix)


def open_routes(options: Sequence[str], served: str) -> Routes:
    """Routes by the command line.

    Args:
        options: the value of each ``--route``.
        served: the name of the model that runs here, which no route may hide.

    Raises:
        ValueError: an option that cannot be, or the extra ``litellm`` is not installed.
    """
    if not options:
        return NO_ROUTES
    from abyssal.serve.routes.library import load
    from abyssal.serve.routes.provider import LiteLLMProvider

    providers: dict[str, Provider] = {}
    for option in map(RouteOption.parse, options):
        if option.prefix in providers:
            raise ValueError(f"--route: the prefix {option.prefix!r} is given twice; give it once")
        if served.startswith(option.prefix):
            raise ValueError(
                f"--route: the prefix {option.prefix!r} would hide the model {served!r} that runs here; "
                f"choose another, or another --name"
            )
        providers[option.prefix] = LiteLLMProvider(load(), option)
    return Routes(providers)
