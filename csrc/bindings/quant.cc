// Bindings of the quant room.
#include "moesaic/quant.h"

#include "bindings.h"
#include "cpu/table.h"

namespace moesaic {
namespace {

GlobalScale global_scale(Address value, int64_t batch_stride, int64_t row_stride) {
  return {pointer<const float>(value), batch_stride, row_stride};
}

void quantize(const BlockFormat& format, Address x, int x_dtype, int64_t batch, int64_t n, int64_t k,
              int64_t batch_stride, int64_t row_stride, bool static_scale, float eps, float amax_ub,
              Address global, int64_t global_batch_stride, int64_t global_row_stride, Address data,
              Address scale, int threads) {
  const QuantizeArgs args{format,
                          pointer<const void>(x),
                          static_cast<DType>(x_dtype),
                          batch,
                          n,
                          k,
                          batch_stride,
                          row_stride,
                          static_scale,
                          eps,
                          amax_ub,
                          global_scale(global, global_batch_stride, global_row_stride),
                          pointer<uint8_t>(data),
                          pointer<void>(scale),
                          threads};
  py::gil_scoped_release release;
  kernels().quantize(args);
}

void dequantize(const BlockFormat& format, int64_t batch, int64_t n, int64_t k, Address data, Address scale,
                Address global, int64_t global_batch_stride, int64_t global_row_stride, Address out,
                int out_dtype, int threads) {
  const DequantizeArgs args{format,
                            batch,
                            n,
                            k,
                            pointer<const uint8_t>(data),
                            pointer<const void>(scale),
                            global_scale(global, global_batch_stride, global_row_stride),
                            pointer<void>(out),
                            static_cast<DType>(out_dtype),
                            threads};
  py::gil_scoped_release release;
  kernels().dequantize(args);
}

void row_amax(Address x, int x_dtype, int64_t batch, int64_t n, int64_t k, int64_t batch_stride,
              int64_t row_stride, Address amax, int threads) {
  const RowAmaxArgs args{pointer<const void>(x),
                         static_cast<DType>(x_dtype),
                         batch,
                         n,
                         k,
                         batch_stride,
                         row_stride,
                         pointer<float>(amax),
                         threads};
  py::gil_scoped_release release;
  kernels().row_amax(args);
}

}  // namespace

void bind_quant(py::module_& m) {
  py::class_<BlockFormat>(m, "BlockFormat", "Element, scale type, scale rule and block of a QuantFormat.")
      .def(py::init([](int element, int scale_type, int rule, int64_t block_rows, int64_t block_cols) {
        return BlockFormat{static_cast<Element>(element), static_cast<ScaleType>(scale_type),
                           static_cast<ScaleRule>(rule), block_rows, block_cols};
      }));
  m.def("quantize", &quantize, "Codes and scales of a matrix; see moesaic/quant.h.");
  m.def("dequantize", &dequantize, "Values of codes and scales; see moesaic/quant.h.");
  m.def("row_amax", &row_amax, "Largest magnitude of each row; see moesaic/quant.h.");
}

}  // namespace moesaic
