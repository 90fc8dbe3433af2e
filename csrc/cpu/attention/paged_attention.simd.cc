// paged_attention: softmax attention of any mix of decode and prefill rows over paged K and V.
//
// Problem: decode reads every K and V byte once for a handful of rows, so memory bounds it; prefill
// has many rows for each key, so arithmetic does.
// Plan: a task is up to kRows query rows (token x head of the group) of one sequence and KV head, so
// that a key is fetched, converted and multiplied for all of them at once; in decode, of several KV
// heads that lie side by side, so that memory is read in long runs.  It walks the keys in tiles of
// kTile (tile.h) and folds the tiles' states in order.  If there are too few tasks for the threads, each
// tile of a short-rowed sequence becomes a task of its own that leaves its state in memory, and a second
// pass folds them in the same order: the same bits.
// Rows of K and V are used as they lie in the pages when few query rows share them; else, or when they
// are no multiple of 32 or not contiguous, a tile is converted to fp32 once for the whole task.
#include "cpu/attention/tile.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "moesaic/attention.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t kRows = 64;               // query rows of a task
constexpr int64_t kRowsInPlace = 8;         // up to this many rows, converting a tile first does not pay
constexpr int64_t kFar = int64_t(1) << 60;  // beyond every position; sums of three stay in range
constexpr int64_t kMaxStateBytes = int64_t(256) << 20;
constexpr int64_t kTasksPerThread = 8;
constexpr int kAhead = 16;                 // most keys to prefetch ahead, ...
constexpr int64_t kAheadBytes = 16 << 10;  // ... or fewer, to this much memory
constexpr int kStep = 16;                  // keys that rows share while they are in the L1 cache

int64_t index_at(const void* indices, bool are_int64, int64_t i) {
  return are_int64 ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

// A sequence as planned: which rows of q, which keys, which tasks.
struct Sequence {
  int64_t index;               // in the batch
  int64_t first_row;           // of q
  int64_t query_rows;          // tokens of q
  int64_t length;              // position of the last row, plus 1
  int64_t keys;                // keys that the table can name
  int64_t head_blocks, heads;  // of KV heads that share a task
  int64_t row_tiles;
  int64_t first_tile, tiles;  // of the rows' visible keys
  int64_t first_task, tasks;
  int64_t states;  // offset in floats of its tile states; -1 if its tasks fold their tiles
};

struct Plan {
  Sequence* sequences;
  int64_t count, tasks;
  float* states;
};

struct Call {
  const PagedAttentionArgs& args;
  int64_t group, k_chunks, v_chunks, k_width, v_width;
  bool paired;
  int64_t state_width;  // floats of one row's state of a tile: m, l, padding to 16, then values

  explicit Call(const PagedAttentionArgs& a)
      : args(a),
        group(a.heads / a.kv_heads),
        k_chunks(chunks_of(a.k.dim)),
        v_chunks(chunks_of(a.v.dim)),
        k_width(k_chunks * kChunk),
        v_width(v_chunks * kChunk),
        paired(a.k.dtype == DType::kBFloat16),
        state_width(16 + v_width) {}

  // Whether `rows` query rows use K or V as it lies in the pages.
  bool in_place(const PageCache& cache, int64_t rows) const {
    return (rows <= kRowsInPlace || cache.dtype == DType::kFloat32) && cache.dim % kChunk == 0 &&
           cache.dim_stride == 1;
  }

  // KV heads that share a task of `rows` rows each: those side by side in a token's memory.
  int64_t heads_together(int64_t rows) const {
    const bool adjacent = args.k.head_stride < args.k.slot_stride && args.v.head_stride < args.v.slot_stride;
    if (!adjacent || !in_place(args.k, rows) || !in_place(args.v, rows)) return 1;
    return lesser(args.kv_heads, greater_of(1, kRows / rows));
  }

  // Keys [begin, end) that the row at `position` of a sequence sees.
  void visible(int64_t position, int64_t keys, int64_t& begin, int64_t& end) const {
    begin = args.window_left < 0 ? 0 : greater_of(0, position - lesser(args.window_left, kFar));
    int64_t right = args.window_right < 0 ? kFar : lesser(args.window_right, kFar);
    if (args.causal) right = 0;
    end = lesser(keys, position + right + 1);
    if (end < begin) end = begin;
  }
};

// Scratch of one task, carved out of the thread's memory.
struct Workspace {
  float *q, *acc, *tile_acc, *weights, *k_tile, *v_tile, *missing;
  State* states;
  Span* spans;
  const void** keys;    // [kTile + kAhead] rows of the tile; the tail names what to prefetch after it
  const void** values;  // [kTile + kAhead]

  explicit Workspace(const Call& c) {
    const int64_t floats =
        kRows * (c.k_width + 2 * c.v_width + kWeights + 4) + kTile * (c.k_width + c.v_width + 1);
    const int64_t pointers = 2 * (kTile + kAhead);
    float* p = static_cast<float*>(thread_scratch(Scratch::kAttention, size_t(4 * floats + 8 * pointers)));
    keys = reinterpret_cast<const void**>(p);
    values = keys + kTile + kAhead;
    p += 2 * pointers;
    q = p, p += kRows * c.k_width;
    acc = p, p += kRows * c.v_width;
    tile_acc = p, p += kRows * c.v_width;
    weights = p, p += kRows * kWeights;
    k_tile = p, p += kTile * c.k_width;
    v_tile = p, p += kTile * c.v_width;
    missing = p, p += kTile;
    states = reinterpret_cast<State*>(p), p += 2 * kRows;
    spans = reinterpret_cast<Span*>(p);
  }
};

template <class T>
struct Task {
  const Call& call;
  const Sequence& sequence;
  const Workspace& work;
  int64_t kv_head, heads;  // KV heads [kv_head, kv_head + heads)
  int64_t first, rows;     // for each of them rows [first, first + rows) of query_rows * group, token-major

  int64_t all_rows() const { return heads * rows; }
  int64_t position(int64_t row) const {
    return sequence.length - sequence.query_rows + (first + row % rows) / call.group;
  }
  int64_t head(int64_t row) const {
    return (kv_head + row / rows) * call.group + (first + row % rows) % call.group;
  }
  int64_t token(int64_t row) const { return sequence.first_row + (first + row % rows) / call.group; }

  void load_queries() const {
    const PagedAttentionArgs& a = call.args;
    for (int64_t r = 0; r < all_rows(); ++r)
      load_q_row(a.q_dtype, a.q, token(r) * a.q_token_stride + head(r) * a.q_head_stride, a.k.dim,
                 call.paired, a.scale, work.q + r * call.k_width);
  }

  // Addresses of the K and V rows of keys [begin, end) of the tile; true if some have no page.
  bool locate(int64_t tile, int begin, int end) const {
    const PagedAttentionArgs& a = call.args;
    const T* k = static_cast<const T*>(a.k.data) + kv_head * a.k.head_stride;
    const T* v = static_cast<const T*>(a.v.data) + kv_head * a.v.head_stride;
    bool holes = false;
    for (int t = begin; t < end;) {
      const int64_t key = tile * kTile + t, column = key / a.block_size, slot = key % a.block_size;
      const int64_t entry = sequence.index * a.table_stride + column;
      const int64_t block = index_at(a.block_table, a.table_is_int64, entry);
      const int stop = int(lesser(end, t + (a.block_size - slot)));
      if (block < 0 || block >= a.num_blocks) {
        if (!holes) std::memset(work.missing, 0, 4 * kTile);
        holes = true;
        for (; t < stop; ++t) {
          work.keys[t] = work.values[t] = nullptr;
          work.missing[t] = 1.0f;
        }
        continue;
      }
      const T* k_row = k + block * a.k.block_stride + slot * a.k.slot_stride;
      const T* v_row = v + block * a.v.block_stride + slot * a.v.slot_stride;
      for (; t < stop; ++t, k_row += a.k.slot_stride, v_row += a.v.slot_stride) {
        work.keys[t] = k_row;
        work.values[t] = v_row;
      }
    }
    for (int t = 0; t < kAhead; ++t) {
      work.keys[end + t] = work.values[lesser(begin + t, end - 1)];
      work.values[end + t] = work.values[end - 1];
    }
    return holes;
  }

  // The rows [begin, end) of a tile for the arithmetic: as they lie in the pages ...
  TileRows<T> in_place(const PageCache& cache, const void** row) const {
    const int64_t bytes = cache.dim * int64_t(sizeof(T));
    const int ahead = int(greater_of(2, lesser(kAhead, kAheadBytes / (bytes * heads))));
    return {reinterpret_cast<const T* const*>(row), cache.head_stride, chunks_of(cache.dim), bytes, ahead};
  }

  // ... or converted to fp32 (one head only).
  TileRows<float> converted(const PageCache& cache, const void** row, int begin, int end, float* tile) const {
    const int64_t width = chunks_of(cache.dim) * kChunk;
    for (int t = begin; t < end; ++t) {
      if (cache.dim_stride == 1)
        prefetch_row(static_cast<const T*>(row[t + kAhead]), 0, cache.dim * int64_t(sizeof(T)));
      if (!row[t]) continue;
      widen_row(static_cast<const T*>(row[t]), cache.dim_stride, cache.dim, tile + t * width);
      row[t] = tile + t * width;
    }
    return {reinterpret_cast<const float* const*>(row), 0, chunks_of(cache.dim), 0, 0};
  }

  // Attention of all rows over one tile: work.tile_acc and the states written to `out`.
  void attend(int64_t tile, State* out) const {
    const PagedAttentionArgs& a = call.args;
    int begin = kTile, end = 0;
    for (int64_t r = 0; r < all_rows(); ++r) {
      int64_t from, to;
      call.visible(position(r), sequence.keys, from, to);
      from = greater_of(from - tile * kTile, 0);
      to = lesser(to - tile * kTile, kTile);
      work.spans[r] = from < to ? Span{int(from), int(to)} : Span{0, 0};
      if (from >= to) continue;
      if (from < begin) begin = int(from);
      if (to > end) end = int(to);
    }
    for (int64_t r = 0; r < all_rows(); ++r) out[r] = {-INFINITY, 0.0f};
    if (begin >= end) return;
    std::memset(work.tile_acc, 0, size_t(4 * all_rows() * call.v_width));

    const bool holes = locate(tile, begin, end);
    const int k_step = heads > 1 ? 4 : kStep;
    if (call.in_place(a.k, rows))
      scores(int(heads), int(rows), in_place(a.k, work.keys), begin, end, k_step, work.q, work.weights);
    else
      scores(1, int(rows), converted(a.k, work.keys, begin, end, work.k_tile), begin, end, kStep, work.q,
             work.weights);
    for (int64_t r = 0; r < all_rows(); ++r) {
      const Span span = work.spans[r];
      if (span.begin == span.end) continue;
      Logits f{a.softcap, 0.0f, float(position(r) - tile * kTile), holes ? work.missing : nullptr};
      if (a.alibi_slopes) f.slope = a.alibi_slopes[sequence.index * a.alibi_batch_stride + head(r)];
      softmax(work.weights + r * kWeights, span, f, out[r].m, out[r].l);
    }
    const int v_step = heads > 1 ? kStep / 2 : kStep;
    if (call.in_place(a.v, rows))
      accumulate(int(heads), int(rows), work.spans, in_place(a.v, work.values), begin, end, v_step,
                 work.weights, work.tile_acc);
    else
      accumulate(1, int(rows), work.spans, converted(a.v, work.values, begin, end, work.v_tile), begin, end,
                 kStep, work.weights, work.tile_acc);
  }

  void finish(int64_t row, State state, const float* acc) const {
    const PagedAttentionArgs& a = call.args;
    const int64_t at = token(row) * a.heads + head(row);
    if (state.l == 0) {
      a.lse[at] = -INFINITY;
      return;  // out is zero already
    }
    float denominator = state.l;
    if (a.sinks) denominator += exp1(a.sinks[head(row)] - state.m);
    a.lse[at] = state.m + log1(state.l);
    store_out_row(a.q_dtype, a.out, at * a.v.dim, a.v.dim, call.paired, acc, denominator);
  }

  // Folds every tile of the rows.
  void run() const {
    load_queries();
    State states[kRows];
    for (int64_t r = 0; r < all_rows(); ++r) states[r] = {0.0f, 0.0f};
    int64_t from, to, unused;
    call.visible(position(0), sequence.keys, from, unused);
    call.visible(position(rows - 1), sequence.keys, unused, to);
    for (int64_t tile = from / kTile; tile * kTile < to; ++tile) {
      attend(tile, work.states);
      for (int64_t r = 0; r < all_rows(); ++r)
        merge(states[r], work.acc + r * call.v_width, work.states[r], work.tile_acc + r * call.v_width,
              call.v_width);
    }
    for (int64_t r = 0; r < all_rows(); ++r) finish(r, states[r], work.acc + r * call.v_width);
  }

  // Where run_tile leaves the state of a row of this task: m, l, and from 16 on the values.
  float* state_at(float* all, int64_t tile, int64_t row) const {
    const int64_t index = (tile * call.args.kv_heads + kv_head + row / rows) * rows + row % rows;
    return all + sequence.states + index * call.state_width;
  }

  // Leaves the states of one tile in memory.
  void run_tile(int64_t tile, float* all) const {
    load_queries();
    attend(sequence.first_tile + tile, work.states);
    for (int64_t r = 0; r < all_rows(); ++r) {
      float* to = state_at(all, tile, r);
      to[0] = work.states[r].m;
      to[1] = work.states[r].l;
      if (work.states[r].l != 0)
        std::memcpy(to + 16, work.tile_acc + r * call.v_width, size_t(4 * call.v_width));
    }
  }

  // Folds the states that run_tile left, in order.
  void fold(float* all) const {
    for (int64_t r = 0; r < all_rows(); ++r) {
      State state{0.0f, 0.0f};
      for (int64_t tile = 0; tile < sequence.tiles; ++tile) {
        const float* from = state_at(all, tile, r);
        merge(state, work.acc, State{from[0], from[1]}, from + 16, call.v_width);
      }
      finish(r, state, work.acc);
    }
  }
};

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Rows of no sequence, and rows that see nothing, are 0 and -inf.
void clear_rows(const Call& c, int64_t begin, int64_t end) {
  const PagedAttentionArgs& a = c.args;
  const int64_t width = a.heads * a.v.dim * (a.q_dtype == DType::kFloat32 ? 4 : 2);
  std::memset(static_cast<char*>(a.out) + begin * width, 0, size_t((end - begin) * width));
  for (int64_t i = begin * a.heads; i < end * a.heads; ++i) a.lse[i] = -INFINITY;
}

Plan plan(const Call& c) {
  const PagedAttentionArgs& a = c.args;
  const size_t table_bytes = size_t(a.batch + 1) * sizeof(Sequence);
  Plan p{static_cast<Sequence*>(thread_scratch(Scratch::kAttentionPlan, table_bytes)), 0, 0, nullptr};
  const int64_t capacity = a.max_blocks > kFar / a.block_size ? kFar : a.max_blocks * a.block_size;
  int64_t row = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t begin = a.cu_seqlens_q ? clamp(index_at(a.cu_seqlens_q, a.cu_is_int64, b), 0, a.tokens) : b;
    const int64_t end =
        a.cu_seqlens_q ? clamp(index_at(a.cu_seqlens_q, a.cu_is_int64, b + 1), 0, a.tokens) : b + 1;
    const int64_t length = lesser(index_at(a.seq_lens, a.lens_are_int64, b), kFar);
    if (begin < row || end <= begin || length <= 0) continue;
    row = end;
    Sequence s{b, begin, end - begin, length, lesser(length, capacity), 0, 0, 0, 0, 0, 0, 0, -1};
    s.row_tiles = (s.query_rows * c.group + kRows - 1) / kRows;
    s.heads = c.heads_together(s.query_rows * c.group);
    s.head_blocks = (a.kv_heads + s.heads - 1) / s.heads;
    int64_t from, to, unused;
    c.visible(length - s.query_rows, s.keys, from, unused);
    c.visible(length - 1, s.keys, unused, to);
    s.first_tile = from / kTile;
    s.tiles = to > from ? (to + kTile - 1) / kTile - s.first_tile : 0;
    s.tasks = s.row_tiles * s.head_blocks;
    p.tasks += s.tasks;
    p.sequences[p.count++] = s;
  }
  clear_rows(c, 0, a.tokens);

  // Too few tasks: one for every tile, where a sequence's rows fit one task.
  int64_t states = 0;
  if (a.threads > 1 && p.tasks < kTasksPerThread * a.threads) {
    for (int64_t i = 0; i < p.count; ++i) {
      Sequence& s = p.sequences[i];
      const int64_t floats = s.tiles * a.kv_heads * s.query_rows * c.group * c.state_width;
      if (s.row_tiles != 1 || s.tiles < 2 || 4 * (states + floats) > kMaxStateBytes) continue;
      s.states = states;
      s.tasks = s.tiles * s.head_blocks;
      states += floats;
    }
    if (states) p.states = static_cast<float*>(thread_scratch(Scratch::kAttentionStates, size_t(4 * states)));
  }
  p.tasks = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    p.sequences[i].first_task = p.tasks;
    p.tasks += p.sequences[i].tasks;
  }
  return p;
}

const Sequence& sequence_of(const Plan& p, int64_t task) {
  int64_t low = 0, high = p.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.sequences[middle].first_task <= task)
      low = middle;
    else
      high = middle - 1;
  }
  return p.sequences[low];
}

template <class T>
void attend_all(const Call& c) {
  const PagedAttentionArgs& a = c.args;
  const Plan p = plan(c);
  parallel_tasks(p.tasks, a.threads, [&](int64_t index) {
    const Sequence& s = sequence_of(p, index);
    const Workspace work(c);
    const int64_t local = index - s.first_task, part = local / s.head_blocks;
    const int64_t kv_head = local % s.head_blocks * s.heads, heads = lesser(s.heads, a.kv_heads - kv_head);
    const int64_t all_rows = s.query_rows * c.group;
    if (s.states >= 0) {
      Task<T>{c, s, work, kv_head, heads, 0, all_rows}.run_tile(part, p.states);
      return;
    }
    // Later rows see more keys under a causal mask: longest first.
    const int64_t first = (s.row_tiles - 1 - part) * kRows;
    Task<T>{c, s, work, kv_head, heads, first, lesser(kRows, all_rows - first)}.run();
  });
  if (!p.states) return;
  parallel_tasks(p.count * a.kv_heads, a.threads, [&](int64_t index) {
    const Sequence& s = p.sequences[index / a.kv_heads];
    if (s.states < 0) return;
    const Workspace work(c);
    Task<T>{c, s, work, index % a.kv_heads, 1, 0, s.query_rows * c.group}.fold(p.states);
  });
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args) {
  const Call call(args);
  switch (args.k.dtype) {
    case DType::kFloat32: return attend_all<float>(call);
    case DType::kBFloat16: return attend_all<BF16>(call);
    default: return attend_all<F16>(call);
  }
}

}  // namespace moesaic::MOESAIC_ISA
