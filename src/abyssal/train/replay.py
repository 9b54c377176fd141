"""Log-probabilities of a rollout's tokens, computed by a trainer along the very path by which a server sampled them.

A policy gradient divides the trainer's probability of a token by the sampler's.  The two programs usually differ: in
the form of attention, in the order of sums, in which expert a token near a tie goes to, and the quotient is then off by
noise that grows with depth.  Here model and operators are the same, and what is left can be repeated: each token's
experts (``forced_routing``) and its form of attention (:class:`~abyssal.model.context.ReplayBatch`).

Without gradients on CPU the result equals the engine's log-probabilities to the last bit, in FP32 and BF16, for
requests of one version of the weights in the engine's deterministic mode with pages in the model's dtype.  With
gradients, products and softmax are torch's, which add in another order: rounding is left, of the activations' dtype.
Measured on 4,096 tokens of a trained model of three layers, largest (mean) difference of log-probabilities: whole
sequences 1e-6 (1e-7) in FP32 and 0.34 (3e-3) in BF16; with the routing forced 1e-6 and 0.048; replayed 0 and 0;
replayed with gradients 3e-6 (4e-7) and 0.047 (3e-3).
Where quotients must be exactly one, compute both, and let the value come from the one and the gradient from the other:

    with torch.no_grad():
        exact = replay_logprobs(model, rollouts)
    trained = replay_logprobs(model, rollouts)
    logprobs = [t + (e - t).detach() for e, t in zip(exact, trained)]

Legend: T tokens, L layers with experts, K chosen experts, O output tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abyssal.kernels.log_normaliser import log_normaliser
from abyssal.model.context import ReplayBatch
from abyssal.model.dispatch import Dispatcher
from abyssal.model.transformer import Transformer

BLOCK_ROWS = 256
"""Rows whose logits are in FP64 at once."""


@dataclass(frozen=True)
class Rollout:
    """A prompt and what was sampled after it."""

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    experts_TLK: np.ndarray | None = None
    """Routed experts of all its tokens but the last, as the engine returns them (``return_experts``); None: the model
    routes by itself."""

    def __post_init__(self) -> None:
        if not (len(self.prompt_ids) and len(self.output_ids)):
            raise ValueError(
                f"rollout: {len(self.prompt_ids)} prompt and {len(self.output_ids)} output tokens; needs one of each"
            )
        wanted = len(self.prompt_ids) + len(self.output_ids) - 1
        if self.experts_TLK is not None and len(self.experts_TLK) != wanted:
            raise ValueError(
                f"experts_TLK: of {len(self.experts_TLK)} tokens, of {wanted} wanted: all of the rollout but its last"
            )


def replay_logprobs(
    model: Transformer, rollouts: Sequence[Rollout], dispatcher: Dispatcher | None = None
) -> list[Tensor]:
    """Log-probability of each output token of each rollout, (O,): the model's own, at temperature 1.

    FP64 and exact without gradients, else FP32 at least and differentiable.  A prompt that several rollouts share is
    computed once.

    Args:
        dispatcher: how tokens reach experts; every expert on this rank without one.

    Raises:
        ValueError: no rollouts; experts given for some of them only, or not of this model's layers.
    """
    if not rollouts:
        raise ValueError("rollouts: none were given")
    prompts, of_rollout = _distinct_prompts(rollouts)
    device = model.embed.weight.device
    lengths = [len(rollout.prompt_ids) for rollout in prompts]
    output_lengths = [len(rollout.output_ids) - 1 for rollout in rollouts]
    step = model.step(
        ReplayBatch(lengths, output_lengths, of_rollout, device),
        dispatcher,
        forced_routing=_forced_routing(model, prompts, rollouts),
    )
    tokens = [token for rollout in prompts for token in rollout.prompt_ids]
    tokens += [token for rollout in rollouts for token in rollout.output_ids[:-1]]
    hidden_TD = model.hidden(torch.tensor(tokens, device=device), step)
    last_rows = np.cumsum(lengths) - 1
    begin = sum(lengths)
    rows: list[int] = []
    for prompt, length in zip(of_rollout, output_lengths, strict=True):
        rows += [int(last_rows[prompt]), *range(begin, begin + length)]
        begin += length
    targets = [token for rollout in rollouts for token in rollout.output_ids]
    logits_OV = model.logits(hidden_TD[torch.tensor(rows, device=device)])
    logprobs_O = _chosen(logits_OV, torch.tensor(targets, device=device))
    return list(logprobs_O.split([len(rollout.output_ids) for rollout in rollouts]))


def _distinct_prompts(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[int]]:
    """A rollout of each prompt that differs in tokens or routing, and which of them each rollout's is."""
    found: dict[tuple[tuple[int, ...], bytes], int] = {}
    prompts: list[Rollout] = []
    of_rollout: list[int] = []
    for rollout in rollouts:
        experts = b"" if rollout.experts_TLK is None else rollout.experts_TLK[: len(rollout.prompt_ids)].tobytes()
        key = tuple(rollout.prompt_ids), experts
        if key not in found:
            found[key] = len(prompts)
            prompts.append(rollout)
        of_rollout.append(found[key])
    return prompts, of_rollout


def _forced_routing(
    model: Transformer, prompts: Sequence[Rollout], rollouts: Sequence[Rollout]
) -> dict[int, Tensor] | None:
    """Expert ids (T, K) of the flat batch by layer."""
    given = [rollout.experts_TLK for rollout in rollouts if rollout.experts_TLK is not None]
    if not given:
        return None
    if len(given) < len(rollouts):
        raise ValueError(f"experts_TLK: given for {len(given)} of {len(rollouts)} rollouts; give all or none")
    layers = [layer for layer in range(model.spec.num_layers) if model.spec.is_moe_layer(layer)]
    if wrong := [experts.shape for experts in given if experts.ndim != 3 or experts.shape[1] != len(layers)]:
        raise ValueError(f"experts_TLK: shape {wrong[0]} does not fit the {len(layers)} layers with experts")
    parts = [rollout.experts_TLK[: len(rollout.prompt_ids)] for rollout in prompts if rollout.experts_TLK is not None]
    parts += [rollout.experts_TLK[len(rollout.prompt_ids) :] for rollout in rollouts if rollout.experts_TLK is not None]
    experts_TLK = torch.from_numpy(np.concatenate(parts)).to(model.embed.weight.device, torch.long)
    return {layer: experts_TLK[:, index].contiguous() for index, layer in enumerate(layers)}


def _chosen(logits_OV: Tensor, targets_O: Tensor) -> Tensor:
    """log softmax(logits)[target], (O,)."""
    if torch.is_grad_enabled() and logits_OV.requires_grad:
        wide = torch.promote_types(logits_OV.dtype, torch.float32)
        return logits_OV.log_softmax(-1, dtype=wide).gather(1, targets_O[:, None]).squeeze(1)
    rows_OV, targets = logits_OV.detach().to("cpu", torch.float32).numpy(), targets_O.cpu().numpy()
    logprobs_O = np.empty(len(rows_OV))
    for start in range(0, len(rows_OV), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        chosen = rows_OV[block][np.arange(len(targets[block])), targets[block]].astype(np.float64)
        logprobs_O[block] = chosen - log_normaliser(rows_OV[block])
    return torch.from_numpy(logprobs_O).to(logits_OV.device)
