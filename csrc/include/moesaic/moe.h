// Argument structs of the MoE kernels.  Names as in python/moesaic/reference/moe, which defines what
// the kernels compute.
#pragma once
#include <cstdint>

#include "moesaic/matmul.h"

namespace moesaic {

// The values are the contract with python/moesaic/backends/cpu/moe.py.
enum class Scoring : int32_t { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2, kNone = 3 };
enum class GroupScore : int32_t { kTop2Sum = 0, kMax = 1 };
enum class Activation : int32_t {
  kSilu = 0,
  kGeluTanh = 1,
  kSwigluOai = 2,
  kSwigluStep = 3,
  kSitu = 4,
  kRelu2 = 5,
  kSiluNoMul = 6,
};
constexpr bool is_gated(Activation a) { return a < Activation::kRelu2; }

struct FusedTopkArgs {
  const void* logits;  // [tokens, experts], rows logits_stride elements apart
  DType logits_dtype;  // kFloat32, kBFloat16, kFloat16
  int64_t logits_stride;
  int64_t tokens, experts, top_k;
  Scoring scoring;
  bool softmax_after_topk, renormalize;
  float renorm_eps, routed_scaling_factor;
  const float* bias;  // [experts] or null
  int64_t num_expert_group, topk_group;
  GroupScore group_score;
  const float* per_expert_scale;  // [experts] or null
  int64_t num_shared;
  float shared_weight;
  const uint8_t* token_mask;  // [tokens] or null
  const int32_t* given_ids;   // [tokens, top_k] or null
  const int32_t* expert_map;  // [experts + num_shared] or null
  float* weights;             // [tokens, top_k + num_shared]
  int32_t* ids;               // likewise
  int threads;
};

struct FusedExpertsArgs {
  PackedMatrix w13, w2;  // [E, N, H] with N = 2 I, or I if not gated; [E, H, I]
  const void* x;         // [tokens, H], rows x_stride elements apart
  DType dtype;           // of x and out: kFloat32, kBFloat16, kFloat16
  int64_t x_stride;
  int64_t tokens, top_k;
  const float* topk_weights;  // [tokens, top_k]
  const int32_t* topk_ids;    // [tokens, top_k]
  const int32_t* expert_map;  // [map_size] or null
  int64_t map_size;
  int64_t num_identity;   // ids from the end of the (global) experts on that mean x itself
  const float* w13_bias;  // [E, N] or null
  const float* w2_bias;   // [E, H] or null
  Activation activation;
  float alpha, limit;  // limit: +inf for none
  bool interleaved, weight_on_input;
  void* out;  // [tokens, H] contiguous
  int threads;
};

}  // namespace moesaic
