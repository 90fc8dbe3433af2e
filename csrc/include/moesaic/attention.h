// Arguments of the attention kernels.  Strides are in elements; pointers are never null unless said.
// Page tables and lengths come from the caller as they are: kernels skip what is out of range.
#pragma once
#include <cstdint>

#include "moesaic/formats.h"

namespace moesaic {

// A page cache [num_blocks, block_size, heads, dim] seen through its strides.
struct PageCache {
  void* data;
  DType dtype;  // kFloat32, kBFloat16 or kFloat16
  int64_t dim;
  int64_t block_stride, slot_stride, head_stride, dim_stride;
};

struct PagedAttentionArgs {
  const void* q;  // [tokens, heads, k.dim], last stride 1
  DType q_dtype;
  int64_t q_token_stride, q_head_stride;
  void* out;   // [tokens, heads, v.dim] contiguous, of q's dtype
  float* lse;  // [tokens, heads] contiguous
  PageCache k, v;
  int64_t tokens, heads, kv_heads, batch;
  int64_t num_blocks, block_size;
  const void* block_table;  // [batch, max_blocks], int32 or int64, last stride 1
  bool table_is_int64;
  int64_t table_stride, max_blocks;
  const void* seq_lens;      // [batch], int32 or int64
  const void* cu_seqlens_q;  // [batch + 1], or null: one row for each sequence
  bool lens_are_int64, cu_is_int64;
  float scale;
  bool causal;
  int64_t window_left, window_right;  // inclusive counts, below 0 = no limit
  float softcap;                      // 0 = off
  const float* alibi_slopes;          // [heads] or [batch, heads], or null
  int64_t alibi_batch_stride;         // 0 or heads
  const float* sinks;                 // [heads], or null
  int threads;
};

// Writes rows of key and value into their slots; slots out of range are skipped.
struct ReshapeAndCacheArgs {
  const void* key;    // [tokens, heads, k.dim], last stride 1
  const void* value;  // [tokens, heads, v.dim], last stride 1
  DType dtype;        // of key and value
  int64_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  PageCache k, v;
  int64_t tokens, heads, num_blocks, block_size;
  const int64_t* slot_mapping;  // [tokens]
  int threads;
};

}  // namespace moesaic
