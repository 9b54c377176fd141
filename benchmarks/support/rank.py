"""A rank's side of a benchmark between ranks: it joins the others and answers requests, a line of JSON each.

Standard output is for answers; whatever else is printed goes to standard error.  The rank ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(build: Callable[[dict[str, Any]], Answer]) -> None:
    """Join the ranks of ``support.rank_group``, build what the command line's JSON asks for, answer each request."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    world_size = int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(os.environ["BENCHMARK_STORE"], world_size),
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=timedelta(seconds=float(os.environ["BENCHMARK_TIMEOUT"])),
    )
    answer = build(json.loads(sys.argv[1]))
    print("{}", file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)
    distributed.destroy_process_group()
