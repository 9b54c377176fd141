// h = silu(gate) · up · w for each row, computed in FP32 and rounded once.
//
// With t = exp(-|g|), silu(g) is g / (1 + t) or, for negative g, g t / (1 + t): no intermediate overflows.  With u =
// 2^-24, t is within 1.4 u (exp.h) and the five operations after it within u each: 6.4 u in all.
// Below g = -87, t is no normal number, is off by up to 2^-149, and g times that is less than 2^-142.

#include "common.h"
#include "operators.h"
#include "swiglu.h"

namespace abyssal {
namespace {

constexpr int64_t kForkValues = 1 << 16;  // below this, waking threads costs more than it gains

using Arguments = SwigluArguments;

template <typename X>
ABYSSAL_INLINE void row(const X* gate, const X* up, float weight, int64_t width, X* y) {
  for (int64_t i = 0; i < width; ++i) narrow(swiglu_value(widen(gate[i]), widen(up[i]), weight), y + i);
}

template <typename X>
void run(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t t = begin; t < end; ++t) {
        const X* gate = reinterpret_cast<const X*>(a.gate_up) + t * a.stride;
        const float weight = weight_of(a.weights, a.weights_dtype, t);
        row(gate, gate + a.width, weight, a.width, reinterpret_cast<X*>(a.y) + t * a.width);
      }
    });
  };
  parallel_for(a.rows, 4 * a.threads, a.rows * a.width < kForkValues ? 1 : a.threads, a.fork, work);
}

}  // namespace

Status swiglu(const Arguments& a) {
  if (!is_dtype(a.dtype) || !is_dtype(a.weights_dtype)) return kBadDtype;
  if (a.rows <= 0 || a.width <= 0) return a.rows < 0 || a.width < 0 ? kBadShape : kOk;
  if (!a.gate_up || !a.y) return kNoStorage;
  a.dtype == kBFloat16 ? run<uint16_t>(a) : run<float>(a);
  return kOk;
}

}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_swiglu(const void* record) {
  abyssal::SwigluArguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::swiglu(a);
}
