// Codes of 8 and 12 bits, and the scales of their tiles: the arithmetic that kernels/fp8_tiles.py defines.
//
// Integer and FP32 arithmetic without branches, which the compiler vectorises in any loop; each step is exact or a
// rounding of IEEE's, so every instruction set gives the same bits.
#pragma once

#include "common.h"

namespace abyssal {

constexpr uint32_t kInfinity = 0x7f800000u, kNan = 0x7fc00000u, kMagnitude = 0x7fffffffu;

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

// The scale of a tile from the bits of its largest magnitude.
template <typename Code>
ABYSSAL_INLINE float tile_scale(uint32_t largest, bool power) {
  float scale = float_of(largest) / Code::kLargest;
  scale = scale < float_of(1u << 23) ? float_of(1u << 23) : scale;
  scale = power ? float_of((bits_of(scale) + 0x7fffffu) & kInfinity) : scale;
  scale = largest == 0 ? 1.0f : scale;
  return largest >= kInfinity ? float_of(kNan) : scale;
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

// To BF16, of what is not NaN.
ABYSSAL_INLINE uint16_t number_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
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
