// Which tokens may win the race that a draw is, and how much mass stands before a token, without the logarithm and the
// FP64 exponential of each token that the definition takes (kernels/race.py).
//
// Token v arrives at -log(u_v) / w_v.  The likeliest has weight 1, and -log(u) >= 1 - u, so whoever arrives before it
// has 1 - u_v <= w_v t with its time t: a comparison of FP32 numbers that err on the safe side.  Few tokens pass, and
// the caller looks at those as the definition does.

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"
#include "exp.h"

namespace abyssal {
namespace {

constexpr int64_t kBlock = 256;       // tokens compared at once
constexpr int64_t kUnit = 1 << 14;    // of a row, for one thread
constexpr int64_t kForkTokens = 1 << 15;
constexpr int64_t kLanes = 16;
constexpr float kSafe = 1.0001f;      // exp's argument is off by 110 * 2^-22 at most, the rest by far less
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

ABYSSAL_INLINE uint64_t mixed(uint64_t state) {  // SplitMix64
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
  return state ^ (state >> 31);
}

// Philox4x32-10 of (position, purpose, 0, 0) under the seed; the last two words start a row's SplitMix64 sequence.
uint64_t start_of(uint64_t seed, uint64_t position, uint64_t purpose) {
  uint32_t a = static_cast<uint32_t>(position), b = static_cast<uint32_t>(purpose), c = 0, d = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * a, second = uint64_t{0xCD9E8D57u} * c;
    const uint32_t next_a = static_cast<uint32_t>(second >> 32) ^ b ^ key0;
    const uint32_t next_c = static_cast<uint32_t>(first >> 32) ^ d ^ key1;
    b = static_cast<uint32_t>(second);
    d = static_cast<uint32_t>(first);
    a = next_a;
    c = next_c;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return uint64_t{c} | uint64_t{d} << 32;
}

struct Arguments {
  const float* logits;         // (rows, tokens), contiguous
  const int64_t* best;         // (rows): the likeliest token
  const double* temperatures;  // (rows)
  const uint64_t* seeds;       // (rows)
  const int64_t* positions;    // (rows)
  uint64_t* starts;            // (rows), out
  int64_t* counts;             // (rows), out: tokens that may win; -1: more than `most`
  int64_t* ids;                // (rows, most), out
  int64_t rows, tokens, most, purpose, threads;
  ForkFunction fork;
  int64_t isa_limit;
};

struct Row {
  const float* logits;
  float largest, inverse, scale;
  uint64_t start;
};

Row row_of(const Arguments& a, int64_t row) {
  const float* logits = a.logits + row * a.tokens;
  const int64_t best = a.best[row];
  const double u = (static_cast<double>(mixed(a.starts[row] + static_cast<uint64_t>(best + 1) * kGolden) >> 12) + 0.5) *
                   0x1p-52;
  return {logits, logits[best], static_cast<float>(1.0 / a.temperatures[row]), static_cast<float>(-std::log(u)) * kSafe,
          a.starts[row]};
}

// Whether any of `count` tokens from `first` on may win; `passes` says which.
ABYSSAL_INLINE bool compare(const Row& row, int64_t first, int64_t count, int32_t* passes) {
  int32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float bound = exp_nonpositive((row.logits[first + i] - row.largest) * row.inverse) * row.scale;
    const uint64_t state = mixed(row.start + static_cast<uint64_t>(first + i + 1) * kGolden);
    const int32_t gap = static_cast<int32_t>(~state >> 33);  // the leading bits of 1 - u
    passes[i] = static_cast<float>(gap) * 0x1p-31f * 0.999999f <= bound;
    any |= passes[i];
  }
  return any;
}

ABYSSAL_INLINE void scan(const Row& row, int64_t begin, int64_t end, std::vector<int64_t>& found) {
  int32_t passes[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    if (!compare(row, first, count, passes)) continue;
    for (int64_t i = 0; i < count; ++i)
      if (passes[i]) found.push_back(first + i);
  }
}

void candidates(const Arguments& a) {
  const Isa isa = choose_isa(a.isa_limit);
  const int64_t units = (a.tokens + kUnit - 1) / kUnit;
  std::vector<std::vector<int64_t>> found(static_cast<size_t>(a.rows * units));
  for (int64_t row = 0; row < a.rows; ++row)
    a.starts[row] = start_of(a.seeds[row], static_cast<uint64_t>(a.positions[row]), static_cast<uint64_t>(a.purpose));
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Row row = row_of(a, unit / units);
      const int64_t first = unit % units * kUnit, last = std::min(a.tokens, first + kUnit);
      std::vector<int64_t>& mine = found[static_cast<size_t>(unit)];
      call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA { scan(row, first, last, mine); });
    }
  };
  const int64_t threads = a.rows * a.tokens < kForkTokens ? 1 : a.threads;
  parallel_for(a.rows * units, std::min(a.rows * units, 4 * a.threads), threads, a.fork, work);
  for (int64_t row = 0; row < a.rows; ++row) {
    int64_t count = 0;
    for (int64_t unit = row * units; unit < (row + 1) * units; ++unit)
      for (const int64_t id : found[static_cast<size_t>(unit)]) {
        if (count < a.most) a.ids[row * a.most + count] = id;
        ++count;
      }
    a.counts[row] = count <= a.most ? count : -1;
  }
}

struct MassArguments {
  const float* logits;  // (tokens)
  double* masses;       // (2), out: of tokens before it, likelier or as likely with a smaller id, and of all
  int64_t tokens, token, best, isa_limit;
  double temperature;
};

// Weights of tokens [begin, end), and of those above the level (or at it, where `level` counts).
ABYSSAL_INLINE void add_up(const MassArguments& a, int64_t begin, int64_t end, bool level, double* above, double* all) {
  const float largest = a.logits[a.best], edge = a.logits[a.token];
  const float inverse = static_cast<float>(1.0 / a.temperature);
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    float sums[kLanes] = {}, aboves[kLanes] = {};
    float weights[kBlock], inside[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      const float logit = i < count ? a.logits[first + i] : 0.0f;
      const bool stands = i < count && (level ? logit >= edge : logit > edge);
      const float weight = i < count ? exp_nonpositive((logit - largest) * inverse) : 0.0f;
      weights[i] = weight;
      inside[i] = stands ? weight : 0.0f;
    }
    for (int64_t i = 0; i < kBlock; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) {
        sums[j] += weights[i + j];
        aboves[j] += inside[i + j];
      }
    for (int64_t j = 0; j < kLanes; ++j) {
      *all += static_cast<double>(sums[j]);
      *above += static_cast<double>(aboves[j]);
    }
  }
}

}  // namespace
}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_race(const void* record) {
  abyssal::Arguments a;
  std::memcpy(&a, record, sizeof(a));
  if (a.rows < 0 || a.tokens <= 0 || a.most <= 0) return abyssal::kBadShape;
  if (a.rows == 0) return abyssal::kOk;
  if (!a.logits || !a.best || !a.temperatures || !a.seeds || !a.positions || !a.starts || !a.counts || !a.ids)
    return abyssal::kNoStorage;
  for (int64_t row = 0; row < a.rows; ++row)
    if (a.best[row] < 0 || a.best[row] >= a.tokens) return abyssal::kBadSlot;
  abyssal::candidates(a);
  return abyssal::kOk;
}

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_mass(const void* record) {
  abyssal::MassArguments a;
  std::memcpy(&a, record, sizeof(a));
  if (a.tokens <= 0) return abyssal::kBadShape;
  if (!a.logits || !a.masses) return abyssal::kNoStorage;
  if (a.token < 0 || a.token >= a.tokens || a.best < 0 || a.best >= a.tokens) return abyssal::kBadSlot;
  double above = 0.0, all = 0.0;
  abyssal::call_vectorized(abyssal::choose_isa(a.isa_limit), [&]() ABYSSAL_INLINE_LAMBDA {
    abyssal::add_up(a, 0, a.token, true, &above, &all);
    abyssal::add_up(a, a.token, a.tokens, false, &above, &all);
  });
  a.masses[0] = above;
  a.masses[1] = all;
  return abyssal::kOk;
}
