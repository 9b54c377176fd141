"""The weights of a training checkpoint as a source of rows, so that an export needs no model in memory.

Rows are read from the checkpoint's files when they are asked for.  Adapters are merged matrix by matrix, as
``merge_lora`` merges them: the memory of one matrix, of which the rows are then taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from abyssal.checkpoint.folder import listed
from abyssal.checkpoint.names import Piece
from abyssal.checkpoint.rectangles import Rectangle
from abyssal.checkpoint.sharded_reader import ShardedReader
from abyssal.model.lora import AdaptedExperts, AdaptedLinear, adapted_modules, attach_lora
from abyssal.model.transformer import Transformer

PARAMETERS, AVERAGE = "model/", "average/"
"""What the names of a checkpoint's tensors begin with, before those of the model."""


class SavedWeights:
    """What a checkpoint holds of a model.

    Args:
        reader: of the checkpoint, its files checked.
        model: on the meta device, with the adapters that were trained.
        average: the average of the parameters in place of the parameters.
        merge: fold the adapters in; False leaves them out.

    Raises:
        ValueError: a checkpoint of another model, or without the average, naming the tensors.
    """

    def __init__(self, reader: ShardedReader, model: Transformer, average: bool = False, merge: bool = True) -> None:
        self._reader = reader
        self._model = model
        self._adapted = adapted_modules(model) if merge else {}
        self._merged: tuple[tuple[str, int | None], Tensor] | None = None
        tensors: Mapping[str, Tensor] = model.state_dict()
        self._saved_as = {name: PARAMETERS + name for name in tensors}
        if average:
            self._saved_as |= {name: AVERAGE + name for name, _ in model.named_parameters()}
        self._check(tensors)

    @property
    def model(self) -> Transformer:
        return self._model

    def rows(self, piece: Piece, start: int, stop: int) -> Tensor:
        first = 0 if piece.rows is None else piece.rows[0]
        path, _, weight = piece.parameter.rpartition(".")
        adapted = self._adapted.get(path)
        if adapted is not None and weight in adapted.weights:
            return self._merged_matrix(piece, adapted, weight)[first + start : first + stop]
        return self._read(piece.parameter, piece.expert, (first + start, first + stop))

    def adapter(self, parameter: str, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """A (…, r, I) and B (…, O, r) of a base parameter, of all experts or of one."""
        path, _, weight = parameter.rpartition(".")
        prefix = adapted_modules(self._model)[path].weights[weight]
        factors = f"{path}.{prefix}lora_a", f"{path}.{prefix}lora_b"
        return self._read(factors[0], expert), self._read(factors[1], expert)

    def _merged_matrix(self, piece: Piece, adapted: AdaptedLinear | AdaptedExperts, weight: str) -> Tensor:
        place = piece.parameter, piece.expert
        if self._merged is None or self._merged[0] != place:  # the next rows are of the same matrix
            self._merged = None
            matrix = self._read(*place)
            self._merged = place, adapted.merged(matrix, *self.adapter(*place))
        return self._merged[1]

    def _read(self, name: str, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        saved_as = self._saved_as[name]
        shape = self._reader.tensors[saved_as].shape
        offsets, sizes = [0] * len(shape), list(shape)
        if expert is not None:
            offsets[0], sizes[0] = expert, 1
        if rows is not None:
            axis = 0 if expert is None else 1
            offsets[axis], sizes[axis] = rows[0], rows[1] - rows[0]
        values = self._reader.read(saved_as, Rectangle(tuple(offsets), tuple(sizes)))
        return values if expert is None else values.squeeze(0)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        saved, folder = self._reader.tensors, self._reader.folder
        wanted = {self._saved_as[name]: tuple(tensor.shape) for name, tensor in tensors.items()}
        problems = [f"{name} is missing" for name in wanted if name not in saved]
        problems += [
            f"{name} is unexpected"
            for name in saved
            if name.startswith(PARAMETERS) and name.removeprefix(PARAMETERS) not in tensors
        ]
        problems += [
            f"{name} is {list(saved[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in saved and saved[name].shape != shape
        ]
        if problems:
            raise ValueError(f"{folder}: the tensors are not those of the run's model: {listed(problems)}")


def attach_saved_adapters(model: Transformer, reader: ShardedReader, rank: int, alpha: float) -> None:
    """Give ``model``, on the meta device, the adapters that a checkpoint holds values of."""
    names = [name.removeprefix(PARAMETERS) for name in reader.tensors if name.startswith(PARAMETERS)]
    modules = {name.rpartition(".")[0] for name in names if name.endswith("lora_a")}
    attach_lora(model, modules, rank, alpha)
