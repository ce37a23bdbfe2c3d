// SPDX-License-Identifier: BSD-3-Clause
// The calls of modules and cells, in module_call.cpp; module.cpp puts them into fastrnn._C.
#pragma once

extern "C" {
struct _object;  // PyObject
}

namespace fastrnn {

void define_module_calls(_object* module);

}  // namespace fastrnn
