// What every native kernel shares: the C interface, element types, instruction sets, and threads.
//
// The library has a plain C interface and is called through ctypes, so it knows neither Python nor torch.  A function
// takes one record of 8-byte fields, because ctypes converts arguments one by one and at decoding that would cost more
// than the arithmetic; the Python side packs the same record with `struct`.  The library owns no threads: a second pool
// would fight torch's OpenMP workers, which spin between operators, for the same cores.  The caller passes torch's own
// GOMP_parallel, or null for one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define ABYSSAL_EXPORT extern "C" __declspec(dllexport)
#else
#define ABYSSAL_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define ABYSSAL_X86 1
#if !defined(__clang__)  // GCC's own AVX-512 header sets these off (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define ABYSSAL_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define ABYSSAL_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define ABYSSAL_TARGET_AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#else
#define ABYSSAL_X86 0
#endif

#if defined(__GNUC__)
#define ABYSSAL_INLINE inline __attribute__((always_inline))
#define ABYSSAL_INLINE_LAMBDA __attribute__((always_inline))
#else
#define ABYSSAL_INLINE inline
#define ABYSSAL_INLINE_LAMBDA
#endif

namespace abyssal {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };
enum Status : int32_t { kOk = 0, kBadDtype = 1, kBadSlot = 2, kBadShape = 3, kNoStorage = 4 };
enum Isa : int32_t { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// Best instruction set of this machine, at most `limit` (negative: no limit).
inline Isa choose_isa(int64_t limit) {
#if ABYSSAL_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
    return kGeneric;
  }();
  return limit >= 0 && limit < best ? static_cast<Isa>(limit) : best;
#else
  (void)limit;
  return kGeneric;
#endif
}

ABYSSAL_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Round to nearest, ties to even, as torch does; NaN stays a quiet NaN.
ABYSSAL_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

ABYSSAL_INLINE float widen(float value) { return value; }
ABYSSAL_INLINE float widen(uint16_t bits) { return from_bf16(bits); }
ABYSSAL_INLINE void narrow(float value, float* out) { *out = value; }
ABYSSAL_INLINE void narrow(float value, uint16_t* out) { *out = to_bf16(value); }

// What is left of a value that is stored as an X.
template <typename X>
ABYSSAL_INLINE float rounded(float value) {
  X stored;
  narrow(value, &stored);
  return widen(stored);
}

inline int64_t bytes_of(int64_t dtype) { return dtype == kBFloat16 ? 2 : 4; }

inline bool is_dtype(int64_t dtype) { return dtype == kFloat32 || dtype == kBFloat16; }

#if ABYSSAL_X86
template <typename Body>
ABYSSAL_TARGET_AVX512 void call_avx512(const Body& body) {
  body();
}
template <typename Body>
ABYSSAL_TARGET_AVX2 void call_avx2(const Body& body) {
  body();
}
#endif

// Run `body`, plain loops that the compiler vectorises, compiled once for each instruction set.  `body` must be marked
// ABYSSAL_INLINE_LAMBDA, and what it calls ABYSSAL_INLINE.  Contraction to fused multiply-adds is off (setup.py), so
// all instruction sets give the same bits.
template <typename Body>
void call_vectorized(Isa isa, const Body& body) {
#if ABYSSAL_X86
  if (isa >= kAvx512) return call_avx512(body);
  if (isa == kAvx2) return call_avx2(body);
#endif
  (void)isa;
  body();
}

// The signature of GOMP_parallel: run `body(data)` on each thread of a team.
using ForkFunction = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

// Call `work(begin, end)` over [0, total) in `num_chunks` contiguous chunks on up to `threads` threads.  Threads claim
// chunks, so a core that is busy with something else delays one chunk and not a whole share, and a team smaller than
// asked for still finishes.
template <typename Work>
void parallel_for(int64_t total, int64_t num_chunks, int64_t threads, ForkFunction fork, const Work& work) {
  if (threads <= 1 || fork == nullptr || num_chunks <= 1) {
    work(int64_t{0}, total);
    return;
  }
  struct Job {
    const Work* work;
    int64_t total, num_chunks;
    std::atomic<int64_t> next{0};
  } job;
  job.work = &work;
  job.total = total;
  job.num_chunks = num_chunks;
  fork(
      [](void* data) {
        Job& shared = *static_cast<Job*>(data);
        for (;;) {
          const int64_t chunk = shared.next.fetch_add(1, std::memory_order_relaxed);
          if (chunk >= shared.num_chunks) return;
          (*shared.work)(shared.total * chunk / shared.num_chunks, shared.total * (chunk + 1) / shared.num_chunks);
        }
      },
      &job, static_cast<unsigned>(threads), 0);
}

}  // namespace abyssal
