// A row divided by its root mean square: the operators that contain it give the same bits.
#pragma once

#include <cmath>

#include "common.h"

namespace abyssal {

constexpr int kSquareSums = 16;  // partial sums of squares side by side

template <typename X, typename W, typename Y>
ABYSSAL_INLINE void normalise(const X* x, const W* weight, int64_t width, double eps, Y* y) {
  double sums[kSquareSums] = {};
  const int64_t whole = width / kSquareSums * kSquareSums;
  for (int64_t i = 0; i < whole; i += kSquareSums)
    for (int lane = 0; lane < kSquareSums; ++lane) {
      const double value = widen(x[i + lane]);
      sums[lane] += value * value;
    }
  for (int64_t i = whole; i < width; ++i) {
    const double value = widen(x[i]);
    sums[i - whole] += value * value;
  }
  double sum = 0.0;
  for (int lane = 0; lane < kSquareSums; ++lane) sum += sums[lane];
  const double scale = 1.0 / std::sqrt(sum / static_cast<double>(width) + eps);
  for (int64_t i = 0; i < width; ++i)
    narrow(static_cast<float>(widen(x[i]) * scale * widen(weight[i])), y + i);
}

}  // namespace abyssal
