// Queries over the cached latents of their sequences: softmax(q · entryᵀ · scale) · entry[:value_dim], a head.
//
// A sequence's entries lie in pages of equally many tokens anywhere in one storage, and a table says which; a sequence
// in one piece is one page.  Any number of queries of a sequence, its last, and sequences of any lengths go together.
//
// Every head reads the same entries, which are cut into chunks of kChunk tokens.  A chunk gives each head the largest
// score, the sum of the weights relative to it and the weighted sum of the values (Milakov and Gimelshein, arXiv
// 1805.02867); the chunks are then joined in their order.  The chunks of a query depend on the number of entries that
// it sees alone, so neither the threads nor other queries, heads or sequences change a bit.  Scores, weights and sums are
// FP32; the chunks are joined in FP64.

#include <algorithm>
#include <limits>
#include <vector>

#include "axpy.h"
#include "common.h"
#include "dot.h"
#include "exp.h"
#include "operators.h"

namespace abyssal {
namespace {

constexpr int64_t kChunk = 128;             // entries that a chunk reads, a multiple of kLanes
constexpr int64_t kScratchFloats = 1 << 20;  // of the chunks' values between two joins
constexpr int64_t kJoined = 128;             // values joined side by side
constexpr int64_t kWholeQueries = 4;         // of a thread, at least, for queries not to be shared by threads
constexpr int64_t kForkProducts = 1 << 21;  // below this, waking threads costs more than it gains

using Arguments = LatentAttentionArguments;

struct Query {
  const int64_t* pages;  // of its sequence
  int64_t seen;          // entries
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

// The chunks of one query as its row (heads, value_dim) of y.
template <typename Y>
ABYSSAL_INLINE void join(const Arguments& a, const Part* parts, const float* values, int64_t chunks, Y* y) {
  double total[kJoined];
  for (int64_t head = 0; head < a.heads; ++head) {
    float largest = parts[head].largest;
    double sum = 0.0;
    for (int64_t c = 1; c < chunks; ++c) largest = std::max(largest, parts[c * a.heads + head].largest);
    for (int64_t c = 0; c < chunks; ++c)
      sum += exp_nonpositive(parts[c * a.heads + head].largest - largest) * parts[c * a.heads + head].sum;
    const double scale = 1.0 / sum;
    for (int64_t start = 0; start < a.value_dim; start += kJoined) {
      const int64_t count = std::min(kJoined, a.value_dim - start);
      for (int64_t i = 0; i < count; ++i) total[i] = 0.0;
      for (int64_t c = 0; c < chunks; ++c) {
        const float factor = exp_nonpositive(parts[c * a.heads + head].largest - largest);
        const float* value = values + (c * a.heads + head) * a.value_dim + start;
        for (int64_t i = 0; i < count; ++i) total[i] += factor * value[i];
      }
      for (int64_t i = 0; i < count; ++i)
        narrow(static_cast<float>(total[i] * scale), y + head * a.value_dim + start + i);
    }
  }
}

struct Tiles {
  Isa isa;
  Dot dot;
  Axpy axpy;
};

// One chunk of a query's entries, from `start`, for all heads, a few side by side; x and the results are the query's own.
void attend(const Arguments& a, const Tiles& tiles, const Query& query, int64_t start, const float* packed,
            int64_t padded, Part* parts, float* values) {
  const int64_t element = bytes_of(a.entries_dtype), x_stride = padded * 4 / bytes_of(tiles.dot.x_dtype);
  const int64_t count = std::min(kChunk, query.seen - start);
  const auto piece = [&](int64_t i, const char** entries) {  // entries from i on that lie together, and where
    const int64_t within = (start + i) % a.page_tokens;
    *entries = a.entries + (query.pages[(start + i) / a.page_tokens] * a.page_stride + within * a.stride) * element;
    return std::min(a.page_tokens - within, count - i);
  };
  const char* entries;
  float scores[kTileRows * kChunk];
  for (int64_t head = 0; head < a.heads;) {
    const int64_t most = tiles.dot.max_rows, left = a.heads - head, left_tiles = (left + most - 1) / most;
    const int64_t rows = (left + left_tiles - 1) / left_tiles;
    const float* x = packed + head * padded;
    for (int64_t from = 0; from < count;) {
      const int64_t size = piece(from, &entries);
      int64_t i = 0;
      for (; rows > 1 && i + kTileOutputs <= size; i += kTileOutputs)
        tiles.dot.tiles[rows - 1](entries + i * a.stride * element, a.stride, x, x_stride, a.width, scores + from + i,
                                  kChunk);
      for (int64_t m = 0; m < rows; ++m)
        dot_row(tiles.dot, entries + i * a.stride * element, a.stride, element, x + m * padded, a.width, size - i,
                scores + m * kChunk + from + i);
      from += size;
    }
    const float scale = static_cast<float>(a.scale);
    call_vectorized(tiles.isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t m = 0; m < rows; ++m) parts[head + m] = weigh(scores + m * kChunk, count, scale);
    });
    for (int64_t from = 0; from < count;) {  // one chain a value, from piece to piece
      const int64_t size = piece(from, &entries);
      tiles.axpy.tiles[rows - 1](entries, a.stride, scores + from, kChunk, size, a.value_dim,
                                 values + head * a.value_dim, a.value_dim, from > 0);
      from += size;
    }
    head += rows;
  }
}

Status check(const Arguments& a, std::vector<Query>& queries) {
  if (!is_dtype(a.q_dtype) || !is_dtype(a.entries_dtype)) return kBadDtype;
  if (a.num_sequences < 0 || a.heads < 0 || a.page_tokens < 1 || a.width < 1) return kBadShape;
  if (a.value_dim < 0 || a.value_dim > a.width) return kBadShape;
  queries.clear();
  if (a.heads == 0 || a.value_dim == 0) return kOk;
  for (const SequencePages* s = a.sequences; s != a.sequences + a.num_sequences; ++s) {
    if (s->queries < 0 || s->length < s->queries) return kBadShape;
    const int64_t pages = (s->length + a.page_tokens - 1) / a.page_tokens;
    if (s->first_page < 0 || s->first_page + pages > a.table_size) return kBadShape;
    for (int64_t i = s->first_page; i < s->first_page + pages; ++i)
      if (a.table[i] < 0 || a.table[i] >= a.num_pages) return kBadSlot;
    for (int64_t i = 1; i <= s->queries; ++i) queries.push_back({a.table + s->first_page, s->length - s->queries + i});
  }
  return queries.empty() || (a.q && a.entries && a.y && a.table) ? kOk : kNoStorage;
}

}  // namespace

Status latent_attention(const Arguments& a) {
  thread_local std::vector<Query> kept_queries;
  const Status status = check(a, kept_queries);
  if (status != kOk || kept_queries.empty()) return status;
  const Query* queries = kept_queries.data();  // the workers must not see their own thread_local vectors
  const int64_t num_queries = static_cast<int64_t>(kept_queries.size());

  const Isa isa = choose_isa(a.isa_limit);
  const Tiles tiles{isa, choose_dot(isa, a.entries_dtype, a.q_dtype), choose_axpy(isa, a.entries_dtype == kBFloat16)};
  int64_t longest = 0, seen = 0;
  for (const Query& query : kept_queries) longest = std::max(longest, query.seen), seen += query.seen;
  const int64_t padded = padded_size(a.width), most_chunks = (longest + kChunk - 1) / kChunk;
  const int64_t q_bytes = a.heads * a.width * bytes_of(a.q_dtype), query_values = most_chunks * a.heads * a.value_dim;
  const int64_t at_once = std::min(num_queries, std::max<int64_t>(kScratchFloats / query_values, 1));
  thread_local std::vector<float> packed, values;
  thread_local std::vector<Part> parts;
  packed.resize(static_cast<size_t>(at_once * a.heads * padded));
  values.resize(static_cast<size_t>(at_once * query_values));
  parts.resize(static_cast<size_t>(at_once * most_chunks * a.heads));
  float* all_values = values.data();
  Part* all_parts = parts.data();
  float* q = packed.data();

  const auto run = [=, &a, &tiles](int64_t first, int64_t query, int64_t start) {
    const int64_t item = query * most_chunks + start / kChunk;
    attend(a, tiles, queries[first + query], start, q + query * a.heads * padded, padded, all_parts + item * a.heads,
           all_values + item * a.heads * a.value_dim);
  };
  const auto finish = [=, &a](int64_t first, int64_t query) {
    const int64_t chunks = (queries[first + query].seen + kChunk - 1) / kChunk, at = (first + query) * a.heads;
    const Part* part = all_parts + query * most_chunks * a.heads;
    const float* value = all_values + query * query_values;
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      if (a.q_dtype == kBFloat16) join(a, part, value, chunks, reinterpret_cast<uint16_t*>(a.y) + at * a.value_dim);
      else join(a, part, value, chunks, reinterpret_cast<float*>(a.y) + at * a.value_dim);
    });
  };
  const int64_t threads = seen * a.heads * (a.width + a.value_dim) < kForkProducts ? 1 : a.threads;
  for (int64_t first = 0; first < num_queries; first += at_once) {
    const int64_t count = std::min(at_once, num_queries - first);
    for (int64_t row = 0; row < count * a.heads; ++row)
      pack_row(a.q + first * q_bytes + row * a.width * bytes_of(a.q_dtype), a.q_dtype, a.width, tiles.dot,
               q + row * padded);
    if (count >= kWholeQueries * threads) {  // a thread takes queries whole
      parallel_for(count, count, threads, a.fork, [&](int64_t begin, int64_t end) {
        for (int64_t query = begin; query < end; ++query) {
          for (int64_t start = 0; start < queries[first + query].seen; start += kChunk) run(first, query, start);
          finish(first, query);
        }
      });
      continue;
    }
    const int64_t items = count * most_chunks;
    parallel_for(items, items, threads, a.fork, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t query = item / most_chunks, start = item % most_chunks * kChunk;
        if (start < queries[first + query].seen) run(first, query, start);
      }
    });
    for (int64_t query = 0; query < count; ++query) finish(first, query);
  }
  return kOk;
}

}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_latent_attention(const void* record) {
  abyssal::LatentAttentionArguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::latent_attention(a);
}
