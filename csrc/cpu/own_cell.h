// SPDX-License-Identifier: BSD-3-Clause
// What a library with a cell of its own hands over: the constants of its cell and a table of kernels for each
// instruction set that it was compiled for. own/library.cpp fills it, run.cpp runs it. The library knows neither torch
// nor Python, and has no symbols of fastrnn._C: both sides are compiled from the same headers, which `layout` holds
// them to.
#pragma once
#include <stdint.h>

namespace fastrnn {
namespace cpu {

struct Kernels;

struct OwnIsa {
  const char* name;  // as those of fastrnn, see select.cpp
  const Kernels* of_float;
  const Kernels* of_double;
};

// Constants of the cell as cells/cell.h has them.
struct OwnCell {
  int64_t layout;       // kOwnLayout of the headers that the library was compiled from
  const char* sources;  // what they hold, a digest; empty: unknown
  int64_t gates, states, saved, stored, parameters;
  const OwnIsa* isas;  // scalar first
  int64_t isa_count;
};

// The name that a library has the instruction set in use under: one that differs from another in bfloat16 alone has
// that one's name, since a library's kernels are of float and double.
const char* own_isa();

// The kernels for the instruction set in use; those in plain C++ where the library has none for it.
const Kernels& own_kernels(const OwnCell& cell, bool is_double);

}  // namespace cpu
}  // namespace fastrnn
