// Floating-point codes of 8 and 12 bits, and the scales of their tiles: the arithmetic that kernels/fp8_tiles.py defines.
//
// All of it is plain integer and FP32 arithmetic without branches, on arrays of columns, so that the compiler vectorises
// it; each step is a rounding of IEEE's or exact, so every instruction set gives the same bits.
#pragma once

#include "common.h"

namespace abyssal {

constexpr int64_t kTile = 128;           // values along an edge of a tile
constexpr int64_t kStrip = 4 * kTile;    // columns that are converted at a time: 128 rows of them stay in cache
constexpr uint32_t kInfinity = 0x7f800000u, kNan = 0x7fc00000u, kMagnitude = 0x7fffffffu;

enum TileKind : int64_t { kRowTiles = 0, kColumnTiles = 1, kBlockTiles = 2 };  // 1x128, 128x1, 128x128
enum CodeKind : int64_t { kE4m3 = 0, kE5m2 = 1, kE5m6 = 2 };
enum ScaleKind : int64_t { kFloatScale = 0, kPowerScale = 1 };  // FP32; UE8M0, a byte

struct E4m3 {
  static constexpr uint32_t kMantissaBits = 3, kSign = 0x80, kNanCode = 0x7f, kFirstSpecial = 0x7f;
  static constexpr uint32_t kSmallestNormal = 121u << 23;  // 2^-6 as FP32
  static constexpr float kLargest = 448.0f;
};
struct E5m2 {
  static constexpr uint32_t kMantissaBits = 2, kSign = 0x80, kNanCode = 0x7f, kFirstSpecial = 0x7c;
  static constexpr uint32_t kSmallestNormal = 113u << 23;
  static constexpr float kLargest = 57344.0f;
};
struct E5m6 {  // two codes in three bytes
  static constexpr uint32_t kMantissaBits = 6, kSign = 0x800, kNanCode = 0x7e0, kFirstSpecial = 0x7c0;
  static constexpr uint32_t kSmallestNormal = 113u << 23;
  static constexpr float kLargest = 65024.0f;
};

ABYSSAL_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

ABYSSAL_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Columns of a strip on their way from values to codes.
struct Strip {
  alignas(64) uint32_t largest[kStrip];  // magnitudes as bits, which are ordered like them, NaN above all
  alignas(64) float scale[kStrip];
  alignas(64) float inverse[kStrip];
  alignas(64) float rounded[kStrip];  // codes as numbers
  alignas(64) uint32_t codes[kStrip];
  bool spoiled;  // some tile is not finite
};

// The scale of a tile from the bits of its largest magnitude.
template <typename Code>
ABYSSAL_INLINE float tile_scale(uint32_t largest, bool power) {
  float scale = float_of(largest) / Code::kLargest;
  scale = scale < float_of(1u << 23) ? float_of(1u << 23) : scale;
  scale = power ? float_of((bits_of(scale) + 0x7fffffu) & kInfinity) : scale;
  scale = largest == 0 ? 1.0f : scale;
  return largest >= kInfinity ? float_of(kNan) : scale;
}

// Scales and their inverses of `count` columns that have tiles of their own.
template <typename Code>
ABYSSAL_INLINE void scale_columns(Strip& strip, int64_t count, bool power) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float scale = tile_scale<Code>(strip.largest[i], power);
    strip.scale[i] = scale;
    strip.inverse[i] = float_of((254u << 23) - bits_of(scale));  // of a power of two
    largest = strip.largest[i] > largest ? strip.largest[i] : largest;
  }
  strip.spoiled = strip.spoiled || largest >= kInfinity;
}

// Scale and inverse of `count` columns from `start` on that share a tile.
template <typename Code>
ABYSSAL_INLINE void scale_tile(Strip& strip, int64_t start, int64_t count, uint32_t largest, bool power) {
  const float scale = tile_scale<Code>(largest, power), inverse = float_of((254u << 23) - bits_of(scale));
  for (int64_t i = start; i < start + count; ++i) {
    strip.scale[i] = scale;
    strip.inverse[i] = inverse;
  }
  strip.spoiled = strip.spoiled || largest >= kInfinity;
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

template <typename X>
ABYSSAL_INLINE void take_largest(const X* x, int64_t count, uint32_t* largest) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(widen(x[i])) & kMagnitude;
    largest[i] = magnitude > largest[i] ? magnitude : largest[i];
  }
}

// Round to the nearest code, ties to even: as a number and as bits.  No clamp: the tile's largest magnitude over its
// scale exceeds the largest code by less than half a step.
template <typename Code>
ABYSSAL_INLINE void encode(float scaled, float* rounded, uint32_t* code) {
  const uint32_t bits = bits_of(scaled), sign = bits & ~kMagnitude;
  // A power of two so large that its last place is the place to round at, which adding it does.
  const uint32_t binade = bits & kInfinity;
  const uint32_t exponent = binade > Code::kSmallestNormal ? binade : Code::kSmallestNormal;
  const uint32_t anchor = exponent + ((23u - Code::kMantissaBits) << 23);
  const float sum = float_of(bits & kMagnitude) + float_of(anchor);
  *rounded = float_of(bits_of(sum - float_of(anchor)) | sign);
  const uint32_t places = bits_of(sum) - anchor;  // a carry goes on into the exponent
  *code = places + ((exponent - Code::kSmallestNormal) >> (23u - Code::kMantissaBits)) + (sign ? Code::kSign : 0u);
}

template <typename Code, typename X>
ABYSSAL_INLINE void encode_row(Strip& strip, const X* x, int64_t count, bool power) {
  if (power) {
    for (int64_t i = 0; i < count; ++i)
      encode<Code>(widen(x[i]) * strip.inverse[i], strip.rounded + i, strip.codes + i);
  } else {
    for (int64_t i = 0; i < count; ++i)
      encode<Code>(widen(x[i]) / strip.scale[i], strip.rounded + i, strip.codes + i);
  }
  if (!strip.spoiled) return;
  for (int64_t i = 0; i < count; ++i) {
    const bool bad = strip.scale[i] != strip.scale[i];
    strip.rounded[i] = bad ? float_of(kNan) : strip.rounded[i];
    strip.codes[i] = bad ? Code::kNanCode : strip.codes[i];
  }
}

ABYSSAL_INLINE int64_t bytes_of_codes(int64_t code, int64_t columns) {
  return code == kE5m6 ? (columns + 1) / 2 * 3 : columns;
}

// Two codes of 12 bits and one of nothing, as 24 bits and back.
ABYSSAL_INLINE uint64_t join(uint64_t pair) { return (pair & 0xfffu) | (pair >> 20); }
ABYSSAL_INLINE uint64_t part(uint64_t joined) { return (joined & 0xfffu) | (joined & 0xfff000u) << 20; }

// Four codes are six bytes, written and read as a word of eight except at the end.  `codes` has room for one more.
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

template <typename Code>
ABYSSAL_INLINE void store_codes(uint32_t* codes, int64_t count, unsigned char* out) {
  if constexpr (Code::kMantissaBits == 6) {
    store_packed(codes, count, out);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<unsigned char>(codes[i]);
  }
}

template <typename Code>
ABYSSAL_INLINE void load_codes(const unsigned char* in, int64_t count, uint32_t* codes) {
  if constexpr (Code::kMantissaBits == 6) {
    load_packed(in, count, codes);
  } else {
    for (int64_t i = 0; i < count; ++i) codes[i] = in[i];
  }
}

template <typename Code>
ABYSSAL_INLINE float decode(uint32_t code) {
  constexpr uint32_t kShift = 23u - Code::kMantissaBits;
  const uint32_t magnitude = code & (Code::kSign - 1u), wide = magnitude << kShift;
  const bool tiny = wide < (1u << 23);  // a subnormal: the exponent of the smallest normal, less its leading one
  const float value = float_of(wide + Code::kSmallestNormal - (tiny ? 0u : 1u << 23)) -
                      (tiny ? float_of(Code::kSmallestNormal) : 0.0f);
  const uint32_t bits = magnitude >= Code::kFirstSpecial ? wide | kInfinity : bits_of(value);
  return float_of(bits | ((code & Code::kSign) ? ~kMagnitude : 0u));
}

// Rounding to BF16 of what is not NaN.
ABYSSAL_INLINE void narrow_number(float value, uint16_t* out) {
  const uint32_t bits = bits_of(value);
  *out = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
ABYSSAL_INLINE void narrow_number(float value, float* out) { *out = value; }

template <typename Y>
ABYSSAL_INLINE void store_values(const Strip& strip, int64_t count, Y* out) {
  if (strip.spoiled) {
    for (int64_t i = 0; i < count; ++i) narrow(strip.rounded[i] * strip.scale[i], out + i);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow_number(strip.rounded[i] * strip.scale[i], out + i);
  }
}

ABYSSAL_INLINE void store_scale(float scale, int64_t kind, char* scales, int64_t index) {
  if (kind == kPowerScale)
    scales[index] = static_cast<char>(bits_of(scale) >> 23);
  else
    std::memcpy(scales + 4 * index, &scale, sizeof(scale));
}

ABYSSAL_INLINE float load_scale(int64_t kind, const char* scales, int64_t index) {
  if (kind == kPowerScale) {
    const uint32_t exponent = static_cast<unsigned char>(scales[index]);
    if (exponent == 0) return float_of(1u << 22);  // 2^-127
    return exponent == 255 ? float_of(kNan) : float_of(exponent << 23);
  }
  float scale;
  std::memcpy(&scale, scales + 4 * index, sizeof(scale));
  return scale;
}

}  // namespace abyssal
