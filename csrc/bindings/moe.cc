// moesaic._C: routing and expert layers.
#include "moesaic/moe.h"

#include "bindings.h"
#include "cpu/table.h"

namespace moesaic {

void bind_moe(py::module_& m) {
  m.def("fused_topk",
        [](Address logits, int logits_dtype, int64_t logits_stride, int64_t tokens, int64_t experts,
           int64_t top_k, int scoring, bool softmax_after_topk, bool renormalize, float renorm_eps,
           float routed_scaling_factor, Address bias, int64_t num_expert_group, int64_t topk_group,
           int group_score, Address per_expert_scale, int64_t num_shared, float shared_weight,
           Address token_mask, Address given_ids, Address expert_map, Address weights, Address ids,
           int threads) {
          FusedTopkArgs args{};
          args.logits = pointer<const void>(logits);
          args.logits_dtype = static_cast<DType>(logits_dtype);
          args.logits_stride = logits_stride;
          args.tokens = tokens;
          args.experts = experts;
          args.top_k = top_k;
          args.scoring = static_cast<Scoring>(scoring);
          args.softmax_after_topk = softmax_after_topk;
          args.renormalize = renormalize;
          args.renorm_eps = renorm_eps;
          args.routed_scaling_factor = routed_scaling_factor;
          args.bias = pointer<const float>(bias);
          args.num_expert_group = num_expert_group;
          args.topk_group = topk_group;
          args.group_score = static_cast<GroupScore>(group_score);
          args.per_expert_scale = pointer<const float>(per_expert_scale);
          args.num_shared = num_shared;
          args.shared_weight = shared_weight;
          args.token_mask = pointer<const uint8_t>(token_mask);
          args.given_ids = pointer<const int32_t>(given_ids);
          args.expert_map = pointer<const int32_t>(expert_map);
          args.weights = pointer<float>(weights);
          args.ids = pointer<int32_t>(ids);
          args.threads = threads;
          py::gil_scoped_release release;
          kernels().fused_topk(args);
        });

  m.def("fused_experts",
        [](const PackedMatrix& w13, const PackedMatrix& w2, Address x, int dtype, int64_t x_stride,
           int64_t tokens, int64_t top_k, Address topk_weights, Address topk_ids, Address expert_map,
           int64_t map_size, int64_t num_identity, Address w13_bias, Address w2_bias, int activation,
           float alpha, float limit, bool interleaved, bool weight_on_input, Address out, int threads) {
          FusedExpertsArgs args{};
          args.w13 = w13;
          args.w2 = w2;
          args.x = pointer<const void>(x);
          args.dtype = static_cast<DType>(dtype);
          args.x_stride = x_stride;
          args.tokens = tokens;
          args.top_k = top_k;
          args.topk_weights = pointer<const float>(topk_weights);
          args.topk_ids = pointer<const int32_t>(topk_ids);
          args.expert_map = pointer<const int32_t>(expert_map);
          args.map_size = map_size;
          args.num_identity = num_identity;
          args.w13_bias = pointer<const float>(w13_bias);
          args.w2_bias = pointer<const float>(w2_bias);
          args.activation = static_cast<Activation>(activation);
          args.alpha = alpha;
          args.limit = limit;
          args.interleaved = interleaved;
          args.weight_on_input = weight_on_input;
          args.out = pointer<void>(out);
          args.threads = threads;
          py::gil_scoped_release release;
          kernels().fused_experts(args);
        });
}

}  // namespace moesaic
