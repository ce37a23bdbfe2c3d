// SPDX-License-Identifier: BSD-3-Clause
// Products of bfloat16 on the tiles of Intel's AMX: 16 rows by 16 lanes by 32 terms an instruction. Compiled with AMX,
// AVX-512 and AVX512_BF16, called only where CPUID has them and the system grants the tiles.
#include "amx.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../table_blocks.h"

namespace fastrnn {
namespace cpu {
namespace {

struct AmxBlocks : BlocksAvx512 {
  static constexpr int kEqualRows = kBlockRows;

  // Not a destructor: its clean-up would bring in a symbol that other objects share.
  void end() { _tile_release(); }

  // Tiles 0 to 3 hold the sums, 4 the rows of a, 5 to 7 in turn the weights: loads run ahead of the products.
  void multiply(const BlockArgs& t, int nv) {
    if (t.room != rows_) shape_tiles(rows_ = t.room);
    asm volatile("" ::: "memory");  // the intrinsics of GCC 12 do not say that they read memory
    if (t.rows > kBlockRows) {
      for (int v = 0; v < nv; v += 2) nv - v > 1 ? pair<2>(t, nv, v) : pair<1>(t, nv, v);
      return;
    }
    switch (nv) {
      case 1:
        return product<1>(t);
      case 2:
        return product<2>(t);
      case 3:
        return product<3>(t);
      default:
        return product<4>(t);
    }
  }

 private:
  template <int N>
  static __attribute__((noinline)) void product(const BlockArgs& t) {
    const int64_t init_row = t.init_row * 4, out_row = t.out_row * 4;
    _tile_loadd(0, t.init, init_row);
    if constexpr (N > 1) _tile_loadd(1, t.init + 16, init_row);
    if constexpr (N > 2) _tile_loadd(2, t.init + 32, init_row);
    if constexpr (N > 3) _tile_loadd(3, t.init + 48, init_row);
    for (const BlockTerms& terms : t.terms) {
      const Bfloat16* a = terms.a;
      const Bfloat16* w = terms.w;
      const Bfloat16* ahead = terms.ahead;
      const int64_t a_row = terms.a_row * 2, lines = terms.lines;
      for (int64_t k = terms.k; k > 0; k -= kBlockTerms, a += kBlockTerms, w += N * kBlock) {
        _tile_loadd(4, a, a_row);
        for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(ahead + line * 32, 0, 2);
        ahead += terms.ahead_row;
        _tile_loadd(5, w, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (N > 1) {
          _tile_loadd(6, w + kBlock, 64);
          _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (N > 2) {
          _tile_loadd(7, w + 2 * kBlock, 64);
          _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (N > 3) {
          _tile_loadd(5, w + 3 * kBlock, 64);
          _tile_dpbf16ps(3, 4, 5);
        }
      }
    }
    _tile_stored(0, t.out, out_row);
    if constexpr (N > 1) _tile_stored(1, t.out + 16, out_row);
    if constexpr (N > 2) _tile_stored(2, t.out + 32, out_row);
    if constexpr (N > 3) _tile_stored(3, t.out + 48, out_row);
    asm volatile("" ::: "memory");
  }

  // 32 rows by vectors v and, with N = 2, v + 1: half as many loads of weights. Tiles 0 to 3 hold the sums, 4 and 5 the
  // rows of a, 6 and 7 the weights.
  template <int N>
  static __attribute__((noinline)) void pair(const BlockArgs& t, int nv, int v) {
    const int64_t init_row = t.init_row * 4, out_row = t.out_row * 4;
    const float* init = t.init + v * kBlockLanes;
    _tile_loadd(0, init, init_row);
    _tile_loadd(2, init + kBlockRows * t.init_row, init_row);
    if constexpr (N > 1) {
      _tile_loadd(1, init + 16, init_row);
      _tile_loadd(3, init + kBlockRows * t.init_row + 16, init_row);
    }
    for (const BlockTerms& terms : t.terms) {
      const Bfloat16* a = terms.a;
      const Bfloat16* w = terms.w + v * kBlock;
      const Bfloat16* ahead = terms.ahead;
      const int64_t a_row = terms.a_row * 2, lower = kBlockRows * terms.a_row, lines = v == 0 ? terms.lines : 0;
      for (int64_t k = terms.k; k > 0; k -= kBlockTerms, a += kBlockTerms, w += nv * kBlock) {
        _tile_loadd(4, a, a_row);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(ahead + line * 32, 0, 2);
        ahead += terms.ahead_row;
        if constexpr (N > 1) {
          _tile_loadd(7, w + kBlock, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        _tile_loadd(5, a + lower, a_row);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* out = t.out + v * kBlockLanes;
    _tile_stored(0, out, out_row);
    _tile_stored(2, out + kBlockRows * t.out_row, out_row);
    if constexpr (N > 1) {
      _tile_stored(1, out + 16, out_row);
      _tile_stored(3, out + kBlockRows * t.out_row + 16, out_row);
    }
    asm volatile("" ::: "memory");
  }

  int rows_ = 0;  // of the tiles as they are set up; 0: not
};

}  // namespace

constinit const Kernels amx_bfloat16 = block_kernels<RoundedLanes, AmxBlocks>();

// Linux saves the tiles of a process only when it has asked for them (arch_prctl, ARCH_REQ_XCOMP_PERM).
bool amx_granted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace cpu
}  // namespace fastrnn
