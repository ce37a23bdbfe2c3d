// SPDX-License-Identifier: BSD-3-Clause
// Peak arithmetic and read bandwidth of one core, measured; the roofline of bench/machine.py.
// The loops share nothing with isa/*.cpp: what is measured must not move when a kernel changes. Every accumulator is a
// named variable: an array that a compiler fails to unroll spills, and a spilled peak flatters every fraction.
#include "roofline.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrnn {
namespace cpu {
namespace {

constexpr int kChains = 12;           // 2 ports x 4 cycles of latency need 8
constexpr double kRunSeconds = 2e-3;  // long against reading the clock, short against a time slice
constexpr int kRuns = 12;
constexpr size_t kPage = 4096;
volatile double sink;  // keeps the results alive

// One body for every vector type; FMA(a) is one multiply-add on the chain a. Behind the empty asm the start values are
// unknown: twelve chains that start alike would be merged into one.
#define FASTRNN_TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define FASTRNN_START(n) a##n = start[n];
#define FASTRNN_SUM(n) sum += FASTRNN_FIRST(a##n);
#define FASTRNN_FMA_LOOP(name, attribute, V, FMA)       \
  attribute double name(int64_t iterations) {           \
    V start[kChains] = {};                              \
    __asm__ volatile("" : : "r"(start) : "memory");     \
    V a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11; \
    FASTRNN_TWELVE(FASTRNN_START)                       \
    for (int64_t n = 0; n < iterations; ++n) {          \
      FASTRNN_TWELVE(FMA)                               \
    }                                                   \
    double sum = 0;                                     \
    FASTRNN_TWELVE(FASTRNN_SUM)                         \
    return sum;                                         \
  }

// Eight chains of OR, one load each: OR takes no notice of what it reads. The asm makes the next pass read again.
#define FASTRNN_READ_LOOP(name, attribute, V, OR)                                   \
  attribute double name(const char* memory, size_t bytes, int64_t passes) {         \
    V a0 = {}, a1 = {}, a2 = {}, a3 = {}, a4 = {}, a5 = {}, a6 = {}, a7 = {};       \
    for (int64_t pass = 0; pass < passes; ++pass) {                                 \
      for (size_t offset = 0; offset < bytes; offset += 8 * sizeof(V)) {            \
        const V* v = reinterpret_cast<const V*>(memory + offset);                   \
        a0 = OR(a0, v[0]), a1 = OR(a1, v[1]), a2 = OR(a2, v[2]), a3 = OR(a3, v[3]); \
        a4 = OR(a4, v[4]), a5 = OR(a5, v[5]), a6 = OR(a6, v[6]), a7 = OR(a7, v[7]); \
      }                                                                             \
      __asm__ volatile("" : : : "memory");                                          \
    }                                                                               \
    a0 = OR(OR(OR(a0, a1), OR(a2, a3)), OR(OR(a4, a5), OR(a6, a7)));                \
    return static_cast<double>(FASTRNN_FIRST(a0));                                  \
  }

// Plain C++ for the compiler's baseline, which is what the scalar kernels are.
#define FASTRNN_FIRST(a) (a)
#define FASTRNN_FMA_FLOAT(n) a##n = a##n * 0.999f + 0.001f;
#define FASTRNN_FMA_DOUBLE(n) a##n = a##n * 0.999 + 0.001;
#define FASTRNN_OR_PLAIN(a, v) ((a) | (v))
FASTRNN_FMA_LOOP(fma_float_scalar, , float, FASTRNN_FMA_FLOAT)
FASTRNN_FMA_LOOP(fma_double_scalar, , double, FASTRNN_FMA_DOUBLE)
FASTRNN_READ_LOOP(read_scalar, , uint64_t, FASTRNN_OR_PLAIN)
#undef FASTRNN_FIRST

#if defined(__x86_64__)
#define FASTRNN_FIRST(a) (a)[0]
#define FASTRNN_AVX2 __attribute__((target("avx2,fma")))
#define FASTRNN_FMA_PS256(n) a##n = _mm256_fmadd_ps(a##n, _mm256_set1_ps(0.999f), _mm256_set1_ps(0.001f));
#define FASTRNN_FMA_PD256(n) a##n = _mm256_fmadd_pd(a##n, _mm256_set1_pd(0.999), _mm256_set1_pd(0.001));
FASTRNN_FMA_LOOP(fma_float_avx2, FASTRNN_AVX2, __m256, FASTRNN_FMA_PS256)
FASTRNN_FMA_LOOP(fma_double_avx2, FASTRNN_AVX2, __m256d, FASTRNN_FMA_PD256)
FASTRNN_READ_LOOP(read_avx2, FASTRNN_AVX2, __m256i, _mm256_or_si256)

#define FASTRNN_AVX512 __attribute__((target("avx512f")))
#define FASTRNN_FMA_PS512(n) a##n = _mm512_fmadd_ps(a##n, _mm512_set1_ps(0.999f), _mm512_set1_ps(0.001f));
#define FASTRNN_FMA_PD512(n) a##n = _mm512_fmadd_pd(a##n, _mm512_set1_pd(0.999), _mm512_set1_pd(0.001));
FASTRNN_FMA_LOOP(fma_float_avx512, FASTRNN_AVX512, __m512, FASTRNN_FMA_PS512)
FASTRNN_FMA_LOOP(fma_double_avx512, FASTRNN_AVX512, __m512d, FASTRNN_FMA_PD512)
FASTRNN_READ_LOOP(read_avx512, FASTRNN_AVX512, __m512i, _mm512_or_si512)
#endif

struct Loops {
  double (*fma_float)(int64_t iterations);
  double (*fma_double)(int64_t iterations);
  double (*read)(const char* memory, size_t bytes, int64_t passes);
  int float_lanes, double_lanes;
};

Loops loops_of(const char* isa) {
#if defined(__x86_64__)
  if (strncmp(isa, "avx512", 6) == 0 && __builtin_cpu_supports("avx512f")) {
    return {fma_float_avx512, fma_double_avx512, read_avx512, 16, 8};
  }
  if (strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {fma_float_avx2, fma_double_avx2, read_avx2, 8, 4};
  }
#endif
  (void)isa;
  return {fma_float_scalar, fma_double_scalar, read_scalar, 1, 1};
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Best rate of run(count), in counts per second: count grows until one run lasts kRunSeconds, then kRuns runs.
template <class Run>
double best_rate(const Run& run) {
  const auto timed = [&run](int64_t count) {
    const double start = seconds_now();
    sink = run(count);
    return seconds_now() - start;
  };
  int64_t count = 1;
  double elapsed = timed(count);
  while (elapsed < kRunSeconds) {
    // From a run too short to be trusted, only grow.
    const double growth = elapsed > kRunSeconds / 64 ? 1.2 * kRunSeconds / elapsed : 32;
    count = static_cast<int64_t>(static_cast<double>(count) * growth) + 1;
    elapsed = timed(count);
  }
  for (int n = 1; n < kRuns; ++n) {
    const double again = timed(count);
    if (again < elapsed) elapsed = again;
  }
  return static_cast<double>(count) / elapsed;
}

}  // namespace

double fma_peak(const char* isa, bool double_precision) {
  const Loops loops = loops_of(isa);
  const auto loop = double_precision ? loops.fma_double : loops.fma_float;
  const int lanes = double_precision ? loops.double_lanes : loops.float_lanes;
  return best_rate(loop) * kChains * lanes * 2 * 1e-9;
}

double read_bandwidth(const char* isa, size_t bytes) {
  bytes = bytes == 0 ? kPage : (bytes + kPage - 1) / kPage * kPage;
  void* memory = nullptr;
  if (posix_memalign(&memory, kPage, bytes) != 0) return 0;
  memset(memory, 1, bytes);  // maps the pages before anything is measured
  const auto read = loops_of(isa).read;
  const double rate = best_rate([=](int64_t passes) { return read(static_cast<const char*>(memory), bytes, passes); });
  free(memory);
  return rate * static_cast<double>(bytes) * 1e-9;
}

}  // namespace cpu
}  // namespace fastrnn
