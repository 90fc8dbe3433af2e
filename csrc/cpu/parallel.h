// Threads: torch's own OpenMP pool (the extension links the plain libgomp and is imported after
// torch).  Every kernel says how many threads it may use; nothing here reads a global.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>

namespace moesaic {
namespace {

// Run body(task) for task in [0, tasks): pulled one by one from a shared counter, so ragged tasks
// balance.  Which thread runs which task is not defined; a kernel's result must not depend on it.
template <class Body>
inline void parallel_tasks(int64_t tasks, int threads, const Body& body) {
  if (tasks <= 0) return;
  if (threads > tasks) threads = int(tasks);
  if (threads <= 1 || omp_in_parallel()) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
}

}  // namespace
}  // namespace moesaic
