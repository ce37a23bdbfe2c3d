// SPDX-License-Identifier: BSD-3-Clause
// Weights and rows laid out as the register tile reads them: panels [k][vectors][lanes], read once from front to back.
// Called by the sweeps, by the threads of a team for their share of the panels.
#pragma once
#include <stdint.h>

#include "elements.h"
#include "kernels.h"
#include "layer.h"
#include "parts.h"
#include "unroll.h"

namespace fastrnn {
namespace cpu {

namespace {  // compiled once per instruction set: nothing that is not a template on V may be shared

// n units in blocks of `lanes`, the blocks in panels of nearly equal width, at most `most` blocks each. The sweeps ask
// for panels at every step: where all are alike, as they are forward in a cell of three or four gates, they do not wait
// for a division.
struct Panels {
  int64_t n, lanes, blocks, count;
  Panels(int64_t units, int64_t lanes_, int64_t most)
      : n(units), lanes(lanes_), blocks((units + lanes_ - 1) / lanes_), count((blocks + most - 1) / most) {
    alike_ = count && blocks % count == 0 ? blocks / count : 0;
  }
  int64_t first(int64_t panel) const { return alike_ ? panel * alike_ : panel * blocks / count; }
  int64_t width(int64_t panel) const { return alike_ ? alike_ : first(panel + 1) - first(panel); }

 private:
  int64_t alike_;  // the width of every panel; 0: they differ
};

}  // namespace

// Whether this lane class turns over half a cache line of every row at a time, beside the few columns of V::columns.
template <class V>
constexpr bool kHasHalfLines = requires(const typename V::Scalar* from, V* column) { V::half_lines(from, 0, column); };

// Whether this lane class turns over elements of 16 bits and makes them its own.
template <class V>
constexpr bool kTurnsWidening = requires { V::kWidenedColumns; };

// `rows` rows of k_size columns, from_row apart -> [k][lanes], `step` apart, zero past the last row.
template <class V>
inline __attribute__((always_inline)) void turn_over(const typename V::Scalar* from, int64_t from_row, int64_t rows,
                                                     int64_t k_size, typename V::Scalar* to, int64_t step) {
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes, C = V::kColumns;
  const auto store = [&](const V* column, int64_t first, int n) __attribute__((always_inline)) {
    for (int c = 0; c < n; ++c) column[c].store(to + (first + c) * step);
  };
  int64_t k = 0;
  if constexpr (kHasHalfLines<V>) {
    for (; rows == L && k + V::kHalfLine <= k_size; k += V::kHalfLine) {
      V column[V::kHalfLine];
      V::half_lines(from + k, from_row, column);
      store(column, k, V::kHalfLine);
    }
  }
  Scalar whole[L * C]{};  // the last units and rows of zero
  for (; k + C <= k_size; k += C) {
    for (int64_t lane = 0; rows < L && lane < rows; ++lane) {
      __builtin_memcpy(whole + lane * C, from + lane * from_row + k, C * sizeof(Scalar));
    }
    V column[C];
    V::columns(rows < L ? whole : from + k, rows < L ? C : from_row, column);
    store(column, k, C);
  }
  for (int64_t lane = 0; lane < L; ++lane) {
    for (int64_t rest = k; rest < k_size; ++rest) {
      to[rest * step + lane] = lane < rows ? from[lane * from_row + rest] : Scalar(0);
    }
  }
}

// `rows` rows of k columns, a multiple of V::kColumns, from_row apart -> [k][height], zero past the last row; up to
// V::kLanes elements past the end are written, too.
template <class V>
void turn_rows(const typename V::Scalar* from, int64_t from_row, int64_t rows, int64_t k, typename V::Scalar* to,
               int64_t height) {
  constexpr int L = V::kLanes;
  // Whole vectors: each column is overrun by the one before, and the upper rows by the lower ones.
  for (int64_t first = (height - 1) / L * L; first >= 0; first -= L) {
    const int64_t left = rows - first;
    turn_over<V>(from + first * from_row, from_row, left < L ? left : L, k, to + first, height);
  }
}

// The same of elements of 16 bits, from_row = k_size.
template <class V>
inline __attribute__((always_inline)) void turn_over(const uint16_t* from, const Conversion& conversion, int64_t rows,
                                                     int64_t k_size, typename V::Scalar* to, int64_t step) {
  int64_t k = 0;
  if constexpr (kTurnsWidening<V>) {
    const auto turn = [&](const auto* elements) __attribute__((always_inline)) {
      for (; rows == V::kLanes && k + V::kWidenedColumns <= k_size; k += V::kWidenedColumns) {
        V::widened_columns(elements + k, k_size, [&](auto c, V column) __attribute__((always_inline)) {
          column.store(to + (k + c.value) * step);
        });
      }
    };
    if (conversion.is_half) {
      turn(reinterpret_cast<const Float16*>(from));
    } else {
      turn(reinterpret_cast<const Bfloat16*>(from));
    }
  }
  constexpr int64_t kPiece = 128;  // with sixteen rows 8 KB: in the first-level cache
  alignas(64) float piece[V::kLanes * kPiece];
  for (; k < k_size; k += kPiece) {
    const int64_t n = k_size - k < kPiece ? k_size - k : kPiece;
    for (int64_t lane = 0; lane < rows; ++lane) conversion.widen(from + lane * k_size + k, piece + lane * kPiece, n);
    turn_over<V>(piece, kPiece, rows, n, to + k * step, step);
  }
}

// w [G*H, K], a row per gate and unit -> for each panel of [p0, p1), one behind the other, [k][block][gate][lanes],
// zero past H.
template <class V, int G>
void pack_gates(const Given<typename V::Scalar>& w, int64_t k_size, const Panels& panels, int64_t p0, int64_t p1,
                typename V::Scalar* packed) {
  using Scalar = typename V::Scalar;
  constexpr int L = V::kLanes;
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t width = panels.width(p), step = width * G * L;
    Scalar* panel = packed + (panels.first(p) - panels.first(p0)) * G * L * k_size;
    for (int64_t block = 0; block < width; ++block) {
      for (int g = 0; g < G; ++g) {
        const int64_t unit = (panels.first(p) + block) * L;
        const void* from = w.at((g * panels.n + unit) * k_size);
        Scalar* to = panel + (block * G + g) * L;
        const int64_t rows = panels.n - unit < L ? panels.n - unit : L;
        if constexpr (sizeof(Scalar) == 4) {
          if (w.conversion) {
            turn_over<V>(static_cast<const uint16_t*>(from), *w.conversion, rows, k_size, to, step);
            continue;
          }
        }
        turn_over<V>(static_cast<const Scalar*>(from), k_size, rows, k_size, to, step);
      }
    }
  }
}

// Whether this lane class works beside products in parts, which have 16 lanes of float.
template <class V>
constexpr bool kHasParts = V::kLanes == 16 && sizeof(typename V::Scalar) == 4;

// As pack_gates, but `packed` is where the first of all panels begins.
template <int G>
inline __attribute__((always_inline)) void pack_gate_parts(const PartProducts& parts, const float* w, int64_t k_size,
                                                           const Panels& panels, int64_t p0, int64_t p1, void* packed) {
  for (int64_t p = p0; p < p1; ++p) {
    parts.pack_gates(w, k_size, panels.n, panels.first(p) * panels.lanes, panels.width(p), G,
                     static_cast<Bfloat16*>(packed) + part_panel(k_size, panels.first(p) * G));
  }
}

// Unit blocks side by side in one panel of the forward sweep: a cell of one or two gates has room for more units.
template <class Cell>
constexpr int kForwardPanel = Cell::kGates <= 2 ? 4 / Cell::kGates : 1;

// b [G*H] or null -> [block][gate][lanes], zero past H.
template <class V, int G>
void pack_bias(const typename V::Scalar* b, const Panels& panels, int64_t p0, int64_t p1, typename V::Scalar* packed) {
  constexpr int L = V::kLanes;
  for (int64_t block = panels.first(p0); block < panels.first(p1); ++block) {
    for (int g = 0; g < G; ++g) {
      for (int64_t lane = 0; lane < L; ++lane) {
        const int64_t unit = block * L + lane;
        packed[(block * G + g) * L + lane] = b && unit < panels.n ? b[g * panels.n + unit] : typename V::Scalar(0);
      }
    }
  }
}

// All the weights of one direction as the forward sweep reads them, for calls that find them packed.
template <class Cell, class V>
void pack_direction(const LayerForward& layer, int d, const PackedWeights& packed) {
  using Scalar = typename V::Scalar;
  constexpr int G = Cell::kGates;
  const auto in = [](const void* p) { return static_cast<const Scalar*>(p); };
  const auto out = [](void* p) { return static_cast<Scalar*>(p); };
  const auto given = [&](const void* p) { return Given<Scalar>{p, layer.conversion}; };
  const DirectionForward& direction = layer.direction[d];
  const Panels units(layer.H, V::kLanes, kForwardPanel<Cell>);
  if constexpr (kHasParts<V>) {
    if (packed.parts)
      pack_gate_parts<G>(*packed.parts, in(direction.w_ih), layer.I, units, 0, units.count, packed.w_ih);
  }
  if (!packed.parts) pack_gates<V, G>(given(direction.w_ih), layer.I, units, 0, units.count, out(packed.w_ih));
  pack_gates<V, G>(given(direction.w_hh), layer.P ? layer.P : layer.H, units, 0, units.count, out(packed.w_hh));
  pack_bias<V, G>(in(direction.b_ih), units, 0, units.count, out(packed.b_ih));
  pack_bias<V, G>(in(direction.b_hh), units, 0, units.count, out(packed.b_hh));
  if (layer.P) {
    const Panels panels(layer.P, V::kLanes, 4);
    pack_gates<V, 1>(given(direction.w_hr), layer.H, panels, 0, panels.count, out(packed.w_hr));
  }
}

// A matrix from here on is read from one end to the other, not panel after panel.
constexpr int64_t kLargeBytes = 1024 * 1024;

// Rows row(0), ..., row(k_size - 1) of panels.n columns, void pointers, of elements of 16 bits if `conversion` is given
// -> for each panel of [p0, p1), one behind the other, [k][block][lanes], zero past the last column. No transpose: a
// panel is a strip of columns. Rows of a large matrix, which comes from the third-level cache or from memory, are asked
// for some rows ahead, since a row of a panel is too short for the hardware's own prefetching (with core.asks_rows
// others of kAskedRow bytes, too), and go to all panels some at a time, since every row is on another page (Ice Lake:
// two steps backward, B = 2, 4, of 512 and 1024 units 1.06 to 1.15 times as fast as panel after panel).
template <class V, class Row>
inline __attribute__((always_inline)) void pack_columns(const Row& row, const Conversion* conversion, int64_t k_size,
                                                        const Panels& panels, int64_t p0, int64_t p1,
                                                        typename V::Scalar* packed, bool part_of_large = false) {
  constexpr int L = V::kLanes;
  constexpr int64_t kSize = sizeof(typename V::Scalar), kRowsAhead = 12, kRowsAtOnce = 64, kAskedRow = 512;
  const bool large = part_of_large || k_size * panels.n * kSize >= kLargeBytes;
  const bool asks = large || (core.asks_rows && panels.n * kSize >= kAskedRow);
  const int64_t together = large ? kRowsAtOnce : k_size;
  for (int64_t k0 = 0; k0 < k_size; k0 += together) {
    const int64_t k1 = k_size - k0 < together ? k_size : k0 + together;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t width = panels.width(p), column = panels.first(p) * L;
      const int64_t rest = panels.n - column < width * L ? panels.n - column : width * L;
      typename V::Scalar* to = packed + (column - panels.first(p0) * L) * k_size + k0 * width * L;
      for (int64_t k = k0; k < k1; ++k, to += width * L) {
        if constexpr (sizeof(typename V::Scalar) == 4) {
          if (conversion) {
            conversion->widen(static_cast<const uint16_t*>(row(k)) + column, to, rest);
            for (int64_t j = rest; j < width * L; ++j) to[j] = 0;
            continue;
          }
        }
        const typename V::Scalar* from = static_cast<const typename V::Scalar*>(row(k)) + column;
        if (asks && k + kRowsAhead < k_size) {
          const auto* const next = static_cast<const typename V::Scalar*>(row(k + kRowsAhead)) + column;
          for (int64_t j = 0; j < rest; j += 64 / kSize) __builtin_prefetch(next + j, 0, 3);
        }
        int64_t j = 0;
        for (; j + L <= rest; j += L) V::load(from + j).store(to + j);
        if (j < rest) V::load_partial(from + j, static_cast<int>(rest - j)).store(to + j);
      }
    }
  }
}

// Columns [0, columns) of a [rows, a_row] -> tiles of `m` columns, tile after tile [row][m], `strip_tile` elements
// apart. Whole powers of two of bytes are copied: what runs over is overwritten by the next row, or lies in the slack
// behind the tile; as much is read past the last column. Eight rows of a tile at a time: with all tiles of one row in
// turn every copy would go to another page (LSTM of 128 to 512 units, Ice Lake: the backward takes 1 % longer).
template <int m, class Scalar>
void pack_strip(const Scalar* a, int64_t a_row, int64_t rows, int64_t columns, int64_t strip_tile, Scalar* strip) {
  constexpr int64_t kRowsAtOnce = 8;
  constexpr size_t kSize = m * sizeof(Scalar), kCopied = kSize <= 16 ? 16 : kSize <= 32 ? 32 : 64;
  static_assert(kSize <= kCopied && kCopied / sizeof(Scalar) <= kOverread);
  for (int64_t first = 0; first < rows; first += kRowsAtOnce, a += kRowsAtOnce * a_row, strip += kRowsAtOnce * m) {
    const int64_t n = rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce;
    Scalar* to = strip;
    for (int64_t column = 0; column < columns; column += m, to += strip_tile) {
      for (int64_t row = 0; row < n; ++row) __builtin_memcpy(to + row * m, a + row * a_row + column, kCopied);
    }
  }
}

}  // namespace cpu
}  // namespace fastrnn
