// Prints "kernel hash" for every kernel on fixed inputs, on the instruction set named by argv[1].  The
// output must be the same for every set and every architecture; tests/integration/test_cross.py builds
// this for the host and for AArch64 and compares.  `isa_digest list` names the sets that run here.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/table.h"

namespace {

using namespace moesaic;

// Deterministic values without the C++ library's generators, whose results may differ by platform.
struct Random {
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state >> 32);
  }
  float uniform() { return float(int32_t(bits()) >> 8) * 0x1p-23f; }  // [-1, 1)
};

std::vector<float> values(size_t n, uint64_t seed) {
  Random random{seed};
  std::vector<float> v(n);
  for (float& x : v) x = random.uniform() * std::ldexp(1.0f, int(random.bits() % 40) - 20);
  return v;
}

std::vector<uint16_t> words(size_t n, uint64_t seed) {
  Random random{seed};
  std::vector<uint16_t> v(n);
  for (uint16_t& x : v) x = uint16_t(random.bits() >> 16);
  return v;
}

void print(const char* name, const void* data, size_t bytes) {
  uint64_t hash = 1469598103934665603ull;  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}

void digest_vocabulary() {
  const char* names[] = {
      "add",       "sub",        "mul",      "div",        "fma",    "min", "max",
      "exp",       "log",        "tanh",     "round_even", "select", "sum", "horizontal_max",
      "load_bf16", "store_bf16", "load_f16", "store_f16"};
  const size_t n = 4096;
  const std::vector<float> a = values(n, 1), b = values(n, 2), c = values(n, 3);
  const std::vector<uint16_t> codes = words(n, 4);
  for (size_t i = 0; i < sizeof(names) / sizeof(*names); ++i) {
    const std::string name = names[i];
    const bool from16 = name.compare(0, 5, "load_") == 0, to16 = name.compare(0, 6, "store_") == 0;
    std::vector<float> out(n);
    SimdSelftestArgs args{};
    args.primitive = static_cast<SimdPrimitive>(i);
    args.n = int64_t(n);
    args.a = from16 ? static_cast<const void*>(codes.data()) : a.data();
    args.b = b.data();
    args.c = c.data();
    args.out = out.data();
    kernels().simd_selftest(args);
    if (!to16)
      for (float& x : out)  // the payload of a NaN is not part of the contract
        if (std::isnan(x)) x = 0.0f;
    print(names[i], out.data(), n * (to16 ? 2 : 4));
  }
}

// quant_linear on random codes of every element type: few rows (decoded in registers) and many.
void digest_matmul() {
  struct Form {
    const char* name;
    DType element;
    ScaleKind scale;
    int64_t block;
  };
  const Form forms[] = {
      {"mxfp4", DType::kE2M1, ScaleKind::kE8M0, 32},      {"nvfp4", DType::kE2M1, ScaleKind::kE4M3, 16},
      {"e4m3", DType::kE4M3FN, ScaleKind::kFloat32, 128}, {"e5m2", DType::kE5M2, ScaleKind::kShared, 128},
      {"int8", DType::kInt8, ScaleKind::kFloat32, 32},    {"bf16", DType::kBFloat16, ScaleKind::kNone, 128},
      {"fp16", DType::kFloat16, ScaleKind::kNone, 128},   {"fp32", DType::kFloat32, ScaleKind::kNone, 128}};
  const int64_t n = 40, k = 296, panels = 3;
  for (const Form& form : forms) {
    Random random{7};
    std::vector<uint8_t> codes(size_t(panels * k / 4 * group_bytes(form.element)));
    for (uint8_t& c : codes) c = uint8_t(random.bits() >> 24) & 0xbb;  // no NaN or Inf in any type
    const bool wide = form.scale == ScaleKind::kFloat32 || form.scale == ScaleKind::kShared;
    std::vector<uint8_t> byte_scales(size_t(panels * 16 * ((k + 15) / 16)));
    for (uint8_t& s : byte_scales) s = uint8_t(random.bits() >> 24) & 0x7e;
    const std::vector<float> float_scales = values(byte_scales.size(), 8), bias = values(size_t(n), 9);
    for (const int64_t m : {1, 3, 5, 14}) {
      const std::vector<float> x = values(size_t(m * k), 10);
      std::vector<float> out(size_t(m * n));
      QuantLinearArgs args{};
      args.weight = {form.element, form.scale,   1,       n,       k,      form.block, panels,
                     1.0f,         codes.data(), nullptr, nullptr, nullptr};
      args.weight.scale = wide ? static_cast<const void*>(float_scales.data()) : byte_scales.data();
      args.x = x.data();
      args.x_dtype = args.out_dtype = DType::kFloat32;
      args.m = m;
      args.x_stride = k;
      args.bias = bias.data();
      args.out = out.data();
      args.threads = 2;
      kernels().quant_linear(args);
      print((std::string("quant_linear ") + form.name + " " + std::to_string(m)).c_str(), out.data(),
            out.size() * 4);
    }
  }
}

// fused_topk with every scoring function, and fused_experts with every activation on bf16 and MXFP4
// weights.
void digest_moe() {
  const int64_t tokens = 37, experts = 20, k = 3, hidden = 44, inner = 24;
  std::vector<float> logits = values(size_t(tokens * experts), 11), bias = values(size_t(experts), 12);
  for (size_t i = 0; i < logits.size(); i += 7) logits[i] = i % 2 ? NAN : -INFINITY;
  std::vector<float> weights(size_t(tokens * k));
  std::vector<int32_t> ids(weights.size());
  for (int scoring = 0; scoring < 4; ++scoring) {
    FusedTopkArgs args{};
    args.logits = logits.data();
    args.logits_dtype = DType::kFloat32;
    args.logits_stride = args.experts = experts;
    args.tokens = tokens;
    args.top_k = k;
    args.scoring = static_cast<Scoring>(scoring);
    args.renormalize = scoring != 3;
    args.renorm_eps = 1e-20f;
    args.routed_scaling_factor = 2.5f;
    args.bias = scoring == 1 ? bias.data() : nullptr;
    args.num_expert_group = 4;
    args.topk_group = 2;
    args.weights = weights.data();
    args.ids = ids.data();
    args.threads = 2;
    kernels().fused_topk(args);
    print(("fused_topk weights " + std::to_string(scoring)).c_str(), weights.data(), weights.size() * 4);
    print(("fused_topk ids " + std::to_string(scoring)).c_str(), ids.data(), ids.size() * 4);
  }

  Random random{13};
  const std::vector<float> x = values(size_t(tokens * hidden), 14);
  for (const DType element : {DType::kBFloat16, DType::kE2M1}) {
    std::vector<uint8_t> codes(size_t(experts * 3 * 16 * 48 * 4));
    for (size_t i = 0; i < codes.size(); ++i) {
      codes[i] = uint8_t(random.bits() >> 24);
      if (element == DType::kBFloat16 && i % 2) codes[i] = (codes[i] & 0x80) | 0x3e;  // +-[1/8, 1/2)
    }
    std::vector<uint8_t> scales(size_t(experts * 3 * 16 * 2));
    for (uint8_t& c : scales) c = uint8_t(118 + (random.bits() >> 30));
    for (int activation = 0; activation <= int(Activation::kSiluNoMul); ++activation) {
      const int64_t rows = is_gated(static_cast<Activation>(activation)) ? 2 * inner : inner;
      const ScaleKind kind = element == DType::kE2M1 ? ScaleKind::kE8M0 : ScaleKind::kNone;
      std::vector<float> out(size_t(tokens * hidden));
      FusedExpertsArgs args{};
      args.w13 = {element, kind, experts,      rows,          hidden,  kind == ScaleKind::kNone ? 128 : 32,
                  1,       1.0f, codes.data(), scales.data(), nullptr, nullptr};
      args.w2 = args.w13;
      args.w2.n = hidden;
      args.w2.k = inner;
      args.x = x.data();
      args.dtype = DType::kFloat32;
      args.x_stride = hidden;
      args.tokens = tokens;
      args.top_k = k;
      args.topk_weights = weights.data();
      args.topk_ids = ids.data();
      args.activation = static_cast<Activation>(activation);
      args.alpha = 1.5f;
      args.limit = activation == 1 ? INFINITY : 7.0f;
      args.interleaved = activation % 2;
      args.out = out.data();
      args.threads = 2;
      kernels().fused_experts(args);
      for (float& v : out)
        if (std::isnan(v)) v = 0.0f;
      const std::string name = element == DType::kE2M1 ? "mxfp4 " : "bf16 ";
      print(("fused_experts " + name + std::to_string(activation)).c_str(), out.data(), out.size() * 4);
    }
  }
}

// Decode and prefill over shuffled pages with a hole, a window, soft-cap, sinks and ALiBi.
void digest_attention(const char* name, DType dtype, int64_t dim) {
  const int64_t heads = 6, kv_heads = 2, blocks = 60, page = 13, lengths[] = {530, 70}, rows[] = {0, 40, 41};
  const bool wide = dtype == DType::kFloat32;
  const auto fill = [&](std::vector<uint16_t>& storage, size_t n, uint64_t seed) {
    Random random{seed};
    storage.resize(wide ? 2 * n : n);
    for (size_t i = 0; i < n; ++i) {
      const float x = random.uniform();
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (wide) std::memcpy(&storage[2 * i], &x, 4);
      // any finite pattern will do for 16 bits
      else
        storage[i] = uint16_t(dtype == DType::kBFloat16 ? bits >> 16 : (bits >> 16 & 0x83ff) | 0x3800);
    }
  };
  std::vector<uint16_t> q, k, v;
  fill(q, size_t(41 * heads * dim), 5);
  fill(k, size_t(blocks * page * kv_heads * dim), 6);
  fill(v, size_t(blocks * page * kv_heads * dim), 7);
  std::vector<int32_t> table(2 * 42);
  for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t((i * 37 + 11) % 61) - 1;
  std::vector<float> out(41 * size_t(heads * dim)), lse(41 * size_t(heads)), slopes(6, 0.01f), sinks(6, 0.5f);

  PagedAttentionArgs a{};
  a.q = q.data();
  a.q_dtype = dtype;
  a.q_token_stride = heads * dim;
  a.q_head_stride = dim;
  a.out = out.data();
  a.lse = lse.data();
  a.k = {k.data(), dtype, dim, page * kv_heads * dim, kv_heads * dim, dim, 1};
  a.v = {v.data(), dtype, dim, page * kv_heads * dim, kv_heads * dim, dim, 1};
  a.tokens = 41;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.batch = 2;
  a.num_blocks = blocks;
  a.block_size = page;
  a.block_table = table.data();
  a.table_stride = a.max_blocks = 42;
  a.seq_lens = lengths;
  a.cu_seqlens_q = rows;
  a.lens_are_int64 = a.cu_is_int64 = true;
  a.scale = 0.2f;
  a.causal = true;
  a.window_left = 400;
  a.window_right = -1;
  a.softcap = 5.0f;
  a.alibi_slopes = slopes.data();
  a.sinks = sinks.data();
  a.threads = 2;
  kernels().paged_attention(a);
  print(name, out.data(), out.size() * (wide ? 4 : 2));
  print(name, lse.data(), lse.size() * 4);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "auto";
  if (what == "list") {
    for (const std::string& isa : variants()) std::printf("%s\n", isa.c_str());
    return 0;
  }
  set_isa(what);
  digest_vocabulary();
  digest_matmul();
  digest_moe();
  digest_attention("paged_attention_fp32", DType::kFloat32, 64);
  digest_attention("paged_attention_bf16", DType::kBFloat16, 64);
  digest_attention("paged_attention_fp16", DType::kFloat16, 72);
  return 0;
}
