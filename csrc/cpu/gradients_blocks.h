// SPDX-License-Identifier: BSD-3-Clause
// The large products after the backward sweeps in bfloat16, as gradients.h in float: x, h, the weights, the gradients
// of the gates and d_x are bfloat16; gradients of weights and biases are summed in float.
//
//   d_x = d_gates[input] * W_ih                         of both directions in one sum, which is rounded once
#pragma once
#include "blocks.h"
#include "weight_gradients.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V, class Blocks>
class BlockGradients : public WeightGradients<BlockGradients<Cell, V, Blocks>, Cell, V, Blocks, kBlockSumRows> {
  using Weights = WeightGradients<BlockGradients<Cell, V, Blocks>, Cell, V, Blocks, kBlockSumRows>;
  friend Weights;
  using typename Weights::Operand;
  using Weights::d_row_, Weights::elements, Weights::join, Weights::layer_, Weights::mask_rows_, Weights::share;
  using Weights::G, Weights::L, Weights::task_;
  static constexpr int64_t kRowBytes = 256 * 1024;                   // of gate gradients that all panels pass over
  static constexpr int64_t kStripRow = kBlockSumRows + kBlockTerms;  // not a power of two: one set of the cache
  static_assert(kStripColumns % kBlockRows == 0 && kBlockSumRows % kBlockTerms == 0);
  static_assert(kStripColumns * kStripRow <= kBlockStripElements);

 public:
  explicit BlockGradients(const GradientTask& task)
      : Weights(task, gate_gradients_row(Cell::kStored, task.layer->forward.H)) {}

  void end() { blocks_.end(); }

 private:
  // The threads pack together and share the rows.
  void input() {
    const Panels panels(layer_.I, L, 4);
    const int64_t k_size = G * layer_.H, panel_row = L * in_blocks(k_size), member = task_.team.member;
    const int64_t first = share(panels.count, member), last = share(panels.count, member + 1);
    for (int d = 0; d < layer_.D; ++d) {
      const Bfloat16* const w_ih = elements(layer_.direction[d].w_ih);
      pack_column_blocks<Blocks>(
          [&](int64_t k) {
            const int64_t gate = k / layer_.H;
            return w_ih + (Cell::input_gate(static_cast<int>(gate)) * layer_.H + (k - gate * layer_.H)) * layer_.I;
          },
          k_size, panels, first, last, elements(task_.w_ih[d]) + panels.first(first) * panel_row);
    }
    join();
    const int64_t begin = share(layer_.N, member), end = share(layer_.N, member + 1);
    const int64_t fit = kRowBytes / (d_row_ * 2) / kRowsAtOnce * kRowsAtOnce;
    const int64_t together = fit < 2 * kRowsAtOnce ? 2 * kRowsAtOnce : fit;
    BlockArgs args{};
    args.init = zeros_;
    for (int d = 0; d < layer_.D; ++d) {
      args.terms[d].k = k_size;
      args.terms[d].a_row = d_row_;
    }
    for (int64_t row = begin; row < end; row += together) {
      const int64_t stop = row + together < end ? row + together : end;
      args.room = static_cast<int>(end - begin < kBlockRows ? end - begin : kBlockRows);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int nv = static_cast<int>(panels.width(p));
        args.out_row = nv * L;
        args.out = buffer_;
        for (int64_t at = row; at < stop; at += kRowsAtOnce) {
          args.rows = static_cast<int>(stop - at < kRowsAtOnce ? stop - at : kRowsAtOnce);
          for (int d = 0; d < layer_.D; ++d) {
            BlockTerms& terms = args.terms[d];
            const Bfloat16* const packed = elements(task_.w_ih[d]);
            terms.a = elements(task_.d_gates[d]) + at * d_row_ + Cell::kInput * layer_.H;
            terms.w = packed + panels.first(p) * panel_row;
            const bool more = p + 1 < panels.count;
            fetch_ahead(terms, nv, more ? packed + panels.first(p + 1) * panel_row : nullptr, at - row, stop - row);
          }
          blocks_.multiply(args, nv);
          for (int j = 0; j < args.rows; ++j) {
            const int64_t place = task_.places ? task_.places[at + j] : at + j;
            store_columns(buffer_ + j * nv * L, layer_.I - panels.first(p) * L, nv,
                          elements(task_.layer->d_x) + place * layer_.I + panels.first(p) * L);
          }
        }
      }
    }
  }

  static void store_columns(const float* from, int64_t left, int nv, Bfloat16* to) {
    for (int64_t j = 0; j < nv * L && j < left; j += L) {
      Blocks::store(V::load(from + j), to + j, left - j < L ? static_cast<int>(left - j) : L);
    }
  }

  template <class Row>
  inline __attribute__((always_inline)) void pack(const Row& row, const Conversion*, int64_t rows,
                                                  const Operand& operand, int64_t first, int64_t last) const {
    pack_column_blocks<Blocks>([&](int64_t k) { return elements(row(k)); }, rows, operand.panels, first, last,
                               operand.packed + operand.panels.first(first) * L * in_blocks(rows));
  }

  // This thread's share of the packed h becomes what W_hh multiplied: h times the mask of its sequence, rounded.
  void mask_panels(const Operand& h, int64_t rows) const {
    const Panels& panels = h.panels;
    for (int64_t p = share(panels.count, task_.team.member); p < share(panels.count, task_.team.member + 1); ++p) {
      const int64_t width = panels.width(p);
      Bfloat16* const packed = h.packed + panels.first(p) * L * in_blocks(rows);
      for (int64_t k = 0; k < rows; k += 2) {
        Bfloat16* pairs = packed + k / kBlockTerms * width * kBlock + k % kBlockTerms * kBlockLanes;
        for (int64_t block = 0; block < width; ++block, pairs += kBlock) {
          const int64_t unit = (panels.first(p) + block) * L;
          const int lanes = panels.n - unit < L ? static_cast<int>(panels.n - unit) : L;
          const V even = load_lanes<V>(mask_rows_[k] + unit, lanes);
          const V odd = k + 1 < rows ? load_lanes<V>(mask_rows_[k + 1] + unit, lanes) : V::zero();
          Blocks::scale_pairs(even, odd, pairs);
        }
      }
    }
  }

  void strip(const Bfloat16* a, int64_t a_row, int64_t rows, int64_t columns) const {
    for (int64_t column = 0; column < columns; column += kBlockRows) {
      const int exist = columns - column < kBlockRows ? static_cast<int>(columns - column) : kBlockRows;
      pack_block_strip<Blocks>(a + column, a_row, rows, exist, elements(task_.strip) + column * kStripRow, kStripRow);
    }
  }

  void product(const Operand& operand, int64_t w_row, int64_t rows, int64_t size, bool start) {
    const Panels& panels = operand.panels;
    BlockArgs args{};
    BlockTerms& terms = args.terms[0];
    terms.k = rows;
    terms.a_row = kStripRow;
    args.room = kBlockRows;
    for (int64_t p = 0; p < panels.count; ++p) {
      const int nv = static_cast<int>(panels.width(p));
      const int64_t column = panels.first(p) * L, left = panels.n - column < nv * L ? panels.n - column : nv * L;
      terms.w = operand.packed + column * in_blocks(rows);
      terms.ahead = terms.w;
      for (int64_t row = 0; row < size; row += kRowsAtOnce) {
        args.rows = static_cast<int>(size - row < kRowsAtOnce ? size - row : kRowsAtOnce);
        const bool whole = left == nv * L && args.rows % kBlockRows == 0;
        float* const d_w = operand.d_w + (w_row + row) * panels.n + column;
        terms.a = elements(task_.strip) + row * kStripRow;
        args.out = whole ? d_w : buffer_;
        args.out_row = whole ? panels.n : nv * L;
        args.init = start ? zeros_ : args.out;
        args.init_row = start ? 0 : args.out_row;
        if (!whole && !start) {
          for (int j = 0; j < args.rows; ++j) load_row<V>(d_w + j * panels.n, left, 0, nv * L, buffer_ + j * nv * L);
        }
        blocks_.multiply(args, nv);
        if (!whole) {
          for (int j = 0; j < args.rows; ++j) store_row<V>(buffer_ + j * nv * L, left, 0, nv * L, d_w + j * panels.n);
        }
      }
    }
  }

  Blocks blocks_;
  alignas(64) float buffer_[kRowsAtOnce * 4 * kBlockLanes] = {};
  alignas(64) float zeros_[4 * kBlockLanes] = {};
};

template <class Cell, class V, class Blocks>
void gradient_blocks(const GradientTask& task) {
  BlockGradients<Cell, V, Blocks> products(task);
  products.run();
  products.end();
}

}  // namespace cpu
}  // namespace fastrnn
