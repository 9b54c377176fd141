// The operators as C++ functions, for those that are made of several: what the exported functions unpack and call.
#pragma once

#include "common.h"

namespace abyssal {

struct GemmArguments {
  const char* w;
  const char* x;
  char* y;  // (rows, num_outputs), contiguous
  int64_t w_dtype, x_dtype, y_dtype;
  int64_t num_groups, num_outputs, size;
  int64_t x_stride;     // from row to row; values of a row are contiguous
  int64_t slot_stride;  // from group to group of W
  int64_t line_stride;  // from output to output or, transposed, from input to input
  int64_t transposed, threads;
  ForkFunction fork;
  int64_t isa_limit;
};

// y = x Wᵀ for groups of consecutive rows; `counts` has the rows of each group.
Status gemm(const GemmArguments& arguments, const int64_t* counts);

struct RmsNormArguments {
  const char* x;
  const void* weight;
  char* y;                        // (rows, width), contiguous
  int64_t dtype, weight_dtype;    // of x and y; of weight
  int64_t rows, width, x_stride;  // from row to row; values of a row are contiguous
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
  double eps;
};

// Each row divided by its root mean square, times the weight.
Status rms_norm(const RmsNormArguments& arguments);

struct SwigluArguments {
  const char* gate_up;  // (rows, 2 * width): gate, then up
  const void* weights;  // (rows), contiguous, or null
  char* y;              // (rows, width), contiguous
  int64_t dtype, weights_dtype;
  int64_t rows, width, stride;  // from row to row of gate_up
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
};

// silu(gate) · up · weight.
Status swiglu(const SwigluArguments& arguments);

struct GateArguments {
  const float* logits;  // (rows, experts), contiguous
  const float* bias;    // (experts), or null
  float* scores;        // (rows, experts)
  int64_t* ids;         // (rows, top_k)
  float* weights;       // (rows, top_k)
  int64_t rows, experts, top_k, groups, kept_groups;
  int64_t softmax, renormalise;
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
  double route_scale;
};

// Scores, choice and weights of each row's experts.
Status gate(const GateArguments& arguments);

struct RowSumsArguments {
  const char* rows;      // (num_rows, width), contiguous
  const int64_t* index;  // (tokens, choices): rows of each token
  char* y;               // (tokens, width), contiguous
  int64_t dtype;
  int64_t num_rows, width, tokens, choices;
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
};

// The sum of each token's rows.
Status row_sums(const RowSumsArguments& arguments);

struct SequencePages {  // of one sequence in a table of pages
  int64_t queries;      // its last tokens: the last query sees all entries, the one before it all but one, ...
  int64_t length;       // entries
  int64_t first_page;   // where its pages begin in the table
};

struct LatentAttentionArguments {
  const char* q;        // (queries, heads, width), contiguous, sequence after sequence
  const char* entries;  // page p's first entry is p * page_stride values from here, the next `stride` values further
  char* y;              // (queries, heads, value_dim), contiguous, in the dtype of q
  const SequencePages* sequences;
  const int64_t* table;  // numbers of pages
  int64_t q_dtype, entries_dtype;
  int64_t num_sequences, heads, width, value_dim;
  int64_t num_pages, page_tokens, page_stride, stride;
  int64_t table_size;
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
  double scale;
};

// softmax(q · entryᵀ · scale) · entry[:value_dim] for each query and head.
Status latent_attention(const LatentAttentionArguments& arguments);

}  // namespace abyssal
