// SPDX-License-Identifier: BSD-3-Clause
// The part of fastrnn._C for cells of other libraries, see own_cell.cpp. Called by ops.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace fastrnn {

void define_own_cells(pybind11::module_& m);

}  // namespace fastrnn
