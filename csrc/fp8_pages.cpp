// Cache entries in FP8: quantised where they are written, gathered and dequantised where they are read.
//
// An entry is E4M3 codes, an FP32 scale for each tile of 128 of them, and values kept in BF16 (spec/fp8_entry.py).  Each
// entry is converted by itself, so its bytes depend on its values alone.

#include "common.h"

namespace abyssal {
namespace {

constexpr int64_t kTile = 128;
constexpr int64_t kForkBytes = 1 << 18;  // below this, waking threads costs more than it gains
constexpr float kLargest = 448.0f;       // of E4M3
constexpr uint32_t kInfinity = 0x7f800000u;

struct Arguments {
  char* values;           // (tokens, num_values), contiguous: read from when writing entries, filled when reading them
  const int64_t* slots;   // (tokens): entries of each token
  unsigned char* entries; // (num_entries, entry_bytes), contiguous
  int64_t dtype;          // of the values
  int64_t tokens, num_entries;
  int64_t runs, run_values, plain_values;
  int64_t scales_at, plain_at, entry_bytes;
  int64_t threads;
  ForkFunction fork;
  int64_t isa_limit;

  int64_t num_values() const { return runs * run_values + plain_values; }
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

// The E4M3 code of a finite value of at most 448, rounded to nearest, ties to even.
ABYSSAL_INLINE uint32_t to_code(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  // Below 2^-6 codes are multiples of 2^-9, the last place of a float near 2^14: adding rounds to it.
  const uint32_t small = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
  // From there on, three bits of the mantissa are kept, and the exponent counts from -7 in place of -127.
  const uint32_t large = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
  return (magnitude < (121u << 23) ? small : large) | (bits >> 31 << 7);
}

// The value of a code that is not NaN.
ABYSSAL_INLINE float from_code(uint32_t code) {
  const uint32_t magnitude = (code & 0x7fu) << 20;
  const uint32_t tiny = magnitude < (1u << 23);  // its exponent is that of the smallest normal code, less its leading 1
  const float value = float_of(magnitude + ((120u + tiny) << 23)) - (tiny ? 0.015625f : 0.0f);
  return float_of(bits_of(value) | (code >> 7 << 31));
}

// The scale of a tile: its largest magnitude over 448; 1 for zeros, NaN for a tile that is not finite throughout.
template <typename X>
ABYSSAL_INLINE float tile_scale(const X* x, int64_t count) {
  uint32_t largest = 0;  // magnitudes are ordered like their bits, infinities and NaN above all
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(widen(x[i])) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= kInfinity) return float_of(0x7fc00000u);
  if (largest == 0) return 1.0f;
  const float scale = float_of(largest) / kLargest, smallest = float_of(1u << 23);
  return scale < smallest ? smallest : scale;
}

template <typename X>
ABYSSAL_INLINE void write_tile(const X* x, int64_t count, unsigned char* codes, float scale) {
  if (scale != scale) {
    for (int64_t i = 0; i < count; ++i) codes[i] = 0x7f;
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    float value = widen(x[i]) / scale;
    value = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
    codes[i] = static_cast<unsigned char>(to_code(value));
  }
}

template <typename X>
ABYSSAL_INLINE void read_tile(const unsigned char* codes, int64_t count, float scale, X* x) {
  for (int64_t i = 0; i < count; ++i) narrow(from_code(codes[i]) * scale, x + i);
}

template <typename X>
ABYSSAL_INLINE void write_entry(const Arguments& a, const X* x, unsigned char* entry) {
  unsigned char* scales = entry + a.scales_at;
  for (int64_t i = a.runs * a.run_values; i < a.scales_at; ++i) entry[i] = 0;
  for (int64_t run = 0; run < a.runs; ++run) {
    for (int64_t start = 0; start < a.run_values; start += kTile) {
      const int64_t count = start + kTile < a.run_values ? kTile : a.run_values - start;
      const float scale = tile_scale(x + run * a.run_values + start, count);
      write_tile(x + run * a.run_values + start, count, entry + run * a.run_values + start, scale);
      std::memcpy(scales, &scale, sizeof(scale));
      scales += sizeof(scale);
    }
  }
  unsigned char* plain = entry + a.plain_at;
  for (int64_t i = 0; i < a.plain_values; ++i) {
    const uint16_t value = to_bf16(widen(x[a.runs * a.run_values + i]));
    std::memcpy(plain + 2 * i, &value, sizeof(value));
  }
  for (int64_t i = a.plain_at + 2 * a.plain_values; i < a.entry_bytes; ++i) entry[i] = 0;
}

template <typename X>
ABYSSAL_INLINE void read_entry(const Arguments& a, const unsigned char* entry, X* x) {
  const unsigned char* scales = entry + a.scales_at;
  for (int64_t run = 0; run < a.runs; ++run) {
    for (int64_t start = 0; start < a.run_values; start += kTile) {
      const int64_t count = start + kTile < a.run_values ? kTile : a.run_values - start;
      float scale;
      std::memcpy(&scale, scales, sizeof(scale));
      scales += sizeof(scale);
      read_tile(entry + run * a.run_values + start, count, scale, x + run * a.run_values + start);
    }
  }
  const unsigned char* plain = entry + a.plain_at;
  for (int64_t i = 0; i < a.plain_values; ++i) {
    uint16_t value;
    std::memcpy(&value, plain + 2 * i, sizeof(value));
    narrow(from_bf16(value), x + a.runs * a.run_values + i);
  }
}

template <typename X, bool kWrite>
void convert(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
      for (int64_t t = begin; t < end; ++t) {
        X* x = reinterpret_cast<X*>(a.values) + t * a.num_values();
        unsigned char* entry = a.entries + a.slots[t] * a.entry_bytes;
        if (kWrite)
          write_entry(a, static_cast<const X*>(x), entry);
        else
          read_entry(a, static_cast<const unsigned char*>(entry), x);
      }
    });
  };
  const int64_t bytes = a.tokens * a.num_values() * bytes_of(a.dtype);
  parallel_for(a.tokens, 4 * a.threads, bytes < kForkBytes ? 1 : a.threads, a.fork, work);
}

template <bool kWrite>
int32_t run(const void* record) {
  Arguments a;
  std::memcpy(&a, record, sizeof(a));
  if (!is_dtype(a.dtype)) return kBadDtype;
  if (a.tokens == 0) return kOk;
  if (a.tokens < 0 || a.runs < 1 || a.run_values < 1 || a.plain_values < 0) return kBadShape;
  const int64_t tiles = a.runs * ((a.run_values + kTile - 1) / kTile);
  if (a.scales_at < a.runs * a.run_values || a.plain_at < a.scales_at + 4 * tiles ||
      a.entry_bytes < a.plain_at + 2 * a.plain_values)
    return kBadShape;
  if (!a.values || !a.slots || !a.entries) return kNoStorage;
  for (int64_t t = 0; t < a.tokens; ++t)
    if (a.slots[t] < 0 || a.slots[t] >= a.num_entries) return kBadSlot;
  a.dtype == kBFloat16 ? convert<uint16_t, kWrite>(a) : convert<float, kWrite>(a);
  return kOk;
}

}  // namespace
}  // namespace abyssal

// Entries `slots` from values; no slot twice.  Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_fp8_write(const void* record) { return abyssal::run<true>(record); }

// Values from entries `slots`.  Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_fp8_read(const void* record) { return abyssal::run<false>(record); }
