"""``abyssal train --model PRESET --data PATH... --out RUN --steps N``: train a model on text."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from abyssal.cli.allocator import keep_freed_memory
from abyssal.cli.arguments import parse
from abyssal.cli.ranks import on_ranks, take_folder
from abyssal.cli.run_options import as_json, open_trackers, recipe_name, recorded_options
from abyssal.train.config import TrainConfig, width_init_std
from abyssal.train.recipes import RECIPES

if TYPE_CHECKING:
    from abyssal.data.prepare import PrepareConfig
    from abyssal.data.shards import PreparedData
    from abyssal.parallel.launch_ranks import JoinedRanks
    from abyssal.spec.model import ModelSpec
    from abyssal.train.folder import RunFolder
    from abyssal.train.run import Run


@dataclass(frozen=True)
class Options:
    """Train a model on text; RUN/model is a Hugging Face folder with its tokenizer, RUN/metrics.jsonl the figures."""

    out: Path
    """The run's folder; it must be empty or not exist, unless --resume."""
    resume: bool = False
    """Go on from the newest checkpoint in RUN; options that are not given are as they were."""
    model: str = "tiny"
    """A preset (tiny, small, medium, deepseek-v2-lite, ...); its vocabulary becomes the tokenizer's."""
    init: Path | None = None
    """A model folder to go on from, in place of a preset with random weights; its tokenizer is used."""
    extend: float | None = None
    """Lengthen the model's context so many times with YaRN (beside --init, for a second stage on longer sequences)."""
    trained_length: int | None = None
    """Length of sequence that the model of --init was trained on; its max_positions by default."""
    recipe: Literal["v3", "v2", "llm"] | None = None
    """A paper's recipe as the default of the options below; give batch size, length and learning rate for your size."""
    data: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    """Folders made by `abyssal prepare`; or text, .jsonl or .parquet files and folders of them, which are prepared into
    RUN/data. Without: the Python standard library's source."""
    mix: Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="WEIGHT [WEIGHT ...]")] = None
    """Weights of the prepared folders; their share of the tokens by default."""
    tokenizer: Path | None = None
    """A folder with tokenizer.json. Without: one is trained on the text."""
    vocab_size: int | None = None
    """Tokens of the tokenizer to be trained; the preset's by default."""
    held_out: float = 0.05
    """Share of the documents to validate on."""
    fim_rate: float = 0.1
    """Share of the documents rearranged for filling in the middle."""
    text_field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    mtp_depth: int | None = None
    """Multi-token-prediction modules; the preset's by default."""
    init_std: float | None = None
    """Standard deviation of the initial weights; 0.5 / sqrt(hidden size) by default, which is V3's 0.006 at 7168."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Tell the run to these, too."""
    train: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainConfig)


def main(argv: list[str]) -> int:
    """Run the verb; bad input raises ValueError or FileNotFoundError."""
    return on_ranks("train", argv, _parsed, _train)


def _parsed(argv: list[str]) -> Options:
    recorded = recorded_options(Options, argv)
    _check_recipe(argv, recorded)
    return parse(Options, argv, "train", recorded or _recipe_defaults(argv))


def _train(options: Options, ranks: JoinedRanks | None) -> int:
    keep_freed_memory()
    from abyssal.train.folder import RunFolder

    _check(options)
    folder, spec = RunFolder(options.out), _spec(options)
    options.train.check_fits(spec)
    if ranks is not None:
        _check_mesh(options, spec, ranks)
    take_folder(folder.path, options.resume, folder.check_free, ranks)
    first = ranks is None or ranks.is_first
    if first and options.resume and not folder.record.exists():
        print(f"{folder.path}: holds no run to resume; beginning one", file=sys.stderr)

    from abyssal.train.fault import TrainingFault
    from abyssal.train.run import run_training

    run = _run(options, folder, spec) if ranks is None else _run_on_ranks(options, folder, spec, ranks)
    with ExitStack() as stack:
        names = options.track if first else ()
        for tracker in (trackers := open_trackers(names, folder.path, run.record())):
            stack.enter_context(tracker)
        mesh, watch = (None, None) if ranks is None else (ranks.mesh, ranks.watch)
        try:
            result = run_training(folder, run, trackers, options.resume, mesh=mesh, watch=watch)
        except TrainingFault as fault:
            raise ValueError(str(fault)) from fault
    if first:
        evaluation = result.evaluation
        print(
            f"{folder.model}: {result.tokens:,} tokens in {result.seconds:.0f} s "
            f"({result.tokens / result.seconds:,.0f} tokens/s), held-out loss {evaluation.loss:.3f}, "
            f"{evaluation.bits_per_byte:.3f} bits per byte, MaxVio {evaluation.max_violation:.2f}"
        )
    return 0


def _check_mesh(options: Options, spec: ModelSpec, ranks: JoinedRanks) -> None:
    from abyssal.train.ranks import check_fits
    from abyssal.train.stages import plan_pipeline

    check_fits(spec, options.train.parallel, ranks.mesh.spec)
    config = options.train.resolved(spec)
    config.plan(ranks.mesh.spec.dp)  # refuses a batch that ranks cannot share
    plan_pipeline(spec, config, ranks.mesh.spec)


def _recipe_defaults(argv: Sequence[str]) -> Options | None:
    """What ``--recipe`` makes of the other options' defaults."""
    name = recipe_name(argv)
    if name not in RECIPES:
        return None
    config = replace(RECIPES[name](tokens=1), tokens=None)
    return Options(out=tyro.MISSING, train=config)


def _check_recipe(argv: Sequence[str], recorded: Options | None) -> None:
    """Refuse a recipe that would decide nothing: a resumed run has its options already."""
    name = recipe_name(argv)
    if recorded is not None and name is not None and name != str(recorded.recipe):
        raise ValueError(f"--recipe is {name}, but the run that is there has {recorded.recipe}; leave it out")


def _check(options: Options) -> None:
    """Refuse what contradicts itself, before anything is read."""
    if options.tokenizer is not None and options.vocab_size is not None:
        raise ValueError("--vocab-size is of a tokenizer to be trained; leave it out beside --tokenizer")
    if options.data == ():
        raise ValueError("--data names no file; leave it out to train on the Python standard library's source")
    if options.init is None and (options.extend is not None or options.trained_length is not None):
        raise ValueError("--extend and --trained-length are of a model that is trained already; give it with --init")
    if options.init is not None and (options.tokenizer is not None or options.vocab_size is not None):
        raise ValueError("--init brings its own tokenizer; leave out --tokenizer and --vocab-size")
    if options.init is not None and options.init_std is not None:
        raise ValueError("--init-std is of random weights; leave it out beside --init")
    if options.trained_length is not None and options.extend is None:
        raise ValueError("--trained-length is for --extend; give both, or leave it out")
    if options.extend is not None and not 1 <= options.extend < math.inf:
        raise ValueError(f"--extend is {options.extend}; give how many times longer, such as 4")


def _spec(options: Options) -> ModelSpec:
    """The model that was asked for, its vocabulary still the preset's."""
    from abyssal.spec.hf_config import read_config
    from abyssal.spec.presets import preset
    from abyssal.train.long_context import extended

    spec = preset(options.model) if options.init is None else read_config(options.init)
    if options.mtp_depth is not None:
        if options.init is not None and options.mtp_depth != spec.mtp_depth:
            raise ValueError(f"--mtp-depth is {options.mtp_depth}, but the model of --init has {spec.mtp_depth}")
        spec = replace(spec, mtp_depth=options.mtp_depth)
    if options.init is None:
        init_std = width_init_std(spec.hidden_size) if options.init_std is None else options.init_std
        return replace(spec, init_std=init_std)
    if options.extend is None:
        return spec
    return extended(spec, options.extend, options.trained_length)


def _run(options: Options, folder: RunFolder, spec: ModelSpec) -> Run:
    """Everything opened, prepared and found to fit."""
    there = folder.data.exists()
    sources = _sources(options, folder, spec)
    try:
        return _run_of(options, spec, sources)
    except ValueError:
        if folder.data.exists() and not there:  # prepared for a run that will not be
            shutil.rmtree(folder.data)
            folder.path.rmdir()
        raise


def _run_on_ranks(options: Options, folder: RunFolder, spec: ModelSpec, ranks: JoinedRanks) -> Run:
    """The same on every rank, once rank 0 has prepared and checked what there is to read."""

    def prepare() -> None:
        try:
            _run(options, folder, spec)
        except (ValueError, OSError):
            with suppress(OSError):
                folder.path.rmdir()  # if it is empty: it was made for this run
            raise

    ranks.first_alone("preparing the text", prepare)
    run = ranks.together("reading the text", lambda: _run_of(options, spec, _sources(options, folder, spec, False)))
    ranks.compare({"of the run": {name: part for name, part in run.record().items() if name != "environment"}})
    return run


def _run_of(options: Options, spec: ModelSpec, sources: list[PreparedData]) -> Run:
    from abyssal.train.data import fitted, pretraining_data
    from abyssal.train.initial import start_from
    from abyssal.train.run import Run

    recorded = as_json(options)
    config = options.train.resolved(spec)
    if options.init is not None:
        _check_tokenizer(options.init, sources[0])
        start, origin = start_from(options.init)
        return Run(spec, config, pretraining_data(sources, spec, config, options.mix), start, recorded, origin)
    spec = fitted(spec, sources[0].tokenizer())
    return Run(spec, config, pretraining_data(sources, spec, config, options.mix), options=recorded)


def _check_tokenizer(init: Path, source: PreparedData) -> None:
    """Refuse text whose token numbers mean something else to the model that is trained on."""
    from abyssal.text.tokenizer import Tokenizer

    if (init / "tokenizer.json").is_file():
        ours = Tokenizer.from_folder(init).content_hash()
        if ours != source.manifest.tokenizer_hash:
            raise ValueError(
                f"{source.folder}: prepared with another tokenizer than that of {init}; prepare the text with "
                f"--tokenizer {init}"
            )


def _sources(options: Options, folder: RunFolder, spec: ModelSpec, verify: bool = True) -> list[PreparedData]:
    """Prepared folders as they are, or ``verify`` their checksums; text prepared into RUN/data, or found there by a
    resumed run."""
    from abyssal.cli.prepare import PrepareDisplay
    from abyssal.data.manifest import is_prepared
    from abyssal.data.prepare import PrepareConfig, prepare_paths
    from abyssal.data.shards import PreparedData
    from abyssal.text.tokenizer import Tokenizer

    paths = options.data or ()
    prepared = [path for path in paths if is_prepared(path)]
    if prepared and len(prepared) < len(paths):
        text = next(path for path in paths if not is_prepared(path))
        raise ValueError(f"--data names prepared folders and text ({text}); prepare the text too: abyssal prepare")
    if options.mix is not None and len(prepared) < 2:
        raise ValueError(
            "--mix weighs several prepared folders; make them with abyssal prepare and name them in --data"
        )
    if prepared:
        _check_not_for_text(options, prepared[0])
        return [PreparedData.open(path, verify) for path in prepared]
    config = PrepareConfig(held_out=options.held_out, fim_rate=options.fim_rate, seed=options.train.seed)
    if is_prepared(folder.data):
        data = PreparedData.open(folder.data, verify)
        _check_prepared_so(data, options, config)
        return [data]
    tokenizer_folder = options.init or options.tokenizer
    vocab_size = spec.vocab_size if options.vocab_size is None else options.vocab_size
    tokenizer = vocab_size if tokenizer_folder is None else Tokenizer.from_folder(tokenizer_folder)
    with PrepareDisplay() as display:
        return [prepare_paths(options.data, folder.data, tokenizer, config, options.text_field, display)]


def _check_not_for_text(options: Options, path: Path) -> None:
    """Refuse options that say how text is prepared beside data that is prepared already."""
    for field_ in fields(Options):
        if field_.name in _FOR_TEXT and getattr(options, field_.name) != field_.default and not options.resume:
            name = field_.name.replace("_", "-")
            raise ValueError(f"--{name} is for text, and {path} is prepared already; leave it out")


_FOR_TEXT = ("tokenizer", "vocab_size", "held_out", "fim_rate", "text_field")


def _check_prepared_so(data: PreparedData, options: Options, config: PrepareConfig) -> None:
    """Refuse to go on with RUN/data where the options ask for other data."""
    from abyssal.data.sources import TextSources

    manifest = data.manifest
    for name, there, wanted in (
        ("data", manifest.sources, TextSources(options.data).names),
        ("held-out", manifest.held_out_fraction, config.held_out),
        ("fim-rate", manifest.fim_rate, config.fim_rate),
        ("seed", manifest.fim_seed, config.seed),
        # a small corpus gives a smaller vocabulary than was asked for
        ("vocab-size", manifest.vocab_size, min(manifest.vocab_size, options.vocab_size or manifest.vocab_size)),
    ):
        if there != wanted:
            shown, asked = (" ".join(v) if isinstance(v, tuple) else v for v in (there, wanted))
            raise ValueError(
                f"{data.folder}: prepared with --{name} {shown}, and this run asks for {asked}; resume with what it "
                "had, or give another --out"
            )
