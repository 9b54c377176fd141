// exp of numbers that are not positive, which is all that a softmax and a sigmoid need.
//
// Plain FP32 arithmetic without branches, so that the compiler vectorises it in any loop: 2^n times a polynomial on
// [-ln 2 / 2, ln 2 / 2] (S. Moshier's coefficients in Cephes, expf).
#pragma once

#include "common.h"

namespace abyssal {

ABYSSAL_INLINE float power_of_two(int32_t n) {  // -126 <= n <= 127
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// exp(x) for x <= 0, within 1.4 · 2^-24 of it, relatively, or 2^-149 below the smallest normal number (found by trying
// every x).  NaN stays NaN.
ABYSSAL_INLINE float exp_nonpositive(float x) {
  x = x < -110.0f ? -110.0f : x;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first product exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits, zero;
  std::memcpy(&bits, &shifted, sizeof(bits));
  std::memcpy(&zero, &kRound, sizeof(zero));
  const int32_t exponent = static_cast<int32_t>(bits - zero), half = exponent >> 1;
  return p * power_of_two(half) * power_of_two(exponent - half);  // in two steps, for results below 2^-126
}

}  // namespace abyssal
