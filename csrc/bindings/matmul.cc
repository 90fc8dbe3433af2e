// moesaic._C: packed weights and quant_linear.
#include "moesaic/matmul.h"

#include "bindings.h"
#include "cpu/table.h"

namespace moesaic {
namespace {

PackArgs pack_args(int element, int64_t experts, int64_t n, int64_t k, Address plain, Address packed,
                   int threads) {
  PackArgs args{};
  args.element = static_cast<DType>(element);
  args.experts = experts;
  args.n = n;
  args.k = k;
  args.plain = pointer<uint8_t>(plain);
  args.packed = pointer<uint8_t>(packed);
  args.threads = threads;
  return args;
}

// Everything but the addresses.
PackedMatrix packed_matrix(int element, int scale_kind, int64_t experts, int64_t n, int64_t k, int64_t block,
                           int64_t scale_panels, float unit) {
  PackedMatrix w{};
  w.element = static_cast<DType>(element);
  w.scale_kind = static_cast<ScaleKind>(scale_kind);
  w.experts = experts;
  w.n = n;
  w.k = k;
  w.block = block;
  w.scale_panels = scale_panels;
  w.unit = unit;
  return w;
}

PackedMatrix at(PackedMatrix w, Address data, Address scale, Address row_scale, Address poison) {
  w.data = pointer<const uint8_t>(data);
  w.scale = pointer<const void>(scale);
  w.row_scale = pointer<const float>(row_scale);
  w.poison = pointer<const float>(poison);
  return w;
}

}  // namespace

void bind_matmul(py::module_& m) {
  py::class_<PackedMatrix>(m, "PackedMatrix", "A packed weight by addresses; see moesaic/matmul.h.")
      .def(py::init(&packed_matrix))
      .def("at", &at, "A copy with the addresses of data, scale, row_scale and poison (0: absent).");
  m.def("group_bytes", [](int element) { return group_bytes(static_cast<DType>(element)); });
  m.def("pack_codes", [](int element, int64_t experts, int64_t n, int64_t k, Address plain, Address packed,
                         Address poison, int nan_mask, int nan_code, int threads) {
    PackArgs args = pack_args(element, experts, n, k, plain, packed, threads);
    args.poison = pointer<float>(poison);
    args.nan_mask = uint8_t(nan_mask);
    args.nan_code = uint8_t(nan_code);
    py::gil_scoped_release release;
    pack_codes(args);
  });
  m.def("unpack_codes",
        [](int element, int64_t experts, int64_t n, int64_t k, Address plain, Address packed, int threads) {
          const PackArgs args = pack_args(element, experts, n, k, plain, packed, threads);
          py::gil_scoped_release release;
          unpack_codes(args);
        });
  m.def("quant_linear", [](const PackedMatrix& weight, Address x, int x_dtype, int64_t rows, int64_t x_stride,
                           Address bias, Address out, int out_dtype, int threads) {
    QuantLinearArgs args{};
    args.weight = weight;
    args.x = pointer<const void>(x);
    args.x_dtype = static_cast<DType>(x_dtype);
    args.m = rows;
    args.x_stride = x_stride;
    args.bias = pointer<const float>(bias);
    args.out = pointer<void>(out);
    args.out_dtype = static_cast<DType>(out_dtype);
    args.threads = threads;
    py::gil_scoped_release release;
    kernels().quant_linear(args);
  });
}

}  // namespace moesaic
