// SwiGLU of one gate and one up, and its gradients: the operators that contain it give the same bits.
#pragma once

#include <cmath>

#include "common.h"
#include "exp.h"

namespace abyssal {

// silu(gate) · up · weight.
ABYSSAL_INLINE float swiglu_value(float gate, float up, float weight) {
  const float t = exp_nonpositive(-std::fabs(gate));
  const float silu = gate * (gate < 0.0f ? t : 1.0f) / (1.0f + t);
  return silu * up * weight;
}

// Gradients of gate and up from that of the value; returns what the row's weight has of it.
ABYSSAL_INLINE float swiglu_gradient(float gate, float up, float d, float weight, float* dgate, float* dup) {
  const float t = exp_nonpositive(-std::fabs(gate));
  const float sigmoid = (gate < 0.0f ? t : 1.0f) / (1.0f + t);
  const float silu = gate * sigmoid, dweighted = d * weight;
  *dgate = dweighted * up * (sigmoid + silu * (1.0f - sigmoid));
  *dup = dweighted * silu;
  return d * silu * up;
}

constexpr int kSwigluSums = 16;  // partial sums of a row side by side: value i goes into sum i % 16

// The weight of row `t`; one where there are none.
ABYSSAL_INLINE float weight_of(const void* weights, int64_t dtype, int64_t t) {
  if (!weights) return 1.0f;
  return dtype == kBFloat16 ? widen(static_cast<const uint16_t*>(weights)[t]) : static_cast<const float*>(weights)[t];
}

}  // namespace abyssal
