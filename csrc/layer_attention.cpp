// The attention of a layer of decoding: latent attention in its absorbed form, as model/attention.py puts it together.

#include "layer.h"
#include "rotate.h"

namespace abyssal {

// The query (tokens, heads, nope + rope), rotary part not yet turned [V3 eq. 6-9].
Status Layer::query(const char* h, char** q) {
  thread_local Buffer downs, latents, queries;
  *q = queries.take(s.tokens * w.q_b.outputs * element);
  if (!w.q_a.w) return multiply(h, w.dtype, w.q_b, *q, w.dtype);
  char* down = downs.take(s.tokens * w.q_a.outputs * element);
  char* latent = latents.take(s.tokens * w.q_a.outputs * element);
  ABYSSAL_TRY(multiply(h, w.dtype, w.q_a, down, w.dtype));
  ABYSSAL_TRY(normalise(down, w.q_a.outputs, w.q_norm, latent));
  return multiply(latent, w.dtype, w.q_b, *q, w.dtype);
}

namespace {

template <typename T>
ABYSSAL_INLINE void turn(const char* x, const float* turns, int64_t pairs, bool interleaved, char* y) {
  rotate_row(reinterpret_cast<const T*>(x), turns, pairs, interleaved, reinterpret_cast<T*>(y));
}

}  // namespace

// What the tokens leave in the cache: normalised latent, turned key [V3 eq. 1, 3].
Status Layer::write_entries(const char* h) {
  thread_local Buffer downs, latents;
  char* down = downs.take(s.tokens * w.kv_a.outputs * element);
  char* latent = latents.take(s.tokens * w.latent * element);
  ABYSSAL_TRY(multiply(h, w.dtype, w.kv_a, down, w.dtype));
  ABYSSAL_TRY(normalise(down, w.kv_a.outputs, w.kv_norm, latent));
  call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
    for (int64_t t = 0; t < s.tokens; ++t) {
      char* entry = s.entries + s.slots[t] * s.stride * element;
      std::memcpy(entry, latent + t * w.latent * element, static_cast<size_t>(w.latent * element));
      const char* key = down + (t * w.kv_a.outputs + w.latent) * element;
      const float* turns = s.turns + t * w.rope;
      if (w.dtype == kBFloat16) turn<uint16_t>(key, turns, w.rope / 2, w.interleaved != 0, entry + w.latent * element);
      else turn<float>(key, turns, w.rope / 2, w.interleaved != 0, entry + w.latent * element);
    }
  });
  return kOk;
}

// Each head's rows times its matrix of kv_b: y (heads, tokens, outputs).  x is (tokens, heads, x_width), of which the
// first `inputs` values are taken.
Status Layer::by_head(const char* x, int64_t x_width, int64_t inputs, const char* matrix, bool transposed,
                      int64_t outputs, char** y) {
  thread_local Buffer sorted, products;
  thread_local std::vector<int64_t> counts;
  counts.assign(static_cast<size_t>(w.heads), s.tokens);
  *y = products.take(w.heads * s.tokens * outputs * element);
  const char* rows = x;
  int64_t row_stride = x_width;
  if (s.tokens > 1) {
    char* copy = sorted.take(w.heads * s.tokens * inputs * element);
    for (int64_t h = 0; h < w.heads; ++h)
      for (int64_t t = 0; t < s.tokens; ++t)
        std::memcpy(copy + (h * s.tokens + t) * inputs * element, x + (t * w.heads + h) * x_width * element,
                    static_cast<size_t>(inputs * element));
    rows = copy;
    row_stride = inputs;
  }
  return gemm({matrix, rows, *y, w.kv_b.dtype, w.dtype, w.dtype, w.heads, outputs, inputs, row_stride,
               (w.nope + w.value_dim) * w.latent, w.latent, transposed, s.threads, s.fork, s.isa_limit},
              counts.data());
}

// What each head attends to: (tokens, heads, value_dim), W_UK folded into the query and W_UV applied after the sum.
Status Layer::attend(char* q, char** attended) {
  thread_local Buffer folded_queries, sums, outputs;
  const int64_t q_width = w.nope + w.rope, width = w.latent + w.rope, rows = s.tokens * w.heads;
  char *folded, *values;
  ABYSSAL_TRY(by_head(q, q_width, w.nope, w.kv_b.w, true, w.latent, &folded));
  char* latent_q = folded_queries.take(rows * width * element);
  call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
    for (int64_t t = 0; t < s.tokens; ++t)
      for (int64_t h = 0; h < w.heads; ++h) {
        char* row = latent_q + (t * w.heads + h) * width * element;
        std::memcpy(row, folded + (h * s.tokens + t) * w.latent * element, static_cast<size_t>(w.latent * element));
        const char* rope = q + ((t * w.heads + h) * q_width + w.nope) * element;
        const float* turns = s.turns + t * w.rope;
        if (w.dtype == kBFloat16) turn<uint16_t>(rope, turns, w.rope / 2, w.interleaved != 0, row + w.latent * element);
        else turn<float>(rope, turns, w.rope / 2, w.interleaved != 0, row + w.latent * element);
      }
  });
  char* sum = sums.take(rows * w.latent * element);
  ABYSSAL_TRY(latent_attention({latent_q, s.entries, sum, s.sequences, s.table, w.dtype, w.dtype, s.num_sequences,
                                w.heads, width, w.latent, s.num_pages, s.page_tokens, s.page_stride, s.stride,
                                s.table_size, s.threads, s.fork, s.isa_limit, w.softmax_scale}));
  ABYSSAL_TRY(by_head(sum, w.latent, w.latent, w.kv_b.w + w.nope * w.latent * bytes_of(w.kv_b.dtype), false,
                      w.value_dim, &values));
  if (s.tokens == 1) {
    *attended = values;
    return kOk;
  }
  *attended = outputs.take(rows * w.value_dim * element);
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t h = 0; h < w.heads; ++h)
      std::memcpy(*attended + (t * w.heads + h) * w.value_dim * element,
                  values + (h * s.tokens + t) * w.value_dim * element, static_cast<size_t>(w.value_dim * element));
  return kOk;
}

Status Layer::attention(const char* x, char* y) {
  thread_local Buffer normed, projected;
  const int64_t hidden = w.attention_norm.width;
  char *h = normed.take(s.tokens * hidden * element), *out = projected.take(s.tokens * hidden * element);
  char *q, *attended;
  ABYSSAL_TRY(normalise(x, hidden, w.attention_norm, h));
  ABYSSAL_TRY(write_entries(h));
  ABYSSAL_TRY(query(h, &q));
  ABYSSAL_TRY(attend(q, &attended));
  ABYSSAL_TRY(multiply(attended, w.dtype, w.out, out, w.dtype));
  add(x, out, y);
  return kOk;
}

}  // namespace abyssal
