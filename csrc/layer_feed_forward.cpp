// The feed-forward of a layer of decoding: dense, or routed and shared experts, all on this rank, each expert in its
// own slot, as model/block.py and the local dispatcher put it together.

#include "layer.h"

namespace abyssal {

// The shared experts, or a dense layer's feed-forward.
Status Layer::dense(const char* u, char** y) {
  thread_local Buffer hiddens, activated, outputs;
  const int64_t width = w.shared_down.inputs;
  char *gate_up = hiddens.take(s.tokens * 2 * width * element), *h = activated.take(s.tokens * width * element);
  *y = outputs.take(s.tokens * w.shared_down.outputs * element);
  ABYSSAL_TRY(multiply(u, w.dtype, w.shared_gate_up, gate_up, w.dtype));
  ABYSSAL_TRY(swiglu({gate_up, nullptr, h, w.dtype, kFloat32, s.tokens, width, 2 * width, s.threads, s.fork,
                      s.isa_limit}));
  return multiply(h, w.dtype, w.shared_down, *y, w.dtype);
}

// The rows of the experts' outputs and, for each token and choice, its row.  Rows are in the order of the experts and,
// of one expert, of the tokens.
Status Layer::expert_rows(const char* u, char** rows, const int64_t** places) {
  thread_local Buffer inputs, hiddens, activated, outputs;
  thread_local std::vector<int64_t> counts, next, place;
  thread_local std::vector<float> weights;
  const int64_t hidden = w.attention_norm.width, width = w.down.inputs, num_rows = s.tokens * w.top_k;
  counts.assign(static_cast<size_t>(w.experts), 0);
  next.resize(static_cast<size_t>(w.experts));
  place.resize(static_cast<size_t>(num_rows));
  weights.resize(static_cast<size_t>(num_rows));
  for (int64_t i = 0; i < num_rows; ++i) ++counts[static_cast<size_t>(s.ids[i])];
  for (int64_t e = 0, first = 0; e < w.experts; first += counts[static_cast<size_t>(e++)])
    next[static_cast<size_t>(e)] = first;
  char* sorted = s.tokens > 1 ? inputs.take(num_rows * hidden * element) : nullptr;
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t row = place[static_cast<size_t>(i)] = next[static_cast<size_t>(s.ids[i])]++;
    weights[static_cast<size_t>(row)] = s.weights[i];
    if (sorted)
      std::memcpy(sorted + row * hidden * element, u + i / w.top_k * hidden * element,
                  static_cast<size_t>(hidden * element));
  }
  char *gate_up = hiddens.take(num_rows * 2 * width * element), *h = activated.take(num_rows * width * element);
  *rows = outputs.take(num_rows * hidden * element);
  *places = place.data();
  // One token is every row of its experts.
  ABYSSAL_TRY(grouped(sorted ? sorted : u, sorted ? hidden : 0, w.gate_up, counts.data(), gate_up));
  ABYSSAL_TRY(swiglu({gate_up, weights.data(), h, w.dtype, kFloat32, num_rows, width, 2 * width, s.threads, s.fork,
                      s.isa_limit}));
  return grouped(h, width, w.down, counts.data(), *rows);
}

namespace {

ABYSSAL_INLINE void widen_all(const uint16_t* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = widen(x[i]);
}

}  // namespace

// y = residual + the sum of the routed experts.
Status Layer::routed(const char* u, const char* residual, char* y) {
  thread_local Buffer wide, logits_buffer, sums;
  const int64_t hidden = w.attention_norm.width;
  const char* u_wide = u;
  if (w.dtype == kBFloat16) {
    float* values = reinterpret_cast<float*>(wide.take(s.tokens * hidden * 4));
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      widen_all(reinterpret_cast<const uint16_t*>(u), s.tokens * hidden, values);
    });
    u_wide = reinterpret_cast<const char*>(values);
  }
  char* logits = logits_buffer.take(s.tokens * w.experts * 4);
  ABYSSAL_TRY(multiply(u_wide, kFloat32, w.router, logits, kFloat32));
  ABYSSAL_TRY(gate({reinterpret_cast<const float*>(logits), w.bias, s.scores, s.ids, s.weights, s.tokens, w.experts,
                    w.top_k, w.groups, w.kept_groups, w.softmax, w.renormalise, s.threads, s.fork, s.isa_limit,
                    w.route_scale}));
  char *rows, *sum = sums.take(s.tokens * hidden * element);
  const int64_t* places;
  ABYSSAL_TRY(expert_rows(u, &rows, &places));
  ABYSSAL_TRY(row_sums({rows, places, sum, w.dtype, s.tokens * w.top_k, hidden, s.tokens, w.top_k, s.threads, s.fork,
                        s.isa_limit}));
  add(residual, sum, y);
  return kOk;
}

Status Layer::feed_forward(const char* x, char* y) {
  thread_local Buffer normed;
  const int64_t hidden = w.attention_norm.width;
  char *u = normed.take(s.tokens * hidden * element), *shared;
  ABYSSAL_TRY(normalise(x, hidden, w.ffn_norm, u));
  if (w.shared_gate_up.w) {
    ABYSSAL_TRY(dense(u, &shared));
    add(x, shared, y);
    x = y;
  }
  return w.router.w ? routed(u, x, y) : kOk;
}

}  // namespace abyssal
