"""The logarithm of a softmax's denominator, for log-probabilities that engine and trainer compute alike, to the bit.

In FP64 from FP32 logits by NumPy, whose sum of a row does not depend on the other rows; torch's exponential differs in
the last bit between the body and the end of an array.

Legend: T rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np


def log_normaliser(logits_TV: np.ndarray) -> np.ndarray:
    """log of the sum of exponentials of each row of FP32 logits: FP64 (T,)."""
    maxima_T = logits_TV.max(axis=-1)
    shifted_TV = logits_TV.astype(np.float64) - maxima_T[:, None]
    return maxima_T + np.log(np.exp(shifted_TV, out=shifted_TV).sum(axis=-1))
