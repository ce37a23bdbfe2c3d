// SPDX-License-Identifier: BSD-3-Clause
// The large products after the backward sweeps on the register tile: gradients of the input, of the weights and of the
// biases, from the gradients of the gates. All threads of the call work on each direction in turn. What belongs to
// which weights is known by weight_gradients.h.
//
//   d_x = d_gates[input] * W_ih                         rows of d_x shared out; sums over gates and units, one chain
#pragma once
#include "weight_gradients.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V>
class Gradients : public WeightGradients<Gradients<Cell, V>, Cell, V, SameElements<V>, kSumRows> {
  using Weights = WeightGradients<Gradients<Cell, V>, Cell, V, SameElements<V>, kSumRows>;
  friend Weights;
  using typename Weights::Operand;
  using typename Weights::Scalar;
  using Weights::d_row_, Weights::join, Weights::layer_, Weights::mask_rows_, Weights::r_, Weights::share;
  using Weights::G, Weights::L, Weights::in, Weights::out, Weights::task_;
  static constexpr int kTileRows = Tiles<V>::kRows4;
  static constexpr int64_t kVectorBytes = L * sizeof(Scalar);
  static constexpr int64_t kPass = pass_terms<V>(kShortChain);  // of input_by_rows
  static constexpr int64_t kStripTile = kTileRows * kSumRows + kOverread;
  static_assert((kStripColumns + kTileRows - 1) / kTileRows * kStripTile <= kStripElements);
  static constexpr int64_t kMovedPass = 8 * kPass;
  // The rows of x or h of a short call stay in a second-level cache while d_w is written row by row from one end to the
  // other. Panel after panel, every row of a tile would be on another page, and what is written would be asked for too
  // late. One step backward, Ice Lake: LSTM, H = 1024, B = 3, 32, 64, 128 1.42, 1.22, 1.09, 1.03 times as fast; H =
  // 512, B = 8, 64 1.15, 1.05.
  static constexpr int64_t kKeptBytes = 512 * 1024;
  static_assert(kSumRows % kShortChain == 0);

 public:
  explicit Gradients(const GradientTask& task) : Weights(task, Cell::kStored * task.layer->forward.H) {}

 private:
  // Both directions in turn; direction 1 adds to what direction 0 left. Few rows: threads share the columns, and pack a
  // panel when they use it, each in the place of the one before; many rows: they pack together and share the rows.
  void input() {
    if constexpr (kHasParts<V>) {
      if (task_.input_parts) return input_by_parts(*task_.input_parts);
    }
    const Panels panels(layer_.I, L, 4);
    const int64_t k_size = G * layer_.H, member = task_.team.member;
    const int64_t block = input_block_rows(k_size, sizeof(Scalar));
    const int64_t first = share(panels.count, member), last = share(panels.count, member + 1);
    if (layer_.N <= block && !task_.places && k_size * layer_.I * static_cast<int64_t>(sizeof(Scalar)) >= kLargeBytes) {
      return input_by_rows(panels, first, last);
    }
    if (layer_.N <= block) {
      for (int64_t p = first; p < last; ++p) {
        for (int d = 0; d < layer_.D; ++d) {
          Scalar* place = out(task_.w_ih[d]) + panels.first(first) * L * k_size;
          pack_panels(d, panels, p, p + 1, place);
          input_panel(d, panels, p, place, 0, layer_.N, nullptr);
        }
        if (layer_.conversion) narrow_input(0, layer_.N, panels.first(p) * L, panels.first(p + 1) * L);
      }
      return;
    }
    for (int d = 0; d < layer_.D; ++d) {
      pack_panels(d, panels, first, last, out(task_.w_ih[d]) + panels.first(first) * L * k_size);
    }
    join();
    const int64_t begin = share(layer_.N, member), end = share(layer_.N, member + 1);
    for (int64_t row = begin, stop; row < end; row = stop) {
      stop = row + block < end ? row + block : end;
      for (int64_t p = 0; p < panels.count; ++p) {
        for (int d = 0; d < layer_.D; ++d) {
          const Scalar* packed = in(task_.w_ih[d]);
          const bool more = layer_.D == 1 && p + 1 < panels.count;  // the tile fetches what follows into the cache
          input_panel(d, panels, p, packed + panels.first(p) * L * k_size, row, stop,
                      more ? packed + panels.first(p + 1) * L * k_size : nullptr);
        }
      }
      if (layer_.conversion) narrow_input(row, stop, 0, layer_.I);
    }
  }

  // Few rows and a large W_ih, whose rows are read from one end to the other: as many of them as make a pass are packed
  // for all panels of this thread, each pass in the place of the one before. Panel after panel, every row would be on
  // another page. One step backward, Ice Lake: LSTM, H = 1024, B = 3 1.30 times as fast, H = 512, B = 1, 3, 32 1.19,
  // 1.16, 1.08; RNN, H = 1024, B = 8 1.06.
  void input_by_rows(const Panels& panels, int64_t first, int64_t last) {
    const int64_t k_size = G * layer_.H;
    for (int d = 0; d < layer_.D; ++d) {
      Scalar* const place = out(task_.w_ih[d]) + panels.first(first) * L * k_size;
      for (int64_t k0 = 0, k1; k0 < k_size; k0 = k1) {
        k1 = k0 + next_pass(kPass, k_size - k0);
        pack_columns<V>([&](int64_t k) { return w_ih_row(d, k0 + k); }, layer_.conversion, k1 - k0, panels, first, last,
                        place, true);
        for (int64_t p = first; p < last; ++p) {
          const Scalar* const packed = place + (panels.first(p) - panels.first(first)) * L * (k1 - k0);
          input_block(d, panels, p, packed, 0, layer_.N, k0, k1, nullptr);
        }
      }
    }
    if (layer_.conversion) narrow_input(0, layer_.N, panels.first(first) * L, panels.first(last) * L);
  }

  // Columns [column, end) of rows [row, stop) of d_x, which wait in wide_d_x, go to their places.
  void narrow_input(int64_t row, int64_t stop, int64_t column, int64_t end) const {
    if constexpr (sizeof(Scalar) == 4) {
      const int64_t I = layer_.I;
      if (end > I) end = I;
      auto* const d_x = static_cast<uint16_t*>(task_.layer->d_x);
      for (int64_t n = row; n < stop; ++n) {
        layer_.conversion->narrow(in(task_.wide_d_x) + (n - row) * I + column,
                                  d_x + (task_.places ? task_.places[n] : n) * I + column, end - column);
      }
    }
  }

  // Column panels [p0, p1) of W_ih, one behind the other; its rows in the order of the stored gradients.
  void pack_panels(int d, const Panels& panels, int64_t p0, int64_t p1, Scalar* packed) const {
    pack_columns<V>([&](int64_t k) { return w_ih_row(d, k); }, layer_.conversion, G * layer_.H, panels, p0, p1, packed);
  }

  // The row of W_ih that stored gradient k belongs to.
  const void* w_ih_row(int d, int64_t k) const {
    const int64_t gate = k / layer_.H;
    const int64_t row = Cell::input_gate(static_cast<int>(gate)) * layer_.H + (k - gate * layer_.H);
    return Given<Scalar>{layer_.direction[d].w_ih, layer_.conversion}.at(row * layer_.I);
  }

  // Rows [0, k_size) by row(k) -> column panels [first, last) as right operands in parts.
  template <class Row>
  inline __attribute__((always_inline)) static void pack_column_parts(const PartProducts& parts, const Row& row,
                                                                      int64_t k_size, const Panels& panels,
                                                                      int64_t first, int64_t last, Bfloat16* to) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t column = panels.first(p) * L, stop = panels.first(p + 1) * L;
      for (int64_t k = 0; k < k_size; k += 32, to += part_panel(32, panels.width(p))) {
        const Scalar* rows[32];
        const int64_t terms = k_size - k < 32 ? k_size - k : 32;
        for (int64_t j = 0; j < terms; ++j) rows[j] = in(row(k + j));
        parts.pack_columns(rows, terms, column, stop < panels.n ? stop : panels.n, to);
      }
    }
  }

  // d_x in parts. Many rows: the threads pack together and share the rows; of these some at a time, chain by chain, so
  // that what all panels read stays in the cache. Few rows: threads share the columns, and pack a chain of a panel when
  // they use it, each in the place of the one before.
  void input_by_parts(const PartProducts& parts) {
    const Panels panels(layer_.I, L, 4);
    const int64_t k_size = G * layer_.H, member = task_.team.member;
    const int64_t first = share(panels.count, member), last = share(panels.count, member + 1);
    const auto place = [&](int d, int64_t p) {
      return static_cast<Bfloat16*>(task_.w_ih[d]) + part_panel(k_size, panels.first(p));
    };
    if (layer_.N <= kPartInputRows) {
      parts.begin();
      for (int d = 0; d < layer_.D && first < last; ++d) {
        for (int64_t k = 0; k < k_size; k += kPartChain) {
          add_chain(parts, d, k, 0, layer_.N, panels, first, last, [&](int64_t p) {
            pack_column_parts(
                parts, [&](int64_t j) { return w_ih_row(d, k + j); }, chain_terms(k), panels, p, p + 1,
                place(d, first));
            return place(d, first);
          });
        }
      }
      parts.end();
      return;
    }
    for (int d = 0; d < layer_.D; ++d) {
      pack_column_parts(parts, [&](int64_t k) { return w_ih_row(d, k); }, k_size, panels, first, last, place(d, first));
    }
    join();
    parts.begin();
    const int64_t end = share(layer_.N, member + 1);
    for (int64_t row = share(layer_.N, member), stop; row < end; row = stop) {
      stop = end - row < kPartInputRows ? end : row + kPartInputRows;
      for (int d = 0; d < layer_.D; ++d) {
        for (int64_t k = 0; k < k_size; k += kPartChain) {
          add_chain(parts, d, k, row, stop, panels, 0, panels.count,
                    [&](int64_t p) { return place(d, p) + part_panel(k, panels.width(p)); });
        }
      }
    }
    parts.end();
  }

  // Terms of the chain of d_x that begins with term k.
  int64_t chain_terms(int64_t k) const { return G * layer_.H - k < kPartChain ? G * layer_.H - k : kPartChain; }

  // Rows [row, stop) of d_x (+)= one chain of terms, from k on, in panels [first, last); weights(p): where those of one
  // panel lie.
  template <class Weights>
  void add_chain(const PartProducts& parts, int d, int64_t k, int64_t row, int64_t stop, const Panels& panels,
                 int64_t first, int64_t last, const Weights& weights) const {
    const int64_t I = layer_.I, terms = chain_terms(k);
    const bool adds = d > 0 || k > 0;
    Bfloat16* const rows = static_cast<Bfloat16*>(task_.d_gates_parts);
    parts.pack_rows(in(task_.d_gates[d]) + row * d_row_ + Cell::kInput * layer_.H + k, d_row_, stop - row, terms, rows);
    alignas(64) Scalar placed[kPartRows * 4 * L];
    PartArgs args{};
    args.blocks = (terms + 31) / 32;
    args.a_row = part_row(terms);
    args.out_row = args.init_row = task_.places ? 4 * L : I;
    for (int64_t p = first; p < last; ++p) {
      const int64_t column = panels.first(p) * L, width = panels.width(p), left = I - column;
      args.w = weights(p);
      args.columns = static_cast<int>(left < width * L ? left : width * L);
      for (int64_t m = row; m < stop; m += kPartRows) {
        args.rows = static_cast<int>(stop - m < kPartRows ? stop - m : kPartRows);
        args.a = rows + (m - row) * args.a_row;
        args.out = task_.places ? placed : out(task_.layer->d_x) + m * I + column;
        args.init = adds ? args.out : nullptr;
        for (int j = 0; adds && task_.places && j < args.rows; ++j) {
          load_row<V>(input_row(m + j) + column, args.columns, 0, args.columns, placed + j * 4 * L);
        }
        parts.multiply(args);
        for (int j = 0; task_.places && j < args.rows; ++j) {
          store_row<V>(placed + j * 4 * L, args.columns, 0, args.columns, input_row(m + j) + column);
        }
      }
    }
  }

  // The row of d_x that row n of d_gates belongs to.
  Scalar* input_row(int64_t n) const { return out(task_.layer->d_x) + task_.places[n] * layer_.I; }

  // Rows [row, end) of d_x in the columns of one panel, in passes; long ones where each moves the sums to and fro.
  void input_panel(int d, const Panels& panels, int64_t p, const Scalar* packed, int64_t row, int64_t end,
                   const Scalar* following) {
    const int64_t k_size = G * layer_.H, step = panels.width(p) * L;
    const bool moves = task_.places || panels.first(p + 1) * L > layer_.I;
    for (int64_t k = 0, stop; k < k_size; k = stop) {
      stop = k + next_pass(moves ? kMovedPass : pass_, k_size - k);
      input_block(d, panels, p, packed + k * step, row, end, k, stop, stop < k_size ? packed + stop * step : following);
    }
  }

  void input_block(int d, const Panels& panels, int64_t p, const Scalar* packed, int64_t row, int64_t end, int64_t k0,
                   int64_t k1, const Scalar* next) {
    const int64_t I = layer_.I, column = panels.first(p) * L;
    const int nv = static_cast<int>(panels.width(p));
    const bool placed = task_.places && !layer_.conversion;
    const bool whole = !placed && column + nv * L <= I, start = d == 0 && k0 == 0;
    // The first of the rows.
    Scalar* const rows = layer_.conversion ? out(task_.wide_d_x) : out(task_.layer->d_x) + row * I;
    TileArgs<Scalar> args{};
    args.k = k1 - k0;
    args.chain = kShortChain;
    args.a_row = d_row_;
    args.a_step = 1;
    args.w = packed;
    args.w_panel = 0;
    args.init_row = args.out_row = whole ? I : nv * L;
    const RowTiles tiles(end - row, Tiles<V>::rows(nv));
    const Ahead ahead(tiles.tiles, k1 - k0, nv * kVectorBytes);
    for (int64_t q = 0; q < tiles.tiles; ++q) {
      const int64_t first = row + tiles.first(q);
      const int m = static_cast<int>(row + tiles.first(q + 1) - first);
      Scalar* const d_x = rows + (first - row) * I + column;
      const auto place = [&](int j) { return placed ? input_row(first + j) + column : d_x + j * I; };
      args.a = in(task_.d_gates[d]) + first * d_row_ + Cell::kInput * layer_.H + k0;
      if (whole && !start) {
        for (int j = 0; j < m; ++j) fetch(d_x + j * I, nv * L);
      }
      ahead.set(args, q, next);
      args.out = whole ? d_x : buffer_;
      args.init = start ? nullptr : args.out;
      if (!whole && !start) {
        for (int j = 0; j < m; ++j) load_row<V>(place(j), I - column, 0, nv * L, buffer_ + j * nv * L);
      }
      Tiles<V>::get(m, nv, 1)(args);
      if (!whole) {
        for (int j = 0; j < m; ++j) store_row<V>(buffer_ + j * nv * L, I - column, 0, nv * L, place(j));
      }
    }
  }

  template <class Row>
  inline __attribute__((always_inline)) void pack(const Row& row, const Conversion* conversion, int64_t rows,
                                                  const Operand& operand, int64_t first, int64_t last) const {
    if constexpr (kHasParts<V>) {
      if (task_.weight_parts) {
        Bfloat16* const packed = reinterpret_cast<Bfloat16*>(operand.packed);
        return pack_column_parts(*task_.weight_parts, row, rows, operand.panels, first, last,
                                 packed + part_panel(rows, operand.panels.first(first)));
      }
    }
    pack_columns<V>(row, conversion, rows, operand.panels, first, last,
                    operand.packed + operand.panels.first(first) * L * rows);
  }

  // This thread's share of the packed h becomes what W_hh multiplied: h times the mask of its sequence.
  void mask_panels(const Operand& h, int64_t rows) {
    const Panels& panels = h.panels;
    for (int64_t p = share(panels.count, task_.team.member); p < share(panels.count, task_.team.member + 1); ++p) {
      const int nv = static_cast<int>(panels.width(p));
      Scalar* packed = h.packed + panels.first(p) * L * rows;
      for (int64_t k = 0; k < rows; ++k) {
        for (int v = 0; v < nv; ++v, packed += L) {
          const int64_t unit = (panels.first(p) + v) * L;
          const int lanes = r_ - unit < L ? static_cast<int>(r_ - unit) : L;
          (V::load(packed) * load_lanes<V>(mask_rows_[k] + unit, lanes)).store(packed);
        }
      }
    }
  }

  void strip(const Scalar* a, int64_t a_row, int64_t rows, int64_t columns) const {
    if constexpr (kHasParts<V>) {
      if (task_.weight_parts) {
        return task_.weight_parts->pack_turned(a, a_row, rows, columns, static_cast<Bfloat16*>(task_.strip));
      }
    }
    pack_strip<kTileRows>(a, a_row, rows, columns, kStripTile, out(task_.strip));
  }

  void product(const Operand& operand, int64_t w_row, int64_t rows, int64_t size, bool start) {
    if constexpr (kHasParts<V>) {
      if (task_.weight_parts) return product_by_parts(*task_.weight_parts, operand, w_row, rows, size, start);
    }
    const Panels& panels = operand.panels;
    TileArgs<Scalar> args{};
    args.k = rows;
    args.chain = kShortChain;
    args.a_row = 1;
    args.a_step = kTileRows;
    if (rows == layer_.N && rows * panels.n * static_cast<int64_t>(sizeof(Scalar)) <= kKeptBytes) {
      for (int64_t row = 0; row < size; row += kTileRows) {
        for (int64_t p = 0; p < panels.count; ++p) product_tile(args, operand, w_row, row, size, p, start);
      }
      return;
    }
    for (int64_t p = 0; p < panels.count; ++p) {
      const Ahead ahead((size + kTileRows - 1) / kTileRows, rows, panels.width(p) * kVectorBytes);
      for (int64_t row = 0, q = 0; row < size; row += kTileRows, ++q) {
        ahead.set(args, q, p + 1 < panels.count ? operand.packed + panels.first(p + 1) * L * rows : nullptr);
        product_tile(args, operand, w_row, row, size, p, start);
      }
    }
  }

  // Rows of d_w from w_row + row on, as many as a tile takes of the `size` of the strip, in the columns of panel p.
  FASTRNN_INLINE void product_tile(TileArgs<Scalar>& args, const Operand& operand, int64_t w_row, int64_t row,
                                   int64_t size, int64_t p, bool start) {
    const Panels& panels = operand.panels;
    const int nv = static_cast<int>(panels.width(p));
    const int m = size - row < kTileRows ? static_cast<int>(size - row) : kTileRows;
    const int64_t column = panels.first(p) * L;
    const int64_t left = panels.n - column < nv * L ? panels.n - column : nv * L;
    const bool whole = left == nv * L;
    Scalar* const d_w = operand.d_w + (w_row + row) * panels.n + column;
    args.a = in(task_.strip) + row / kTileRows * kStripTile;
    args.w = operand.packed + column * args.k;
    args.init_row = args.out_row = whole ? panels.n : nv * L;
    args.out = whole ? d_w : buffer_;
    args.init = start ? nullptr : args.out;
    for (int j = 0; whole && j < m; ++j) fetch(d_w + j * panels.n, nv * L);
    for (int j = 0; !whole && !start && j < m; ++j) {
      load_row<V>(d_w + j * panels.n, left, 0, nv * L, buffer_ + j * nv * L);
    }
    Tiles<V>::get(m, nv, 1)(args);
    for (int j = 0; !whole && j < m; ++j) store_row<V>(buffer_ + j * nv * L, left, 0, nv * L, d_w + j * panels.n);
  }

  void product_by_parts(const PartProducts& parts, const Operand& operand, int64_t w_row, int64_t rows, int64_t size,
                        bool start) const {
    const Panels& panels = operand.panels;
    PartArgs args{};
    args.blocks = (rows + 31) / 32;
    args.a_row = part_row(rows);
    args.init_row = args.out_row = panels.n;
    parts.begin();
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t column = panels.first(p) * L, left = panels.n - column;
      args.w = reinterpret_cast<const Bfloat16*>(operand.packed) + part_panel(rows, panels.first(p));
      args.columns = static_cast<int>(left < panels.width(p) * L ? left : panels.width(p) * L);
      for (int64_t row = 0; row < size; row += kPartRows) {
        args.rows = static_cast<int>(size - row < kPartRows ? size - row : kPartRows);
        args.a = static_cast<const Bfloat16*>(task_.strip) + row * args.a_row;
        args.out = operand.d_w + (w_row + row) * panels.n + column;
        args.init = start ? nullptr : args.out;
        parts.multiply(args);
      }
    }
    parts.end();
  }

  const int64_t pass_ = pass_terms<V>(kShortChain, core.backward_pass);  // terms of d_x per pass over a panel
  alignas(64) Scalar buffer_[Tiles<V>::kMostRows * 4 * L];
};

template <class Cell, class V>
void gradients(const GradientTask& task) {
  Gradients<Cell, V>(task).run();
}

}  // namespace cpu
}  // namespace fastrnn
