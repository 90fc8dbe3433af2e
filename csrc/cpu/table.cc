#include "cpu/table.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/features.h"

namespace moesaic {

#define X(name, Args) void name(const Args&);
#if MOESAIC_HAVE_AVX512
namespace avx512 {
#include "cpu/kernels.inc"
}
#endif
#if MOESAIC_HAVE_AVX2
namespace avx2 {
#include "cpu/kernels.inc"
}
#endif
#if MOESAIC_HAVE_NEON
namespace neon {
#include "cpu/kernels.inc"
}
#endif
namespace scalar {
#include "cpu/kernels.inc"
}
#undef X

namespace {

bool always() { return true; }

const Kernels kTables[] = {
#if MOESAIC_HAVE_AVX512
    {
        "avx512",
        cpu_has_avx512,
#define X(name, Args) avx512::name,
#include "cpu/kernels.inc"
#undef X
    },
#endif
#if MOESAIC_HAVE_AVX2
    {
        "avx2",
        cpu_has_avx2,
#define X(name, Args) avx2::name,
#include "cpu/kernels.inc"
#undef X
    },
#endif
#if MOESAIC_HAVE_NEON
    {
        "neon",
        cpu_has_neon,
#define X(name, Args) neon::name,
#include "cpu/kernels.inc"
#undef X
    },
#endif
    {
        "scalar",
        always,
#define X(name, Args) scalar::name,
#include "cpu/kernels.inc"
#undef X
    },
};

const Kernels& best() {
  for (const Kernels& table : kTables)
    if (table.runs_here()) return table;
  return kTables[0];
}

const Kernels& find(const std::string& name) {
  if (name == "auto" || name.empty()) return best();
  std::string here;
  for (const Kernels& table : kTables) {
    if (!table.runs_here()) continue;
    if (name == table.isa) return table;
    here += std::string(here.empty() ? "" : ", ") + table.isa;
  }
  throw std::invalid_argument("set_isa: name: expected one of auto, " + here +
                              " (what this build has and this CPU runs), got '" + name + "'");
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> table{[] {
    const char* asked = std::getenv("MOESAIC_CPU_ISA");
    return &find(asked ? asked : "auto");
  }()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Kernels& table : kTables) names.push_back(table.isa);
  return names;
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Kernels& table : kTables)
    if (table.runs_here()) names.push_back(table.isa);
  return names;
}

void set_isa(const std::string& name) { active().store(&find(name)); }

}  // namespace moesaic
