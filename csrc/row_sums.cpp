// For each token the sum of its rows, gathered from anywhere: added in FP32 in the order given and rounded once.

#include "common.h"
#include "operators.h"

namespace abyssal {
namespace {

constexpr int64_t kForkBytes = 1 << 18;  // below this, waking threads costs more than it gains
constexpr int64_t kBlock = 256;          // columns whose sums stay in registers and first-level cache

using Arguments = RowSumsArguments;

template <typename X>
ABYSSAL_INLINE void add_up(const X* rows, const int64_t* index, int64_t width, int64_t choices, X* y) {
  float sums[kBlock];
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t count = start + kBlock < width ? kBlock : width - start;
    for (int64_t i = 0; i < count; ++i) sums[i] = 0.0f;
    for (int64_t k = 0; k < choices; ++k) {
      const X* row = rows + index[k] * width + start;
      for (int64_t i = 0; i < count; ++i) sums[i] += widen(row[i]);
    }
    for (int64_t i = 0; i < count; ++i) narrow(sums[i], y + start + i);
  }
}

template <typename X>
void run(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t t = begin; t < end; ++t)
        add_up(reinterpret_cast<const X*>(a.rows), a.index + t * a.choices, a.width, a.choices,
               reinterpret_cast<X*>(a.y) + t * a.width);
    });
  };
  const int64_t bytes = a.tokens * a.choices * a.width * bytes_of(a.dtype);
  parallel_for(a.tokens, 4 * a.threads, bytes < kForkBytes ? 1 : a.threads, a.fork, work);
}

}  // namespace

Status row_sums(const Arguments& a) {
  if (!is_dtype(a.dtype)) return kBadDtype;
  if (a.tokens <= 0 || a.width <= 0) return a.tokens < 0 || a.width < 0 ? kBadShape : kOk;
  if (a.choices < 0) return kBadShape;
  if (!a.rows || !a.index || !a.y) return kNoStorage;
  for (int64_t i = 0; i < a.tokens * a.choices; ++i)
    if (a.index[i] < 0 || a.index[i] >= a.num_rows) return kBadSlot;
  a.dtype == kBFloat16 ? run<uint16_t>(a) : run<float>(a);
  return kOk;
}

}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_row_sums(const void* record) {
  abyssal::RowSumsArguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::row_sums(a);
}
