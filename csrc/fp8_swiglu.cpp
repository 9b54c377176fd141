// SwiGLU between quantised products: kernels/fp8_swiglu.py says what it computes, swiglu.h and fp8_rows.h how.
//
// The forward reads the input once and writes what is kept of it, and the result, quantised.  The backward reads codes
// and the result's gradient, and writes the input's gradient twice, in tiles along rows and in tiles over rows, from a
// panel of it that never leaves the cache.

#include <memory>
#include <vector>

#include "common.h"
#include "fp8_rows.h"
#include "swiglu.h"

namespace abyssal {
namespace {

constexpr int64_t kForkValues = 1 << 14;      // below this, waking threads costs more than it gains
constexpr int64_t kPanelColumns = 4 * kTile;  // two panels of gradients fit into a core's second cache

struct Arguments {
  const char* gate_up;  // (rows, 2 * width): gate, then up
  const void* weights;  // (rows), contiguous, or null
  unsigned char* kept_codes;  // (rows, 2, width), each half in tiles of its own
  char* kept_scales;
  unsigned char* codes;  // (rows, width)
  char* scales;
  char* values;
  int64_t dtype, weights_dtype, values_dtype;
  int64_t kept_code, kept_scale, code, scale;
  int64_t rows, width, stride;  // from row to row of gate_up
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;

  TileOutput kept() const {
    return {kept_codes, kept_scales, nullptr, kFloat32, kRowTiles, kept_code, kept_scale, width};
  }
  TileOutput output() const { return {codes, scales, values, values_dtype, kRowTiles, code, scale, width}; }
};

struct GradientArguments {
  const unsigned char* kept_codes;  // (rows, 2, width)
  const char* kept_scales;
  const void* weights;    // (rows), contiguous, or null
  const char* dh;         // (rows, width), contiguous
  char* by_row;           // (rows, 2, width): values of the gradient in tiles along rows
  char* by_column;        // (rows, 2 * width): in tiles over rows
  float* dweights;        // (rows), or null
  const int64_t* counts;  // rows of each group, or null
  int64_t dh_dtype, weights_dtype, values_dtype;
  int64_t kept_code, kept_scale;
  int64_t row_code, row_scale, column_code, column_scale;
  int64_t rows, width, num_counts;
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;

  TileInput kept() const { return {kept_codes, kept_scales, kRowTiles, kept_code, kept_scale, width}; }
  TileOutput rows_out() const {
    return {nullptr, nullptr, by_row, values_dtype, kRowTiles, row_code, row_scale, width};
  }
  TileOutput columns_out() const {
    return {nullptr, nullptr, by_column, values_dtype, kColumnTiles, column_code, column_scale, 2 * width};
  }
};

template <typename X>
void forward(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const TileOutput kept = a.kept(), out = a.output();
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    alignas(64) float h[kStrip];
    for (int64_t row = begin; row < end; ++row) {
      const float weight = weight_of(a.weights, a.weights_dtype, row);
      for (int64_t start = 0; start < a.width; start += kStrip) {
        const int64_t count = start + kStrip < a.width ? kStrip : a.width - start;
        const X* gate = reinterpret_cast<const X*>(a.gate_up) + row * a.stride + start;
        const X* up = gate + a.width;
        quantise_row(isa, kept, strip, gate, a.dtype, 2 * row, start, count);
        quantise_row(isa, kept, strip, up, a.dtype, 2 * row + 1, start, count);
        call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
          for (int64_t i = 0; i < count; ++i) h[i] = rounded<X>(swiglu_value(widen(gate[i]), widen(up[i]), weight));
        });
        quantise_row(isa, out, strip, h, kFloat32, row, start, count);
      }
    }
  };
  parallel_for(a.rows, 4 * a.threads, a.rows * a.width < kForkValues ? 1 : a.threads, a.fork, work);
}

struct Panels {  // of gate and up, or of their gradients
  alignas(64) float halves[2][kTile * kPanelColumns];
  alignas(64) float sums[kTile][kSwigluSums];
};

template <typename X>
ABYSSAL_INLINE void row_gradients(float* gate, float* up, const X* dh, float weight, int64_t count, float* sums) {
  const int64_t whole = count / kSwigluSums * kSwigluSums;
  for (int64_t i = 0; i < whole; i += kSwigluSums)
    for (int lane = 0; lane < kSwigluSums; ++lane) {
      const int64_t j = i + lane;
      sums[lane] += swiglu_gradient(gate[j], up[j], widen(dh[j]), weight, gate + j, up + j);
    }
  for (int64_t i = whole; i < count; ++i)
    sums[i - whole] += swiglu_gradient(gate[i], up[i], widen(dh[i]), weight, gate + i, up + i);
  for (int64_t i = 0; i < count; ++i) {
    gate[i] = rounded<X>(gate[i]);
    up[i] = rounded<X>(up[i]);
  }
}

// Gradients of `count` columns from `start` on of the rows of a block, and what the weights have of them.
template <typename X>
void find_gradients(Isa isa, const GradientArguments& a, Strip& strip, Panels& panels, RowBlock block, int64_t start,
                    int64_t count) {
  const TileInput kept = a.kept();
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t row = block.first + r;
    float* gate = panels.halves[0] + r * kPanelColumns;
    float* up = panels.halves[1] + r * kPanelColumns;
    read_row(isa, kept, strip, 2 * row, start, count, gate);
    read_row(isa, kept, strip, 2 * row + 1, start, count, up);
    const float weight = weight_of(a.weights, a.weights_dtype, row);
    const X* dh = reinterpret_cast<const X*>(a.dh) + row * a.width + start;
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      row_gradients(gate, up, dh, weight, count, panels.sums[r]);
    });
  }
}

template <typename X>
void block_gradients(Isa isa, const GradientArguments& a, Strip& strip, Panels& panels, RowBlock block) {
  const TileOutput rows = a.rows_out(), columns = a.columns_out();
  std::memset(panels.sums, 0, sizeof(panels.sums));
  for (int64_t start = 0; start < a.width; start += kPanelColumns) {
    const int64_t count = start + kPanelColumns < a.width ? kPanelColumns : a.width - start;
    find_gradients<X>(isa, a, strip, panels, block, start, count);
    for (int half = 0; half < 2; ++half) {
      const float* panel = panels.halves[half];
      for (int64_t r = 0; r < block.count; ++r)
        quantise_row(isa, rows, strip, panel + r * kPanelColumns, kFloat32, 2 * (block.first + r) + half, start, count);
      quantise_panel(isa, columns, strip, panel, kFloat32, kPanelColumns, block, 0, half * a.width + start, count);
    }
  }
  for (int64_t r = 0; a.dweights && r < block.count; ++r) {
    float sum = 0.0f;
    for (int lane = 0; lane < kSwigluSums; ++lane) sum += panels.sums[r][lane];
    a.dweights[block.first + r] = sum;
  }
}

template <typename X>
void backward(const GradientArguments& a, const std::vector<RowBlock>& blocks) {
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    const std::unique_ptr<Panels> panels(new Panels);
    for (int64_t block = begin; block < end; ++block) block_gradients<X>(isa, a, strip, *panels, blocks[block]);
  };
  const int64_t units = static_cast<int64_t>(blocks.size());
  parallel_for(units, 4 * a.threads, a.rows * a.width < kForkValues ? 1 : a.threads, a.fork, work);
}

int32_t run(const Arguments& a) {
  if (!is_dtype(a.dtype) || !is_dtype(a.weights_dtype) || !is_dtype(a.values_dtype)) return kBadDtype;
  if (!is_format(kRowTiles, a.code, a.scale) || !is_format(kRowTiles, a.kept_code, a.kept_scale)) return kBadDtype;
  if (a.rows <= 0 || a.width <= 0) return a.rows < 0 || a.width < 0 ? kBadShape : kOk;
  if (!a.gate_up || !a.kept_codes || !a.kept_scales || !a.codes || !a.scales || !a.values) return kNoStorage;
  a.dtype == kBFloat16 ? forward<uint16_t>(a) : forward<float>(a);
  return kOk;
}

int32_t run(const GradientArguments& a) {
  if (!is_dtype(a.dh_dtype) || !is_dtype(a.weights_dtype) || !is_dtype(a.values_dtype)) return kBadDtype;
  if (!is_format(kRowTiles, a.kept_code, a.kept_scale) || !is_format(kRowTiles, a.row_code, a.row_scale) ||
      !is_format(kColumnTiles, a.column_code, a.column_scale))
    return kBadDtype;
  std::vector<RowBlock> blocks;
  if (a.rows < 0 || a.width < 0 || !row_blocks(a.counts, a.num_counts, a.rows, kTile, blocks)) return kBadShape;
  if (a.rows == 0 || a.width == 0) return kOk;
  if (!a.kept_codes || !a.kept_scales || !a.dh || !a.by_row || !a.by_column) return kNoStorage;
  a.dh_dtype == kBFloat16 ? backward<uint16_t>(a, blocks) : backward<float>(a, blocks);
  return kOk;
}

}  // namespace
}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_fp8_swiglu(const void* record) {
  abyssal::Arguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::run(a);
}

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_fp8_swiglu_gradients(const void* record) {
  abyssal::GradientArguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::run(a);
}
