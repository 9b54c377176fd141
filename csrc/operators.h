// The operators as C++ functions, for those that are made of several: what the exported functions unpack and call.
#pragma once

#include "common.h"

namespace abyssal {

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
