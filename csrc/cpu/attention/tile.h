// The arithmetic of one tile: kTile consecutive keys, aligned to the key's absolute index, against a
// block of query rows.  Every order of summation here depends on nothing but key index and dimension:
//   score     sum over dimensions: 16 lanes, sequential chunks, then the fixed tree of reduce_add
//   softmax   the maximum of the tile, then exp; the sum in 16 lanes by key index mod 16, then the tree
//   values    one lane per dimension, keys in order, only those that the row sees
// so a row's bits are the same in a decode step and in a prefill, for any batch, page size or machine.
#pragma once
#include "cpu/attention/rows.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int kTile = 256;
// Floats between the weights of two rows: not a power of 2, so that rows do not share cache sets.
constexpr int kWeights = kTile + 16;
// Query rows whose accumulators stay in registers.
constexpr int kScoreRows = kVectors >= 8 ? 4 : 2;
constexpr int kValueRows = kVectors >= 16 ? 4 : 2;

// Rows of K or V of a tile: of key t and head h at row[t] + h * head_stride; null if t has no page.
template <class T>
struct TileRows {
  const T* const* row;
  int64_t head_stride;
  int64_t chunks;          // of kChunk elements
  int64_t prefetch_bytes;  // of a row; 0 if the rows are in the cache already
  int ahead;               // how many keys ahead to prefetch; row[] reaches that far past the tile
};

// A hint for `bytes` of the row, from element `offset` on; nothing where there is no page.
template <class T>
inline void prefetch_row(const T* row, int64_t offset, int64_t bytes) {
  if (!row) return;
  const char* from = reinterpret_cast<const char*>(row + offset);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// s[r * kWeights + t] = q[r] . keys[t] for t in [begin, end).
template <int R, class T>
inline void score_block(const TileRows<T>& keys, int64_t offset, int begin, int end, bool first,
                        const float* q, float* s) {
  const int64_t width = keys.chunks * kChunk, bytes = first ? keys.prefetch_bytes : 0;
  for (int t = begin; t < end; ++t) {
    if (bytes) prefetch_row(keys.row[t + keys.ahead], offset, bytes);
    if (!keys.row[t]) continue;
    const T* key = keys.row[t] + offset;
    F32x16 acc[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r] = zero();
    for (int64_t c = 0; c < width; c += kChunk) {
      F32x16 a, b;
      load_chunk(key + c, a, b);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r] = fma(a, load(q + r * width + c), acc[r]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r] = fma(b, load(q + r * width + c + 16), acc[r]);
    }
    if constexpr (R == 4) {
      reduce_add4(acc[0], acc[1], acc[2], acc[3], s + t, kWeights);
    } else {
      for (int r = 0; r < R; ++r) s[r * kWeights + t] = reduce_add(acc[r]);
    }
  }
}

// Scores of all rows, `rows` for each of `heads`, for keys [begin, end), `step` keys at a time: one key
// where K comes from memory, so that it is read in the order it lies there with all heads beside one
// another; more where many rows share K in the cache, so that q is not.
template <class T>
inline void scores(int heads, int rows, const TileRows<T>& keys, int begin, int end, int step, const float* q,
                   float* s) {
  const int64_t width = keys.chunks * kChunk;
  for (int t = begin; t < end; t += step) {
    const int stop = int(lesser(end, t + step));
    for (int h = 0; h < heads; ++h) {
      const int64_t offset = h * keys.head_stride;
      for (int r = 0; r < rows; r += kScoreRows) {
        const float* qr = q + (h * rows + r) * width;
        float* sr = s + (h * rows + r) * kWeights;
        switch (rows - r) {
          case 1: score_block<1>(keys, offset, t, stop, !r, qr, sr); break;
          case 2: score_block<2>(keys, offset, t, stop, !r, qr, sr); break;
          case 3: score_block<3>(keys, offset, t, stop, !r, qr, sr); break;
          default: score_block<kScoreRows>(keys, offset, t, stop, !r, qr, sr);
        }
      }
    }
  }
}

// acc[r] += p[r][t] values[t] for t in [begin, end), C chunks wide.
template <int R, int C, class T>
inline void value_block(const TileRows<T>& values, int64_t offset, int begin, int end, int64_t chunk,
                        bool first, const float* p, float* acc) {
  const int64_t width = values.chunks * kChunk, bytes = first && chunk == 0 ? values.prefetch_bytes : 0;
  F32x16 sum[R][C][2];
  acc += chunk * kChunk;
  offset += chunk * kChunk;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) load_chunk(acc + r * width + c * kChunk, sum[r][c][0], sum[r][c][1]);
  for (int t = begin; t < end; ++t) {
    if (bytes) prefetch_row(values.row[t + values.ahead], offset, bytes);
    if (!values.row[t]) continue;
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      F32x16 a, b;
      load_chunk(values.row[t] + offset + c * kChunk, a, b);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F32x16 weight = set1(p[r * kWeights + t]);
        sum[r][c][0] = fma(weight, a, sum[r][c][0]);
        sum[r][c][1] = fma(weight, b, sum[r][c][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      store(acc + r * width + c * kChunk, sum[r][c][0]);
      store(acc + r * width + c * kChunk + 16, sum[r][c][1]);
    }
}

template <int R, class T>
inline void value_rows(const TileRows<T>& values, int64_t offset, int begin, int end, bool first,
                       const float* p, float* acc) {
  constexpr int C = R >= kValueRows ? 1 : 2;
  int64_t c = 0;
  for (; c + C <= values.chunks; c += C) value_block<R, C>(values, offset, begin, end, c, first, p, acc);
  for (; c < values.chunks; ++c) value_block<R, 1>(values, offset, begin, end, c, first, p, acc);
}

// What a row sees of a tile: keys [begin, end), relative to the tile's first.
struct Span {
  int begin, end;
};

// Adds keys [begin, end) to all rows, `step` at a time so that their V stays in the L1 cache for all
// rows.  Rows are taken together where they see the same keys of the step and one by one on the edges
// of masks, so that no row ever multiplies a value it does not see.
template <class T>
inline void accumulate(int heads, int rows, const Span* spans, const TileRows<T>& values, int begin, int end,
                       int step, const float* p, float* acc) {
  const int64_t width = values.chunks * kChunk;
  for (int from = begin; from < end; from += step) {
    const int to = int(lesser(end, from + step));
    for (int h = 0; h < heads; ++h) {
      const int64_t offset = h * values.head_stride;
      for (int r = 0; r < rows;) {
        const Span* span = spans + h * rows + r;
        int together = 0;
        while (together < kValueRows && r + together < rows && span[together].begin <= from &&
               span[together].end >= to)
          ++together;
        const float* pr = p + (h * rows + r) * kWeights;
        float* ar = acc + (h * rows + r) * width;
        if (together == kValueRows) {
          value_rows<kValueRows>(values, offset, from, to, !r, pr, ar);
          r += kValueRows;
        } else if (together >= 2) {
          value_rows<2>(values, offset, from, to, !r, pr, ar);
          r += 2;
        } else {
          const int low = int(greater_of(from, span->begin)), high = int(lesser(to, span->end));
          if (low < high) value_rows<1>(values, offset, low, high, !r, pr, ar);
          ++r;
        }
      }
    }
  }
}

// How the raw scores of a row become logits.
struct Logits {
  float softcap;         // 0 = off
  float slope;           // ALiBi
  float distance;        // the row's position less the tile's first key
  const float* missing;  // [kTile], 1 where the key has no page and 0 elsewhere; null if all have one
};

// Turns the scores of [span.begin, span.end) into weights exp(s - m) in place; returns m and their sum l.
inline void softmax(float* s, Span span, const Logits& f, float& m, float& l) {
  static const float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F32x16 iota = load(kIota), none = set1(-INFINITY);
  const int first = span.begin / 16 * 16;
  F32x16 top = none;
  for (int t = first; t < span.end; t += 16) {
    F32x16 x = load(s + t);
    if (f.softcap > 0) x = mul(set1(f.softcap), tanh(div(x, set1(f.softcap))));
    if (f.slope != 0) {
      const F32x16 d = sub(set1(f.distance - float(t)), iota);
      x = fma(set1(-f.slope), max(d, sub(zero(), d)), x);
    }
    if (f.missing) x = select(gt(load(f.missing + t), zero()), none, x);
    if (t < span.begin) x = select(ge(iota, set1(float(span.begin - t))), x, none);
    if (t + 16 > span.end) x = select(gt(set1(float(span.end - t)), iota), x, none);
    store(s + t, x);
    top = max(x, top);
  }
  m = reduce_max(top);
  const F32x16 base = set1(m == -INFINITY ? 0.0f : m);
  F32x16 sum = zero();
  for (int t = first; t < span.end; t += 16) {
    const F32x16 p = exp(sub(load(s + t), base));
    store(s + t, p);
    sum = add(sum, p);
  }
  l = reduce_add(sum);
}

inline float exp1(float x) {
  float lanes[16];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

inline float log1(float x) {
  float lanes[16];
  store(lanes, log(set1(x)));
  return lanes[0];
}

// Softmax over the keys seen so far: maximum, sum of exp(s - m), and the weighted sum of values.
struct State {
  float m, l;
};

// state += other, in this order; acc and other_acc are `width` wide.  An empty state (l == 0) is neutral.
inline void merge(State& state, float* acc, State other, const float* other_acc, int64_t width) {
  if (other.l == 0) return;
  if (state.l == 0) {
    state = other;
    std::memcpy(acc, other_acc, 4 * size_t(width));
    return;
  }
  const float m = state.m > other.m ? state.m : other.m;
  const float a = exp1(state.m - m), b = exp1(other.m - m);
  state = {m, state.l * a + other.l * b};
  for (int64_t i = 0; i < width; i += 16)
    store(acc + i, fma(set1(b), load(other_acc + i), mul(set1(a), load(acc + i))));
}

}  // namespace
}  // namespace moesaic::MOESAIC_ISA
