"""Every Triton kernel, aligned and unaligned, compiles for every chip: no spills, fits, uses MMA.

The launchers themselves are recorded, so what is compiled is what would be launched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from moesaic.kernels.attention.paged_decode import paged_decode
from moesaic.kernels.common.chip import SHARED_MEMORY, is_amd
from moesaic.kernels.matmul import weight_only
from moesaic.kernels.matmul.w4a16 import mxfp4_linear
from moesaic.kernels.matmul.w8a16 import fp8_linear
from moesaic.kernels.moe.topk import fused_topk

from moesaic.testing import aot

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Variant:
    """A call of a launcher; ``kernels`` are the launches it makes, in order."""

    name: str
    kernels: tuple[str, ...]
    call: Callable[[], object]
    aligned: bool = True


def linear(dtype, tokens, k):
    def call():
        x, bias = torch.empty(tokens, k, dtype=dtype), torch.empty(64, dtype=dtype)
        data = torch.empty(64, (k + 1) // 2, dtype=torch.uint8)
        scale = torch.empty(64, (k + 31) // 32, dtype=torch.uint8)
        mxfp4_linear(x, data, scale, bias, dtype)

    return call


def linear_fp8(dtype, tokens, k, block):
    def call():
        x, data = torch.empty(tokens, k, dtype=dtype), torch.empty(128, k, dtype=torch.uint8)
        scale = torch.empty(128, 1 + k // 64)
        fp8_linear(x, data, scale, None, dtype, element="e4m3fn", block=block)

    return call


def decode(dtype, cache, d, gap=0, extras=True, page_size=16, group=4):
    """``gap`` unused elements lie between the rows of the cache."""

    def call():
        q = torch.empty(2, 2 * group, d, dtype=dtype)
        k, v = (torch.empty(8, page_size, 2, d + gap, dtype=cache)[..., :d] for _ in range(2))
        table, lens = torch.zeros(2, 7, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        heads = torch.empty(2 * group)
        options = {"alibi_slopes": heads, "sinks": heads, "softcap": 30.0, "window_left": 127}
        paged_decode(q, k, v, table, lens, scale=0.1, **(options if extras else {}))

    return call


def routing(experts, top_k, **kwargs):
    return lambda: fused_topk(torch.empty(4, experts), top_k, **kwargs)


LINEAR, LINEAR_FP8, DECODE, TOPK = (
    ("mxfp4_linear_kernel",),
    ("fp8_linear_kernel",),
    ("paged_decode_kernel", "merge_splits_kernel"),
    ("fused_topk_kernel",),
)
BIAS = {"e_score_correction_bias": torch.zeros(256)}
VARIANTS = {
    v.name: v
    for v in [
        Variant("linear-bf16-1", LINEAR, linear(BF16, 1, 2880)),
        Variant("linear-bf16-300", LINEAR, linear(BF16, 300, 2880)),
        Variant("linear-bf16-300-odd-k", LINEAR, linear(BF16, 300, 129), aligned=False),
        Variant("linear-fp16-300", LINEAR, linear(FP16, 300, 2880)),
        Variant("linear-fp32-300", LINEAR, linear(FP32, 300, 2880)),
        Variant("linear-fp8-bf16-1", LINEAR_FP8, linear_fp8(BF16, 1, 2880, (1, -1))),
        Variant("linear-fp8-bf16-300", LINEAR_FP8, linear_fp8(BF16, 300, 2880, (128, 128))),
        Variant("linear-fp8-fp32-300", LINEAR_FP8, linear_fp8(FP32, 300, 2880, (1, 128))),
        Variant("decode-bf16-64", DECODE, decode(BF16, BF16, 64, extras=False)),
        Variant("decode-bf16-128", DECODE, decode(BF16, BF16, 128)),
        Variant("decode-bf16-80-odd", DECODE, decode(BF16, BF16, 80, gap=1), aligned=False),
        Variant("decode-bf16-256-page-1", DECODE, decode(BF16, BF16, 256, page_size=1, group=1)),
        Variant("decode-fp8-128", DECODE, decode(BF16, FP8, 128)),
        Variant("decode-fp32-64", DECODE, decode(FP32, FP32, 64)),
        Variant("topk-qwen3", TOPK, routing(128, 8, scoring_func="softmax", renormalize=True)),
        Variant(
            "topk-deepseek-v3",
            TOPK,
            routing(256, 8, scoring_func="sigmoid", num_expert_group=8, topk_group=4, **BIAS),
        ),
        Variant("topk-4095", TOPK, routing(4095, 22, scoring_func="sqrtsoftplus")),
    ]
}
PARAMETERS = [(name, chip) for name in VARIANTS for chip in aot.CHIPS]

#: Spills that are accepted: (variant, chip) -> bytes. Everything else must not spill at all.
#: ptxas aims at three programs a multiprocessor here (168 registers) and misses by one or two.
ACCEPTED_SPILLS = {("decode-fp8-128", chip): 8 for chip in ("sm_80", "sm_89", "sm_90", "sm_100")}

WARP_GROUP_MMA = {"sm_90": "wgmma", "sm_100": "tcgen05"}


@pytest.fixture(scope="module")
def reports(request):
    """The reports of the selected tests' variants, compiled together: {(variant, chip): [...]}."""
    wanted = {
        (item.callspec.params["name"], item.callspec.params["chip"])
        for item in request.session.items
        if item.path == request.path and "reports" in item.fixturenames
    }
    jobs, keys = [], []
    for name, chip in sorted(wanted):
        with aot.recording(chip) as launches:
            VARIANTS[name].call()
        jobs += [(launch, chip) for launch in launches]
        keys += [(name, chip)] * len(launches)
    found = {key: [] for key in keys}
    for key, report in zip(keys, aot.compile_all(jobs, workers=2), strict=True):
        found[key].append(report)
    return found


@pytest.mark.parametrize(("name", "chip"), PARAMETERS)
def test_compiles_fits_and_does_not_spill(name, chip, reports):
    variant, found = VARIANTS[name], reports[name, chip]
    assert tuple(r.kernel for r in found) == variant.kernels
    for report in found:
        assert not report.error, report
        assert report.shared_memory <= SHARED_MEMORY[chip], report
        assert report.spilled_bytes <= ACCEPTED_SPILLS.get((name, chip), 0), report
        assert "atomic" not in report.instructions, report


def expected_mma(name, chip):
    if is_amd(chip):
        return "mfma"
    if name.startswith("linear"):
        return WARP_GROUP_MMA.get(chip, "mma.sync")
    return None if "fp32" in name else "mma.sync"  # no tensor core multiplies fp32 exactly


@pytest.mark.parametrize(("name", "chip"), [p for p in PARAMETERS if "topk" not in p[0]])
def test_dots_run_on_tensor_cores_and_loads_are_asynchronous(name, chip, reports):
    """One kind of MMA whatever the number of tokens: the bits of a row depend on it."""
    report = reports[name, chip][0]
    families = {"mma.sync", "wgmma", "tcgen05", "mfma"} & set(report.instructions)
    assert families == {expected_mma(name, chip)} - {None}, report
    if VARIANTS[name].aligned and not is_amd(chip):
        assert report.instructions.get("cp.async", 0) > 0, report


@pytest.mark.parametrize("chip", aot.CHIPS)
@pytest.mark.parametrize("dtype", weight_only.PLANES)
@pytest.mark.parametrize("aligned", [True, False])
def test_number_of_tokens_changes_no_order_of_additions(chip, dtype, aligned):
    plans = [weight_only.heuristic(tokens, dtype, aligned, chip) for tokens in range(1, 600)]
    varying = {key for plan in plans for key in plan if plan[key] != plans[0][key]}
    assert varying <= {"BLOCK_M", "num_stages"}
