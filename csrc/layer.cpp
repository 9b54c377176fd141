// A whole layer of decoding as one call (layer.h): the parts that attention and feed-forward share, and the entry.

#include "layer.h"

namespace abyssal {

Status Layer::normalise(const char* x, int64_t x_stride, const Norm& norm, char* y) {
  return rms_norm({x, norm.w, y, w.dtype, norm.dtype, s.tokens, norm.width, x_stride, s.threads, s.fork, s.isa_limit,
                   norm.eps});
}

Status Layer::multiply(const char* x, int64_t x_dtype, const Matrix& matrix, char* y, int64_t y_dtype) {
  return gemm({matrix.w, x, y, matrix.dtype, x_dtype, y_dtype, 1, matrix.outputs, matrix.inputs, matrix.inputs, 0,
               matrix.inputs, 0, s.threads, s.fork, s.isa_limit},
              &s.tokens);
}

// Each expert's rows times its matrix.
Status Layer::grouped(const char* x, int64_t x_stride, const Matrix& matrix, const int64_t* counts, char* y) {
  return gemm({matrix.w, x, y, matrix.dtype, w.dtype, w.dtype, w.experts, matrix.outputs, matrix.inputs, x_stride,
               matrix.outputs * matrix.inputs, matrix.inputs, 0, s.threads, s.fork, s.isa_limit},
              counts);
}

namespace {

template <typename T>
ABYSSAL_INLINE void add_values(const T* a, const T* b, int64_t count, T* y) {
  for (int64_t i = 0; i < count; ++i) narrow(widen(a[i]) + widen(b[i]), y + i);
}

}  // namespace

void Layer::add(const char* a, const char* b, char* y) {
  const int64_t count = s.tokens * w.attention_norm.width;
  call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
    if (w.dtype == kBFloat16)
      add_values(reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), count,
                 reinterpret_cast<uint16_t*>(y));
    else
      add_values(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), count,
                 reinterpret_cast<float*>(y));
  });
}

namespace {

Status check(const LayerWeights& w, const LayerStep& s) {
  if (!is_dtype(w.dtype)) return kBadDtype;
  if (s.tokens < 1 || w.heads < 1 || w.nope < 1 || w.rope < 2 || w.value_dim < 1 || w.latent < 2) return kBadShape;
  if (s.page_tokens < 1 || s.num_pages < 1 || s.stride != w.latent + w.rope) return kBadShape;
  if (!s.x || !s.y || !s.turns || !s.slots || !s.entries || !s.sequences || !s.table) return kNoStorage;
  if (w.router.w && (!s.scores || !s.ids || !s.weights)) return kNoStorage;
  if (!w.router.w && !w.shared_gate_up.w) return kNoStorage;
  int64_t queries = 0;
  for (int64_t i = 0; i < s.num_sequences; ++i) queries += s.sequences[i].queries;
  if (queries != s.tokens) return kBadShape;
  const int64_t last = ((s.num_pages - 1) * s.page_stride) / s.stride + s.page_tokens - 1;
  for (int64_t t = 0; t < s.tokens; ++t)
    if (s.slots[t] < 0 || s.slots[t] > last) return kBadSlot;
  return kOk;
}

}  // namespace
}  // namespace abyssal

// The record is a LayerStep and then LayerWeights.  Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_layer(const void* record) {
  using namespace abyssal;
  LayerStep step;
  LayerWeights weights;
  std::memcpy(&step, record, sizeof(step));
  std::memcpy(&weights, static_cast<const char*>(record) + sizeof(step), sizeof(weights));
  ABYSSAL_TRY(check(weights, step));
  thread_local Buffer attended;
  char* middle = attended.take(step.tokens * weights.attention_norm.width * bytes_of(weights.dtype));
  Layer layer(weights, step);
  ABYSSAL_TRY(layer.attention(step.x, middle));
  return layer.feed_forward(middle, step.y);
}
