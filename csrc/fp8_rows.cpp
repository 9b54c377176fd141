// The strips of fp8_rows.h: largest magnitudes, scales, codes, values.

#include "fp8_rows.h"

#include <algorithm>

namespace abyssal {
namespace {

// Call `body` with the format that `code` names.
template <typename Body>
void with_code(int64_t code, const Body& body) {
  if (code == kE4m3) body(E4m3{});
  else if (code == kE5m2) body(E5m2{});
  else body(E5m6{});
}

// Call `body` with `x` as what it points to.
template <typename Body>
void with_dtype(const void* x, int64_t dtype, const Body& body) {
  if (dtype == kBFloat16) body(static_cast<const uint16_t*>(x));
  else body(static_cast<const float*>(x));
}

int64_t bytes_of_codes(int64_t code, int64_t columns) { return code == kE5m6 ? (columns + 1) / 2 * 3 : columns; }

// Two codes of 12 bits in a word of their own each, the first in the lower, as 24 bits and back.
ABYSSAL_INLINE uint64_t join(uint64_t pair) { return (pair & 0xfffu) | (pair >> 20); }
ABYSSAL_INLINE uint64_t part(uint64_t joined) { return (joined & 0xfffu) | (joined & 0xfff000u) << 20; }

// Four codes are six bytes, written and read as a (little-endian) word of eight except at the end.  `codes` has room
// for one more.
ABYSSAL_INLINE void store_packed(uint32_t* codes, int64_t count, unsigned char* out) {
  if (count % 2) codes[count] = 0;
  const int64_t pairs = (count + 1) / 2, safe = pairs - 3;
  uint64_t joined[kStrip / 2];
  for (int64_t i = 0; i < pairs; ++i) {
    uint64_t pair;
    std::memcpy(&pair, codes + 2 * i, sizeof(pair));
    joined[i] = join(pair);
  }
  int64_t i = 0;
  for (; i < safe; i += 2) {
    const uint64_t word = joined[i] | joined[i + 1] << 24;
    std::memcpy(out + 3 * i, &word, sizeof(word));
  }
  for (; i < pairs; ++i)
    for (int byte = 0; byte < 3; ++byte) out[3 * i + byte] = static_cast<unsigned char>(joined[i] >> 8 * byte);
}

ABYSSAL_INLINE void load_packed(const unsigned char* in, int64_t count, uint32_t* codes) {
  const int64_t pairs = (count + 1) / 2, safe = pairs - 3;
  uint64_t joined[kStrip / 2];
  int64_t i = 0;
  for (; i < safe; i += 2) {
    uint64_t word;
    std::memcpy(&word, in + 3 * i, sizeof(word));
    joined[i] = word & 0xffffffu;
    joined[i + 1] = word >> 24 & 0xffffffu;
  }
  for (; i < pairs; ++i)
    joined[i] = in[3 * i] | static_cast<uint64_t>(in[3 * i + 1]) << 8 | static_cast<uint64_t>(in[3 * i + 2]) << 16;
  for (i = 0; i < pairs; ++i) {
    const uint64_t pair = part(joined[i]);
    std::memcpy(codes + 2 * i, &pair, sizeof(pair));
  }
}

// In functions of their own, because a byte may be part of anything that a closure refers to.
ABYSSAL_INLINE void store_bytes(const uint32_t* codes, int64_t count, unsigned char* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<unsigned char>(codes[i]);
}

ABYSSAL_INLINE void load_bytes(const unsigned char* in, int64_t count, uint32_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = in[i];
}

template <typename X>
ABYSSAL_INLINE uint32_t largest_of(const X* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(widen(x[i])) & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The largest magnitude of each tile of a row, at the tile's first column.
void largest_of_tiles(Isa isa, Strip& strip, const void* x, int64_t dtype, int64_t count) {
  with_dtype(x, dtype, [&](auto values) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t i = 0; i < count; i += kTile)
        strip.largest[i] = i + kTile <= count ? largest_of(values + i, kTile) : largest_of(values + i, count - i);
    });
  });
}

// The largest magnitude of each column.
void largest_of_columns(Isa isa, Strip& strip, const void* x, int64_t dtype, int64_t stride, int64_t rows,
                        int64_t count) {
  with_dtype(x, dtype, [&](auto values) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t i = 0; i < count; ++i) strip.largest[i] = 0;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t magnitude = bits_of(widen(values[r * stride + i])) & kMagnitude;
          strip.largest[i] = magnitude > strip.largest[i] ? magnitude : strip.largest[i];
        }
    });
  });
}

// Scales of columns that have tiles of their own.
void scale_columns(Isa isa, const TileOutput& out, Strip& strip, int64_t count) {
  const bool power = out.scale == kPowerScale;
  with_code(out.code, [&](auto code) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      uint32_t largest = 0;
      for (int64_t i = 0; i < count; ++i) {
        strip.scale[i] = tile_scale<decltype(code)>(strip.largest[i], power);
        largest = strip.largest[i] > largest ? strip.largest[i] : largest;
      }
      strip.spoiled = largest >= kInfinity;
    });
  });
}

// The largest magnitude of each block of 128 columns, at its first.
void share_largest(Strip& strip, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t& largest = strip.largest[i / kTile * kTile];
    largest = strip.largest[i] > largest ? strip.largest[i] : largest;
  }
}

// Scales of columns that share a tile with 127 others, whose largest magnitude is at its first.
void scale_tiles(Isa isa, const TileOutput& out, Strip& strip, int64_t count) {
  const bool power = out.scale == kPowerScale;
  with_code(out.code, [&](auto code) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      strip.spoiled = false;
      for (int64_t i = 0; i < count; i += kTile) {
        const float scale = tile_scale<decltype(code)>(strip.largest[i], power);
        strip.spoiled = strip.spoiled || strip.largest[i] >= kInfinity;
        // Whole tiles, of which the strip has room for the last: a loop of known length needs no remainder.
        for (int64_t j = 0; j < kTile; ++j) strip.scale[i + j] = scale;
      }
    });
  });
}

void write_scales(const TileOutput& out, const Strip& strip, int64_t line, int64_t start, int64_t count) {
  if (!out.scales) return;
  const int64_t width = out.tile == kColumnTiles ? 1 : kTile;
  const int64_t place =
      out.tile == kColumnTiles ? line * out.columns + start : line * tiles_along(out.columns) + start / kTile;
  for (int64_t i = 0; i < count; i += width) store_scale(strip.scale[i], out.scale, out.scales, place + i / width);
}

template <typename Code, typename X>
ABYSSAL_INLINE void encode_values(Strip& strip, const X* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) encode<Code>(widen(x[i]) / strip.scale[i], strip.rounded + i, strip.codes + i);
  if (!strip.spoiled) return;
  for (int64_t i = 0; i < count; ++i) {
    const bool bad = strip.scale[i] != strip.scale[i];
    strip.rounded[i] = bad ? float_of(kNan) : strip.rounded[i];
    strip.codes[i] = bad ? Code::kNanCode : strip.codes[i];
  }
}

ABYSSAL_INLINE void store_values(const Strip& strip, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = strip.rounded[i] * strip.scale[i];
}

ABYSSAL_INLINE void store_values(const Strip& strip, int64_t count, uint16_t* out) {
  if (strip.spoiled) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(strip.rounded[i] * strip.scale[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = number_to_bf16(strip.rounded[i] * strip.scale[i]);
  }
}

template <typename Code, typename Y>
ABYSSAL_INLINE void decode_values(const Strip& strip, int64_t count, Y* out) {
  for (int64_t i = 0; i < count; ++i) narrow(decode<Code>(strip.codes[i]) * strip.scale[i], out + i);
}

// Codes and values of `count` values at `x`, by the scales in the strip.
void write_row(Isa isa, const TileOutput& out, Strip& strip, const void* x, int64_t dtype, int64_t row, int64_t start,
               int64_t count) {
  with_dtype(x, dtype, [&](auto values) {
    with_code(out.code, [&](auto code) {
      call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA { encode_values<decltype(code)>(strip, values, count); });
    });
  });
  unsigned char* codes = out.codes + row * bytes_of_codes(out.code, out.columns) + bytes_of_codes(out.code, start);
  char* values = out.values + (row * out.columns + start) * bytes_of(out.values_dtype);
  call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
    if (out.codes && out.code == kE5m6) {
      store_packed(strip.codes, count, codes);
    } else if (out.codes) {
      store_bytes(strip.codes, count, codes);
    }
    if (out.values && out.values_dtype == kBFloat16)
      store_values(strip, count, reinterpret_cast<uint16_t*>(values));
    else if (out.values)
      store_values(strip, count, reinterpret_cast<float*>(values));
  });
}

}  // namespace

bool row_blocks(const int64_t* counts, int64_t num_counts, int64_t rows, int64_t height,
                std::vector<RowBlock>& blocks) {
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

void quantise_row(Isa isa, const TileOutput& out, Strip& strip, const void* x, int64_t dtype, int64_t row,
                  int64_t start, int64_t count) {
  largest_of_tiles(isa, strip, x, dtype, count);
  scale_tiles(isa, out, strip, count);
  write_scales(out, strip, row, start, count);
  write_row(isa, out, strip, x, dtype, row, start, count);
}

void quantise_panel(Isa isa, const TileOutput& out, Strip& strip, const void* x, int64_t dtype, int64_t stride,
                    RowBlock block, int64_t line, int64_t start, int64_t count) {
  largest_of_columns(isa, strip, x, dtype, stride, block.count, count);
  if (out.tile == kColumnTiles) {
    scale_columns(isa, out, strip, count);
  } else {
    share_largest(strip, count);
    scale_tiles(isa, out, strip, count);
  }
  write_scales(out, strip, line, start, count);
  for (int64_t r = 0; r < block.count; ++r)
    write_row(isa, out, strip, static_cast<const char*>(x) + r * stride * bytes_of(dtype), dtype, block.first + r,
              start, count);
}

void load_scales(const TileInput& in, Strip& strip, int64_t line, int64_t start, int64_t count) {
  const int64_t width = in.tile == kColumnTiles ? 1 : kTile;
  const int64_t place =
      in.tile == kColumnTiles ? line * in.columns + start : line * tiles_along(in.columns) + start / kTile;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t end = i + width < count ? i + width : count;
    std::fill(strip.scale + i, strip.scale + end, load_scale(in.scale, in.scales, place + i / width));
  }
}

void read_codes(Isa isa, const TileInput& in, Strip& strip, int64_t row, int64_t start, int64_t count, void* out,
                int64_t dtype) {
  const unsigned char* codes = in.codes + row * bytes_of_codes(in.code, in.columns) + bytes_of_codes(in.code, start);
  with_code(in.code, [&](auto code) {
    using Code = decltype(code);
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      if constexpr (Code::kMantissaBits == 6) load_packed(codes, count, strip.codes);
      else load_bytes(codes, count, strip.codes);
      if (dtype == kBFloat16) decode_values<Code>(strip, count, static_cast<uint16_t*>(out));
      else decode_values<Code>(strip, count, static_cast<float*>(out));
    });
  });
}

}  // namespace abyssal
