"""What is trained: a model of wide layers over few ranks, and tokens whose experts are dealt out evenly.

Layers compute much for each byte that they send, though less than V3's do: what a byte costs the core that sends and
receives it cannot be hidden behind the same core's products.

Attention and experts of a layer compute about as long as each other, as an interleaving that hides communication of
one behind the other wants.  Every rank's experts get the same number of rows, as loss-free balancing has it after a
while: waiting for a peer with more to compute is no communication.

Legend: T tokens, K chosen experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abyssal.data.batch import Batch
from abyssal.model.dispatch import Dispatcher
from abyssal.model.step import Step
from abyssal.model.transformer import Transformer
from abyssal.parallel.pipeline.chunk import MicroBatch
from abyssal.parallel.pipeline.chunk_ends import Targets
from abyssal.parallel.pipeline.messages import Boundary
from abyssal.spec.mesh import MeshSpec
from abyssal.spec.model import LatentAttentionSpec, ModelSpec, MoESpec
from abyssal.train.config import TrainConfig
from abyssal.train.loss import packed_step, targets

RANKS = 2


@dataclass(frozen=True)
class Setting:
    """Of one run.

    Raises:
        ValueError: numbers that do not divide as they must.
    """

    hidden: int = 2048
    layers: int = 2
    heads: int = 32
    experts: int = 4
    top_k: int = 2
    expert_ffn: int = 2304
    rows: int = 1
    """Sequences of a micro-batch."""
    length: int = 64
    """Tokens of a sequence."""
    micro_batches: int = 48
    """Of a rank and step."""
    vocab: int = 512

    def __post_init__(self) -> None:
        if self.layers % 2 or self.experts % RANKS or self.top_k % RANKS or self.top_k > self.experts:
            raise ValueError(
                f"{self.layers} layers, {self.top_k} of {self.experts} experts: give an even number of each, as a rank "
                "holds two stages and half of the experts, and no more chosen than there are"
            )
        if self.micro_batches < 2:
            raise ValueError(f"{self.micro_batches} micro-batches leave no pair to overlap; give 2 or more")

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @property
    def mesh(self) -> MeshSpec:
        return MeshSpec(dp=RANKS, ep=RANKS, ranks_per_node=1)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            family="deepseek_v3",
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_layers=self.layers,
            dense_ffn_size=self.expert_ffn,
            attention=LatentAttentionSpec(
                num_heads=self.heads,
                q_lora_rank=self.hidden // 2,
                kv_lora_rank=self.hidden // 4,
                qk_nope_head_dim=self.hidden // 8,
                qk_rope_head_dim=self.hidden // 16,
                v_head_dim=self.hidden // 8,
            ),
            moe=MoESpec(self.experts, 1, self.top_k, self.expert_ffn, scoring="sigmoid"),
            max_positions=self.length,
            init_std=0.02,
        )

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(steps=1, seq_len=self.length, batch_size=RANKS, compute="float32")

    @property
    def boundary(self) -> Boundary:
        shapes = [(self.tokens, self.hidden)] * self.micro_batches
        return Boundary(shapes, torch.float32, torch.device("cpu"))

    def batches(self, rank: int) -> list[Batch]:
        """The micro-batches of a rank."""
        generator = np.random.default_rng((3, rank))
        shape = self.rows * self.micro_batches, self.length + 1
        return Batch(generator.integers(0, self.vocab, shape)).parts(self.rows)

    def expert_ids(self, rank: int, micro_batch: int, layer: int) -> Tensor:
        """(T, K): each rank's experts in turn, each as often as the others."""
        seed = (rank * self.micro_batches + micro_batch) * self.layers + layer
        turns_T = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(seed))
        own = self.experts // RANKS
        choices_K = torch.arange(self.top_k)
        return (turns_T[:, None] + choices_K // RANKS) % own + choices_K % RANKS * own

    def micro_batch(
        self, model: Transformer, rank: int, number: int, part: Batch, dispatcher: Dispatcher | None, dealt: bool = True
    ) -> MicroBatch:
        """As a chunk is given it; not ``dealt``, the router chooses the experts."""
        forced = {layer: self.expert_ids(rank, number, layer) for layer in range(self.layers)} if dealt else None

        def make_step() -> Step:
            return replace(packed_step(model, part, None, dispatcher), forced_routing=forced)

        count = RANKS * self.tokens * self.micro_batches
        aims = [Targets(aim.tokens_T, aim.learned_T, count) for aim in targets(part, 0)]
        return MicroBatch(make_step, [torch.from_numpy(part.tokens_BX[:, :-1]).flatten()], aims)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{RANKS} ranks of a thread and core each; {self.layers} layers {self.hidden} wide, {self.top_k} of "
            f"{self.experts} experts; {self.micro_batches} micro-batches of {self.tokens} tokens a rank and step"
        )
