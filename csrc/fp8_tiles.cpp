// Tiles of values quantised, and back: kernels/fp8_tiles.py defines the bytes, fp8_tiles.h has the arithmetic.
//
// Values are read once from memory: the scales of a panel (a strip of one row, or of 128) are found in a first pass
// over it, and codes, scales and dequantised values are written in a second that finds it in cache.  The values may
// themselves be codes in tiles along rows, or SwiGLU of such codes: a tensor is turned, or made again, without being
// written in between.

#include <memory>
#include <vector>

#include "common.h"
#include "fp8_rows.h"
#include "swiglu.h"

namespace abyssal {
namespace {

constexpr int64_t kForkValues = 1 << 16;  // below this, waking threads costs more than it gains
enum Gated : int64_t { kNotGated = 0, kGatedFloat32 = 1, kGatedBFloat16 = 2 };
constexpr int64_t kRowsAtATime = 8;       // where each row has tiles of its own

struct Arguments {
  const char* x;               // (matrices, rows, columns), or null where there are codes to read
  const unsigned char* kept;   // one matrix of codes in tiles along rows, contiguous; two rows of it where gated
  const char* kept_scales;
  const void* weights;    // (rows), where gated, or null
  unsigned char* codes;   // contiguous, or null
  char* scales;           // contiguous, or null
  char* values;           // contiguous, or null
  const int64_t* counts;  // rows of each group for tiles along columns, or null; one matrix
  int64_t x_dtype, weights_dtype, values_dtype;
  int64_t kept_code, kept_scale;
  int64_t gated;  // a Gated: rows of codes are gate, up, gate, up, ..., and x is their SwiGLU, rounded
  int64_t tile, code, scale;
  int64_t matrices, rows, columns, num_counts;
  int64_t matrix_stride, stride;  // of x, in values; those of a row are contiguous
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;

  TileInput input() const { return {kept, kept_scales, kRowTiles, kept_code, kept_scale, columns}; }
  TileOutput output() const { return {codes, scales, values, values_dtype, tile, code, scale, columns}; }
};

struct DequantiseArguments {
  const unsigned char* codes;
  const char* scales;
  char* values;
  const int64_t* counts;
  int64_t values_dtype;
  int64_t tile, code, scale;
  int64_t matrices, rows, columns, num_counts;
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
};

// `count` values from `start` on of a row that is kept as codes.
void read_kept(Isa isa, const Arguments& a, Strip& strip, int64_t row, int64_t start, int64_t count, float* out) {
  if (!a.gated) return read_row(isa, a.input(), strip, row, start, count, out);
  alignas(64) float up[kStrip];
  read_row(isa, a.input(), strip, 2 * row, start, count, out);
  read_row(isa, a.input(), strip, 2 * row + 1, start, count, up);
  const float weight = weight_of(a.weights, a.weights_dtype, row);
  call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
    for (int64_t i = 0; i < count; ++i) out[i] = swiglu_value(out[i], up[i], weight);
    if (a.gated == kGatedBFloat16)
      for (int64_t i = 0; i < count; ++i) out[i] = rounded<uint16_t>(out[i]);
  });
}

void quantise_rows(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const TileOutput out = a.output();
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    alignas(64) float values[kStrip];
    for (int64_t row = begin; row < end; ++row) {
      const char* x = a.x + (row / a.rows * a.matrix_stride + row % a.rows * a.stride) * bytes_of(a.x_dtype);
      for (int64_t start = 0; start < a.columns; start += kStrip) {
        const int64_t count = start + kStrip < a.columns ? kStrip : a.columns - start;
        if (a.kept) read_kept(isa, a, strip, row, start, count, values);
        const void* read = a.kept ? static_cast<const void*>(values) : x + start * bytes_of(a.x_dtype);
        quantise_row(isa, out, strip, read, a.x_dtype, row, start, count);
      }
    }
  };
  const int64_t rows = a.matrices * a.rows;
  parallel_for(rows, 4 * a.threads, rows * a.columns < kForkValues ? 1 : a.threads, a.fork, work);
}

void quantise_panels(const Arguments& a, const std::vector<RowBlock>& blocks) {
  const Isa isa = choose_isa(a.isa_limit);
  const TileOutput out = a.output();
  const int64_t strips = (a.columns + kStrip - 1) / kStrip, num_blocks = static_cast<int64_t>(blocks.size());
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    std::unique_ptr<float[]> panel(a.kept ? new float[kTile * kStrip] : nullptr);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t line = unit / strips, start = unit % strips * kStrip, matrix = line / num_blocks;
      const int64_t count = start + kStrip < a.columns ? kStrip : a.columns - start;
      RowBlock block = blocks[line % num_blocks];
      if (a.kept) {
        for (int64_t r = 0; r < block.count; ++r)
          read_kept(isa, a, strip, block.first + r, start, count, panel.get() + r * kStrip);
        quantise_panel(isa, out, strip, panel.get(), kFloat32, kStrip, block, line, start, count);
      } else {
        const int64_t place = matrix * a.matrix_stride + block.first * a.stride + start;
        block.first += matrix * a.rows;
        quantise_panel(isa, out, strip, a.x + place * bytes_of(a.x_dtype), a.x_dtype, a.stride, block, line, start,
                       count);
      }
    }
  };
  const int64_t units = a.matrices * num_blocks * strips;
  parallel_for(units, 4 * a.threads, a.matrices * a.rows * a.columns < kForkValues ? 1 : a.threads, a.fork, work);
}

void dequantise_blocks(const DequantiseArguments& a, const std::vector<RowBlock>& blocks) {
  const Isa isa = choose_isa(a.isa_limit);
  const TileInput in = {a.codes, a.scales, a.tile, a.code, a.scale, a.columns};
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    for (int64_t unit = begin; unit < end; ++unit) {
      const RowBlock block = blocks[unit % num_blocks];
      const int64_t first = unit / num_blocks * a.rows + block.first;
      for (int64_t start = 0; start < a.columns; start += kStrip) {
        const int64_t count = start + kStrip < a.columns ? kStrip : a.columns - start;
        for (int64_t row = first; row < first + block.count; ++row) {
          if (a.tile == kRowTiles || row == first)
            load_scales(in, strip, a.tile == kRowTiles ? row : unit, start, count);
          read_codes(isa, in, strip, row, start, count,
                     a.values + (row * a.columns + start) * bytes_of(a.values_dtype), a.values_dtype);
        }
      }
    }
  };
  const int64_t units = a.matrices * num_blocks, values = a.matrices * a.rows * a.columns;
  parallel_for(units, 4 * a.threads, values < kForkValues ? 1 : a.threads, a.fork, work);
}

int32_t quantise(const Arguments& a) {
  if (!is_dtype(a.x_dtype) || !is_dtype(a.weights_dtype) || !is_dtype(a.values_dtype)) return kBadDtype;
  if (!is_format(a.tile, a.code, a.scale) || !is_format(kRowTiles, a.kept_code, a.kept_scale)) return kBadDtype;
  if (a.matrices < 0 || a.rows < 0 || a.columns < 0) return kBadShape;
  if ((a.counts || a.kept) && a.matrices != 1) return kBadShape;
  std::vector<RowBlock> blocks;
  if (!row_blocks(a.counts, a.num_counts, a.rows, kTile, blocks)) return kBadShape;
  if (a.matrices == 0 || a.rows == 0 || a.columns == 0) return kOk;
  if (a.kept ? !a.kept_scales : !a.x) return kNoStorage;
  a.tile == kRowTiles ? quantise_rows(a) : quantise_panels(a, blocks);
  return kOk;
}

int32_t dequantise(const DequantiseArguments& a) {
  if (!is_dtype(a.values_dtype) || !is_format(a.tile, a.code, a.scale)) return kBadDtype;
  if (a.matrices < 0 || a.rows < 0 || a.columns < 0 || (a.counts && a.matrices != 1)) return kBadShape;
  std::vector<RowBlock> blocks;
  if (!row_blocks(a.counts, a.num_counts, a.rows, a.tile == kRowTiles ? kRowsAtATime : kTile, blocks)) return kBadShape;
  if (a.matrices == 0 || a.rows == 0 || a.columns == 0) return kOk;
  if (!a.codes || !a.scales || !a.values) return kNoStorage;
  dequantise_blocks(a, blocks);
  return kOk;
}

}  // namespace
}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_fp8_quantise(const void* record) {
  abyssal::Arguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::quantise(a);
}

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_fp8_dequantise(const void* record) {
  abyssal::DequantiseArguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::dequantise(a);
}
