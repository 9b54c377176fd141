// Rows and panels of values on their way into tiles, and rows of codes on their way out: what the operators that read
// or write quantised tiles are made of.
//
// Each function works on a strip, hundreds of columns, and chooses its instruction set itself: that costs a few
// nanoseconds a strip, and spares every operator a copy of all formats for every instruction set.
#pragma once

#include <vector>

#include "common.h"
#include "fp8_tiles.h"

namespace abyssal {

constexpr int64_t kTile = 128;          // values along an edge of a tile
constexpr int64_t kStrip = 12 * kTile;  // columns converted at a time: as many as a core's first cache has room for

enum TileKind : int64_t { kRowTiles = 0, kColumnTiles = 1, kBlockTiles = 2 };  // 1x128, 128x1, 128x128

struct TileOutput {      // of a matrix, or of several one below the other
  unsigned char* codes;  // contiguous, or null
  char* scales;          // contiguous, or null
  char* values;          // contiguous, or null
  int64_t values_dtype, tile, code, scale;
  int64_t columns;
};

struct TileInput {
  const unsigned char* codes;
  const char* scales;
  int64_t tile, code, scale;
  int64_t columns;
};

struct Strip {  // columns on their way from values to codes
  alignas(64) uint32_t largest[kStrip];  // magnitudes as bits, which are ordered like them, NaN above all
  alignas(64) float scale[kStrip];
  alignas(64) float rounded[kStrip];  // codes as numbers
  alignas(64) uint32_t codes[kStrip + 1];
  bool spoiled;  // some tile is not finite
};

struct RowBlock {  // rows that share tiles
  int64_t first, count;
};

inline int64_t tiles_along(int64_t length) { return (length + kTile - 1) / kTile; }

inline bool is_format(int64_t tile, int64_t code, int64_t scale) {
  return tile >= kRowTiles && tile <= kBlockTiles && code >= kE4m3 && code <= kE5m6 && scale >= kFloatScale &&
         scale <= kPowerScale;
}

// The blocks of one matrix with groups of `counts` rows (null: one group); false where they do not add up to `rows`.
bool row_blocks(const int64_t* counts, int64_t num_counts, int64_t rows, int64_t height, std::vector<RowBlock>& blocks);

// Quantise `count` values at `x`, columns from `start` on of a row, in tiles along it.
void quantise_row(Isa isa, const TileOutput& out, Strip& strip, const void* x, int64_t dtype, int64_t row,
                  int64_t start, int64_t count);

// Quantise the same columns of the rows of a block, `stride` values apart, in tiles over rows; `line` is the row of
// scales.
void quantise_panel(Isa isa, const TileOutput& out, Strip& strip, const void* x, int64_t dtype, int64_t stride,
                    RowBlock block, int64_t line, int64_t start, int64_t count);

// Scales of `count` columns from `start` on, into the strip; `line` is the row of scales.
void load_scales(const TileInput& in, Strip& strip, int64_t line, int64_t start, int64_t count);

// Values of `count` codes from column `start` on, by the scales in the strip.
void read_codes(Isa isa, const TileInput& in, Strip& strip, int64_t row, int64_t start, int64_t count, void* out,
                int64_t dtype);

// Both, in FP32, of a row that has tiles of its own.
inline void read_row(Isa isa, const TileInput& in, Strip& strip, int64_t row, int64_t start, int64_t count,
                     float* out) {
  load_scales(in, strip, row, start, count);
  read_codes(isa, in, strip, row, start, count, out, kFloat32);
}

}  // namespace abyssal
