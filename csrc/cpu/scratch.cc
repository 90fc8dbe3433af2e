#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace moesaic {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* thread_scratch(Scratch slot, size_t bytes) {
  thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    const size_t rounded = (bytes + 4095) & ~size_t(4095);
    buffer.data = std::aligned_alloc(64, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = rounded;
  }
  return buffer.data;
}

}  // namespace moesaic
