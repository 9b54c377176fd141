"""Which part of which of a model's tensors a piece of the checkpoint table is, slots of experts taken into account."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from abyssal.checkpoint.names import Piece
from abyssal.model.experts import Experts


def regions(piece: Piece, tensors: Mapping[str, Tensor], slots: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The rows of our parameter that a tensor is, once for each slot that holds its expert."""
    parameter = tensors[piece.parameter]
    matrices = (
        [parameter]
        if piece.expert is None
        else [parameter[slot] for slot, expert in enumerate(slots[piece.parameter]) if expert == piece.expert]
    )
    return matrices if piece.rows is None else [matrix[slice(*piece.rows)] for matrix in matrices]


def slots_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The logical expert of each slot, for each parameter whose module has slots."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in tensors}
    return {name: owner.slots for name, owner in owners.items() if isinstance(owner, Experts)}


def logical_shapes(
    tensors: Mapping[str, Tensor], slots: Mapping[str, tuple[int, ...]], pieces: tuple[Piece, ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters with logical experts, of which a rank may hold a few, as the leading axis."""
    experts: dict[str, int] = {}
    for piece in pieces:
        if piece.expert is not None:
            experts[piece.parameter] = max(experts.get(piece.parameter, 0), piece.expert + 1)
    return {
        name: (experts.get(name, 0), *tensor.shape[1:]) if name in slots else tuple(tensor.shape)
        for name, tensor in tensors.items()
    }
