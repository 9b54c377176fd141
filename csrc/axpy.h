// Weighted sums of rows: out = sum over i of x[i] * w[i], the transposed form of the dot products in dot.h.
//
// Rows are BF16 or FP32 and lie `stride` values apart; sums are FP32.  A strip of outputs stays in registers while the
// rows go by, so an output is one chain of multiply-adds in the order of the rows, wherever it lies in the row.
#pragma once

#include "common.h"

namespace abyssal {

// out[o] = sum over i < size of x[i] * w[i * stride + o], for o < outputs.
using AxpyFunction = void (*)(const void* w, int64_t stride, const float* x, int64_t size, int64_t outputs, float* out);

constexpr int64_t kStrip = 128;  // outputs a caller may hand to one thread: a whole number of strips everywhere

template <typename T>
void axpy_generic(const void* w_void, int64_t stride, const float* x, int64_t size, int64_t outputs, float* out) {
  const T* w = static_cast<const T*>(w_void);
  for (int64_t o = 0; o < outputs; ++o) out[o] = 0.0f;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t o = 0; o < outputs; ++o) out[o] += x[i] * widen(w[i * stride + o]);
}

#if ABYSSAL_X86

ABYSSAL_TARGET_AVX2 ABYSSAL_INLINE __m256 load_avx2(const float* source) { return _mm256_loadu_ps(source); }
ABYSSAL_TARGET_AVX2 ABYSSAL_INLINE __m256 load_avx2(const uint16_t* source) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

ABYSSAL_TARGET_AVX512 ABYSSAL_INLINE __m512 load_avx512(const float* source) { return _mm512_loadu_ps(source); }
ABYSSAL_TARGET_AVX512 ABYSSAL_INLINE __m512 load_avx512(const uint16_t* source) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <int N, typename T>
ABYSSAL_TARGET_AVX2 void strip_avx2(const T* w, int64_t stride, const float* x, int64_t size, float* out) {
  __m256 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm256_setzero_ps();
  for (int64_t i = 0; i < size; ++i, w += stride) {
    const __m256 x_i = _mm256_set1_ps(x[i]);
    for (int n = 0; n < N; ++n) sums[n] = _mm256_fmadd_ps(load_avx2(w + 8 * n), x_i, sums[n]);
  }
  for (int n = 0; n < N; ++n) _mm256_storeu_ps(out + 8 * n, sums[n]);
}

template <int N, typename T>
ABYSSAL_TARGET_AVX512 void strip_avx512(const T* w, int64_t stride, const float* x, int64_t size, float* out) {
  __m512 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; ++i, w += stride) {
    const __m512 x_i = _mm512_set1_ps(x[i]);
    for (int n = 0; n < N; ++n) sums[n] = _mm512_fmadd_ps(load_avx512(w + 16 * n), x_i, sums[n]);
  }
  for (int n = 0; n < N; ++n) _mm512_storeu_ps(out + 16 * n, sums[n]);
}

// What is left of a row after its whole vectors, fewer than `kLanes` outputs, with the same fused multiply-adds.
template <typename T>
ABYSSAL_TARGET_AVX2 void strip_rest(const T* w, int64_t stride, const float* x, int64_t size, int64_t count,
                                    float* out) {
  for (int64_t o = 0; o < count; ++o) {
    float sum = 0.0f;
    for (int64_t i = 0; i < size; ++i) sum = __builtin_fmaf(widen(w[i * stride + o]), x[i], sum);
    out[o] = sum;
  }
}

template <typename T>
void axpy_avx2(const void* w_void, int64_t stride, const float* x, int64_t size, int64_t outputs, float* out) {
  const T* w = static_cast<const T*>(w_void);
  int64_t o = 0;
  for (; o + 64 <= outputs; o += 64) strip_avx2<8>(w + o, stride, x, size, out + o);
  for (; o + 32 <= outputs; o += 32) strip_avx2<4>(w + o, stride, x, size, out + o);
  for (; o + 8 <= outputs; o += 8) strip_avx2<1>(w + o, stride, x, size, out + o);
  strip_rest(w + o, stride, x, size, outputs - o, out + o);
}

template <typename T>
void axpy_avx512(const void* w_void, int64_t stride, const float* x, int64_t size, int64_t outputs, float* out) {
  const T* w = static_cast<const T*>(w_void);
  int64_t o = 0;
  for (; o + 128 <= outputs; o += 128) strip_avx512<8>(w + o, stride, x, size, out + o);
  for (; o + 64 <= outputs; o += 64) strip_avx512<4>(w + o, stride, x, size, out + o);
  for (; o + 16 <= outputs; o += 16) strip_avx512<1>(w + o, stride, x, size, out + o);
  strip_rest(w + o, stride, x, size, outputs - o, out + o);
}

#endif  // ABYSSAL_X86

inline AxpyFunction choose_axpy(Isa isa, bool is_bf16) {
#if ABYSSAL_X86
  if (isa == kAvx512) return is_bf16 ? axpy_avx512<uint16_t> : axpy_avx512<float>;
  if (isa == kAvx2) return is_bf16 ? axpy_avx2<uint16_t> : axpy_avx2<float>;
#endif
  (void)isa;
  return is_bf16 ? axpy_generic<uint16_t> : axpy_generic<float>;
}

}  // namespace abyssal
