// SPDX-License-Identifier: BSD-3-Clause
// The set-up of Intel's AMX tiles. Included by the files compiled with AMX.
#pragma once
#include "bfloat16.h"

namespace fastrnn {
namespace cpu {
namespace {

struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 4, sums and the left operand, have `rows` rows; the right operand always 16, of pairs of terms.
__attribute__((noinline)) void shape_tiles(int rows) {
  alignas(64) TileShapes shapes{};
  shapes.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = 64;
    shapes.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : 16);
  }
  asm volatile("" ::: "memory");
  _tile_loadconfig(&shapes);
}

}  // namespace
}  // namespace cpu
}  // namespace fastrnn
