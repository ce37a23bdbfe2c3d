// SPDX-License-Identifier: BSD-3-Clause
// Conversions of 16-bit elements, with AVX-512 or AVX2 and F16C where the machine has them. Not through the dispatcher:
// a copy of torch takes longer to begin than a small layer takes to run.
#include "half.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand of its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrnn {
namespace cpu {
namespace {

template <class Element>
void widen_plain(const uint16_t* from, float* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(Element(from[j], Element::from_bits()));
}

template <class Element>
void narrow_plain(const float* from, uint16_t* to, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] = Element(from[j]).x;
}

template <class Element>
constexpr Conversion kPlain{std::is_same_v<Element, c10::Half>, widen_plain<Element>, narrow_plain<Element>};

#if defined(__x86_64__)
#define FASTRNN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define FASTRNN_AVX2 __attribute__((target("avx2,f16c")))

FASTRNN_AVX512 __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n < 16 ? (1u << n) - 1 : 0xffff); }

FASTRNN_AVX512 void widen_half_avx512(const uint16_t* from, float* to, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 lanes = first_lanes(n - j);
    _mm512_mask_storeu_ps(to + j, lanes, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from + j)));
  }
}

FASTRNN_AVX512 void narrow_half_avx512(const float* from, uint16_t* to, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, from + j);
    _mm256_mask_storeu_epi16(to + j, lanes, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
}

FASTRNN_AVX512 void widen_bfloat16_avx512(const uint16_t* from, float* to, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + j));
    _mm512_mask_storeu_epi32(to + j, lanes, _mm512_slli_epi32(bits, 16));
  }
}

// Half of the last place and the place itself are added, so that what is cut off rounds to nearest and ties to even;
// every NaN becomes the same one, as in torch.
FASTRNN_AVX512 void narrow_bfloat16_avx512(const float* from, uint16_t* to, int64_t n) {
  const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff), nan = _mm512_set1_epi32(0x7fc0);
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512i x = _mm512_maskz_loadu_epi32(lanes, from + j);
    const __m512i place = _mm512_and_si512(_mm512_srli_epi32(x, 16), one);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(half, place)), 16);
    const __m512 value = _mm512_castsi512_ps(x);
    const __mmask16 unordered = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, unordered, nan);
    _mm256_mask_storeu_epi16(to + j, lanes, _mm512_cvtepi32_epi16(result));
  }
}

FASTRNN_AVX2 void widen_half_avx2(const uint16_t* from, float* to, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
  }
  widen_plain<c10::Half>(from + j, to + j, n - j);
}

FASTRNN_AVX2 void narrow_half_avx2(const float* from, uint16_t* to, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT));
  }
  narrow_plain<c10::Half>(from + j, to + j, n - j);
}

FASTRNN_AVX2 void widen_bfloat16_avx2(const uint16_t* from, float* to, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), _mm256_slli_epi32(bits, 16));
  }
  widen_plain<c10::BFloat16>(from + j, to + j, n - j);
}

FASTRNN_AVX2 void narrow_bfloat16_avx2(const float* from, uint16_t* to, int64_t n) {
  const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff), nan = _mm256_set1_epi32(0x7fc0);
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m256 value = _mm256_loadu_ps(from + j);
    const __m256i x = _mm256_castps_si256(value);
    const __m256i place = _mm256_and_si256(_mm256_srli_epi32(x, 16), one);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(half, place)), 16);
    const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, nan, unordered);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), packed);
  }
  narrow_plain<c10::BFloat16>(from + j, to + j, n - j);
}
#endif

Conversion best(bool is_half) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return is_half ? Conversion{true, widen_half_avx512, narrow_half_avx512}
                   : Conversion{false, widen_bfloat16_avx512, narrow_bfloat16_avx512};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    return is_half ? Conversion{true, widen_half_avx2, narrow_half_avx2}
                   : Conversion{false, widen_bfloat16_avx2, narrow_bfloat16_avx2};
  }
#endif
  return is_half ? kPlain<c10::Half> : kPlain<c10::BFloat16>;
}

constexpr int64_t kGrain = 1 << 16;  // elements of a thread: as long as a parallel region takes to begin

}  // namespace

const Conversion& conversion(c10::ScalarType type) {
  static const Conversion of_half = best(true), of_bfloat16 = best(false);
  return type == c10::kHalf ? of_half : of_bfloat16;
}

void widen(c10::ScalarType type, const void* from, float* to, int64_t n) {
  const auto* elements = static_cast<const uint16_t*>(from);
  const auto convert = conversion(type).widen;
  if (n <= kGrain) return convert(elements, to, n);
  at::parallel_for(0, n, kGrain,
                   [&](int64_t begin, int64_t end) { convert(elements + begin, to + begin, end - begin); });
}

void narrow(c10::ScalarType type, const float* from, void* to, int64_t n) {
  auto* elements = static_cast<uint16_t*>(to);
  const auto convert = conversion(type).narrow;
  if (n <= kGrain) return convert(from, elements, n);
  at::parallel_for(0, n, kGrain,
                   [&](int64_t begin, int64_t end) { convert(from + begin, elements + begin, end - begin); });
}

}  // namespace cpu
}  // namespace fastrnn
