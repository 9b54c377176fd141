// y[r] = W[slot[r]] @ x[r]: the matrix products of decoding, where each row (a token at one of its experts) meets a
// whole matrix and the time is the time to read the weights once.
//
// Weights are (E, O, I) row-major in BF16 or FP32, sums are FP32.  Four rows of a matrix are read side by side, which
// hides the latency of fused multiply-adds; rows of x that chose the same expert share each block of weights while it
// is in cache.  One output is one dot product with an order of summation that depends on I alone, so neither the
// other rows, nor the number of threads, nor the position in the matrix changes a bit of it.

#include <algorithm>
#include <vector>

#include "common.h"

namespace abyssal {
namespace {

constexpr int64_t kBlockRows = 4;      // outputs computed side by side
constexpr int64_t kPad = 32;           // x is padded with zeros to a multiple of this
constexpr int64_t kChunkBytes = 64 << 10;  // weights a thread claims at once, at least
constexpr size_t kKeptFloats = 1 << 20;    // scratch kept between calls, at most
constexpr int64_t kForkBytes = 1 << 20;  // below this, waking threads costs more than it gains

// out[n] = dot(w + n * size, x) for n < N.  `x` is padded, in the order that the kernel's Layout gives.
using DotFunction = void (*)(const void* w, const float* x, int64_t size, float* out);

// How the kernel wants x: blocks of 2 * half values, the even ones first; half 0 means in order.  A vector of BF16
// pairs becomes two FP32 vectors, its even and its odd values, by one shift and one mask, without a shuffle.
struct Kernel {
  DotFunction block, single;
  int64_t half;
};

constexpr int kLanes = 16;

template <int N, typename T>
void dot_generic(const void* w_void, const float* x, int64_t size, float* out) {
  const T* w = static_cast<const T*>(w_void);
  const auto widen = [](T value) {
    if constexpr (sizeof(T) == 2) return from_bf16(value);
    else return value;
  };
  float lanes[N][kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int n = 0; n < N; ++n)
      for (int lane = 0; lane < kLanes; ++lane) lanes[n][lane] += widen(w[n * size + i + lane]) * x[i + lane];
  for (int n = 0; n < N; ++n) {
    for (int64_t i = whole; i < size; ++i) lanes[n][i - whole] += widen(w[n * size + i]) * x[i];
    for (int step = kLanes / 2; step > 0; step /= 2)
      for (int lane = 0; lane < step; ++lane) lanes[n][lane] += lanes[n][lane + step];
    out[n] = lanes[n][0];
  }
}

#if ABYSSAL_X86

#define ABYSSAL_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define ABYSSAL_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx2,fma")))

ABYSSAL_TARGET_AVX2 inline float sum_avx2(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

template <int N>
ABYSSAL_TARGET_AVX2 void dot_bf16_avx2(const void* w_void, const float* x, int64_t size, float* out) {
  const uint16_t* w = static_cast<const uint16_t*>(w_void);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 even[N], odd[N];
  for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm256_setzero_ps();
  const auto add = [&](int n, const uint16_t* source, __m256 x_even, __m256 x_odd) ABYSSAL_TARGET_AVX2 {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    even[n] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), x_even, even[n]);
    odd[n] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(pairs, high)), x_odd, odd[n]);
  };
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m256 x_even = _mm256_loadu_ps(x + i), x_odd = _mm256_loadu_ps(x + i + 8);
    for (int n = 0; n < N; ++n) {
      _mm_prefetch(reinterpret_cast<const char*>(w + (n + N) * size + i), _MM_HINT_T0);
      add(n, w + n * size + i, x_even, x_odd);
    }
  }
  for (int n = 0; i < size && n < N; ++n) {
    alignas(32) uint16_t rest[16] = {};
    std::memcpy(rest, w + n * size + i, static_cast<size_t>(size - i) * 2);
    add(n, rest, _mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8));
  }
  for (int n = 0; n < N; ++n) out[n] = sum_avx2(_mm256_add_ps(even[n], odd[n]));
}

template <int N>
ABYSSAL_TARGET_AVX2 void dot_float_avx2(const void* w_void, const float* x, int64_t size, float* out) {
  const float* w = static_cast<const float*>(w_void);
  __m256 first[N], second[N];
  for (int n = 0; n < N; ++n) first[n] = second[n] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    const __m256 x_first = _mm256_loadu_ps(x + i), x_second = _mm256_loadu_ps(x + i + 8);
    for (int n = 0; n < N; ++n) {
      first[n] = _mm256_fmadd_ps(_mm256_loadu_ps(w + n * size + i), x_first, first[n]);
      second[n] = _mm256_fmadd_ps(_mm256_loadu_ps(w + n * size + i + 8), x_second, second[n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    if (i < size) {
      alignas(32) float rest[16] = {};
      std::memcpy(rest, w + n * size + i, static_cast<size_t>(size - i) * 4);
      first[n] = _mm256_fmadd_ps(_mm256_load_ps(rest), _mm256_loadu_ps(x + i), first[n]);
      second[n] = _mm256_fmadd_ps(_mm256_load_ps(rest + 8), _mm256_loadu_ps(x + i + 8), second[n]);
    }
    out[n] = sum_avx2(_mm256_add_ps(first[n], second[n]));
  }
}

template <int N>
ABYSSAL_TARGET_AVX512 void dot_bf16_avx512(const void* w_void, const float* x, int64_t size, float* out) {
  const uint16_t* w = static_cast<const uint16_t*>(w_void);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 even[N], odd[N];
  for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m512 x_even = _mm512_loadu_ps(x + i), x_odd = _mm512_loadu_ps(x + i + 16);
    for (int n = 0; n < N; ++n) {
      const uint16_t* source = w + n * size + i;
      _mm_prefetch(reinterpret_cast<const char*>(source + N * size), _MM_HINT_T0);
      const __m512i pairs = _mm512_loadu_si512(source);
      even[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), x_even, even[n]);
      odd[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, high)), x_odd, odd[n]);
    }
  }
  if (i < size) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << (size - i)) - 1);
    const __m512 x_even = _mm512_loadu_ps(x + i), x_odd = _mm512_loadu_ps(x + i + 16);
    for (int n = 0; n < N; ++n) {
      const __m512i pairs = _mm512_maskz_loadu_epi16(mask, w + n * size + i);
      even[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), x_even, even[n]);
      odd[n] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, high)), x_odd, odd[n]);
    }
  }
  for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(_mm512_add_ps(even[n], odd[n]));
}

template <int N>
ABYSSAL_TARGET_AVX512 void dot_float_avx512(const void* w_void, const float* x, int64_t size, float* out) {
  const float* w = static_cast<const float*>(w_void);
  __m512 first[N], second[N];
  for (int n = 0; n < N; ++n) first[n] = second[n] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m512 x_first = _mm512_loadu_ps(x + i), x_second = _mm512_loadu_ps(x + i + 16);
    for (int n = 0; n < N; ++n) {
      const float* source = w + n * size + i;
      _mm_prefetch(reinterpret_cast<const char*>(source + N * size), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(source + N * size + 16), _MM_HINT_T0);
      first[n] = _mm512_fmadd_ps(_mm512_loadu_ps(source), x_first, first[n]);
      second[n] = _mm512_fmadd_ps(_mm512_loadu_ps(source + 16), x_second, second[n]);
    }
  }
  if (i < size) {
    const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << (size - i)) - 1);
    const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    for (int n = 0; n < N; ++n) {
      const float* source = w + n * size + i;
      first[n] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(low, source), _mm512_loadu_ps(x + i), first[n]);
      second[n] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(high, source + 16), _mm512_loadu_ps(x + i + 16), second[n]);
    }
  }
  for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(_mm512_add_ps(first[n], second[n]));
}

#endif  // ABYSSAL_X86

Kernel choose_kernel(Isa isa, bool is_bf16) {
#if ABYSSAL_X86
  if (isa == kAvx512)
    return is_bf16 ? Kernel{dot_bf16_avx512<kBlockRows>, dot_bf16_avx512<1>, 16}
                   : Kernel{dot_float_avx512<kBlockRows>, dot_float_avx512<1>, 0};
  if (isa == kAvx2)
    return is_bf16 ? Kernel{dot_bf16_avx2<kBlockRows>, dot_bf16_avx2<1>, 8}
                   : Kernel{dot_float_avx2<kBlockRows>, dot_float_avx2<1>, 0};
#endif
  (void)isa;
  return is_bf16 ? Kernel{dot_generic<kBlockRows, uint16_t>, dot_generic<1, uint16_t>, 0}
                 : Kernel{dot_generic<kBlockRows, float>, dot_generic<1, float>, 0};
}

// One row of x as padded FP32 in the kernel's order.
void pack_row(const void* x, bool is_bf16, int64_t row, int64_t size, int64_t padded, int64_t half, float* out) {
  const auto value = [&](int64_t i) {
    if (i >= size) return 0.0f;
    return is_bf16 ? from_bf16(static_cast<const uint16_t*>(x)[row * size + i])
                   : static_cast<const float*>(x)[row * size + i];
  };
  if (half == 0) {
    for (int64_t i = 0; i < padded; ++i) out[i] = value(i);
    return;
  }
  for (int64_t start = 0; start < padded; start += 2 * half)
    for (int64_t i = 0; i < half; ++i) {
      out[start + i] = value(start + 2 * i);
      out[start + half + i] = value(start + 2 * i + 1);
    }
}

struct Group {  // rows [first, last) of `order` chose the same slot
  int64_t slot, first, last;
};

}  // namespace
}  // namespace abyssal

// W (num_slots, num_outputs, size), x (num_rows, size), y (num_rows, num_outputs), all contiguous; slots (num_rows) or
// null, which means slot 0 for every row.  `fork` is GOMP_parallel or null.  Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_grouped_gemv(const void* w, int32_t w_dtype, const void* x, int32_t x_dtype, void* y,
                                            int32_t y_dtype, const int64_t* slots, int64_t num_rows, int64_t num_slots,
                                            int64_t num_outputs, int64_t size, int32_t threads, void* fork,
                                            int32_t isa_limit) {
  using namespace abyssal;
  for (int32_t dtype : {w_dtype, x_dtype, y_dtype})
    if (dtype != kFloat32 && dtype != kBFloat16) return kBadDtype;
  if (num_rows < 0 || num_slots < 0 || num_outputs < 0 || size < 0) return kBadShape;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t slot = slots ? slots[row] : 0;
    if (slot < 0 || slot >= num_slots) return kBadSlot;
  }
  if (num_rows == 0 || num_outputs == 0) return kOk;

  const Kernel kernel = choose_kernel(choose_isa(isa_limit), w_dtype == kBFloat16);
  const int64_t padded = (size + kPad - 1) / kPad * kPad;
  thread_local std::vector<float> packed;  // kept between calls: decoding asks for the same few sizes again and again
  thread_local std::vector<int64_t> order;
  thread_local std::vector<Group> groups;
  packed.resize(static_cast<size_t>(num_rows * padded));
  order.resize(static_cast<size_t>(num_rows));
  groups.clear();

  for (int64_t row = 0; row < num_rows; ++row) {
    order[static_cast<size_t>(row)] = row;
    pack_row(x, x_dtype == kBFloat16, row, size, padded, kernel.half, packed.data() + row * padded);
  }
  if (slots) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return slots[a] < slots[b]; });
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t slot = slots ? slots[order[static_cast<size_t>(i)]] : 0;
    if (groups.empty() || groups.back().slot != slot) groups.push_back({slot, i, i});
    groups.back().last = i + 1;
  }

  const int64_t blocks = (num_outputs + kBlockRows - 1) / kBlockRows;
  const int64_t element = w_dtype == kBFloat16 ? 2 : 4;
  const int64_t num_groups = static_cast<int64_t>(groups.size());
  const int64_t bytes = num_groups * num_outputs * size * element;
  const float* packed_rows = packed.data();  // the workers must not see their own thread_local vectors
  const int64_t* row_order = order.data();
  const Group* group_list = groups.data();

  const auto work = [=](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Group& group = group_list[item / blocks];
      const int64_t output = item % blocks * kBlockRows;
      const int64_t count = std::min(kBlockRows, num_outputs - output);
      const char* block = static_cast<const char*>(w) + (group.slot * num_outputs + output) * size * element;
      for (int64_t i = group.first; i < group.last; ++i) {
        const int64_t row = row_order[i];
        float out[kBlockRows];
        if (count == kBlockRows) {
          kernel.block(block, packed_rows + row * padded, size, out);
        } else {
          for (int64_t n = 0; n < count; ++n)
            kernel.single(block + n * size * element, packed_rows + row * padded, size, out + n);
        }
        for (int64_t n = 0; n < count; ++n) {
          const int64_t at = row * num_outputs + output + n;
          if (y_dtype == kBFloat16) static_cast<uint16_t*>(y)[at] = to_bf16(out[n]);
          else static_cast<float*>(y)[at] = out[n];
        }
      }
    }
  };
  const int64_t chunks = std::min<int64_t>(bytes / kChunkBytes, int64_t{4} * threads);
  parallel_for(num_groups * blocks, chunks, bytes < kForkBytes ? 1 : threads, reinterpret_cast<ForkFunction>(fork), work);
  if (packed.capacity() > kKeptFloats) std::vector<float>().swap(packed);
  return kOk;
}

// 0 generic C++, 1 AVX2 with FMA, 2 AVX-512 (F, BW).
ABYSSAL_EXPORT int32_t abyssal_isa() { return abyssal::choose_isa(-1); }

// Raised whenever a signature in this library changes; the Python side refuses another number.
ABYSSAL_EXPORT int32_t abyssal_abi_version() { return 1; }
