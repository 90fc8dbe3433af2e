// Quantize and dequantize blocks; see moesaic/quant.h for layouts and codec.h for the arithmetic.
//
// A task is a run of bands; a band is block_rows rows.  Each block of a band is read twice: once for its
// largest magnitude, once (from cache) to be encoded.  Nothing is summed, so every order gives the same
// bits.
#include "moesaic/quant.h"

#include "cpu/parallel.h"
#include "cpu/quant/codec.h"
#include "cpu/simd/simd.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTaskElements = 1 << 15;
constexpr uint32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

MOESAIC_ALWAYS_INLINE F32x16 load16(const float* p) { return load(p); }
MOESAIC_ALWAYS_INLINE F32x16 load16(const BF16* p) { return load_bf16(&p->bits); }
MOESAIC_ALWAYS_INLINE F32x16 load16(const F16* p) { return load_f16(&p->bits); }
MOESAIC_ALWAYS_INLINE void store16(float* p, F32x16 v) { store(p, v); }
MOESAIC_ALWAYS_INLINE void store16(BF16* p, F32x16 v) { store_bf16(&p->bits, v); }
MOESAIC_ALWAYS_INLINE void store16(F16* p, F32x16 v) { store_f16(&p->bits, v); }

// 16 values of which the first n (< 16) are read, the others 0.
template <class T>
MOESAIC_ALWAYS_INLINE F32x16 load_tail(const T* p, int64_t n) {
  T values[kLanes] = {};
  std::memcpy(values, p, size_t(n) * sizeof(T));
  return load16(values);
}

constexpr int64_t code_bytes(Element e, int64_t n) { return e == Element::kE2M1 ? (n + 1) / 2 : n; }

template <Element e>
MOESAIC_ALWAYS_INLINE void store_codes(uint8_t* p, U32x16 codes) {
  if constexpr (e == Element::kE2M1)
    store_nibbles(p, codes);
  else
    store_u8(p, codes);
}

template <Element e>
MOESAIC_ALWAYS_INLINE U32x16 load_codes(const uint8_t* p) {
  if constexpr (e == Element::kE2M1)
    return load_nibbles(p);
  else
    return load_u8(p);
}

// Largest bit pattern of a magnitude in x[0:n], lane by lane; a NaN is larger than Inf.
template <class T>
MOESAIC_ALWAYS_INLINE U32x16 amax_bits(U32x16 acc, const T* x, int64_t n) {
  const U32x16 mask = set1_u32(kMagnitude);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) acc = max_s32(acc, bit_and(bits(load16(x + i)), mask));
  if (i < n) acc = max_s32(acc, bit_and(bits(load_tail(x + i, n - i)), mask));
  return acc;
}

inline float finite_amax(uint32_t magnitude) {
  return bits_float(magnitude < kInfinity ? magnitude : kInfinity - 1);
}

template <class T>
struct Rows {
  const T* first;
  int64_t count, stride;  // stride in elements
  const T* row(int64_t i) const { return first + i * stride; }
};

struct Amax {
  float value;
  bool has_nan;
};

template <class T>
__attribute__((noinline)) float amax_without_nan(const Rows<T>& rows, int64_t column, int64_t width) {
  const U32x16 mask = set1_u32(kMagnitude), infinity = set1_u32(kInfinity);
  U32x16 acc = set1_u32(0);
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* x = rows.row(r) + column;
    for (int64_t i = 0; i < width; i += kLanes) {
      const F32x16 v = i + kLanes <= width ? load16(x + i) : load_tail(x + i, width - i);
      const U32x16 magnitude = bit_and(bits(v), mask);
      acc = max_s32(acc, select(gt_s32(magnitude, infinity), set1_u32(0), magnitude));
    }
  }
  return finite_amax(reduce_max_s32(acc));
}

template <class T>
MOESAIC_ALWAYS_INLINE Amax block_amax(const Rows<T>& rows, int64_t column, int64_t width) {
  U32x16 acc = set1_u32(0);
  for (int64_t r = 0; r < rows.count; ++r) acc = amax_bits(acc, rows.row(r) + column, width);
  const uint32_t magnitude = reduce_max_s32(acc);
  if (magnitude > kInfinity) return {amax_without_nan(rows, column, width), true};
  return {finite_amax(magnitude), false};
}

enum class Scaling { kDivide, kMultiply };

template <Element e, Scaling scaling, bool checked, class T>
MOESAIC_ALWAYS_INLINE void encode_segment(const T* x, int64_t n, float step, float per_unit, uint8_t* out) {
  const F32x16 by = set1(scaling == Scaling::kMultiply ? 1.0f / step : step);
  const auto codes = [&](F32x16 v) __attribute__((always_inline)) {
    v = scaling == Scaling::kMultiply ? mul(v, by) : div(v, by);
    if constexpr (e == Element::kInt8) v = mul(v, set1(per_unit));
    return encode<e, checked>(v);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_codes<e>(out + code_bytes(e, i), codes(load16(x + i)));
  if (i < n) {
    uint8_t tail[kLanes];
    store_codes<e>(tail, codes(load_tail(x + i, n - i)));
    const int64_t bytes = code_bytes(e, n - i);
    if (e == Element::kE2M1 && n % 2) tail[bytes - 1] &= 15;
    std::memcpy(out + code_bytes(e, i), tail, size_t(bytes));
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks of one dimension of n; block 0 is the whole of it.
struct Blocks {
  int64_t n, size, count;
  Blocks(int64_t n, int64_t block) : n(n), size(block ? block : n), count(block ? ceil_div(n, block) : 1) {}
  int64_t begin(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return size < n - i * size ? size : n - i * size; }
  int64_t of(int64_t at) const { return size ? at / size : 0; }
};

const float* global_at(const GlobalScale& g, int64_t batch, int64_t row) {
  return g.value ? g.value + batch * g.batch_stride + row * g.row_stride : nullptr;
}

// Runs body(batch, first row, rows) over bands of rows, several small bands to a task.
template <class Body>
void for_bands(int64_t batch, const Blocks& bands, int64_t k, int threads, const Body& body) {
  const int64_t all = batch * bands.count;
  const int64_t cost = bands.size * k > 0 ? bands.size * k : 1;
  const int64_t run = kTaskElements > cost ? kTaskElements / cost : 1;
  parallel_tasks(ceil_div(all, run), threads, [&](int64_t task) {
    const int64_t end = (task + 1) * run < all ? (task + 1) * run : all;
    for (int64_t i = task * run; i < end; ++i) {
      const int64_t band = i % bands.count;
      body(i / bands.count, bands.begin(band), bands.length(band));
    }
  });
}

// A band of rows whose blocks lie side by side.
template <Element e, class T>
struct Band {
  const QuantizeArgs& args;
  Rows<T> rows;
  const float* global;
  Blocks columns;
  uint8_t* out;
  int64_t out_stride, first_scale;

  static constexpr bool kPoisons = ElementTraits<e>::nan < 0;
  static constexpr int64_t kRun = 64;

  // Blocks [begin, end) in three passes, so that the short chains of arithmetic of many blocks overlap.
  void quantize(int64_t begin, int64_t end) const {
    Amax amax[kRun];
    float step[kRun];
    bool any_nan = false;
    for (int64_t j = begin; j < end; ++j) {
      amax[j - begin] = args.static_scale && !kPoisons
                            ? Amax{0.0f, true}
                            : block_amax(rows, columns.begin(j), columns.length(j));
      any_nan |= amax[j - begin].has_nan;
    }
    for (int64_t j = begin; j < end; ++j) step[j - begin] = scale(amax[j - begin], first_scale + j);
    // Division by a power of two is multiplication by its reciprocal, bit for bit.
    const bool power_of_two = args.format.scale_type == ScaleType::kE8M0 ||
                              (args.format.rule != ScaleRule::kExact && !args.static_scale);
    if (args.static_scale || global || any_nan)
      encode<Scaling::kDivide, true>(begin, end, step);
    else if (power_of_two)
      encode<Scaling::kMultiply, false>(begin, end, step);
    else
      encode<Scaling::kDivide, false>(begin, end, step);
    if (!kPoisons || !any_nan) return;
    for (int64_t j = begin; j < end; ++j)
      if (amax[j - begin].has_nan) clear(j);
  }

  float scale(const Amax& amax, int64_t index) const {
    float step;
    if (kPoisons && amax.has_nan) {
      store_nan_scale(args.format, args.scale, index);
      return 1.0f;
    }
    if (args.static_scale) {
      step = load_scale(args.format, args.scale, index);
    } else {
      float value = amax.value < args.eps ? args.eps : amax.value;
      value = value > args.amax_ub ? args.amax_ub : value;
      step = make_scale<e>(args.format, value, global, args.scale, index);
    }
    return global ? step * *global : step;
  }

  uint8_t* codes(int64_t row, int64_t j) const {
    return out + row * out_stride + code_bytes(e, columns.begin(j));
  }

  template <Scaling scaling, bool checked>
  void encode(int64_t begin, int64_t end, const float* step) const {
    const float per_unit = 1.0f / code_unit(args.format);
    for (int64_t r = 0; r < rows.count; ++r)
      for (int64_t j = begin; j < end; ++j)
        encode_segment<e, scaling, checked>(rows.row(r) + columns.begin(j), columns.length(j),
                                            step[j - begin], per_unit, codes(r, j));
  }

  void clear(int64_t j) const {
    for (int64_t r = 0; r < rows.count; ++r)
      std::memset(codes(r, j), 0, size_t(code_bytes(e, columns.length(j))));
  }
};

template <Element e, class T>
void quantize_as(const QuantizeArgs& args) {
  const BlockFormat& f = args.format;
  const Blocks rows_of(args.n, f.block_rows), columns(args.k, f.block_cols);
  const int64_t row_bytes = code_bytes(e, args.k);
  // Given scales of a type with NaN depend on no other row: any split will do.
  const bool by_row = args.static_scale && !Band<e, T>::kPoisons;
  const auto task = [&](int64_t batch, int64_t first, int64_t count) {
    const T* x = static_cast<const T*>(args.x) + batch * args.batch_stride + first * args.row_stride;
    const Band<e, T> band{args,
                          {x, count, args.row_stride},
                          global_at(args.global_scale, batch, first),
                          columns,
                          args.data + (batch * args.n + first) * row_bytes,
                          row_bytes,
                          (batch * rows_of.count + rows_of.of(first)) * columns.count};
    // Few enough blocks at a time that their second reading finds them in cache.
    const int64_t cost = count * columns.size > 0 ? count * columns.size : 1;
    const int64_t fit = kTaskElements > cost ? kTaskElements / cost : 1;
    const int64_t run = fit < band.kRun ? fit : band.kRun;
    for (int64_t j = 0; j < columns.count; j += run)
      band.quantize(j, j + run < columns.count ? j + run : columns.count);
  };
  for_bands(args.batch, by_row ? Blocks(args.n, 1) : rows_of, args.k, args.threads, task);
}

template <Element e, class T>
void dequantize_as(const DequantizeArgs& args) {
  const BlockFormat& f = args.format;
  const Blocks rows_of(args.n, f.block_rows), columns(args.k, f.block_cols);
  const int64_t row_bytes = code_bytes(e, args.k);
  const float unit = code_unit(f);
  const auto band = [&](int64_t batch, int64_t row, int64_t) {
    const uint8_t* data = args.data + (batch * args.n + row) * row_bytes;
    T* out = static_cast<T*>(args.out) + (batch * args.n + row) * args.k;
    const float* global = global_at(args.global_scale, batch, row);
    const F32x16 top = set1(global ? *global : 1.0f);
    const int64_t scale_row = (batch * rows_of.count + rows_of.of(row)) * columns.count;
    for (int64_t j = 0; j < columns.count; ++j) {
      const F32x16 scale = set1(load_scale(f, args.scale, scale_row + j));
      const auto values = [&](U32x16 codes) __attribute__((always_inline)) {
        F32x16 v = decode<e>(codes);
        if constexpr (e == Element::kInt8) v = mul(v, set1(unit));
        v = mul(v, scale);
        return global ? mul(v, top) : v;
      };
      int64_t i = columns.begin(j);
      const int64_t end = i + columns.length(j);
      for (; i + kLanes <= end; i += kLanes) store16(out + i, values(load_codes<e>(data + code_bytes(e, i))));
      if (i < end) {
        uint8_t codes[kLanes] = {};
        T tail[kLanes];
        std::memcpy(codes, data + code_bytes(e, i), size_t(code_bytes(e, end - i)));
        store16(tail, values(load_codes<e>(codes)));
        std::memcpy(out + i, tail, size_t(end - i) * sizeof(T));
      }
    }
  };
  for_bands(args.batch, Blocks(args.n, 1), args.k, args.threads, band);
}

template <class T>
void row_amax_as(const RowAmaxArgs& args) {
  for_bands(args.batch, Blocks(args.n, 1), args.k, args.threads, [&](int64_t batch, int64_t row, int64_t) {
    const T* x = static_cast<const T*>(args.x) + batch * args.batch_stride + row * args.row_stride;
    args.amax[batch * args.n + row] = block_amax(Rows<T>{x, 1, 0}, 0, args.k).value;
  });
}

// Calls f.template run<element, type>() for the run-time element.
template <class T, class F>
void for_element(Element e, const F& f) {
  switch (e) {
    case Element::kE4M3FN: return f.template run<Element::kE4M3FN, T>();
    case Element::kE5M2: return f.template run<Element::kE5M2, T>();
    case Element::kE4M3FNUZ: return f.template run<Element::kE4M3FNUZ, T>();
    case Element::kE5M2FNUZ: return f.template run<Element::kE5M2FNUZ, T>();
    case Element::kE2M1: return f.template run<Element::kE2M1, T>();
    case Element::kE2M3: return f.template run<Element::kE2M3, T>();
    case Element::kE3M2: return f.template run<Element::kE3M2, T>();
    case Element::kInt8: return f.template run<Element::kInt8, T>();
  }
}

struct Quantizer {
  const QuantizeArgs& args;
  template <Element e, class T>
  void run() const {
    quantize_as<e, T>(args);
  }
};

struct Dequantizer {
  const DequantizeArgs& args;
  template <Element e, class T>
  void run() const {
    dequantize_as<e, T>(args);
  }
};

}  // namespace

void quantize(const QuantizeArgs& args) {
  const Quantizer f{args};
  switch (args.x_dtype) {
    case DType::kBFloat16: return for_element<BF16>(args.format.element, f);
    case DType::kFloat16: return for_element<F16>(args.format.element, f);
    default: return for_element<float>(args.format.element, f);
  }
}

void dequantize(const DequantizeArgs& args) {
  const Dequantizer f{args};
  switch (args.out_dtype) {
    case DType::kBFloat16: return for_element<BF16>(args.format.element, f);
    case DType::kFloat16: return for_element<F16>(args.format.element, f);
    default: return for_element<float>(args.format.element, f);
  }
}

void row_amax(const RowAmaxArgs& args) {
  switch (args.x_dtype) {
    case DType::kBFloat16: return row_amax_as<BF16>(args);
    case DType::kFloat16: return row_amax_as<F16>(args);
    default: return row_amax_as<float>(args);
  }
}

}  // namespace moesaic::MOESAIC_ISA
