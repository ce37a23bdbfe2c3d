// SPDX-License-Identifier: BSD-3-Clause
// Which instruction set runs: the best that the machine has, or the one that FASTRNN_ISA or select_isa names.
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>

#include "kernels.h"

namespace fastrnn {
namespace cpu {
namespace {

bool always() { return true; }
#if defined(__x86_64__)
// Every feature on its own flag; the built-in also asks whether the system saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// A dot product of pairs is twice a multiply-add on AMD's Zen 5 (520 to 260 GFLOP/s), and little more than half of one
// on Intel's Granite Rapids (100 to 180): there it takes longer than converting to float.
bool prefers_avx512_bf16() { return __builtin_cpu_is("amd"); }
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  static const bool has = (d & kTile) != 0 && (d & kBf16) != 0 && amx_granted();
  return has;
}
#endif

// Best last.
const Isa isas[] = {
    {"scalar", always, &scalar_float, &scalar_double, nullptr, nullptr, always},
#if defined(__x86_64__)
    {"avx2", has_avx2, &avx2_float, &avx2_double, nullptr, nullptr, always},
    {"avx512", has_avx512, &avx512_float, &avx512_double, nullptr, nullptr, always},
    {"avx512_bf16", has_avx512_bf16, &avx512_float, &avx512_double, &avx512_bfloat16, nullptr, prefers_avx512_bf16},
    {"amx", has_amx, &avx512_float, &avx512_double, &amx_bfloat16, &amx_parts, always},
#endif
};

const Isa* find(const char* name) {
  for (const Isa& isa : isas) {
    if (name && strcmp(isa.name, name) == 0 && isa.supported()) return &isa;
  }
  return nullptr;
}

const Isa* best() {
  const Isa* found = &isas[0];
  for (const Isa& isa : isas) {
    if (isa.supported() && isa.preferred()) found = &isa;
  }
  return found;
}

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa& chosen_isa() {
  const Isa* isa = chosen.load(std::memory_order_acquire);
  if (!isa) {
    isa = find(getenv("FASTRNN_ISA"));
    if (!isa) isa = best();
    chosen.store(isa, std::memory_order_release);
  }
  return *isa;
}

bool multiplies_bfloat16() { return chosen_isa().of_bfloat16 != nullptr; }
bool multiplies_in_parts() { return chosen_isa().parts != nullptr; }
const char* own_isa() {
  const Isa* isa = isas;
  while (isa->of_float != chosen_isa().of_float) ++isa;
  return isa->name;
}

const Kernels& own_kernels(const OwnCell& cell, bool is_double) {
  const OwnIsa* found = &cell.isas[0];
  for (int64_t k = 1; k < cell.isa_count; ++k) {
    if (strcmp(cell.isas[k].name, own_isa()) == 0) found = &cell.isas[k];
  }
  return is_double ? *found->of_double : *found->of_float;
}

const char* isa_name() { return chosen_isa().name; }

bool select_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa) chosen.store(isa, std::memory_order_release);
  return isa != nullptr;
}

int available_isas(const char* names[], int capacity) {
  int n = 0;
  for (const Isa& isa : isas) {
    if (isa.supported() && n < capacity) names[n++] = isa.name;
  }
  return n;
}

}  // namespace cpu
}  // namespace fastrnn
