// reshape_and_cache: new keys and values to their slots, converted to the cache's type.
#include "cpu/attention/rows.h"
#include "cpu/parallel.h"
#include "moesaic/attention.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t kTokensPerTask = 16;
constexpr int64_t kBytesWorthAThread = 64 << 10;

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void copy_row(DType from, const void* row, int64_t offset, const PageCache& cache, int64_t at) {
  const int64_t from_size = size_of(from), to_size = size_of(cache.dtype);
  const char* source = static_cast<const char*>(row) + offset * from_size;
  char* target = static_cast<char*>(cache.data) + at * to_size;
  if (from == cache.dtype && cache.dim_stride == 1) {
    std::memcpy(target, source, size_t(cache.dim * to_size));
    return;
  }
  for (int64_t i = 0; i < cache.dim; i += 16) {
    const int64_t count = lesser(16, cache.dim - i);
    alignas(64) char chunk[64] = {};
    std::memcpy(chunk, source + i * from_size, size_t(count * from_size));
    if (from != cache.dtype) {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(chunk);
      const F32x16 x = from == DType::kFloat32    ? load(reinterpret_cast<const float*>(chunk))
                       : from == DType::kBFloat16 ? load_bf16(half)
                                                  : load_f16(half);
      if (cache.dtype == DType::kFloat32) store(reinterpret_cast<float*>(chunk), x);
      if (cache.dtype == DType::kBFloat16) store_bf16(reinterpret_cast<uint16_t*>(chunk), x);
      if (cache.dtype == DType::kFloat16) store_f16(reinterpret_cast<uint16_t*>(chunk), x);
    }
    if (cache.dim_stride == 1) {
      std::memcpy(target + i * to_size, chunk, size_t(count * to_size));
      continue;
    }
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(target + (i + j) * cache.dim_stride * to_size, chunk + j * to_size, size_t(to_size));
  }
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheArgs& args) {
  const int64_t slots = args.num_blocks * args.block_size;
  const int64_t bytes = args.tokens * args.heads * (args.k.dim + args.v.dim) * size_of(args.dtype);
  const int threads = int(lesser(args.threads, 1 + bytes / kBytesWorthAThread));
  parallel_tasks((args.tokens + kTokensPerTask - 1) / kTokensPerTask, threads, [&](int64_t task) {
    const int64_t end = lesser(args.tokens, (task + 1) * kTokensPerTask);
    for (int64_t t = task * kTokensPerTask; t < end; ++t) {
      const int64_t slot = args.slot_mapping[t];
      if (slot < 0 || slot >= slots) continue;
      const int64_t block = slot / args.block_size, within = slot % args.block_size;
      const int64_t k_at = block * args.k.block_stride + within * args.k.slot_stride;
      const int64_t v_at = block * args.v.block_stride + within * args.v.slot_stride;
      for (int64_t h = 0; h < args.heads; ++h) {
        copy_row(args.dtype, args.key, t * args.key_token_stride + h * args.key_head_stride, args.k,
                 k_at + h * args.k.head_stride);
        copy_row(args.dtype, args.value, t * args.value_token_stride + h * args.value_head_stride, args.v,
                 v_at + h * args.v.head_stride);
      }
    }
  });
}

}  // namespace moesaic::MOESAIC_ISA
