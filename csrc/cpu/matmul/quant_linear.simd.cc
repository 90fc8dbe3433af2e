// quant_linear: pack the rows of x once, then tasks of (row range, panel range) on gemm.h.
#include "cpu/matmul/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t kTaskPanels = 4;            // or half as many, where that leaves threads idle
constexpr int64_t kSerialFloats = 64 * 1024;  // activations that one thread packs faster than it wakes others

inline void store_as(DType dtype, void* out, int64_t at, F32x16 v, int64_t count) {
  if (dtype == DType::kFloat32) return store_n(static_cast<float*>(out) + at, v, int(count));
  uint16_t* to = static_cast<uint16_t*>(out) + at;
  uint16_t part[kPanel];
  uint16_t* whole = count == kPanel ? to : part;
  if (dtype == DType::kBFloat16)
    store_bf16(whole, v);
  else
    store_f16(whole, v);
  if (whole == part) std::memcpy(to, part, 2 * count);
}

void store_tile(const QuantLinearArgs& args, const GemmTask& task) {
  const int64_t row0 = block_begin(task.rows, task.block0), row1 = block_begin(task.rows, task.block1);
  const float* acc = task.acc;
  for (int64_t panel = task.panel0; panel < task.panel1; ++panel) {
    const int64_t n0 = panel * kPanel;
    const int64_t count = args.weight.n - n0 < kPanel ? args.weight.n - n0 : kPanel;
    const F32x16 bias = args.bias ? load_n(args.bias + n0, int(count)) : zero();
    for (int64_t row = row0; row < row1; ++row, acc += kPanel) {
      F32x16 v = finish(args.weight, 0, panel, load(acc));
      if (args.bias) v = add(v, bias);
      store_as(args.out_dtype, args.out, row * args.weight.n + n0, v, count);
    }
  }
}

}  // namespace

void quant_linear(const QuantLinearArgs& args) {
  const PackedMatrix& w = args.weight;
  const int64_t m = args.m, panels = panel_count(w), blocks = row_blocks(m);
  if (m == 0 || panels == 0) return;

  const int64_t kp = padded_k(w.k);
  float* a = static_cast<float*>(thread_scratch(Scratch::kMatmul, size_t(m * kp) * sizeof(float)));
  const int64_t element_size = args.x_dtype == DType::kFloat32 ? 4 : 2;
  const auto row = [&](int64_t i) {
    return static_cast<const char*>(args.x) + i * args.x_stride * element_size;
  };
  parallel_tasks(blocks, m * kp <= kSerialFloats ? 1 : args.threads,
                 [&](int64_t b) { pack_row_block(args.x_dtype, w.k, m, b, row, a); });

  const int64_t row_tasks = ceil_div(m, kTaskRows);
  const int64_t width = panels * row_tasks < 4 * kTaskPanels * args.threads ? kTaskPanels / 2 : kTaskPanels;
  parallel_tasks(row_tasks * ceil_div(panels, width), args.threads, [&](int64_t index) {
    alignas(64) float acc[(kTaskRows + kTileRows) * kPanel * kTaskPanels];
    const int64_t i = index % row_tasks, panel = index / row_tasks * width;
    const int64_t end = panel + width < panels ? panel + width : panels;
    const GemmTask task{&w, 0, a, m, blocks * i / row_tasks, blocks * (i + 1) / row_tasks, panel, end, acc};
    gemm(task);
    store_tile(args, task);
  });
}

}  // namespace moesaic::MOESAIC_ISA
