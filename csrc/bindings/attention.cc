// Bindings of the attention room: addresses and sizes to argument structs.
#include "moesaic/attention.h"

#include "bindings.h"
#include "cpu/table.h"

namespace moesaic {
namespace {

// (address, dtype code, dim, block stride, slot stride, head stride, dim stride)
using Pages = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t, int64_t>;

PageCache page_cache(const Pages& p) {
  return {pointer<void>(std::get<0>(p)),
          static_cast<DType>(std::get<1>(p)),
          std::get<2>(p),
          std::get<3>(p),
          std::get<4>(p),
          std::get<5>(p),
          std::get<6>(p)};
}

void paged_attention(Address q, int q_dtype, int64_t tokens, int64_t heads, int64_t q_token_stride,
                     int64_t q_head_stride, Address out, Address lse, const Pages& k, const Pages& v,
                     int64_t kv_heads, int64_t num_blocks, int64_t block_size, Address block_table,
                     bool table_is_int64, int64_t batch, int64_t max_blocks, int64_t table_stride,
                     Address seq_lens, bool lens_are_int64, Address cu_seqlens_q, bool cu_is_int64,
                     double scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
                     Address alibi_slopes, int64_t alibi_batch_stride, Address sinks, int threads) {
  PagedAttentionArgs a{};
  a.q = pointer<const void>(q);
  a.q_dtype = static_cast<DType>(q_dtype);
  a.tokens = tokens;
  a.heads = heads;
  a.q_token_stride = q_token_stride;
  a.q_head_stride = q_head_stride;
  a.out = pointer<void>(out);
  a.lse = pointer<float>(lse);
  a.k = page_cache(k);
  a.v = page_cache(v);
  a.kv_heads = kv_heads;
  a.num_blocks = num_blocks;
  a.block_size = block_size;
  a.block_table = pointer<const void>(block_table);
  a.table_is_int64 = table_is_int64;
  a.batch = batch;
  a.max_blocks = max_blocks;
  a.table_stride = table_stride;
  a.seq_lens = pointer<const void>(seq_lens);
  a.lens_are_int64 = lens_are_int64;
  a.cu_seqlens_q = pointer<const void>(cu_seqlens_q);
  a.cu_is_int64 = cu_is_int64;
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  a.window_left = window_left;
  a.window_right = window_right;
  a.softcap = static_cast<float>(softcap);
  a.alibi_slopes = pointer<const float>(alibi_slopes);
  a.alibi_batch_stride = alibi_batch_stride;
  a.sinks = pointer<const float>(sinks);
  a.threads = threads;
  kernels().paged_attention(a);
}

void reshape_and_cache(Address key, Address value, int dtype, int64_t tokens, int64_t heads,
                       int64_t key_token_stride, int64_t key_head_stride, int64_t value_token_stride,
                       int64_t value_head_stride, const Pages& k, const Pages& v, int64_t num_blocks,
                       int64_t block_size, Address slot_mapping, int threads) {
  ReshapeAndCacheArgs a{};
  a.key = pointer<const void>(key);
  a.value = pointer<const void>(value);
  a.dtype = static_cast<DType>(dtype);
  a.tokens = tokens;
  a.heads = heads;
  a.key_token_stride = key_token_stride;
  a.key_head_stride = key_head_stride;
  a.value_token_stride = value_token_stride;
  a.value_head_stride = value_head_stride;
  a.k = page_cache(k);
  a.v = page_cache(v);
  a.num_blocks = num_blocks;
  a.block_size = block_size;
  a.slot_mapping = pointer<const int64_t>(slot_mapping);
  a.threads = threads;
  kernels().reshape_and_cache(a);
}

}  // namespace

void bind_attention(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("paged_attention", &paged_attention, release());
  m.def("reshape_and_cache", &reshape_and_cache, release());
}

}  // namespace moesaic
