// Dot products of a few rows of weights with one vector, the inner loop of decoding.
//
// Rows are BF16 or FP32 and lie `stride` values apart; sums are FP32.  Four rows are read side by side, which hides the
// latency of fused multiply-adds.  The order of summation depends on `size` alone.
#pragma once

#include <algorithm>

#include "common.h"

namespace abyssal {

constexpr int64_t kDotRows = 4;  // rows side by side
constexpr int64_t kPad = 32;     // x is padded with zeros to a multiple of this
constexpr int64_t kAheadBytes = 4096;  // weights are fetched this far ahead or a block of rows, whichever is farther

template <int N, typename T>
ABYSSAL_INLINE int64_t fetch_ahead(int64_t stride) {
  return std::max<int64_t>(N * stride, kAheadBytes / static_cast<int64_t>(sizeof(T)));
}

inline int64_t padded_size(int64_t size) { return (size + kPad - 1) / kPad * kPad; }

// out[n] = dot(w + n * stride, x) over `size` values, for n < N.  `x` is padded, in the order that Dot::half gives.
using DotFunction = void (*)(const void* w, int64_t stride, const float* x, int64_t size, float* out);

// How the kernel wants x: blocks of 2 * half values, the even ones first; half 0 means in order.  A vector of BF16
// pairs becomes two FP32 vectors, its even and its odd values, by one shift and one mask, without a shuffle.
struct Dot {
  DotFunction block, single;
  int64_t half;
};

constexpr int kLanes = 16;

template <int N, typename T>
void dot_generic(const void* w_void, int64_t stride, const float* x, int64_t size, float* out) {
  const T* w = static_cast<const T*>(w_void);
  float lanes[N][kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int n = 0; n < N; ++n)
      for (int lane = 0; lane < kLanes; ++lane) lanes[n][lane] += widen(w[n * stride + i + lane]) * x[i + lane];
  for (int n = 0; n < N; ++n) {
    for (int64_t i = whole; i < size; ++i) lanes[n][i - whole] += widen(w[n * stride + i]) * x[i];
    for (int step = kLanes / 2; step > 0; step /= 2)
      for (int lane = 0; lane < step; ++lane) lanes[n][lane] += lanes[n][lane + step];
    out[n] = lanes[n][0];
  }
}

#if ABYSSAL_X86

ABYSSAL_TARGET_AVX2 inline float sum_avx2(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

template <int N>
ABYSSAL_TARGET_AVX2 void dot_bf16_avx2(const void* w_void, int64_t stride, const float* x, int64_t size, float* out) {
  const uint16_t* w = static_cast<const uint16_t*>(w_void);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 even[N], odd[N];
  for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm256_setzero_ps();
  const auto add = [&](int n, const uint16_t* source, __m256 x_even, __m256 x_odd) ABYSSAL_TARGET_AVX2 {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    even[n] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), x_even, even[n]);
    odd[n] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pairs, high)), x_odd, odd[n]);
  };
  const int64_t ahead = fetch_ahead<N, uint16_t>(stride);
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m256 x_even = _mm256_loadu_ps(x + i), x_odd = _mm256_loadu_ps(x + i + 8);
    for (int n = 0; n < N; ++n) {
      _mm_prefetch(reinterpret_cast<const char*>(w + n * stride + ahead + i), _MM_HINT_T0);
      add(n, w + n * stride + i, x_even, x_odd);
    }
  }
  for (int n = 0; i < size && n < N; ++n) {
    alignas(32) uint16_t rest[16] = {};
    std::memcpy(rest, w + n * stride + i, static_cast<size_t>(size - i) * 2);
    add(n, rest, _mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8));
  }
  for (int n = 0; n < N; ++n) out[n] = sum_avx2(_mm256_add_ps(even[n], odd[n]));
}

template <int N>
ABYSSAL_TARGET_AVX2 void dot_float_avx2(const void* w_void, int64_t stride, const float* x, int64_t size, float* out) {
  const float* w = static_cast<const float*>(w_void);
  __m256 first[N], second[N];
  for (int n = 0; n < N; ++n) first[n] = second[n] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m256 x_first = _mm256_loadu_ps(x + i), x_second = _mm256_loadu_ps(x + i + 8);
    for (int n = 0; n < N; ++n) {
      first[n] = _mm256_fmadd_ps(_mm256_loadu_ps(w + n * stride + i), x_first, first[n]);
      second[n] = _mm256_fmadd_ps(_mm256_loadu_ps(w + n * stride + i + 8), x_second, second[n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    if (i < size) {
      alignas(32) float rest[16] = {};
      std::memcpy(rest, w + n * stride + i, static_cast<size_t>(size - i) * 4);
      first[n] = _mm256_fmadd_ps(_mm256_load_ps(rest), _mm256_loadu_ps(x + i), first[n]);
      second[n] = _mm256_fmadd_ps(_mm256_load_ps(rest + 8), _mm256_loadu_ps(x + i + 8), second[n]);
    }
    out[n] = sum_avx2(_mm256_add_ps(first[n], second[n]));
  }
}

template <int N>
ABYSSAL_TARGET_AVX512 void dot_bf16_avx512(const void* w_void, int64_t stride, const float* x, int64_t size, float* out) {
  const uint16_t* w = static_cast<const uint16_t*>(w_void);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 even[N], odd[N];
  for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
  const int64_t ahead = fetch_ahead<N, uint16_t>(stride);
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m512 x_even = _mm512_loadu_ps(x + i), x_odd = _mm512_loadu_ps(x + i + 16);
    for (int n = 0; n < N; ++n) {
      const uint16_t* source = w + n * stride + i;
      _mm_prefetch(reinterpret_cast<const char*>(source + ahead), _MM_HINT_T0);
      const __m512i pairs = _mm512_loadu_si512(source);
      even[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), x_even, even[n]);
      odd[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, high)), x_odd, odd[n]);
    }
  }
  if (i < size) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << (size - i)) - 1);
    const __m512 x_even = _mm512_loadu_ps(x + i), x_odd = _mm512_loadu_ps(x + i + 16);
    for (int n = 0; n < N; ++n) {
      const __m512i pairs = _mm512_maskz_loadu_epi16(mask, w + n * stride + i);
      even[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), x_even, even[n]);
      odd[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, high)), x_odd, odd[n]);
    }
  }
  for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(_mm512_add_ps(even[n], odd[n]));
}

template <int N>
ABYSSAL_TARGET_AVX512 void dot_float_avx512(const void* w_void, int64_t stride, const float* x, int64_t size, float* out) {
  const float* w = static_cast<const float*>(w_void);
  __m512 first[N], second[N];
  for (int n = 0; n < N; ++n) first[n] = second[n] = _mm512_setzero_ps();
  const int64_t ahead = fetch_ahead<N, float>(stride);
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m512 x_first = _mm512_loadu_ps(x + i), x_second = _mm512_loadu_ps(x + i + 16);
    for (int n = 0; n < N; ++n) {
      const float* source = w + n * stride + i;
      _mm_prefetch(reinterpret_cast<const char*>(source + ahead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(source + ahead + 16), _MM_HINT_T0);
      first[n] = _mm512_fmadd_ps(_mm512_loadu_ps(source), x_first, first[n]);
      second[n] = _mm512_fmadd_ps(_mm512_loadu_ps(source + 16), x_second, second[n]);
    }
  }
  if (i < size) {
    const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << (size - i)) - 1);
    const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    for (int n = 0; n < N; ++n) {
      const float* source = w + n * stride + i;
      first[n] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(low, source), _mm512_loadu_ps(x + i), first[n]);
      second[n] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(high, source + 16), _mm512_loadu_ps(x + i + 16), second[n]);
    }
  }
  for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(_mm512_add_ps(first[n], second[n]));
}

#endif  // ABYSSAL_X86

inline Dot choose_dot(Isa isa, bool is_bf16) {
#if ABYSSAL_X86
  if (isa == kAvx512)
    return is_bf16 ? Dot{dot_bf16_avx512<kDotRows>, dot_bf16_avx512<1>, 16}
                   : Dot{dot_float_avx512<kDotRows>, dot_float_avx512<1>, 0};
  if (isa == kAvx2)
    return is_bf16 ? Dot{dot_bf16_avx2<kDotRows>, dot_bf16_avx2<1>, 8}
                   : Dot{dot_float_avx2<kDotRows>, dot_float_avx2<1>, 0};
#endif
  (void)isa;
  return is_bf16 ? Dot{dot_generic<kDotRows, uint16_t>, dot_generic<1, uint16_t>, 0}
                 : Dot{dot_generic<kDotRows, float>, dot_generic<1, float>, 0};
}

template <typename T>
void pack_typed(const T* x, int64_t size, int64_t half, float* out) {
  const int64_t padded = padded_size(size);
  if (half == 0) {
    for (int64_t i = 0; i < size; ++i) out[i] = widen(x[i]);
    for (int64_t i = size; i < padded; ++i) out[i] = 0.0f;
    return;
  }
  const int64_t block = 2 * half, whole = size / block * block;
  for (int64_t start = 0; start < whole; start += block)
    for (int64_t i = 0; i < half; ++i) {
      out[start + i] = widen(x[start + 2 * i]);
      out[start + half + i] = widen(x[start + 2 * i + 1]);
    }
  for (int64_t i = whole; i < padded; ++i) {
    const int64_t within = i % block, place = i - within + within / 2 + within % 2 * half;
    out[place] = i < size ? widen(x[i]) : 0.0f;
  }
}

// `size` values of x as padded FP32 in the order of a Dot.
inline void pack_row(const void* x, int64_t dtype, int64_t size, int64_t half, float* out) {
  if (dtype == kBFloat16) pack_typed(static_cast<const uint16_t*>(x), size, half, out);
  else pack_typed(static_cast<const float*>(x), size, half, out);
}

}  // namespace abyssal
