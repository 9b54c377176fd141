// The gate of a mixture: scores of the experts, the best groups, the best experts in them, and their weights, in FP32.
//
// A row depends on nothing but itself: the exponential is the same code for every element, whatever its place in the
// array, and sums run in the order of the experts.  Of equal scores the smaller number wins.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"
#include "exp.h"
#include "operators.h"

namespace abyssal {
namespace {

constexpr int64_t kForkValues = 1 << 15;  // below this, waking threads costs more than it gains

using Arguments = GateArguments;

ABYSSAL_INLINE void sigmoid(const float* logits, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = logits[i];
    const float t = exp_nonpositive(-std::fabs(x));
    scores[i] = (x < 0.0f ? t : 1.0f) / (1.0f + t);
  }
}

ABYSSAL_INLINE void exponentials(const float* logits, float largest, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; ++i) scores[i] = exp_nonpositive(logits[i] - largest);
}

inline void softmax(const float* logits, int64_t count, float* scores) {
  const float largest = *std::max_element(logits, logits + count);
  exponentials(logits, largest, count, scores);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += scores[i];
  for (int64_t i = 0; i < count; ++i) scores[i] = static_cast<float>(scores[i] / sum);
}

// Indices of the `count` largest of `values`, largest first, smaller index first among equals.
inline void largest_of(const float* values, int64_t size, int64_t count, int64_t* out) {
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < size; ++i) {
      bool taken = false;
      for (int64_t j = 0; j < k; ++j) taken |= out[j] == i;
      if (!taken && (best < 0 || values[i] > values[best])) best = i;
    }
    out[k] = best;
  }
}

// Put what a group that is not kept counts for in place of its experts' choice scores.
void keep_groups(const Arguments& a, float* choice, std::vector<float>& group_scores, std::vector<int64_t>& kept) {
  const int64_t size = a.experts / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    const float* members = choice + g * size;
    float first = -std::numeric_limits<float>::infinity(), second = first;
    for (int64_t i = 0; i < size; ++i) {
      if (members[i] > first) {
        second = first;
        first = members[i];
      } else if (members[i] > second) {
        second = members[i];
      }
    }
    group_scores[static_cast<size_t>(g)] = a.softmax ? first : first + second;
  }
  largest_of(group_scores.data(), a.groups, a.kept_groups, kept.data());
  const float dropped = a.softmax ? 0.0f : -std::numeric_limits<float>::infinity();
  for (int64_t g = 0; g < a.groups; ++g)
    if (std::find(kept.begin(), kept.begin() + a.kept_groups, g) == kept.begin() + a.kept_groups)
      std::fill(choice + g * size, choice + (g + 1) * size, dropped);
}

void choose_row(const Arguments& a, int64_t row, std::vector<float>& choice, std::vector<float>& group_scores,
                std::vector<int64_t>& kept) {
  const float* scores = a.scores + row * a.experts;
  for (int64_t e = 0; e < a.experts; ++e) choice[static_cast<size_t>(e)] = scores[e] + (a.bias ? a.bias[e] : 0.0f);
  if (a.kept_groups < a.groups) keep_groups(a, choice.data(), group_scores, kept);
  int64_t* ids = a.ids + row * a.top_k;
  float* weights = a.weights + row * a.top_k;
  largest_of(choice.data(), a.experts, a.top_k, ids);
  float sum = 0.0f;
  for (int64_t k = 0; k < a.top_k; ++k) sum += weights[k] = scores[ids[k]];
  const float scale = static_cast<float>(a.route_scale);
  for (int64_t k = 0; k < a.top_k; ++k) {
    if (a.renormalise) weights[k] /= sum + 1e-20f;
    weights[k] *= scale;
  }
}

}  // namespace

Status gate(const Arguments& a) {
  const bool fits = a.rows >= 0 && a.experts > 0 && a.top_k > 0 && a.top_k <= a.experts && a.groups > 0 &&
                    a.experts % a.groups == 0 && a.kept_groups > 0 && a.kept_groups <= a.groups;
  if (!fits) return kBadShape;
  if (a.rows == 0) return kOk;
  if (!a.logits || !a.scores || !a.ids || !a.weights) return kNoStorage;
  const Isa isa = choose_isa(a.isa_limit);
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> choice(static_cast<size_t>(a.experts)), group_scores(static_cast<size_t>(a.groups));
    std::vector<int64_t> kept(static_cast<size_t>(a.groups));
    for (int64_t row = begin; row < end; ++row) {
      const float* logits = a.logits + row * a.experts;
      float* scores = a.scores + row * a.experts;
      if (a.softmax) softmax(logits, a.experts, scores);
      else call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA { sigmoid(logits, a.experts, scores); });
      choose_row(a, row, choice, group_scores, kept);
    }
  };
  parallel_for(a.rows, 4 * a.threads, a.rows * a.experts < kForkValues ? 1 : a.threads, a.fork, work);
  return kOk;
}

}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_gate(const void* record) {
  abyssal::GateArguments a;
  std::memcpy(&a, record, sizeof(a));
  return abyssal::gate(a);
}
