"""LiteLLM, loaded when it is first needed, and kept quiet.

As it comes, it reads a ``.env`` file, fetches a table of prices from the network, prints advice on errors, and can be
told by the environment to log requests and to send them to others.  Here it does none of these: what it knows is what
is installed, and no key and no prompt goes anywhere but to the provider.
"""

from __future__ import annotations

import logging
import os
from typing import Any

_CALLBACKS = ("input_callback", "success_callback", "failure_callback", "service_callback", "callbacks")
_ASYNC_CALLBACKS = ("_async_input_callback", "_async_success_callback", "_async_failure_callback")


def load() -> Any:
    """The module.

    Raises:
        ValueError: it is not installed.
    """
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_MODE"] = "PRODUCTION"  # else it reads .env
    try:
        import litellm
    except ModuleNotFoundError as error:
        raise ValueError(
            f'--route: needs LiteLLM ({error.name} is missing); install it: pip install "abyssal[litellm]"'
        ) from None
    _quieten(litellm)
    return litellm


def _quieten(litellm: Any) -> None:
    for name in (*_CALLBACKS, *_ASYNC_CALLBACKS):
        setattr(litellm, name, [])
    litellm.telemetry = False
    litellm.set_verbose = False
    litellm.suppress_debug_info = True
    litellm.turn_off_message_logging = True
    litellm.drop_params = False
    litellm.modify_params = False
    litellm.cache = None
    litellm.num_retries = 0
    litellm.disable_aiohttp_transport = True  # its sessions outlive the event loop that they belong to
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        logger.setLevel(logging.CRITICAL)
