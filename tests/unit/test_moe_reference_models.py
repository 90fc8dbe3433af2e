"""The definitions against transformers' own blocks: tiny random models, eager experts, fp32."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    LongcatFlashConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4TopKRouter,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moesaic.reference.moe import fused_experts, fused_moe, fused_topk

T, H, INTER, E, K = 13, 40, 24, 12, 3


def randomize(module):
    """Weights of order 1 / sqrt(fan in), biases and correction biases of order 1."""
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            fan_in = p.shape[-1] if "bias" not in name else 1
            p.copy_(torch.randn_like(p) / fan_in**0.5)
    return module.eval()


def common(**kw):
    return dict(
        hidden_size=H, intermediate_size=INTER, moe_intermediate_size=INTER, num_experts_per_tok=K,
        _experts_implementation="eager", **kw,
    )  # fmt: skip


def block_output(block, x):
    out = block(x[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


@pytest.mark.parametrize(
    ("config", "block", "routing"),
    [
        (
            MixtralConfig(num_local_experts=E, **common()),
            MixtralSparseMoeBlock,
            dict(renormalize=True),
        ),
        (
            Qwen3MoeConfig(num_experts=E, norm_topk_prob=True, **common()),
            Qwen3MoeSparseMoeBlock,
            dict(renormalize=True),
        ),
        (
            Qwen3MoeConfig(num_experts=E, norm_topk_prob=False, **common()),
            Qwen3MoeSparseMoeBlock,
            {},
        ),
        (OlmoeConfig(num_experts=E, **common()), OlmoeSparseMoeBlock, {}),
    ],
    ids=["mixtral", "qwen3", "qwen3-plain", "olmoe"],
)
def test_softmax_blocks(config, block, routing):
    if block is OlmoeSparseMoeBlock:
        config.norm_topk_prob = False
    m = randomize(block(config))
    x = torch.randn(T, H)
    logits = x @ m.gate.weight.T
    got = fused_moe(x, m.experts.gate_up_proj, m.experts.down_proj, logits, K, **routing)
    assert_close(got, block_output(m, x))


def test_qwen2_with_gated_shared_expert():
    config = Qwen2MoeConfig(num_experts=E, shared_expert_intermediate_size=20, **common())
    m = randomize(Qwen2MoeSparseMoeBlock(config))
    x = torch.randn(T, H)
    shared = m.shared_expert
    got = fused_moe(
        x, m.experts.gate_up_proj, m.experts.down_proj, x @ m.gate.weight.T, K,
        renormalize=config.norm_topk_prob,
        shared_w13=torch.cat([shared.gate_proj.weight, shared.up_proj.weight]),
        shared_w2=shared.down_proj.weight, shared_gate=m.shared_expert_gate.weight,
    )  # fmt: skip
    assert_close(got, block_output(m, x))


def shared_weights(mlp):
    return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight


@pytest.mark.parametrize("norm", [True, False])
def test_deepseek_v3(norm):
    config = DeepseekV3Config(
        n_routed_experts=E, num_local_experts=E, n_group=4, topk_group=2, n_shared_experts=2,
        routed_scaling_factor=2.5, norm_topk_prob=norm, **common(),
    )  # fmt: skip
    m = randomize(DeepseekV3MoE(config))
    x = torch.randn(T, H)
    shared_w13, shared_w2 = shared_weights(m.shared_experts)
    got = fused_moe(
        x, m.experts.gate_up_proj, m.experts.down_proj, x @ m.gate.weight.T, K,
        scoring_func="sigmoid", e_score_correction_bias=m.gate.e_score_correction_bias,
        num_expert_group=4, topk_group=2, renormalize=norm, routed_scaling_factor=2.5,
        shared_w13=shared_w13, shared_w2=shared_w2,
    )  # fmt: skip
    assert_close(got, block_output(m, x))


def test_deepseek_v3_with_the_shared_expert_as_a_routed_one():
    config = DeepseekV3Config(
        n_routed_experts=E, num_local_experts=E, n_group=1, topk_group=1, n_shared_experts=1,
        routed_scaling_factor=2.5, **common(),
    )  # fmt: skip
    m = randomize(DeepseekV3MoE(config))
    x = torch.randn(T, H)
    shared_w13, shared_w2 = shared_weights(m.shared_experts)
    got = fused_moe(
        x,
        torch.cat([m.experts.gate_up_proj, shared_w13[None]]),
        torch.cat([m.experts.down_proj, shared_w2[None]]),
        x @ m.gate.weight.T, K,
        scoring_func="sigmoid", e_score_correction_bias=m.gate.e_score_correction_bias,
        renormalize=True, routed_scaling_factor=2.5, num_fused_shared_experts=1,
    )  # fmt: skip
    assert_close(got, block_output(m, x))


def test_deepseek_v2_group_limited():
    config = DeepseekV2Config(
        n_routed_experts=E, num_local_experts=E, n_group=4, topk_group=2, n_shared_experts=1,
        routed_scaling_factor=16.0, topk_method="group_limited_greedy",
        num_attention_heads=2, **common(),
    )  # fmt: skip
    m = randomize(DeepseekV2Moe(config))
    x = torch.randn(T, H)
    shared_w13, shared_w2 = shared_weights(m.shared_experts)
    got = fused_moe(
        x, m.experts.gate_up_proj, m.experts.down_proj, x @ m.gate.weight.T, K,
        num_expert_group=4, topk_group=2, group_score="max", routed_scaling_factor=16.0,
        shared_w13=shared_w13, shared_w2=shared_w2,
    )  # fmt: skip
    assert_close(got, block_output(m, x))


def test_deepseek_v4_router_and_clamped_experts():
    config = DeepseekV4Config(
        num_local_experts=E, n_routed_experts=E, routed_scaling_factor=1.5,
        scoring_func="sqrtsoftplus", swiglu_limit=0.5, **common(),
    )  # fmt: skip
    router = randomize(DeepseekV4TopKRouter(config))
    experts = randomize(DeepseekV4Experts(config))
    x = torch.randn(T, H)
    _, weights, ids = router(x)
    got_w, got_ids = fused_topk(
        x @ router.weight.T, K, scoring_func="sqrtsoftplus", renormalize=True,
        routed_scaling_factor=1.5, e_score_correction_bias=router.e_score_correction_bias,
    )  # fmt: skip
    order, got_order = ids.argsort(1), got_ids.argsort(1)
    assert torch.equal(got_ids.gather(1, got_order), ids.gather(1, order).int())
    assert_close(got_w.gather(1, got_order), weights.gather(1, order))
    got = fused_experts(
        x, experts.gate_up_proj, experts.down_proj, got_w, got_ids, limit=experts.limit
    )
    assert_close(got, experts(x, ids, weights))


def test_gpt_oss():
    config = GptOssConfig(num_local_experts=E, head_dim=8, num_attention_heads=2, **common())
    m = randomize(GptOssMLP(config))
    x = 4 * torch.randn(T, H)  # large enough for the clamps to act
    e = m.experts
    got = fused_moe(
        x, e.gate_up_proj, e.down_proj, x @ m.router.weight.T + m.router.bias, K,
        softmax_after_topk=True, activation="swigluoai", interleaved=True, transposed=True,
        w13_bias=e.gate_up_proj_bias, w2_bias=e.down_proj_bias,
    )  # fmt: skip
    assert_close(got, block_output(m, x))


def test_longcat_identity_experts():
    config = LongcatFlashConfig(
        n_routed_experts=E, num_local_experts=E, zero_expert_num=5, moe_topk=K,
        routed_scaling_factor=6.0, expert_ffn_hidden_size=INTER, hidden_size=H,
        _experts_implementation="eager",
    )  # fmt: skip
    m = randomize(LongcatFlashMoE(config))
    x = torch.randn(T, H)
    got = fused_moe(
        x, m.experts.gate_up_proj[:E], m.experts.down_proj, x @ m.router.classifier.weight.T,
        m.router.top_k, e_score_correction_bias=m.router.e_score_correction_bias,
        routed_scaling_factor=6.0, num_identity_experts=5,
    )  # fmt: skip
    assert_close(got, block_output(m, x))
