// The Python module moesaic._C: instruction-set choice here, one file per room beside it.  Tensors
// arrive as addresses and sizes that the doors in python/moesaic/ops have checked; nothing here
// validates, and every kernel call releases the GIL.
#include "bindings.h"
#include "cpu/table.h"
#include "moesaic/roofline.h"
#include "moesaic/selftest.h"

namespace moesaic {
namespace {

void simd_selftest(const std::string& isa, const std::string& primitive, int64_t n, Address a, Address b,
                   Address c, Address out) {
  static const std::vector<std::string> names = {
      "add",       "sub",        "mul",      "div",        "fma",    "min", "max",
      "exp",       "log",        "tanh",     "round_even", "select", "sum", "horizontal_max",
      "load_bf16", "store_bf16", "load_f16", "store_f16"};
  const auto at = std::find(names.begin(), names.end(), primitive);
  if (at == names.end()) throw py::value_error("simd_selftest: primitive: unknown name '" + primitive + "'");
  SimdSelftestArgs args{};
  args.primitive = static_cast<SimdPrimitive>(at - names.begin());
  args.n = n;
  args.a = pointer<const void>(a);
  args.b = pointer<const float>(b);
  args.c = pointer<const float>(c);
  args.out = pointer<void>(out);
  const std::string before = kernels().isa;
  set_isa(isa);
  kernels().simd_selftest(args);
  set_isa(before);
}

void roof_read(Address data, int64_t n, int threads) {
  float sum;
  RoofReadArgs args{pointer<const float>(data), n, threads, &sum};
  py::gil_scoped_release release;
  kernels().roof_read(args);
}

void roof_fma(int64_t steps, int threads) {
  float sum;
  RoofFmaArgs args{steps, threads, &sum};
  py::gil_scoped_release release;
  kernels().roof_fma(args);
}

}  // namespace
}  // namespace moesaic

PYBIND11_MODULE(_C, m) {
  using namespace moesaic;
  m.doc() = "CPU kernels of moesaic. Private: use the functions of the moesaic package.";
  m.def("variants", &variants, "Instruction sets of this build that run on this machine, best first.");
  m.def("compiled_isas", &compiled_isas, "Instruction sets of this build, best first.");
  m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Force an instruction set for the whole process; 'auto' for the best.");
  m.def("max_threads", [] { return omp_get_max_threads(); }, "Threads that the OpenMP runtime would start.");
  m.def("simd_selftest", &simd_selftest, "Run one vocabulary primitive on one instruction set (tests only).");
  m.def("roof_read", &roof_read, "Read n fp32 values once (the bandwidth roof).");
  m.def("roof_fma", &roof_fma, "`steps` FMAs of 32 flops a thread, registers only (the FMA roof).");
#define X(room) bind_##room(m);
#include "rooms.inc"
#undef X
}
