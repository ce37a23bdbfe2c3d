// SPDX-License-Identifier: BSD-3-Clause
// What one core can do at best: the two figures that the benchmark divides by.
// Called through the Python module by bench/machine.py; nothing in the library depends on it. No torch here.
#pragma once
#include <stddef.h>

namespace fastrnn {
namespace cpu {

// Multiply-adds out of registers, in GFLOP/s (two per multiply-add) of the calling thread; best of several runs
// of 2 ms, about 25 ms in all. isa: a name of layer.h ("avx512", "avx512_bf16", "avx2"; anything else, and any set that
// the machine lacks, is plain C++: a multiplication and an addition).
double fma_peak(const char* isa, bool double_precision);

// Reads `bytes` (rounded up to 4 KiB) of ordinary memory again and again, in GB/s of the calling thread; best of
// several runs of 2 ms or one pass, about 25 ms in all. Measures the cache level in which `bytes` fits.
// Returns 0 when the memory cannot be had.
double read_bandwidth(const char* isa, size_t bytes);

}  // namespace cpu
}  // namespace fastrnn
