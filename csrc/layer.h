// A whole layer of decoding as one call: what its parts share.
//
// The layer is the row of operators that model/block.py puts together, called here one after another on the same
// values, so its result has their bits.  What is saved is the way there and back: at one token a layer is some forty
// operators of a few microseconds each, and each would cost as much again in Python.
#pragma once

#include <vector>

#include "common.h"
#include "operators.h"

namespace abyssal {

struct Matrix {  // (outputs, inputs), contiguous; null where the layer has none
  const char* w;
  int64_t dtype, outputs, inputs;
};

struct Norm {
  const void* w;
  int64_t dtype, width;
  double eps;
};

struct LayerWeights {  // what is the same from step to step
  int64_t dtype;       // of activations and entries
  Norm attention_norm, q_norm, kv_norm, ffn_norm;
  Matrix q_a, q_b, kv_a, kv_b, out;  // without q_a, q_b makes the query from the hidden state
  int64_t heads, nope, rope, value_dim, latent, interleaved;
  double softmax_scale;
  Matrix shared_gate_up, shared_down;  // the shared experts', or a dense layer's
  Matrix router;                       // null in a dense layer
  Matrix gate_up, down;                // of one expert; the experts lie one after another
  const float* bias;
  int64_t experts, top_k, groups, kept_groups, softmax, renormalise;
  double route_scale;
};

struct LayerStep {  // what is of this step
  const char* x;    // (tokens, hidden)
  char* y;          // the same
  const float* turns;    // (tokens, rope / 2, 2)
  const int64_t* slots;  // (tokens): rows of `entries` that the tokens write
  char* entries;         // of this layer
  const SequencePages* sequences;
  const int64_t* table;
  float* scores;   // (tokens, experts)
  int64_t* ids;    // (tokens, top_k)
  float* weights;  // (tokens, top_k)
  int64_t tokens, num_sequences, table_size;
  int64_t num_pages, page_tokens, page_stride, stride;  // as in LatentAttentionArguments
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
};

static_assert(sizeof(LayerWeights) == 72 * 8 && sizeof(LayerStep) == 20 * 8, "kernels/layer.py packs 8-byte fields");

// Values between the operators; kept from call to call.
class Buffer {
 public:
  char* take(int64_t bytes) {
    if (static_cast<int64_t>(bytes_.size()) < bytes) bytes_.resize(static_cast<size_t>(bytes));
    return bytes_.data();
  }

 private:
  std::vector<char> bytes_;
};

class Layer {
 public:
  Layer(const LayerWeights& weights, const LayerStep& step)
      : w(weights), s(step), element(bytes_of(weights.dtype)), isa(choose_isa(step.isa_limit)) {}

  Status attention(const char* x, char* y);     // y = x + attention
  Status feed_forward(const char* x, char* y);  // y = x + feed-forward

 private:
  Status query(const char* h, char** q);
  Status write_entries(const char* h);
  Status attend(char* q, char** attended);
  Status by_head(const char* x, int64_t x_width, int64_t inputs, const char* matrix, bool transposed, int64_t outputs,
                 char** y);
  Status routed(const char* u, const char* residual, char* y);
  Status expert_rows(const char* u, char** rows, const int64_t** places);
  Status dense(const char* u, char** y);
  Status normalise(const char* x, int64_t x_stride, const Norm& norm, char* y);
  Status multiply(const char* x, int64_t x_dtype, const Matrix& matrix, char* y, int64_t y_dtype);
  Status grouped(const char* x, int64_t x_stride, const Matrix& matrix, const int64_t* counts, char* y);
  void add(const char* a, const char* b, char* y);

  const LayerWeights& w;
  const LayerStep& s;
  const int64_t element;
  const Isa isa;
};

#define ABYSSAL_TRY(call)                                         \
  do {                                                            \
    if (const Status status = (call); status != kOk) return status; \
  } while (false)

}  // namespace abyssal
