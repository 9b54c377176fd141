"""What a DeepSeek-class language model is, as facts: sizes, gates, positions.

One frozen record describes every family that this package runs: DeepSeek-V3/R1, DeepSeek-V2, and the dense
DeepSeek LLM / DeepSeekMath (Llama layout).  A family is a value of this record, never a class of its own, so the
model, the checkpoint reader, the planner and the arithmetic all read the same fields.  Free of torch.

The record refuses what no model of the family can be (a Llama layout with latent attention).  It does not refuse gates
that only the Hugging Face format cannot express (a sigmoid gate without its bias, say): those are good for ablations,
and :func:`abyssal.spec.hf_config.write_config` names them when such a model is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abyssal.spec import arithmetic
from abyssal.spec.parts import (
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    MoESpec,
    YarnSpec,
    check_at_least,
    check_positive,
)

__all__ = [
    "FAMILIES",
    "LATENT_NORM_EPS",
    "Family",
    "GroupedQueryAttentionSpec",
    "LatentAttentionSpec",
    "MoESpec",
    "ModelSpec",
    "YarnSpec",
]

Family = Literal["deepseek_v3", "deepseek_v2", "llama"]
FAMILIES: tuple[Family, ...] = ("deepseek_v3", "deepseek_v2", "llama")

LATENT_NORM_EPS = 1e-6
"""Epsilon of the RMSNorm on the query and key-value latents.  Published checkpoints were trained with 1e-6 there,
whatever their ``rms_norm_eps`` says."""


@dataclass(frozen=True)
class ModelSpec:
    """One model.  Build from :func:`abyssal.preset`, a ``config.json``, or directly.

    Raises:
        ValueError: a field that contradicts another, by name, with the fix.
    """

    family: Family
    """``model_type`` of the Hugging Face configuration."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    dense_ffn_size: int
    attention: LatentAttentionSpec | GroupedQueryAttentionSpec
    moe: MoESpec | None = None
    num_dense_layers: int = 0
    """Leading layers with a dense FFN; without ``moe`` every layer is dense and this stays 0."""
    mtp_depth: int = 0
    """Multi-token-prediction modules after the main model."""
    max_positions: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: YarnSpec | None = None
    rope_interleaved: bool = True
    """MLA checkpoints rotate pairs (0,1), (2,3), ...; the Llama layout rotates halves."""
    tie_embeddings: bool = False
    init_std: float = 0.006
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_at_least(
            "spec",
            1,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            dense_ffn_size=self.dense_ffn_size,
            max_positions=self.max_positions,
        )
        check_at_least("spec", 0, num_dense_layers=self.num_dense_layers, mtp_depth=self.mtp_depth)
        check_positive("spec", rms_norm_eps=self.rms_norm_eps, rope_theta=self.rope_theta)
        if self.yarn is not None and self.rope_theta <= 1:
            raise ValueError(f"spec.rope_theta is {self.rope_theta}: YaRN needs a base above 1 (10000 is usual)")
        if not 0 <= self.init_std <= 1:
            raise ValueError(f"spec.init_std is {self.init_std}: set it between 0 and 1 (0.006 in DeepSeek-V3)")
        self._check_family()
        self._check_dense_layers()
        self._check_token_ids()

    def _check_family(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"spec.family is {self.family!r}: set it to one of {', '.join(FAMILIES)}")
        latent = isinstance(self.attention, LatentAttentionSpec)
        if latent == (self.family == "llama"):
            wanted = "GroupedQueryAttentionSpec" if self.family == "llama" else "LatentAttentionSpec"
            raise ValueError(
                f"spec.attention is a {type(self.attention).__name__}, but family {self.family} has a {wanted}"
            )
        if self.family == "llama" and self.moe is not None:
            raise ValueError("spec.moe is set, but family llama is dense: set moe=None or family='deepseek_v3'")
        if self.family != "deepseek_v3" and self.mtp_depth:
            raise ValueError(
                f"spec.mtp_depth is {self.mtp_depth}, but only family deepseek_v3 has MTP modules: set it to 0"
            )
        layout = {"llama": False, "deepseek_v2": True}.get(self.family, self.rope_interleaved)
        if self.rope_interleaved != layout:
            raise ValueError(
                f"spec.rope_interleaved is {self.rope_interleaved}: family {self.family} rotates "
                f"{'pairs' if layout else 'halves'}, set it to {layout}"
            )

    def _check_dense_layers(self) -> None:
        if self.moe is None and self.num_dense_layers:
            raise ValueError(
                f"spec.num_dense_layers is {self.num_dense_layers} without moe: every layer is dense then, set it to 0"
            )
        if self.moe is not None and self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"spec.num_dense_layers is {self.num_dense_layers} of {self.num_layers} layers, so no layer uses moe: "
                "lower it, or set moe=None"
            )

    def _check_token_ids(self) -> None:
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        named = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        for name, token in [*named, *(("eos_token_id", token) for token in eos)]:
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"spec.{name} is {token}, outside the vocabulary of {self.vocab_size}: "
                    "correct the id or set vocab_size to the tokenizer's"
                )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` has experts; indices from ``num_layers`` on are the MTP modules' blocks.

        Raises:
            IndexError: no such layer.
        """
        if not 0 <= layer < self.num_layers + self.mtp_depth:
            raise IndexError(f"layer {layer} of a model of {self.num_layers} layers and {self.mtp_depth} MTP modules")
        return self.moe is not None and layer >= self.num_dense_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model that have experts."""
        return 0 if self.moe is None else self.num_layers - self.num_dense_layers

    @property
    def total_parameters(self) -> int:
        """Elements of the main model, embedding, head and router biases included, MTP modules not."""
        return arithmetic.total_parameters(self)

    @property
    def active_parameters(self) -> int:
        """The part of :attr:`total_parameters` that one token passes: ``top_k`` of the routed experts."""
        return arithmetic.active_parameters(self)

    @property
    def active_parameters_without_embedding(self) -> int:
        """Elements of the matrices that one token is multiplied by: :attr:`active_parameters` without the embedding
        (of which a token reads one row), norms and biases; the N of 6 N FLOPs a training token."""
        return arithmetic.active_parameters_without_embedding(self)

    @property
    def mtp_parameters(self) -> int:
        """Elements of all MTP modules; they share embedding and head with the main model, so neither counts."""
        return arithmetic.mtp_parameters(self)

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of cache a token over the main model's layers, in BF16 (70,272 for DeepSeek-V3)."""
        return arithmetic.kv_cache_bytes_per_token(self)

    def training_flops_per_token(self, seq_len: int = 4096) -> int:
        """FLOPs of forward and backward a token of a causal sequence of ``seq_len``, without MTP."""
        return arithmetic.training_flops_per_token(self, seq_len)
