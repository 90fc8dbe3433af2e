// fused_experts on packed weights, built on cpu/matmul/gemm.h.
//
// Slots (token, j) are sorted by expert with a stable counting sort, so an expert's rows are contiguous.
// Then four steps, each a pool of tasks that threads pull:
//
//   gather    x rows of each expert into the row blocks that gemm() reads
//   up        w13 panels, bias, activation: h, written as the row blocks of the next step
//   down      w2 panels, bias: y, one fp32 row a slot
//   combine   out[t] = sum over j, in slot order, of weight * y, rounded once
//
// All of it is done for a chunk of tokens at a time, so that scratch is bounded.  The bits of a token's
// result depend on that token alone: gemm() promises it for rows, the rest works row by row.
#include "cpu/matmul/gemm.h"
#include "cpu/moe/activation.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t kScratchFloats = 32 << 20;  // of activations in flight: 128 MB
constexpr int64_t kTaskPanels = 4;            // panels of h, and of y, that a task computes

struct Arena {
  char* at = nullptr;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at);
    at += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

// A range of one expert's row blocks: what a task of the up and down steps works on.
struct Rows {
  int64_t expert, block0, block1;
};

struct Experts {
  const FusedExpertsArgs& args;
  const bool gated = is_gated(args.activation);
  const int64_t experts = args.w13.experts;
  const int64_t hidden = args.w13.k, inner = args.w2.k, outputs = args.w2.n;
  const int64_t hidden_p = padded_k(hidden), inner_p = padded_k(inner);
  const int64_t element_size = args.dtype == DType::kFloat32 ? 4 : 2;
  int64_t first = 0, tokens = 0;  // the chunk

  int64_t* ends = nullptr;     // [experts + 1]: ends[e] is the first row of expert e; after the sort its end
  int32_t* slot_of = nullptr;  // [rows]: slot of each sorted row, within the chunk
  int32_t* row_of = nullptr;   // [slots]: sorted row of each slot, kNone or kIdentity
  Rows* pieces = nullptr;
  int64_t piece_count = 0, rows = 0;
  float *a = nullptr, *h = nullptr, *y = nullptr, *scaled = nullptr;

  static constexpr int32_t kNone = -1, kIdentity = -2;

  explicit Experts(const FusedExpertsArgs& arguments) : args(arguments) {}

  int64_t slots() const { return tokens * args.top_k; }
  int64_t begin(int64_t e) const { return e == 0 ? 0 : ends[e - 1]; }

  // Lay out scratch for chunks of `n` tokens; with a null arena only the size counts.
  int64_t layout(char* memory, int64_t n) {
    Arena arena{memory};
    const int64_t s = n * args.top_k;
    ends = arena.take<int64_t>(experts + 1);
    slot_of = arena.take<int32_t>(s);
    row_of = arena.take<int32_t>(s);
    pieces = arena.take<Rows>(s / kTaskRows + (experts < s ? experts : s) + 1);
    a = arena.take<float>(s * hidden_p);
    h = arena.take<float>(s * inner_p);
    y = arena.take<float>(s * outputs);
    scaled = arena.take<float>(args.weight_on_input ? n * hidden : 0);
    return arena.at - memory;
  }

  int32_t local_expert(int64_t id) const {
    const int64_t end = args.expert_map ? args.map_size : experts;
    if (id >= end && id < end + args.num_identity) return kIdentity;
    if (id < 0 || id >= end) return kNone;
    if (args.expert_map) id = args.expert_map[id];
    return id >= 0 && id < experts ? int32_t(id) : kNone;
  }

  void sort() {
    for (int64_t e = 0; e <= experts; ++e) ends[e] = 0;
    const int32_t* ids = args.topk_ids + first * args.top_k;
    for (int64_t s = 0; s < slots(); ++s) {
      row_of[s] = local_expert(ids[s]);
      if (row_of[s] >= 0) ++ends[row_of[s] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) ends[e + 1] += ends[e];
    rows = ends[experts];
    for (int64_t s = 0; s < slots(); ++s) {
      if (row_of[s] < 0) continue;
      const int64_t row = ends[row_of[s]]++;
      slot_of[row] = int32_t(s);
      row_of[s] = int32_t(row);
    }
    piece_count = 0;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t count = ends[e] - begin(e), blocks = row_blocks(count), cuts = ceil_div(count, kTaskRows);
      for (int64_t i = 0; i < cuts; ++i)
        pieces[piece_count++] = {e, blocks * i / cuts, blocks * (i + 1) / cuts};
    }
  }

  const char* x_row(int64_t token) const {
    return static_cast<const char*>(args.x) + (first + token) * args.x_stride * element_size;
  }

  // x times the router's weight, for weight_on_input.
  void scale_input() {
    parallel_tasks(tokens, args.threads, [&](int64_t t) {
      const F32x16 w = set1(args.topk_weights[first + t]);
      const char* x = x_row(t);
      int64_t i = 0;
      for (; i + kPanel <= hidden; i += kPanel)
        store(scaled + t * hidden + i, mul(w, load_as_float(args.dtype, x, i)));
      for (; i < hidden; ++i)
        scaled[t * hidden + i] = args.topk_weights[first + t] * one_as_float(args.dtype, x, i);
    });
  }

  void gather() {
    parallel_tasks(piece_count, args.threads, [&](int64_t p) {
      const Rows& piece = pieces[p];
      const int64_t start = begin(piece.expert), count = ends[piece.expert] - start;
      const auto row = [&](int64_t i) -> const void* {
        const int64_t token = slot_of[start + i] / args.top_k;
        if (args.weight_on_input) return scaled + token * hidden;
        return x_row(token);
      };
      const DType dtype = args.weight_on_input ? DType::kFloat32 : args.dtype;
      for (int64_t b = piece.block0; b < piece.block1; ++b)
        pack_row_block(dtype, hidden, count, b, row, a + start * hidden_p);
    });
  }

  GemmTask gemm_task(const PackedMatrix& w, const Rows& piece, const float* from, int64_t column0,
                     int64_t column1, float* acc) const {
    const int64_t start = begin(piece.expert);
    return {&w,
            piece.expert,
            from + start * padded_k(w.k),
            ends[piece.expert] - start,
            piece.block0,
            piece.block1,
            column0 / kPanel,
            ceil_div(column1, kPanel),
            acc};
  }

  // 16 finished w13 outputs, with bias, of one row from a column on; `out` takes 32.
  void columns(const GemmTask& task, int64_t row, int64_t task_rows, int64_t column, int64_t count,
               float* out) const {
    const PackedMatrix& w = *task.weight;
    for (int64_t panel = column / kPanel; panel <= (column + count - 1) / kPanel; ++panel, out += kPanel) {
      F32x16 v =
          finish(w, task.expert, panel, load(task.acc + ((panel - task.panel0) * task_rows + row) * kPanel));
      if (args.w13_bias) {
        const int64_t left = w.n - panel * kPanel;
        v = add(v, load_n(args.w13_bias + task.expert * w.n + panel * kPanel,
                          left < kPanel ? int(left) : int(kPanel)));
      }
      store(out, v);
    }
  }

  // h columns [c0, c1) of one piece.
  void up(const Rows& piece, int64_t c0, int64_t c1) {
    constexpr int64_t kRows = kTaskRows + kTileRows;
    alignas(64) float gate_acc[2 * kTaskPanels * kRows * kPanel];
    alignas(64) float up_acc[(kTaskPanels + 1) * kRows * kPanel];
    const bool split = gated && !args.interleaved;
    const int64_t step = gated && args.interleaved ? 2 : 1;
    const GemmTask g = gemm_task(args.w13, piece, a, step * c0, step * c1, gate_acc);
    const GemmTask u = gemm_task(args.w13, piece, a, inner + c0, inner + c1, up_acc);
    gemm(g);
    if (split) gemm(u);

    const int64_t total = g.rows, row0 = block_begin(total, piece.block0);
    const int64_t task_rows = block_begin(total, piece.block1) - row0;
    float* out = h + begin(piece.expert) * inner_p;
    alignas(64) float gates[2 * kPanel] = {}, ups[2 * kPanel] = {}, result[kPanel];
    for (int64_t b = piece.block0; b < piece.block1; ++b) {
      const int64_t start = block_begin(total, b), block_rows = block_begin(total, b + 1) - start;
      float* block = out + start * inner_p;
      for (int64_t r = 0; r < block_rows; ++r) {
        const int64_t row = start - row0 + r;
        for (int64_t c = c0; c < c1; c += kPanel) {
          const int64_t count = c1 - c < kPanel ? c1 - c : kPanel;
          columns(g, row, task_rows, step * c, step * count, gates);
          F32x16 gv = load(gates), uv = zero();
          if (split) {
            columns(u, row, task_rows, inner + c, count, ups);
            uv = load_n(ups + (inner + c) % kPanel, int(count));
          } else if (gated) {
            alignas(64) float even[kPanel];
            for (int64_t i = 0; i < kPanel; ++i) even[i] = gates[2 * i], ups[i] = gates[2 * i + 1];
            gv = load(even), uv = load(ups);
          }
          store(result, activate(args.activation, gv, uv, args.alpha, args.limit));
          for (int64_t i = 0; i < count; ++i) block[(c + i) * block_rows + r] = result[i];
        }
        if (c1 == inner)
          for (int64_t i = inner; i < inner_p; ++i) block[i * block_rows + r] = 0.0f;
      }
    }
  }

  void up() {
    const int64_t width = kTaskPanels * kPanel, cuts = ceil_div(inner, width);
    parallel_tasks(piece_count * cuts, args.threads, [&](int64_t task) {
      const int64_t c0 = task % cuts * width;
      up(pieces[task / cuts], c0, c0 + width < inner ? c0 + width : inner);
    });
  }

  void down() {
    const int64_t width = kTaskPanels * kPanel, cuts = ceil_div(outputs, width);
    parallel_tasks(piece_count * cuts, args.threads, [&](int64_t index) {
      alignas(64) float acc[kTaskPanels * (kTaskRows + kTileRows) * kPanel];
      const Rows& piece = pieces[index / cuts];
      const int64_t c0 = index % cuts * width, c1 = c0 + width < outputs ? c0 + width : outputs;
      const GemmTask task = gemm_task(args.w2, piece, h, c0, c1, acc);
      gemm(task);
      const int64_t row0 = block_begin(task.rows, task.block0), row1 = block_begin(task.rows, task.block1);
      const float* from = acc;
      for (int64_t panel = task.panel0; panel < task.panel1; ++panel) {
        const int64_t n0 = panel * kPanel, count = outputs - n0 < kPanel ? outputs - n0 : kPanel;
        const float* bias = args.w2_bias ? args.w2_bias + piece.expert * outputs + n0 : nullptr;
        for (int64_t row = row0; row < row1; ++row, from += kPanel) {
          F32x16 v = finish(args.w2, piece.expert, panel, load(from));
          if (bias) v = add(v, load_n(bias, int(count)));
          store_n(y + (begin(piece.expert) + row) * outputs + n0, v, int(count));
        }
      }
    });
  }

  void store_out(int64_t token, int64_t column, F32x16 v, int64_t count) const {
    const int64_t at = (first + token) * outputs + column;
    if (args.dtype == DType::kFloat32) return store_n(static_cast<float*>(args.out) + at, v, int(count));
    uint16_t part[kPanel];
    if (args.dtype == DType::kBFloat16)
      store_bf16(part, v);
    else
      store_f16(part, v);
    std::memcpy(static_cast<uint16_t*>(args.out) + at, part, size_t(2 * count));
  }

  F32x16 load_x(int64_t token, int64_t column, int64_t count) const {
    if (count == kPanel) return load_as_float(args.dtype, x_row(token), column);
    float part[kPanel] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = one_as_float(args.dtype, x_row(token), column + i);
    return load(part);
  }

  void combine() {
    parallel_tasks(ceil_div(tokens, 8), args.threads, [&](int64_t task) {
      for (int64_t t = 8 * task; t < (8 * task + 8 < tokens ? 8 * task + 8 : tokens); ++t) {
        const int32_t* row = row_of + t * args.top_k;
        const float* weight = args.topk_weights + (first + t) * args.top_k;
        for (int64_t c = 0; c < outputs; c += kPanel) {
          const int64_t count = outputs - c < kPanel ? outputs - c : kPanel;
          F32x16 sum = zero();
          for (int64_t j = 0; j < args.top_k; ++j) {
            if (row[j] == kIdentity) {
              sum = fma(set1(weight[j]), load_x(t, c, count), sum);
            } else if (row[j] >= 0) {
              const F32x16 v = load_n(y + row[j] * outputs + c, int(count));
              sum = args.weight_on_input ? add(sum, v) : fma(set1(weight[j]), v, sum);
            }
          }
          store_out(t, c, sum, count);
        }
      }
    });
  }

  void run(int64_t begin_token, int64_t count) {
    first = begin_token, tokens = count;
    sort();
    if (args.weight_on_input) scale_input();
    gather();
    up();
    down();
    combine();
  }
};

}  // namespace

void fused_experts(const FusedExpertsArgs& args) {
  if (args.tokens == 0) return;
  Experts layer(args);
  const int64_t per_token = args.top_k * (layer.hidden_p + layer.inner_p + layer.outputs) + 1;
  int64_t chunk = kScratchFloats / per_token;
  chunk = chunk < 64 ? 64 : chunk;
  chunk = chunk < args.tokens ? chunk : args.tokens;
  const size_t bytes = size_t(layer.layout(nullptr, chunk));
  layer.layout(static_cast<char*>(thread_scratch(Scratch::kMoe, bytes)), chunk);
  for (int64_t t = 0; t < args.tokens; t += chunk)
    layer.run(t, args.tokens - t < chunk ? args.tokens - t : chunk);
}

}  // namespace moesaic::MOESAIC_ISA
