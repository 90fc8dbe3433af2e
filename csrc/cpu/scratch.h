// Per-thread scratch memory: grows to the largest request and is freed when the thread ends.
#pragma once
#include <cstddef>

namespace moesaic {

// At least `bytes` of 64-byte aligned memory of the calling thread, contents undefined.  A later call
// with the same slot on this thread may move it.  Slots let nested users keep theirs apart.
enum class Scratch { kMatmul, kMoe, kAttention, kQuant, kAttentionPlan, kAttentionStates, kCount };
void* thread_scratch(Scratch slot, size_t bytes);

}  // namespace moesaic
