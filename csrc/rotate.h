// Rotary positions: each pair of a row turned by its angle, in FP32, rounded once.
#pragma once

#include "common.h"

namespace abyssal {

// y = x turned.  `turns` has cos and sin of each pair; pairs are neighbours, or values `pairs` apart.  y may be x.
template <typename T>
ABYSSAL_INLINE void rotate_row(const T* x, const float* turns, int64_t pairs, bool interleaved, T* y) {
  const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    const float first = widen(x[step * i]), second = widen(x[step * i + apart]);
    const float cosine = turns[2 * i], sine = turns[2 * i + 1];
    narrow(first * cosine - second * sine, y + step * i);
    narrow(first * sine + second * cosine, y + step * i + apart);
  }
}

}  // namespace abyssal
