// Gradients of h = silu(g) · u · w for each row, from dh, in one pass: nothing but the input was kept.
//
// With s = sigmoid(g) = (g < 0 ? t : 1) / (1 + t), t = exp(-|g|):  du = dh w g s,  dg = dh w u (s + g s (1 - s)),
// dw = sum of dh g s u over the row.  FP32 throughout, each gradient rounded once.

#include "common.h"
#include "swiglu.h"

namespace abyssal {
namespace {

constexpr int64_t kForkValues = 1 << 14;  // below this, waking threads costs more than it gains

struct Arguments {
  const char* gate_up;  // (rows, 2 * width): gate, then up
  const void* weights;  // (rows), contiguous, or null
  const char* dh;       // (rows, width), contiguous
  char* dgate_up;       // (rows, 2 * width), contiguous
  float* dweights;      // (rows), or null
  int64_t dtype, weights_dtype;
  int64_t rows, width, stride;  // from row to row of gate_up
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
};

template <typename X>
ABYSSAL_INLINE float value(const X* gate, const X* up, const X* dh, float weight, int64_t i, X* dgate, X* dup) {
  float dg, du;
  const float dw = swiglu_gradient(widen(gate[i]), widen(up[i]), widen(dh[i]), weight, &dg, &du);
  narrow(dg, dgate + i);
  narrow(du, dup + i);
  return dw;
}

template <typename X>
ABYSSAL_INLINE float row(const X* gate, const X* up, const X* dh, float weight, int64_t width, X* dgate, X* dup) {
  float sums[kSwigluSums] = {};
  const int64_t whole = width / kSwigluSums * kSwigluSums;
  for (int64_t i = 0; i < whole; i += kSwigluSums)
    for (int lane = 0; lane < kSwigluSums; ++lane) sums[lane] += value(gate, up, dh, weight, i + lane, dgate, dup);
  for (int64_t i = whole; i < width; ++i) sums[i - whole] += value(gate, up, dh, weight, i, dgate, dup);
  float sum = 0.0f;
  for (int lane = 0; lane < kSwigluSums; ++lane) sum += sums[lane];
  return sum;
}

template <typename X>
void run(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t t = begin; t < end; ++t) {
        const X* gate = reinterpret_cast<const X*>(a.gate_up) + t * a.stride;
        const X* dh = reinterpret_cast<const X*>(a.dh) + t * a.width;
        X* dgate = reinterpret_cast<X*>(a.dgate_up) + t * 2 * a.width;
        const float weight = weight_of(a.weights, a.weights_dtype, t);
        const float sum = row(gate, gate + a.width, dh, weight, a.width, dgate, dgate + a.width);
        if (a.dweights) a.dweights[t] = sum;
      }
    });
  };
  parallel_for(a.rows, 4 * a.threads, a.rows * a.width < kForkValues ? 1 : a.threads, a.fork, work);
}

}  // namespace
}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_swiglu_backward(const void* record) {
  using namespace abyssal;
  Arguments a;
  std::memcpy(&a, record, sizeof(a));
  if (!is_dtype(a.dtype) || !is_dtype(a.weights_dtype)) return kBadDtype;
  if (a.rows <= 0 || a.width <= 0) return a.rows < 0 || a.width < 0 ? kBadShape : kOk;
  if (!a.gate_up || !a.dh || !a.dgate_up) return kNoStorage;
  a.dtype == kBFloat16 ? run<uint16_t>(a) : run<float>(a);
  return kOk;
}
