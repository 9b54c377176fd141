// RMSNorm whose result, rounded to the dtype of its input, is quantised in tiles along rows.

#include <memory>

#include "common.h"
#include "fp8_rows.h"
#include "rms_norm.h"

namespace abyssal {
namespace {

constexpr int64_t kForkValues = 1 << 16;  // below this, waking threads costs more than it gains

struct Arguments {
  const char* x;
  const void* weight;
  unsigned char* codes;  // (rows, width)
  char* scales;
  char* values;
  int64_t dtype, weight_dtype, values_dtype;
  int64_t code, scale;
  int64_t rows, width, x_stride;  // from row to row; values of a row are contiguous
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
  double eps;
};

template <typename X, typename W>
void run(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const TileOutput out = {a.codes, a.scales, a.values, a.values_dtype, kRowTiles, a.code, a.scale, a.width};
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    const std::unique_ptr<X[]> y(new X[a.width]);
    for (int64_t row = begin; row < end; ++row) {
      call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
        normalise(reinterpret_cast<const X*>(a.x) + row * a.x_stride, static_cast<const W*>(a.weight), a.width, a.eps,
                  y.get());
      });
      for (int64_t start = 0; start < a.width; start += kStrip)
        quantise_row(isa, out, strip, y.get() + start, a.dtype, row, start,
                     start + kStrip < a.width ? kStrip : a.width - start);
    }
  };
  parallel_for(a.rows, 4 * a.threads, a.rows * a.width < kForkValues ? 1 : a.threads, a.fork, work);
}

}  // namespace
}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_fp8_rms_norm(const void* record) {
  using namespace abyssal;
  Arguments a;
  std::memcpy(&a, record, sizeof(a));
  if (!is_dtype(a.dtype) || !is_dtype(a.weight_dtype) || !is_dtype(a.values_dtype)) return kBadDtype;
  if (!is_format(kRowTiles, a.code, a.scale)) return kBadDtype;
  if (a.rows <= 0 || a.width <= 0) return a.rows < 0 || a.width < 0 ? kBadShape : kOk;
  if (!a.x || !a.weight || !a.codes || !a.scales || !a.values) return kNoStorage;
  const bool bf16 = a.dtype == kBFloat16, weight_bf16 = a.weight_dtype == kBFloat16;
  if (bf16) weight_bf16 ? run<uint16_t, uint16_t>(a) : run<uint16_t, float>(a);
  else weight_bf16 ? run<float, uint16_t>(a) : run<float, float>(a);
  return kOk;
}
