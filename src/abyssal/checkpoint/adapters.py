"""Adapters as PEFT keeps them: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names are those of the checkpoint table with PEFT's around them: the adapter of ``model.layers.3.self_attn.q_a_proj``
is ``base_model.model.model.layers.3.self_attn.q_a_proj.lora_A.weight`` (r, I) and ``….lora_B.weight`` (O, r).

*Experts* are written one by one (``….mlp.experts.7.gate_proj.lora_A.weight``), the layout that adapters of DeepSeek
models have had all along.  transformers 5 stacks experts into parameters, and PEFT (0.20 and later) stacks adapters of
these names when it loads them: ``gate_proj``, ``up_proj`` and ``down_proj`` under ``target_modules`` mean the routed
experts there, and become ``target_parameters``.  So in a model with experts its *dense and shared feed-forwards* are
listed by their weights (``shared_experts.gate_proj.weight``) under ``target_parameters``; in a dense model they are
plain ``target_modules``.  What PEFT itself trains on the stack it saves stacked, with one A for gate and up as here
(``….mlp.experts.base_layer.lora_A.weight`` for both, ``….mlp.experts.lora_A.weight`` for down); that is read too.

*Gate and up* are one product here and share one A, which is written twice, a copy for each.  Read back, the two must
be equal; an adapter with an A for each has to be merged by PEFT first.

*MTP modules* are written under their checkpoint names, which transformers' models lack and PEFT passes over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.checkpoint.folder import listed
from abyssal.checkpoint.layout import write_json
from abyssal.checkpoint.names import checkpoint_table
from abyssal.checkpoint.safetensors_file import SafetensorsReader, SafetensorsWriter
from abyssal.checkpoint.safetensors_header import TensorEntry
from abyssal.checkpoint.whole_folder import whole_folder
from abyssal.model.lora import adapted_modules, attach_lora, remove_lora
from abyssal.model.transformer import Transformer
from abyssal.spec.model import ModelSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_DTYPES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.float64: "F64"}
_READABLE = frozenset({"F16", "BF16", "F32", "F64"})

_MUST_BE: Mapping[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "megatron_config": None,
    "use_bdlora": None,
}
"""Fields of PEFT's configuration that change what is computed, and the only value that is understood here.  (Dropout
is not among them: it is off outside training.)"""


AdapterSource = Callable[[str], tuple[Tensor, Tensor]]
"""Gives A (…, r, I) and B (…, O, r) of the adapter of a base parameter, stacked by logical expert where that is."""


def _adapters_of(model: Transformer) -> AdapterSource:
    def adapter(parameter: str) -> tuple[Tensor, Tensor]:
        module, _, weight = parameter.rpartition(".")
        a, b = adapted_modules(model.get_submodule(module))[""].adapter(weight)
        return a.detach(), b.detach()

    return adapter


@dataclass(frozen=True)
class _Factors:
    """One pair of tensors of an adapter's file, and the part of the model that it is."""

    parameter: str
    """The base parameter that is adapted."""
    stem: str
    """What the names of both tensors begin with."""
    shapes: tuple[tuple[int, int], tuple[int, int]]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    stacked: bool = False
    """All experts in one pair."""

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.stem}.lora_A.weight", f"{self.stem}.lora_B.weight"

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    def parts(self, source: AdapterSource) -> tuple[Tensor, Tensor]:
        """Views of A, all of it even where the pair is of a few rows of the parameter, and of those rows of B."""
        a, b = source(self.parameter)
        if self.stacked:  # (experts · r, I) and (O, r · experts)
            return a.flatten(0, 1), b.permute(1, 2, 0)
        if self.expert is not None:
            a, b = a[self.expert], b[self.expert]
        return a, b if self.rows is None else b[slice(*self.rows)]


def _table(spec: ModelSpec, rank: int, include_mtp: bool = True) -> Iterator[_Factors]:
    """Every adapter that a model could have, in the order of the checkpoint, experts one by one."""
    for piece in checkpoint_table(spec, include_mtp):
        if piece.storage == "block" and piece.copy_of is None:
            stem = f"base_model.model.{piece.hf_name.removesuffix('.weight')}"
            rows, columns = piece.hf_shape
            yield _Factors(piece.parameter, stem, ((rank, columns), (rows, rank)), piece.expert, piece.rows)


def _stacked_table(spec: ModelSpec, rank: int) -> Iterator[_Factors]:
    """The experts' adapters as PEFT saves those that it trains on transformers 5: wrappers around the stack, of which
    the inner is that of gate and up."""
    for factors in _table(spec, rank):
        if factors.expert == 0 and not factors.stem.endswith("up_proj"):
            assert spec.moe is not None
            experts, gate_up = spec.moe.num_experts, factors.stem.endswith("gate_proj")
            stem = factors.stem.partition(".experts.")[0] + (".experts.base_layer" if gate_up else ".experts")
            (_, columns), (rows, _) = factors.shapes
            shapes = (rank * experts, columns), (2 * rows if gate_up else rows, rank * experts)
            yield _Factors(factors.parameter, stem, shapes, stacked=True)


def save_adapter(
    model: Transformer,
    folder: str | Path,
    base_model: str | None = None,
    include_mtp: bool = True,
    overwrite: bool = False,
    source: AdapterSource | None = None,
) -> None:
    """Write the adapters of ``model`` as a folder that PEFT loads.  It appears whole or not at all.

    Args:
        model: with adapters, all of one rank and α; they need have no values where there is a ``source``.
        folder: must not exist, unless ``overwrite``.
        base_model: name or folder of the base model, for those who load the adapter by itself.
        include_mtp: False leaves out the adapters of the MTP modules.
        source: of the adapters' values, asked for one parameter after another; the model itself by default.

    Raises:
        ValueError: no adapters, a folder in the way, or an adapter with an infinity or a NaN, by name.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise ValueError(f"{folder}: exists; give another folder, or overwrite=True if it is one to be replaced")
    adapted = adapted_modules(model)
    if not adapted:
        raise ValueError(f"{folder}: the model has no adapters to save; add_lora(model, ...) gives it some")
    (rank, alpha), *others = {(module.lora_rank, module.lora_alpha) for module in adapted.values()}
    assert not others, "adapters of one model have one rank and one alpha"
    table = [factors for factors in _table(model.spec, rank, include_mtp) if factors.module in adapted]
    own = _adapters_of(model)
    entries = [
        TensorEntry(name, _DTYPES[part.dtype], shape)
        for factors in table
        for name, part, shape in zip(factors.names, factors.parts(own), factors.shapes, strict=True)
    ]
    with whole_folder(folder) as partial:
        with SafetensorsWriter(partial / WEIGHTS_FILE, entries) as writer:
            for factors in table:
                for name, part in zip(factors.names, factors.parts(source or own), strict=True):
                    _check_finite(folder / WEIGHTS_FILE, name, part)
                    writer.write_rows(name, part.cpu())
        write_json(partial / CONFIG_FILE, _config(model.spec, table, rank, alpha, base_model))


def load_adapter(model: Transformer, folder: str | Path) -> None:
    """Give ``model`` the adapters of a folder, written here or by PEFT; the rest of the model is frozen.

    Raises:
        ValueError: no adapter, one of another kind or another model, tensors missing, unexpected or mis-shaped, gate
            and up with an A each, a model that has adapters already; one message that names them.  The model is as
            before then.
    """
    folder = Path(folder)
    rank, alpha = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " (adapter_model.bin is pickled and never opened: save it again with PEFT as safetensors)"
        there = pickled if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{path}: is not there{there}; give the folder of an adapter that was saved whole")
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with SafetensorsReader(path) as reader:
        present = _match(reader, [*_table(model.spec, rank), *_stacked_table(model.spec, rank)])
        attach_lora(model, {factors.module for factors in present}, rank, alpha)
        try:
            _fill(model, reader, present)
        except BaseException:
            remove_lora(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])
            raise


def _match(reader: SafetensorsReader, table: list[_Factors]) -> list[_Factors]:
    """The adapters that the file holds, after checking that they are whole and fit."""
    entries = reader.entries
    touched = {(factors.module, factors.stacked) for factors in table if entries.keys() & set(factors.names)}
    present = [factors for factors in table if (factors.module, factors.stacked) in touched]
    twice = {module for module, stacked in touched if stacked and (module, False) in touched}
    problems = [f"{module} has adapters one by one and stacked" for module in sorted(twice)]
    for factors in present:
        for name, shape in zip(factors.names, factors.shapes, strict=True):
            if name not in entries:
                problems.append(f"{name} is missing")
            elif entries[name].shape != shape:
                problems.append(f"{name} has shape {list(entries[name].shape)}, not {list(shape)}")
            elif entries[name].dtype not in _READABLE:
                problems.append(f"{name} has dtype {entries[name].dtype}, which is none of {', '.join(_READABLE)}")
    expected = {name for factors in present for name in factors.names}
    problems += [f"{name} is unexpected" for name in entries if name not in expected]
    if problems or not present:
        raise ValueError(
            f"{reader.path}: the adapters do not fit the model: {listed(problems) or 'there are none'}; check that "
            f"they were trained on this model, MTP modules included, with the r of {CONFIG_FILE}"
        )
    return present


def _fill(model: Transformer, reader: SafetensorsReader, present: list[_Factors]) -> None:
    owners: dict[int, str] = {}
    own = _adapters_of(model)
    for factors in present:
        for name, part in zip(factors.names, factors.parts(own), strict=True):
            found = reader.read(name)
            _check_finite(reader.path, name, found)
            found = found.view(part.shape).to(part.device, part.dtype)
            first = owners.setdefault(part.data_ptr(), name)
            if first == name:
                part.copy_(found)
            elif not torch.equal(part, found):
                raise ValueError(
                    f"{reader.path}: {name} is not equal to {first}, but gate and up share one A here; merge this "
                    "adapter with PEFT (merge_and_unload) and load the merged model"
                )


def _check_finite(path: Path, name: str, part: Tensor) -> None:
    if not bool(torch.isfinite(part).all()):
        raise ValueError(f"{path}: {name} holds an infinity or a NaN; go back to an adapter from before it")


# ---- adapter_config.json ----


def _config(spec: ModelSpec, table: list[_Factors], rank: int, alpha: float, base_model: str | None) -> dict[str, Any]:
    modules: set[str] = set()
    parameters: set[str] = set()
    for factors in table:
        *_, owner, leaf = factors.stem.split(".")
        if spec.moe is not None and factors.expert is None and owner != "self_attn":
            parameters.add(f"{owner}.{leaf}.weight")
        else:
            modules.add(leaf)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        **{field: _MUST_BE[field] for field in ("bias", "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save")},
    }


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and α.

    Raises:
        ValueError: not there, not JSON, or a field that is not understood, by name.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: is not there; give the folder of an adapter in PEFT's format") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path}: peft_type is {kind!r}; only 'LORA' adapters can be loaded")
    for field, value in _MUST_BE.items():
        found = config.get(field, value)
        if found != value and (found or value):
            raise ValueError(f"{path}: {field} is {found!r}, which is not supported; train with {value!r}")
    initial = config.get("init_lora_weights", True)
    if not isinstance(initial, bool) and initial != "gaussian":  # PiSSA and its kin change the base model
        raise ValueError(f"{path}: init_lora_weights is {initial!r}, which is not supported; train with true")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: r is {rank!r}: it must be an integer of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"{path}: lora_alpha is {alpha!r}: it must be a number above 0")
    return rank, float(alpha)
