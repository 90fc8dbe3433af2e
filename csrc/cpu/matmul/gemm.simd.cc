// The kernels behind gemm.h.  Two ways to the same bits:
//
//   stream  few rows: the weights are decoded in registers and used at once, several panels abreast so
//           that their chains of dependent FMAs overlap.  Bound by memory where decoding is fast enough.
//   tile    more rows: a chunk of kChunk k of one panel is decoded to fp32 in L1 and multiplied with row
//           block after row block of the packed activations, which stay in L2.  Bound by the FMA units.
#include "cpu/matmul/gemm.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t kChunk = 256;           // k decoded at a time: 16 KB of fp32
constexpr int64_t kL2Floats = 96 * 1024;  // activations that may be expected to stay in L2

// k = 2 * pair and the next of a group.
template <DType element, int pair>
inline void decode_pair(const uint8_t* group, F32x16& k0, F32x16& k1) {
  const uint8_t* p = group + (element == DType::kE2M1 ? 0 : pair * group_bytes(element) / 2);
  if constexpr (element == DType::kE2M1) {
    decode_e2m1<pair>(p, k0, k1);
  } else if constexpr (element == DType::kE4M3FN) {
    decode_e4m3(p, k0, k1);
  } else if constexpr (element == DType::kE5M2) {
    decode_e5m2(p, k0, k1);
  } else if constexpr (element == DType::kInt8) {
    const U32x16 v = load_u16(reinterpret_cast<const uint16_t*>(p));
    k0 = from_s32(sar<24>(shl<24>(v)));
    k1 = from_s32(sar<24>(shl<16>(v)));
  } else if constexpr (element == DType::kBFloat16) {
    const U32x16 v = load_u32(p);
    k0 = as_float(shl<16>(v));
    k1 = as_float(bit_and(v, set1_u32(0xffff0000u)));
  } else if constexpr (element == DType::kFloat16) {
    k0 = load_f16(reinterpret_cast<const uint16_t*>(p));
    k1 = load_f16(reinterpret_cast<const uint16_t*>(p) + kPanel);
  } else {
    k0 = load(reinterpret_cast<const float*>(p));
    k1 = load(reinterpret_cast<const float*>(p) + kPanel);
  }
}

// Where the scales of one panel begin.
inline const uint8_t* panel_scales(const PackedMatrix& w, int64_t expert, int64_t panel) {
  const int64_t panels = panel_count(w), blocks = ceil_div(w.k, w.block);
  const uint8_t* base = static_cast<const uint8_t*>(w.scale);
  switch (w.scale_kind) {
    case ScaleKind::kNone: return nullptr;
    case ScaleKind::kShared:
      return base + 4 * blocks * (expert * ceil_div(panels, w.scale_panels) + panel / w.scale_panels);
    default:
      return base +
             (w.scale_kind == ScaleKind::kFloat32 ? 4 : 1) * kPanel * blocks * (expert * panels + panel);
  }
}

inline F32x16 load_scale(ScaleKind kind, const uint8_t* scales, int64_t block) {
  switch (kind) {
    case ScaleKind::kE8M0:  // code 0 is 2^-127, a subnormal; code 255 (NaN) is left to the poison
      return as_float(max_s32(shl<23>(load_u8(scales + kPanel * block)), set1_u32(0x00400000)));
    case ScaleKind::kE4M3: return load_e4m3(scales + kPanel * block);
    case ScaleKind::kFloat32: return load(reinterpret_cast<const float*>(scales) + kPanel * block);
    case ScaleKind::kShared: return set1(reinterpret_cast<const float*>(scales)[block]);
    default: return set1(1.0f);
  }
}

template <DType element>
inline const uint8_t* panel_codes(const PackedMatrix& w, int64_t expert, int64_t panel) {
  return w.data + (expert * panel_count(w) + panel) * ceil_div(w.k, 4) * group_bytes(element);
}

// The same pointer, unknown to the optimizer: what is loaded through it is loaded again.  Keeps values
// that are cheap to load again from pushing accumulators out of the registers.
template <class T>
inline T* fresh(T* p) {
  __asm__ volatile("" : "+r"(p));
  return p;
}

// p[r] += x[2][R] times two k of a group.
template <DType element, int pair, int R>
inline void fma_pair(const uint8_t* group, const float* x, F32x16 (&p)[R]) {
  F32x16 k0, k1;
  decode_pair<element, pair>(group, k0, k1);
  for (int r = 0; r < R; ++r) fma_to(p[r], set1(x[r]), k0);
  for (int r = 0; r < R; ++r) fma_to(p[r], set1(x[R + r]), k1);
}

// R rows times P panels from `panel` on; acc [P][R][16].
template <DType element, int R, int P>
void stream(const GemmTask& task, int64_t panel, const float* a, float* acc) {
  const PackedMatrix& w = *task.weight;
  const int64_t k = padded_k(w.k), block = w.block;
  const int64_t panel_bytes = k / 4 * group_bytes(element);
  const uint8_t* codes = panel_codes<element>(w, task.expert, panel);
  const uint8_t* scales[P];
  for (int j = 0; j < P; ++j) scales[j] = panel_scales(w, task.expert, panel + j);
  for (int i = 0; i < P * R; ++i) store(acc + kPanel * i, zero());
  for (int64_t begin = 0, b = 0; begin < k; begin += block, ++b) {
    const int64_t groups = (k - begin < block ? k - begin : block) / 4;
    F32x16 p[P][R];
    for (int j = 0; j < P; ++j)
      for (int r = 0; r < R; ++r) p[j][r] = zero();
    for (int64_t g = 0; g < groups; ++g) {
      for (int j = 0; j < P; ++j) {
        const uint8_t* at = codes + j * panel_bytes;
        const float* x = fresh(a);
        __builtin_prefetch(at + 2048);
        fma_pair<element, 0>(at, x, p[j]);
        fma_pair<element, 1>(at, x + 2 * R, p[j]);
      }
      a += 4 * R;
      codes += group_bytes(element);
    }
    for (int j = 0; j < P; ++j) {
      const F32x16 s = load_scale(w.scale_kind, scales[j], b);
      for (int r = 0; r < R; ++r) {
        float* c = acc + kPanel * (j * R + r);
        store(c, fma(p[j][r], s, load(c)));
      }
    }
  }
}

template <DType element, int R, int P>
void stream_panels(const GemmTask& task, const float* a) {
  float* acc = task.acc;
  int64_t panel = task.panel0;
  for (; panel + P <= task.panel1; panel += P, acc += P * R * kPanel)
    stream<element, R, P>(task, panel, a, acc);
  for (; panel < task.panel1; ++panel, acc += R * kPanel) stream<element, R, 1>(task, panel, a, acc);
}

// Panels that a tile covers: what the registers hold beside kTileRows rows.
#if MOESAIC_ISA_AVX512
constexpr int kTilePanels = 2;
#else
constexpr int kTilePanels = 1;
#endif

// The decoded chunk of one panel and its scales, in L1.
struct Chunk {
  alignas(64) float weights[kChunk * kPanel];     // [k][16]
  alignas(64) float scales[kChunk / 4 * kPanel];  // [blocks][16]
};

// c[P][R][16], panels `stride` floats apart, += the chunks of P panels times row block a[depth][R].
template <int R, int P>
void tile(const float* a, const Chunk* chunks, int64_t depth, int64_t block, float* c, int64_t stride) {
  const float *b = chunks->weights, *scales = chunks->scales;
  constexpr int64_t next = sizeof(Chunk) / sizeof(float);
  for (int64_t begin = 0; begin < depth; begin += block, scales += kPanel) {
    const int64_t count = depth - begin < block ? depth - begin : block;
    F32x16 p[P][R];
    for (int j = 0; j < P; ++j)
      for (int r = 0; r < R; ++r) p[j][r] = zero();
    for (int64_t i = 0; i < count; i += 4, a += 4 * R, b += 4 * kPanel) {
      for (int kk = 0; kk < 4; ++kk) {
        F32x16 v[P];
        for (int j = 0; j < P; ++j) v[j] = load(b + kk * kPanel + j * next);
        for (int r = 0; r < R; ++r) {
          const F32x16 x = set1(a[kk * R + r]);
          for (int j = 0; j < P; ++j) fma_to(p[j][r], x, v[j]);
        }
      }
    }
    c = fresh(c);  // or the compiler keeps sums in spilled registers and stores each twice
    for (int j = 0; j < P; ++j) {
      const F32x16 s = load(scales + j * next);
      for (int r = 0; r < R; ++r) {
        float* at = c + j * stride + kPanel * r;
        store(at, fma(p[j][r], s, load(at)));
      }
    }
  }
}

using Tile = void (*)(const float*, const Chunk*, int64_t, int64_t, float*, int64_t);
constexpr Tile kTiles[kTilePanels][kTileRows] = {
    {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>},
#if MOESAIC_ISA_AVX512
    {tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>},
#endif
};

template <DType element>
struct Tiles {
  const GemmTask& task;
  const PackedMatrix& w = *task.weight;
  const int64_t k = padded_k(w.k);
  const int64_t chunk = kChunk / w.block * w.block;
  const int64_t row0 = block_begin(task.rows, task.block0);
  const int64_t rows = block_begin(task.rows, task.block1) - row0;
  Chunk chunks[kTilePanels];

  explicit Tiles(const GemmTask& t) : task(t) {}

  void decode(int64_t panel, int64_t begin, int64_t depth, Chunk& to) {
    const uint8_t* codes = panel_codes<element>(w, task.expert, panel) + begin / 4 * group_bytes(element);
    for (int64_t g = 0; g < depth / 4; ++g, codes += group_bytes(element)) {
      __builtin_prefetch(codes + kChunk / 4 * group_bytes(element));
      F32x16 v[4];
      decode_pair<element, 0>(codes, v[0], v[1]);
      decode_pair<element, 1>(codes, v[2], v[3]);
      for (int kk = 0; kk < 4; ++kk) store(to.weights + (4 * g + kk) * kPanel, v[kk]);
    }
    const uint8_t* scales = panel_scales(w, task.expert, panel);
    for (int64_t b = 0; b * w.block < depth; ++b)
      store(to.scales + b * kPanel, load_scale(w.scale_kind, scales, begin / w.block + b));
  }

  // `panels` <= kTilePanels panels from `panel` on, the chunk of k at `begin`, all rows of the task.
  void multiply(int64_t panel, int64_t panels, int64_t begin) {
    const int64_t depth = k - begin < chunk ? k - begin : chunk;
    for (int64_t j = 0; j < panels; ++j) decode(panel + j, begin, depth, chunks[j]);
    float* c = task.acc + (panel - task.panel0) * rows * kPanel;
    const int64_t fewest = task.rows / row_blocks(task.rows), larger = task.rows % row_blocks(task.rows);
    const float* a = task.a + row0 * k;
    for (int64_t rb = task.block0; rb < task.block1; ++rb) {
      const int64_t count = fewest + (rb < larger);
      kTiles[panels - 1][count - 1](a + begin * count, chunks, depth, w.block, c, rows * kPanel);
      a += count * k;
      c += count * kPanel;
    }
  }

  // Panel by panel reads the weights as one stream; with many rows the activations would then not stay
  // in L2, and all panels take their turn on a chunk of k.
  void run() {
    for (int64_t i = 0; i < (task.panel1 - task.panel0) * rows; ++i) store(task.acc + i * kPanel, zero());
    const int64_t all = task.panel1 - task.panel0;
    const auto at_once = [&](int64_t i) { return all - i < kTilePanels ? all - i : kTilePanels; };
    if (rows * k <= kL2Floats) {
      for (int64_t i = 0; i < all; i += kTilePanels)
        for (int64_t begin = 0; begin < k; begin += chunk) multiply(task.panel0 + i, at_once(i), begin);
    } else {
      for (int64_t begin = 0; begin < k; begin += chunk)
        for (int64_t i = 0; i < all; i += kTilePanels) multiply(task.panel0 + i, at_once(i), begin);
    }
  }
};

// Most rows that stream keeps in registers beside what decoding needs: two accumulators each on AVX2.
#if MOESAIC_ISA_AVX2
constexpr int64_t kStreamRows = 5;
#else
constexpr int64_t kStreamRows = kTileRows;
#endif

template <DType element>
void gemm_of(const GemmTask& task) {
  const int64_t row0 = block_begin(task.rows, task.block0), rows = block_begin(task.rows, task.block1) - row0;
  const float* a = task.a + row0 * padded_k(task.weight->k);
  switch (task.block1 - task.block0 == 1 && rows <= kStreamRows ? rows : 0) {
    case 1: return stream_panels<element, 1, 2>(task, a);
    case 2: return stream_panels<element, 2, 2>(task, a);
    case 3: return stream_panels<element, 3, 1>(task, a);
    case 4: return stream_panels<element, 4, 1>(task, a);
    case 5: return stream_panels<element, 5, 1>(task, a);
    case 6: return stream_panels<element, 6, 1>(task, a);
    default: Tiles<element>(task).run();
  }
}

}  // namespace

void gemm(const GemmTask& task) {
  switch (task.weight->element) {
    case DType::kE2M1: return gemm_of<DType::kE2M1>(task);
    case DType::kE4M3FN: return gemm_of<DType::kE4M3FN>(task);
    case DType::kE5M2: return gemm_of<DType::kE5M2>(task);
    case DType::kInt8: return gemm_of<DType::kInt8>(task);
    case DType::kBFloat16: return gemm_of<DType::kBFloat16>(task);
    case DType::kFloat16: return gemm_of<DType::kFloat16>(task);
    default: return gemm_of<DType::kFloat32>(task);
  }
}

}  // namespace moesaic::MOESAIC_ISA
