// Tiles of values quantised, and back: kernels/fp8_tiles.py defines the bytes, fp8_tiles.h has the arithmetic.
//
// Values are read once from memory: the scales of a panel (a row, or 128 rows of a strip of columns) are found in a
// first pass over it, and codes, scales and dequantised values are written in a second that finds it in cache.  The
// values may themselves be codes in tiles along rows, which is how a tensor is turned without being written in between.

#include <memory>
#include <vector>

#include "common.h"
#include "fp8_tiles.h"

namespace abyssal {
namespace {

constexpr int64_t kForkValues = 1 << 16;  // below this, waking threads costs more than it gains
constexpr int64_t kRowsAtATime = 8;       // where each row has tiles of its own

struct Arguments {
  const char* x;                // (matrices, rows, columns), or null where there are codes to read
  const unsigned char* turned;  // codes to read, in tiles along rows, contiguous; one matrix
  const char* turned_scales;
  unsigned char* codes;   // contiguous, or null
  char* scales;           // contiguous, or null
  char* values;           // contiguous, or null
  const int64_t* counts;  // rows of each group for tiles along columns, or null; one matrix
  int64_t x_dtype, values_dtype;
  int64_t tile, code, scale;
  int64_t turned_code, turned_scale;
  int64_t matrices, rows, columns, num_counts;
  int64_t matrix_stride, stride;  // of x, in values; those of a row are contiguous
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;
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

ABYSSAL_INLINE int64_t tiles_along(int64_t length) { return (length + kTile - 1) / kTile; }

struct RowBlock {  // rows that share tiles
  int64_t first, count;
};

// The blocks of one matrix; empty where the counts do not fit.
bool row_blocks(const int64_t* counts, int64_t num_counts, int64_t rows, int64_t height, std::vector<RowBlock>& blocks) {
  const int64_t all = rows;
  if (!counts) counts = &all, num_counts = 1;
  int64_t first = 0;
  for (int64_t group = 0; group < num_counts; ++group) {
    if (counts[group] < 0 || counts[group] > rows - first) return false;
    for (int64_t start = 0; start < counts[group]; start += height)
      blocks.push_back({first + start, counts[group] - start < height ? counts[group] - start : height});
    first += counts[group];
  }
  return first == rows;
}

// Where a panel is written: `row` counts over all matrices, `scale` is the index of its first scale.
template <typename Code>
ABYSSAL_INLINE void write_row(const Arguments& a, Strip& strip, int64_t row, int64_t start, int64_t count) {
  if (a.codes)
    store_codes<Code>(strip.codes, count, a.codes + row * bytes_of_codes(a.code, a.columns) +
                                              bytes_of_codes(a.code, start));
  if (!a.values) return;
  const int64_t place = row * a.columns + start;
  if (a.values_dtype == kBFloat16)
    store_values(strip, count, reinterpret_cast<uint16_t*>(a.values) + place);
  else
    store_values(strip, count, reinterpret_cast<float*>(a.values) + place);
}

template <typename Code, typename X>
ABYSSAL_INLINE void convert_row(const Arguments& a, Strip& strip, const X* x, int64_t row) {
  const bool power = a.scale == kPowerScale;
  for (int64_t start = 0; start < a.columns; start += kStrip) {
    const int64_t count = start + kStrip < a.columns ? kStrip : a.columns - start;
    strip.spoiled = false;
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t width = i + kTile < count ? kTile : count - i;
      const uint32_t largest = width == kTile ? largest_of(x + start + i, kTile) : largest_of(x + start + i, width);
      scale_tile<Code>(strip, i, width, largest, power);
      if (a.scales) store_scale(strip.scale[i], a.scale, a.scales, row * tiles_along(a.columns) + (start + i) / kTile);
    }
    encode_row<Code>(strip, x + start, count, power);
    write_row<Code>(a, strip, row, start, count);
  }
}

// A panel of `block.count` rows and `count` columns from `start` on; `block_row` counts the blocks of all matrices.
template <typename Code, typename X>
ABYSSAL_INLINE void convert_panel(const Arguments& a, Strip& strip, const X* x, int64_t stride, RowBlock block,
                                  int64_t block_row, int64_t start, int64_t count) {
  const bool power = a.scale == kPowerScale;
  for (int64_t i = 0; i < count; ++i) strip.largest[i] = 0;
  for (int64_t r = 0; r < block.count; ++r) take_largest(x + r * stride, count, strip.largest);
  strip.spoiled = false;
  if (a.tile == kColumnTiles) {
    scale_columns<Code>(strip, count, power);
    for (int64_t i = 0; a.scales && i < count; ++i)
      store_scale(strip.scale[i], a.scale, a.scales, block_row * a.columns + start + i);
  } else {
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t width = i + kTile < count ? kTile : count - i;
      uint32_t largest = 0;
      for (int64_t j = i; j < i + width; ++j) largest = strip.largest[j] > largest ? strip.largest[j] : largest;
      scale_tile<Code>(strip, i, width, largest, power);
      if (a.scales)
        store_scale(strip.scale[i], a.scale, a.scales, block_row * tiles_along(a.columns) + (start + i) / kTile);
    }
  }
  for (int64_t r = 0; r < block.count; ++r) {
    encode_row<Code>(strip, x + r * stride, count, power);
    write_row<Code>(a, strip, block.first + r, start, count);
  }
}

// Scales of `count` columns from `start` on, of which 128 share a tile; `line` is the row of tiles.
ABYSSAL_INLINE void load_tile_scales(const char* scales, int64_t kind, int64_t columns, int64_t line, int64_t start,
                                     int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kTile) {
    const int64_t end = i + kTile < count ? i + kTile : count;
    const float scale = load_scale(kind, scales, line * tiles_along(columns) + (start + i) / kTile);
    for (int64_t j = i; j < end; ++j) out[j] = scale;
  }
}

// Values of `count` codes from column `start` on, by the scales in `strip`.
template <typename Y>
ABYSSAL_INLINE void decode_row(const unsigned char* codes, int64_t code, int64_t columns, Strip& strip, int64_t row,
                               int64_t start, int64_t count, Y* out) {
  codes += row * bytes_of_codes(code, columns) + bytes_of_codes(code, start);
  const auto decode_as = [&](auto format) ABYSSAL_INLINE_LAMBDA {
    load_codes<decltype(format)>(codes, count, strip.codes);
    for (int64_t i = 0; i < count; ++i) narrow(decode<decltype(format)>(strip.codes[i]) * strip.scale[i], out + i);
  };
  if (code == kE4m3) decode_as(E4m3{});
  else if (code == kE5m2) decode_as(E5m2{});
  else decode_as(E5m6{});
}

template <typename Code, typename X>
void convert_rows(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t place = row / a.rows * a.matrix_stride + row % a.rows * a.stride;
        convert_row<Code>(a, strip, reinterpret_cast<const X*>(a.x) + place, row);
      }
    });
  };
  const int64_t rows = a.matrices * a.rows;
  parallel_for(rows, 4 * a.threads, rows * a.columns < kForkValues ? 1 : a.threads, a.fork, work);
}

template <typename Code, typename X, bool kTurn>
void convert_panels(const Arguments& a, const std::vector<RowBlock>& blocks) {
  const Isa isa = choose_isa(a.isa_limit);
  const int64_t strips = (a.columns + kStrip - 1) / kStrip, num_blocks = static_cast<int64_t>(blocks.size());
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    std::unique_ptr<float[]> panel(kTurn ? new float[kTile * kStrip] : nullptr);
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t block_row = unit / strips, start = unit % strips * kStrip, matrix = block_row / num_blocks;
        const int64_t count = start + kStrip < a.columns ? kStrip : a.columns - start;
        RowBlock block = blocks[block_row % num_blocks];
        if constexpr (kTurn) {
          for (int64_t r = 0, row = block.first; r < block.count; ++r, ++row) {
            load_tile_scales(a.turned_scales, a.turned_scale, a.columns, row, start, count, strip.scale);
            decode_row(a.turned, a.turned_code, a.columns, strip, row, start, count, panel.get() + r * kStrip);
          }
          convert_panel<Code>(a, strip, panel.get(), kStrip, block, block_row, start, count);
        } else {
          const X* x = reinterpret_cast<const X*>(a.x) + matrix * a.matrix_stride + block.first * a.stride + start;
          block.first += matrix * a.rows;
          convert_panel<Code>(a, strip, x, a.stride, block, block_row, start, count);
        }
      }
    });
  };
  const int64_t units = a.matrices * num_blocks * strips;
  parallel_for(units, 4 * a.threads, a.matrices * a.rows * a.columns < kForkValues ? 1 : a.threads, a.fork, work);
}

template <typename Code>
void convert(const Arguments& a, const std::vector<RowBlock>& blocks) {
  const bool bf16 = a.x_dtype == kBFloat16;
  if (a.turned) convert_panels<Code, float, true>(a, blocks);
  else if (a.tile == kRowTiles) bf16 ? convert_rows<Code, uint16_t>(a) : convert_rows<Code, float>(a);
  else bf16 ? convert_panels<Code, uint16_t, false>(a, blocks) : convert_panels<Code, float, false>(a, blocks);
}

bool is_format(int64_t tile, int64_t code, int64_t scale) {
  return tile >= kRowTiles && tile <= kBlockTiles && code >= kE4m3 && code <= kE5m6 && scale >= kFloatScale &&
         scale <= kPowerScale;
}

int32_t quantise(const Arguments& a) {
  if (!is_dtype(a.x_dtype) || !is_dtype(a.values_dtype) || !is_format(a.tile, a.code, a.scale)) return kBadDtype;
  if (a.turned && (!is_format(kRowTiles, a.turned_code, a.turned_scale) || a.tile == kRowTiles)) return kBadDtype;
  if (a.matrices < 0 || a.rows < 0 || a.columns < 0) return kBadShape;
  if ((a.counts || a.turned) && a.matrices != 1) return kBadShape;
  std::vector<RowBlock> blocks;
  if (!row_blocks(a.counts, a.num_counts, a.rows, kTile, blocks)) return kBadShape;
  if (a.matrices == 0 || a.rows == 0 || a.columns == 0) return kOk;
  if (a.turned ? !a.turned_scales : !a.x) return kNoStorage;
  if (a.code == kE4m3) convert<E4m3>(a, blocks);
  else if (a.code == kE5m2) convert<E5m2>(a, blocks);
  else convert<E5m6>(a, blocks);
  return kOk;
}

template <typename Y>
void dequantise_blocks(const DequantiseArguments& a, const std::vector<RowBlock>& blocks) {
  const Isa isa = choose_isa(a.isa_limit);
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  const auto work = [&](int64_t begin, int64_t end) {
    Strip strip;
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t unit = begin; unit < end; ++unit) {
        const RowBlock block = blocks[unit % num_blocks];
        const int64_t first = unit / num_blocks * a.rows + block.first;
        for (int64_t start = 0; start < a.columns; start += kStrip) {
          const int64_t count = start + kStrip < a.columns ? kStrip : a.columns - start;
          if (a.tile == kBlockTiles) load_tile_scales(a.scales, a.scale, a.columns, unit, start, count, strip.scale);
          for (int64_t i = 0; a.tile == kColumnTiles && i < count; ++i)
            strip.scale[i] = load_scale(a.scale, a.scales, unit * a.columns + start + i);
          for (int64_t row = first; row < first + block.count; ++row) {
            if (a.tile == kRowTiles) load_tile_scales(a.scales, a.scale, a.columns, row, start, count, strip.scale);
            decode_row(a.codes, a.code, a.columns, strip, row, start, count,
                       reinterpret_cast<Y*>(a.values) + row * a.columns + start);
          }
        }
      }
    });
  };
  const int64_t units = a.matrices * num_blocks, values = a.matrices * a.rows * a.columns;
  parallel_for(units, 4 * a.threads, values < kForkValues ? 1 : a.threads, a.fork, work);
}

int32_t dequantise(const DequantiseArguments& a) {
  if (!is_dtype(a.values_dtype) || !is_format(a.tile, a.code, a.scale)) return kBadDtype;
  if (a.matrices < 0 || a.rows < 0 || a.columns < 0 || (a.counts && a.matrices != 1)) return kBadShape;
  std::vector<RowBlock> blocks;
  if (!row_blocks(a.counts, a.num_counts, a.rows, a.tile == kRowTiles ? kRowsAtATime : kTile, blocks)) return kBadShape;
  if (a.matrices == 0 || a.rows == 0 || a.columns == 0) return kOk;
  if (!a.codes || !a.scales || !a.values) return kNoStorage;
  a.values_dtype == kBFloat16 ? dequantise_blocks<uint16_t>(a, blocks) : dequantise_blocks<float>(a, blocks);
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
