"""How a token's cache entry in one layer is laid out in FP8: the one place that says which byte is what.

    codes (E4M3, one byte a value) | scales (FP32, one a tile) | plain values (BF16)

Values are scaled by tiles of 128, so that an outlier coarsens its own tile alone.  A tile never reaches over the border
of a *run*: the latent is one run, and in the dense family each head's key and each head's value are.  The rotary key of
latent attention is kept plain, as every head's score reads it directly.  For DeepSeek-V3 that is 512 + 4 · 4 + 64 · 2 =
656 bytes instead of 1,152, the layout of FlashMLA's FP8 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

TILE = 128
"""Values under one scale; the last tile of a run may hold fewer."""


@dataclass(frozen=True)
class Fp8Entry:
    """Sizes of one entry."""

    runs: int
    run_values: int
    """Values of one run."""
    plain_values: int = 0
    """Values kept in BF16, after the runs."""

    @cached_property
    def values(self) -> int:
        """Values of an entry in all."""
        return self.runs * self.run_values + self.plain_values

    @cached_property
    def tiles_per_run(self) -> int:
        return -(-self.run_values // TILE)

    @cached_property
    def num_codes(self) -> int:
        return self.runs * self.run_values

    @cached_property
    def scales_at(self) -> int:
        """Byte at which the scales begin: after the codes, at a multiple of 4."""
        return -(-self.num_codes // 4) * 4

    @cached_property
    def plain_at(self) -> int:
        """Byte at which the plain values begin."""
        return self.scales_at + 4 * self.runs * self.tiles_per_run

    @cached_property
    def num_bytes(self) -> int:
        """Of an entry, a multiple of 4."""
        return -(-(self.plain_at + 2 * self.plain_values) // 4) * 4
