// SPDX-License-Identifier: BSD-3-Clause
// What a library with a cell of its own exports. fastrnn.build_cell compiles it beside barrier.cpp, core.cpp and
// isa/*.cpp, all with FASTRNN_CELL, the struct, FASTRNN_CELL_HEADER, where it is defined, and FASTRNN_ISAS, which of
// isa/ are there: ISA(scalar) ISA(avx2).
#include "../kernels.h"
#include FASTRNN_CELL_HEADER

namespace fastrnn {
namespace cpu {
namespace {

using C = FASTRNN_CELL;

static_assert(C::kGates >= 1 && C::kGates <= 4, "a cell has 1 to 4 gates");
static_assert(C::kStates >= 1 && C::kStates <= 2, "a cell has one state, h, or two, h and c");
static_assert(C::kSaved >= 0 && C::kSaved <= 16, "a cell saves up to 16 lanes");
static_assert(C::kParameters >= 0 && C::kParameters <= 8, "a cell has up to 8 parameters per unit");
constexpr int kGateGradients = C::kStored - C::kParameters;  // the last of kStored are those of the parameters
static_assert(C::kInput >= 0 && C::kInput + C::kGates <= kGateGradients, "kInput: a window of kGates gradients");
static_assert(C::kRecurrent >= 0 && C::kRecurrent + C::kGates <= kGateGradients, "kRecurrent: likewise");
static_assert(kGateGradients <= 2 * C::kGates, "no gradient lies outside both windows");
static_assert(!C::kProjects, "a projection is for the cells of fastrnn");

#define ISA(name) {#name, &name##_float, &name##_double},
const OwnIsa isas[] = {FASTRNN_ISAS};
#undef ISA

const OwnCell cell = {kOwnLayout,
                      FASTRNN_SOURCES,
                      C::kGates,
                      C::kStates,
                      C::kSaved,
                      C::kStored,
                      C::kParameters,
                      isas,
                      sizeof(isas) / sizeof(isas[0])};

}  // namespace
}  // namespace cpu
}  // namespace fastrnn

extern "C" __attribute__((visibility("default"))) const fastrnn::cpu::OwnCell* fastrnn_own_cell() {
  return &fastrnn::cpu::cell;
}
