// y = x / sqrt(mean(x²) + eps) · weight for each row, in one pass over a row that stays in cache.
//
// Squares are summed, and the result is computed, in FP64 and rounded once: at these sizes that costs nanoseconds and
// makes the error half a unit in the last place whatever the width.

#include "common.h"
#include "operators.h"
#include "rms_norm.h"

namespace abyssal {
namespace {

constexpr int64_t kForkBytes = 1 << 20;  // below this, waking threads costs more than it gains

using Arguments = RmsNormArguments;

template <typename X, typename W>
void run(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t row = begin; row < end; ++row)
        normalise(reinterpret_cast<const X*>(a.x) + row * a.x_stride, static_cast<const W*>(a.weight), a.width, a.eps,
                  reinterpret_cast<X*>(a.y) + row * a.width);
    });
  };
  const int64_t bytes = a.rows * a.width * bytes_of(a.dtype);
  parallel_for(a.rows, 4 * a.threads, bytes < kForkBytes ? 1 : a.threads, a.fork, work);
}

}  // namespace

Status rms_norm(const Arguments& a) {
  if (!is_dtype(a.dtype) || !is_dtype(a.weight_dtype)) return kBadDtype;
  if (a.rows <= 0 || a.width <= 0) return a.rows < 0 || a.width < 0 ? kBadShape : kOk;
  if (!a.x || !a.weight || !a.y) return kNoStorage;
  const bool bf16 = a.dtype == kBFloat16, weight_bf16 = a.weight_dtype == kBFloat16;
  if (bf16) weight_bf16 ? run<uint16_t, uint16_t>(a) : run<uint16_t, float>(a);
  else weight_bf16 ? run<float, uint16_t>(a) : run<float, float>(a);
  return kOk;
}

}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_rms_norm(const void* record) {
  abyssal::RmsNormArguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::rms_norm(a);
}
