// Run-time choice of the instruction set: one table of function pointers per set, best first.
#pragma once
#include <string>
#include <vector>

#include "moesaic/kernels.h"

namespace moesaic {

struct Kernels {
  const char* isa;
  bool (*runs_here)();
#define X(name, Args) void (*name)(const Args&);
#include "cpu/kernels.inc"
#undef X
};

// The table in use: the best that runs here, or what MOESAIC_CPU_ISA or set_isa() asked for.
const Kernels& kernels();

// Names of all compiled sets, best first, and those of them that run on this machine.
std::vector<std::string> compiled_isas();
std::vector<std::string> variants();

// Force a set by name; "auto" returns to the best.  Throws std::invalid_argument for a name that is
// not compiled in or does not run here.
void set_isa(const std::string& name);

}  // namespace moesaic
