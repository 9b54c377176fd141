// Rotary positions of rows of heads, each token's turned by its own angles (rotate.h).

#include "rotate.h"

#include "common.h"

namespace abyssal {
namespace {

struct Arguments {
  const char* x;       // (tokens, heads, 2 * pairs)
  const float* turns;  // (tokens, pairs, 2), contiguous
  char* y;             // (tokens, heads, 2 * pairs), contiguous
  int64_t dtype, interleaved;
  int64_t tokens, heads, pairs, token_stride, head_stride;
  int64_t isa_limit;
};

template <typename T>
void run(const Arguments& a) {
  call_vectorized(choose_isa(a.isa_limit), [&]() ABYSSAL_INLINE_LAMBDA {
    for (int64_t t = 0; t < a.tokens; ++t)
      for (int64_t h = 0; h < a.heads; ++h)
        rotate_row(reinterpret_cast<const T*>(a.x) + t * a.token_stride + h * a.head_stride,
                   a.turns + t * a.pairs * 2, a.pairs, a.interleaved != 0,
                   reinterpret_cast<T*>(a.y) + (t * a.heads + h) * a.pairs * 2);
  });
}

}  // namespace
}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_rotate(const void* record) {
  using namespace abyssal;
  Arguments a;
  std::memcpy(&a, record, sizeof(a));
  if (!is_dtype(a.dtype)) return kBadDtype;
  if (a.tokens < 0 || a.heads < 0 || a.pairs < 0) return kBadShape;
  if (a.tokens * a.heads * a.pairs == 0) return kOk;
  if (!a.x || !a.turns || !a.y) return kNoStorage;
  a.dtype == kBFloat16 ? run<uint16_t>(a) : run<float>(a);
  return kOk;
}
