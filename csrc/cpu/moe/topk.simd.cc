// fused_topk: scores, selection and weights of one token at a time; a token's row of logits fits in L1.
//
// Plan of a row: logits to fp32 with NaN as -inf; keys to select by (the logits themselves, or biased
// scores); one scan that keeps the k best in a sorted list, 16 keys a step against the worst kept one;
// weights of the k chosen.  A key enters the list only if it is greater than the last, and goes behind
// its equals, so ties fall to the lower index and ids are unique even if every key is -inf.
//
// Sums across experts use 16 fixed lanes and one tree; sums across slots run in slot order: the same
// bits on every instruction set and for every number of tokens and threads.
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/simd.h"
#include "moesaic/moe.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr float kMax = 3.402823466e+38f;
constexpr int64_t kRowsPerTask = 64;

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// The k best of what was offered, best first.
struct Best {
  float* keys;
  int32_t* ids;
  int64_t k;
  int64_t count = 0;

  void offer(float key, int64_t id) {
    if (count == k) {
      if (!(key > keys[k - 1])) return;
    } else {
      ++count;
    }
    int64_t at = count - 1;
    for (; at > 0 && key > keys[at - 1]; --at) {
      keys[at] = keys[at - 1];
      ids[at] = ids[at - 1];
    }
    keys[at] = key;
    ids[at] = int32_t(id);
  }

  // Offer all[begin, end); readable up to the next multiple of 16 past end.
  void scan(const float* all, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i < end && count < k; ++i) offer(all[i], i);
    for (; i < end; i += 16) {
      const int64_t left = end - i < 16 ? end - i : 16;
      uint32_t better = mask_bits(mask_and(gt(load(all + i), set1(keys[k - 1])), first_n(int(left))));
      for (; better; better &= better - 1) {
        const int64_t at = i + __builtin_ctz(better);
        offer(all[at], at);
      }
    }
  }
};

// log(1 + t) for t in [0, 1], to full relative precision: the rounding of 1 + t is divided out.
inline F32x16 log1p(F32x16 t) {
  const F32x16 u = add(set1(1.0f), t), rounded = sub(u, set1(1.0f));
  return select(eq(rounded, zero()), t, mul(log(u), div(t, rounded)));
}

inline F32x16 score(Scoring scoring, F32x16 x) {
  switch (scoring) {
    case Scoring::kSigmoid: return sigmoid(x);
    case Scoring::kSqrtSoftplus: {
      const F32x16 magnitude = max(x, sub(zero(), x));
      return sqrt(add(max(x, zero()), log1p(exp(sub(zero(), magnitude)))));
    }
    default: return select(eq(x, set1(-INFINITY)), zero(), x);
  }
}

struct Router {
  const FusedTopkArgs& args;
  // Per thread: logits, scores, keys [experts rounded up + 16], group scores, the lists.
  float *x, *scores, *keys, *groups, *best_keys, *group_keys;
  int32_t *best_ids, *group_ids;
  float total = 1.0f;  // the chosen scores of a softmax are still to be divided by this

  explicit Router(const FusedTopkArgs& a) : args(a) {
    const int64_t e = padded(a.experts) + 16, g = padded(a.num_expert_group), k = padded(a.top_k);
    float* at =
        static_cast<float*>(thread_scratch(Scratch::kMoe, size_t(3 * e + 3 * g + 2 * k) * sizeof(float)));
    x = at, scores = x + e, keys = scores + e, groups = keys + e, group_keys = groups + g;
    group_ids = reinterpret_cast<int32_t*>(group_keys + g);
    best_keys = group_keys + 2 * g;
    best_ids = reinterpret_cast<int32_t*>(best_keys + k);
  }

  void load_logits(int64_t token) {
    const int64_t n = args.experts, from = token * args.logits_stride;
    const uint16_t* half = static_cast<const uint16_t*>(args.logits) + from;
    const float* full = static_cast<const float*>(args.logits) + from;
    for (int64_t i = 0; i < padded(n) + 16; i += 16) {
      const int64_t left = n - i;
      F32x16 v;
      if (left <= 0) {
        v = set1(-INFINITY);
      } else if (args.logits_dtype == DType::kFloat32) {
        v = left >= 16 ? load(full + i) : load_n(full + i, int(left));
      } else {
        uint16_t part[16] = {};
        if (left < 16) std::memcpy(part, half + i, 2 * left);
        const uint16_t* p = left < 16 ? part : half + i;
        v = args.logits_dtype == DType::kBFloat16 ? load_bf16(p) : load_f16(p);
      }
      if (left < 16) v = select(first_n(left < 0 ? 0 : int(left)), v, set1(-INFINITY));
      store(x + i, select(is_nan(v), set1(-INFINITY), min(v, set1(kMax))));
    }
  }

  // exp(x - max) of all experts, undivided, and their sum (at least 1: the largest term is e^0).
  void softmax() {
    F32x16 top = set1(-INFINITY), sum = zero();
    for (int64_t i = 0; i < args.experts; i += 16) top = max(top, load(x + i));
    const float highest = reduce_max(top);
    const F32x16 shift = set1(highest == -INFINITY ? 0.0f : highest);
    for (int64_t i = 0; i < args.experts; i += 16) {
      const F32x16 e = exp(sub(load(x + i), shift));
      store(scores + i, e);
      sum = add(sum, e);
    }
    total = reduce_add(sum);
    if (!(total > 1.0f)) total = 1.0f;
  }

  void compute_scores(bool divided) {
    if (args.softmax_after_topk) {
      std::memcpy(scores, x, size_t(padded(args.experts)) * sizeof(float));
    } else if (args.scoring == Scoring::kSoftmax) {
      softmax();
      if (!divided) return;
      for (int64_t i = 0; i < args.experts; i += 16) store(scores + i, div(load(scores + i), set1(total)));
      total = 1.0f;
    } else {
      for (int64_t i = 0; i < args.experts; i += 16) store(scores + i, score(args.scoring, load(x + i)));
    }
  }

  // Scores plus bias; -inf where the logit is, and where the bias is NaN.
  void compute_keys() {
    for (int64_t i = 0; i < args.experts; i += 16) {
      const int64_t left = args.experts - i < 16 ? args.experts - i : 16;
      F32x16 v = load(scores + i);
      if (args.bias) v = add(v, load_n(args.bias + i, int(left)));
      v = select(eq(load(x + i), set1(-INFINITY)), set1(-INFINITY), v);
      store(keys + i, select(is_nan(v), set1(-INFINITY), v));
    }
  }

  float top2_sum(int64_t begin, int64_t end) const {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = begin; i < end; ++i) {
      if (keys[i] > first)
        second = first, first = keys[i];
      else if (keys[i] > second)
        second = keys[i];
    }
    return second == -INFINITY ? first : first + second;
  }

  void choose() {
    const bool grouped = args.topk_group < args.num_expert_group;
    const bool sums = grouped && args.group_score == GroupScore::kTop2Sum;
    compute_scores(args.bias || sums);
    if (args.bias || sums) compute_keys();
    const float* by = args.bias ? keys : x;
    Best best{best_keys, best_ids, args.top_k};
    if (!grouped) return best.scan(by, 0, args.experts);

    const int64_t size = args.experts / args.num_expert_group;
    for (int64_t g = 0; g < args.num_expert_group; ++g) {
      groups[g] = -INFINITY;
      if (sums) {
        groups[g] = top2_sum(g * size, (g + 1) * size);
      } else {
        for (int64_t i = g * size; i < (g + 1) * size; ++i) groups[g] = by[i] > groups[g] ? by[i] : groups[g];
      }
    }
    Best kept{group_keys, group_ids, args.topk_group};
    for (int64_t g = 0; g < args.num_expert_group; ++g) kept.offer(groups[g], g);
    for (int64_t g = 0; g < args.num_expert_group; ++g) groups[g] = 0.0f;
    for (int64_t g = 0; g < args.topk_group; ++g) groups[group_ids[g]] = 1.0f;
    for (int64_t g = 0; g < args.num_expert_group; ++g)
      if (groups[g] != 0.0f) best.scan(by, g * size, (g + 1) * size);
  }

  void take(int64_t token) {
    compute_scores(false);
    for (int64_t j = 0; j < args.top_k; ++j) {
      const int32_t id = args.given_ids[token * args.top_k + j];
      best_ids[j] = id >= 0 && id < args.experts ? id : -1;
    }
  }

  void softmax_of_chosen(float* w) {
    const int64_t k = args.top_k;
    float highest = -INFINITY, sum = 0.0f;
    for (int64_t j = 0; j < k; ++j) {
      w[j] = best_ids[j] < 0 ? -INFINITY : x[best_ids[j]];
      highest = w[j] > highest ? w[j] : highest;
    }
    const F32x16 shift = set1(highest == -INFINITY ? 0.0f : highest);
    for (int64_t j = 0; j < k; j += 16) {
      const int left = k - j < 16 ? int(k - j) : 16;
      store_n(w + j, exp(sub(load_n(w + j, left), shift)), left);
    }
    for (int64_t j = 0; j < k; ++j) sum += w[j];
    if (!(sum > 1.0f)) sum = 1.0f;
    for (int64_t j = 0; j < k; ++j) w[j] = w[j] / sum;
  }

  void weigh(float* w) {
    if (args.softmax_after_topk) {
      softmax_of_chosen(w);
    } else {
      for (int64_t j = 0; j < args.top_k; ++j) w[j] = best_ids[j] < 0 ? 0.0f : scores[best_ids[j]] / total;
    }
    if (args.renormalize) {
      float sum = 0.0f;
      for (int64_t j = 0; j < args.top_k; ++j) sum += w[j];
      sum += args.renorm_eps;
      for (int64_t j = 0; j < args.top_k; ++j) w[j] = w[j] / sum;
    }
    for (int64_t j = 0; j < args.top_k; ++j) {
      w[j] = w[j] * args.routed_scaling_factor;
      if (args.per_expert_scale && best_ids[j] >= 0) w[j] = w[j] * args.per_expert_scale[best_ids[j]];
    }
  }

  void route(int64_t token) {
    const int64_t slots = args.top_k + args.num_shared;
    float* w = args.weights + token * slots;
    int32_t* ids = args.ids + token * slots;
    load_logits(token);
    total = 1.0f;
    if (args.given_ids)
      take(token);
    else
      choose();
    weigh(w);
    for (int64_t j = 0; j < slots; ++j) {
      if (j >= args.top_k) w[j] = args.shared_weight;
      int32_t id = j < args.top_k ? best_ids[j] : int32_t(args.experts + j - args.top_k);
      if (id >= 0 && args.expert_map) id = args.expert_map[id];
      if (id < 0 || (args.token_mask && !args.token_mask[token])) id = -1, w[j] = 0.0f;
      ids[j] = id;
    }
  }
};

}  // namespace

void fused_topk(const FusedTopkArgs& args) {
  const int64_t tasks = (args.tokens + kRowsPerTask - 1) / kRowsPerTask;
  parallel_tasks(tasks, args.threads, [&](int64_t task) {
    Router router(args);
    const int64_t end = (task + 1) * kRowsPerTask;
    for (int64_t t = task * kRowsPerTask; t < (end < args.tokens ? end : args.tokens); ++t) router.route(t);
  });
}

}  // namespace moesaic::MOESAIC_ISA
