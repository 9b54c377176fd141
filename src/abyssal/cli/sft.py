"""``abyssal sft MODEL --data chat.jsonl --out RUN``: fine-tune a model on conversations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from abyssal.cli.allocator import keep_freed_memory
from abyssal.cli.arguments import parse
from abyssal.cli.ranks import on_ranks, take_folder
from abyssal.cli.run_options import as_json, open_trackers, recorded_options
from abyssal.train.config import BalanceConfig, OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from abyssal.parallel.launch_ranks import JoinedRanks
    from abyssal.train.folder import RunFolder
    from abyssal.train.run import Run


def default_config(lr: float) -> TrainConfig:
    """V3's fine-tuning [V3 section 5.1]: cosine from 5e-6 to 1e-6, a fifth; λ and γ as at the end of pre-training."""
    return TrainConfig(
        seq_len=1024,
        batch_size=8,
        mtp_weight=0.1,
        document_mask=True,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=0, lr_schedule="cosine:1:0.2"),
        balance=BalanceConfig(bias_speed=0.0),
    )


FULL_LR = 5e-6
LORA_LR = 2e-4
"""Adapters start at zero and are few; they want far more than the whole model."""


@dataclass(frozen=True)
class Options:
    """Fine-tune a model on conversations; RUN/model is a Hugging Face folder with tokenizer and chat template."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model, with its tokenizer."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
    """JSON lines in OpenAI's message format: {"messages": [...], "tools": [...]}."""
    out: Path
    """The run's folder; it must be empty or not exist, unless --resume."""
    resume: bool = False
    """Go on from the newest checkpoint in RUN; options that are not given are as they were."""
    template: Literal["deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v2.5"] | None = None
    """Chat format to teach; the model's own template by default."""
    thinking: bool | None = None
    """Show the reasoning of the messages (with True, of R1 and V3.1) or drop it; as the messages have it by default."""
    epochs: float = 2.0
    """Passes over the conversations, unless --steps or --tokens are given."""
    held_out: float = 0.05
    """Share of the conversations to validate on."""
    truncate: bool = False
    """Cut off conversations longer than --seq-len; otherwise they are left out and counted."""
    lora: bool = False
    """Train low-rank adapters alone: RUN/adapter in PEFT's format, RUN/model with them merged."""
    lora_rank: int = 16
    """Width of the adapters."""
    lora_alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    lora_targets: tuple[Literal["attention", "experts", "ffn"], ...] = ("attention", "experts")
    """Which products get adapters; ffn are dense layers and shared experts."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Tell the run to these, too."""
    train: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: default_config(FULL_LR))


def main(argv: list[str]) -> int:
    """Run the verb; bad input raises ValueError or FileNotFoundError."""
    return on_ranks("sft", argv, _parsed, _fine_tune)


def _parsed(argv: list[str]) -> Options:
    options = parse(Options, argv, "sft", recorded_options(Options, argv) or _defaults(argv))
    if options.epochs <= 0:
        raise ValueError(f"--epochs is {options.epochs}; give a positive number")
    return options


def _fine_tune(options: Options, ranks: JoinedRanks | None) -> int:
    keep_freed_memory()
    from abyssal.train.folder import RunFolder

    folder = RunFolder(options.out)
    take_folder(folder.path, options.resume, folder.check_free, ranks)

    from abyssal.train.fault import TrainingFault
    from abyssal.train.run import run_training
    from abyssal.train.sft import save_adapted

    first = ranks is None or ranks.is_first
    run = _run(options) if ranks is None else _run_on_ranks(options, folder, ranks)
    if first:
        _report(run)
    save = save_adapted(folder, options.model, run.data) if options.lora else None
    with ExitStack() as stack:
        names = options.track if first else ()
        for tracker in (trackers := open_trackers(names, folder.path, run.record())):
            stack.enter_context(tracker)
        mesh, watch = (None, None) if ranks is None else (ranks.mesh, ranks.watch)
        try:
            result = run_training(folder, run, trackers, options.resume, save, mesh=mesh, watch=watch)
        except TrainingFault as fault:
            raise ValueError(str(fault)) from fault
    if first:
        print(
            f"{folder.model}: {run.data.record['epochs']:g} epochs in {result.seconds:.0f} s, "
            f"held-out loss {result.evaluation.loss:.3f} over {result.evaluation.num_tokens:,} tokens of the assistant"
        )
    return 0


def _run_on_ranks(options: Options, folder: RunFolder, ranks: JoinedRanks) -> Run:
    """Every rank reads all conversations: they are few beside a model's own text, and what each trains on is a row."""
    from abyssal.train.ranks import check_fits
    from abyssal.train.stages import plan_pipeline

    def read() -> Run:
        run = _run(options)
        check_fits(run.spec, options.train.parallel, ranks.mesh.spec)
        run.config.plan(ranks.mesh.spec.dp)
        plan_pipeline(run.spec, run.config, ranks.mesh.spec)
        return run

    try:
        run = ranks.together("reading the conversations", read)
    except ValueError:
        if ranks.is_first:
            with suppress(OSError):
                folder.path.rmdir()  # if it is empty: it was made for this run
        raise
    ranks.compare({"of the run": {name: part for name, part in run.record().items() if name != "environment"}})
    return run


def _defaults(argv: Sequence[str]) -> Options | None:
    """With ``--lora``, another learning rate."""
    if "--lora" not in argv:
        return None
    return Options(model=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING, train=default_config(LORA_LR))


def _run(options: Options) -> Run:
    """Everything read and found to fit."""
    from abyssal.model.lora import LoraConfig
    from abyssal.train.sft import ChatData, sft_run

    lora = LoraConfig(options.lora_rank, options.lora_alpha, options.lora_targets) if options.lora else None
    data = ChatData(options.data, options.held_out, options.truncate, options.thinking)
    return sft_run(options.model, data, options.train, options.template, options.epochs, lora, as_json(options))


def _report(run: Run) -> None:
    """What the conversations came to, before they are trained on."""
    record = run.data.record
    train, held_out = record["train"], record["held_out"]
    print(
        f"{train['conversations']:,} conversations ({train['trained_tokens']:,} of {train['tokens']:,} tokens learned) "
        f"in {train['rows']:,} rows, {held_out['conversations']:,} held out; template {record['template']}"
    )
    cut = "cut off" if run.options.get("truncate") else "left out; --truncate keeps their beginnings"
    if too_long := train["too_long"] + held_out["too_long"]:
        print(f"{too_long:,} samples are longer than {run.config.seq_len} tokens: {cut}")
    if unlearned := train["nothing_to_learn"] + held_out["nothing_to_learn"]:
        print(f"{unlearned:,} samples hold nothing to learn and are left out")
