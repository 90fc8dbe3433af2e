// Shared by the binding files: how a Python integer becomes a typed pointer.
#pragma once
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace moesaic {

namespace py = pybind11;

using Address = uintptr_t;  // torch.Tensor.data_ptr(), 0 for an absent tensor

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#define X(room) void bind_##room(py::module_& m);
#include "rooms.inc"
#undef X

}  // namespace moesaic
