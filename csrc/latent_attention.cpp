// One query a head over the cached latents of one sequence: softmax(q · entryᵀ · scale) · entry[:value_dim].
//
// Every head reads the same entries, which are cut into chunks of kChunk tokens.  A chunk gives each head the largest
// score, the sum of the weights relative to it and the weighted sum of the values (Milakov and Gimelshein, arXiv
// 1805.02867); the chunks are then joined in their order.  Chunks depend on the number of entries alone, so the number
// of threads changes no bit.  Scores, weights and sums are FP32; the chunks are joined in FP64.

#include <algorithm>
#include <limits>
#include <vector>

#include "axpy.h"
#include "common.h"
#include "dot.h"
#include "exp.h"

namespace abyssal {
namespace {

constexpr int64_t kChunk = 128;          // entries that a chunk reads, a multiple of kDotRows and kLanes
constexpr int64_t kForkProducts = 1 << 21;  // below this, waking threads costs more than it gains

struct Arguments {
  const char* q;        // (heads, width), contiguous
  const char* entries;  // (length, width), rows `stride` values apart
  char* y;              // (heads, value_dim), contiguous, in the dtype of q
  int64_t q_dtype, entries_dtype;
  int64_t heads, length, width, value_dim, stride;
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
  double scale;
};

struct Part {  // what a chunk hands on for one head
  float largest, sum;
};

// Turn scores into exp(scale * score - largest) over the chunk.  The scores after the last are overwritten, up to a
// multiple of kLanes; the order of the sum depends on `count` alone.
ABYSSAL_INLINE Part weigh(float* scores, int64_t count, float scale) {
  const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
  float largest[kLanes], sums[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) largest[lane] = -std::numeric_limits<float>::infinity();
  for (int64_t i = count; i < whole; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) scores[i] *= scale;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane)
      largest[lane] = scores[i + lane] > largest[lane] ? scores[i + lane] : largest[lane];
  for (int lane = 1; lane < kLanes; ++lane) largest[0] = largest[lane] > largest[0] ? largest[lane] : largest[0];
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      scores[i + lane] = exp_nonpositive(scores[i + lane] - largest[0]);
      sums[lane] += scores[i + lane];
    }
  for (int lane = 1; lane < kLanes; ++lane) sums[0] += sums[lane];
  return {largest[0], sums[0]};
}

void join(const Arguments& a, const Part* parts, const float* values, int64_t chunks) {
  for (int64_t head = 0; head < a.heads; ++head) {
    float largest = parts[head].largest;
    double sum = 0.0;
    for (int64_t c = 1; c < chunks; ++c) largest = std::max(largest, parts[c * a.heads + head].largest);
    thread_local std::vector<double> total;
    total.assign(static_cast<size_t>(a.value_dim), 0.0);
    for (int64_t c = 0; c < chunks; ++c) {
      const Part& part = parts[c * a.heads + head];
      const float factor = exp_nonpositive(part.largest - largest);
      const float* value = values + (c * a.heads + head) * a.value_dim;
      sum += factor * part.sum;
      for (int64_t i = 0; i < a.value_dim; ++i) total[static_cast<size_t>(i)] += factor * value[i];
    }
    const double scale = 1.0 / sum;
    for (int64_t i = 0; i < a.value_dim; ++i) {
      const float result = static_cast<float>(total[static_cast<size_t>(i)] * scale);
      const int64_t at = head * a.value_dim + i;
      if (a.q_dtype == kBFloat16) narrow(result, reinterpret_cast<uint16_t*>(a.y) + at);
      else narrow(result, reinterpret_cast<float*>(a.y) + at);
    }
  }
}

}  // namespace
}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_latent_attention(const void* record) {
  using namespace abyssal;
  Arguments a;
  std::memcpy(&a, record, sizeof(a));
  if (!is_dtype(a.q_dtype) || !is_dtype(a.entries_dtype)) return kBadDtype;
  if (a.heads < 0 || a.length < 1 || a.width < 1 || a.value_dim < 0 || a.value_dim > a.width) return kBadShape;
  if (a.heads == 0 || a.value_dim == 0) return kOk;
  if (!a.q || !a.entries || !a.y) return kNoStorage;

  const Isa isa = choose_isa(a.isa_limit);
  const Dot dot = choose_dot(isa, a.entries_dtype == kBFloat16);
  const AxpyFunction axpy = choose_axpy(isa, a.entries_dtype == kBFloat16);
  const int64_t padded = padded_size(a.width), chunks = (a.length + kChunk - 1) / kChunk;
  const int64_t line_bytes = a.stride * bytes_of(a.entries_dtype);
  thread_local std::vector<float> packed, values;
  thread_local std::vector<Part> parts;
  packed.resize(static_cast<size_t>(a.heads * padded));
  values.resize(static_cast<size_t>(chunks * a.heads * a.value_dim));
  parts.resize(static_cast<size_t>(chunks * a.heads));
  for (int64_t head = 0; head < a.heads; ++head)
    pack_row(a.q + head * a.width * bytes_of(a.q_dtype), a.q_dtype, a.width, dot.half, packed.data() + head * padded);

  float* all_values = values.data();  // the workers must not see their own thread_local vectors
  Part* all_parts = parts.data();
  const float* q = packed.data();
  const float scale = static_cast<float>(a.scale);
  const auto work = [=](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item / a.heads, head = item % a.heads;
      const int64_t first = chunk * kChunk, count = std::min(kChunk, a.length - first);
      const char* entries = a.entries + first * line_bytes;
      const float* x = q + head * padded;
      float scores[kChunk];
      int64_t i = 0;
      for (; i + kDotRows <= count; i += kDotRows)
        dot.block(entries + i * line_bytes, a.stride, x, a.width, scores + i);
      for (; i < count; ++i) dot.single(entries + i * line_bytes, a.stride, x, a.width, scores + i);
      Part& part = all_parts[item];
      call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA { part = weigh(scores, count, scale); });
      axpy(entries, a.stride, scores, count, a.value_dim, all_values + item * a.value_dim);
    }
  };
  const int64_t products = a.heads * a.length * (a.width + a.value_dim);
  parallel_for(chunks * a.heads, chunks, products < kForkProducts ? 1 : a.threads, a.fork, work);
  join(a, all_parts, all_values, chunks);
  return kOk;
}
