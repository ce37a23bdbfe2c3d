// SPDX-License-Identifier: BSD-3-Clause
// Conversions of 16-bit elements, with AVX-512 or F16C where the machine has them. Not through the dispatcher: a copy
// of torch takes longer to begin than a small layer takes to run.
#include "half.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand of its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrnn {
namespace cpu {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements of a thread: as long as a parallel region takes to begin

template <class Element>
void widen_plain(const uint16_t* from, float* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(Element(from[j], Element::from_bits()));
}

template <class Element>
void narrow_plain(const float* from, uint16_t* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = Element(from[j]).x;
}

#if defined(__x86_64__)
#define FASTRNN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define FASTRNN_F16C __attribute__((target("avx2,f16c")))

FASTRNN_AVX512 void widen_half_avx512(const uint16_t* from, float* to, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const auto lanes = static_cast<__mmask16>(n - j < 16 ? (1u << (n - j)) - 1 : 0xffff);
    _mm512_mask_storeu_ps(to + j, lanes, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from + j)));
  }
}

FASTRNN_AVX512 void narrow_half_avx512(const float* from, uint16_t* to, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const auto lanes = static_cast<__mmask16>(n - j < 16 ? (1u << (n - j)) - 1 : 0xffff);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, from + j);
    _mm256_mask_storeu_epi16(to + j, lanes, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
}

FASTRNN_F16C void widen_half_f16c(const uint16_t* from, float* to, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
  }
  widen_plain<c10::Half>(from + j, to + j, n - j);
}

FASTRNN_F16C void narrow_half_f16c(const float* from, uint16_t* to, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT));
  }
  narrow_plain<c10::Half>(from + j, to + j, n - j);
}

bool has_avx512() {
  static const bool has =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has;
}
bool has_f16c() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}
#endif

void widen_some(c10::ScalarType type, const uint16_t* from, float* to, int64_t n) {
  if (type == c10::kBFloat16) return widen_plain<c10::BFloat16>(from, to, n);  // a shift, which compilers vectorize
#if defined(__x86_64__)
  if (has_avx512()) return widen_half_avx512(from, to, n);
  if (has_f16c()) return widen_half_f16c(from, to, n);
#endif
  widen_plain<c10::Half>(from, to, n);
}

void narrow_some(c10::ScalarType type, const float* from, uint16_t* to, int64_t n) {
  if (type == c10::kBFloat16) return narrow_plain<c10::BFloat16>(from, to, n);
#if defined(__x86_64__)
  if (has_avx512()) return narrow_half_avx512(from, to, n);
  if (has_f16c()) return narrow_half_f16c(from, to, n);
#endif
  narrow_plain<c10::Half>(from, to, n);
}

}  // namespace

void widen(c10::ScalarType type, const void* from, float* to, int64_t n) {
  const auto* elements = static_cast<const uint16_t*>(from);
  if (n <= kGrain) return widen_some(type, elements, to, n);
  at::parallel_for(0, n, kGrain,
                   [&](int64_t begin, int64_t end) { widen_some(type, elements + begin, to + begin, end - begin); });
}

void narrow(c10::ScalarType type, const float* from, void* to, int64_t n) {
  auto* elements = static_cast<uint16_t*>(to);
  if (n <= kGrain) return narrow_some(type, from, elements, n);
  at::parallel_for(0, n, kGrain,
                   [&](int64_t begin, int64_t end) { narrow_some(type, from + begin, elements + begin, end - begin); });
}

}  // namespace cpu
}  // namespace fastrnn
