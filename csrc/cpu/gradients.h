// SPDX-License-Identifier: BSD-3-Clause
// The large products after the backward sweeps: gradients of the input, of the weights and of the biases, from the
// gradients of the gates. All threads of the call work on each direction in turn.
//
//   d_x = d_gates[input] * W_ih                         rows of d_x shared out; sums over gates and units, one chain
//   d_w_ih = d_gates[input]^T * x                       rows of d_w shared out, never the sum over T*B
//   d_w_hh = d_gates[recurrent]^T * (h one step before)
//   d_w_hr = d_h^T * (o * tanh(c))
#pragma once
#include "kernels.h"
#include "matmul.h"
#include "rows.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V>
class Gradients {
  using Scalar = typename V::Scalar;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  static constexpr int kTileRows = Tiles<V>::kRows4;
  static constexpr int64_t kBlockBytes = 256 * 1024;  // of gate gradients and of a panel: half of a small L2 together
  static constexpr int64_t kPass = 1024;              // terms of d_x per pass over a panel
  static constexpr int64_t kStripTile = kTileRows * kSumRows + 16;
  static_assert((kStripColumns + kTileRows - 1) / kTileRows * kStripTile <= kStripElements);
  static_assert(kSumRows % kShortChain == 0 && kPass % kShortChain == 0 && L <= kOverread);

 public:
  explicit Gradients(const GradientTask& task)
      : task_(task),
        layer_(task.layer->forward),
        r_(layer_.P ? layer_.P : layer_.H),
        d_row_(Cell::kStored * layer_.H) {}

  void run() {
    if (task_.layer->d_x) input();
    for (int d = 0; d < layer_.D; ++d) weights(d);
  }

 private:
  static const Scalar* in(const void* p) { return static_cast<const Scalar*>(p); }
  static Scalar* out(void* p) { return static_cast<Scalar*>(p); }
  int64_t share(int64_t n, int64_t member) const { return n * member / task_.team.members; }
  void join() const { wait(task_.team.barrier, task_.team.members); }

  // Both directions in turn; direction 1 adds to what direction 0 left. Few rows: threads share the columns, and pack a
  // panel when they use it, each in the place of the one before; many rows: they pack together and share the rows.
  void input() {
    const Panels panels(layer_.I, L, 4);
    const int64_t k_size = G * layer_.H, member = task_.team.member;
    const int64_t wide = kBlockBytes / (k_size * static_cast<int64_t>(sizeof(Scalar)));
    const int64_t block = wide < 48 ? 48 : wide;
    const int64_t first = share(panels.count, member), last = share(panels.count, member + 1);
    if (layer_.N <= block) {
      for (int64_t p = first; p < last; ++p) {
        for (int d = 0; d < layer_.D; ++d) {
          Scalar* place = out(task_.w_ih[d]) + panels.first(first) * L * k_size;
          pack_panels(d, panels, p, p + 1, place);
          input_panel(d, panels, p, place, 0, layer_.N, nullptr);
        }
      }
      return;
    }
    for (int d = 0; d < layer_.D; ++d) {
      pack_panels(d, panels, first, last, out(task_.w_ih[d]) + panels.first(first) * L * k_size);
    }
    join();
    const int64_t begin = share(layer_.N, member), end = share(layer_.N, member + 1);
    for (int64_t row = begin; row < end; row += block) {
      for (int64_t p = 0; p < panels.count; ++p) {
        for (int d = 0; d < layer_.D; ++d) {
          const Scalar* packed = in(task_.w_ih[d]);
          const bool more = layer_.D == 1 && p + 1 < panels.count;  // the tile fetches what follows into the cache
          input_panel(d, panels, p, packed + panels.first(p) * L * k_size, row, row + block < end ? row + block : end,
                      more ? packed + panels.first(p + 1) * L * k_size : nullptr);
        }
      }
    }
  }

  // Column panels [p0, p1) of W_ih, one behind the other; its rows in the order of the stored gradients.
  void pack_panels(int d, const Panels& panels, int64_t p0, int64_t p1, Scalar* packed) const {
    const int64_t I = layer_.I, H = layer_.H;
    const Scalar* w_ih = in(layer_.direction[d].w_ih);
    pack_columns<V>(
        [&](int64_t k) {
          const int64_t gate = k / H;
          return w_ih + (Cell::input_gate(static_cast<int>(gate)) * H + (k - gate * H)) * I;
        },
        G * H, panels, p0, p1, packed);
  }

  // Rows [row, end) of d_x in the columns of one panel, in passes of kPass terms.
  void input_panel(int d, const Panels& panels, int64_t p, const Scalar* packed, int64_t row, int64_t end,
                   const Scalar* following) {
    const int64_t k_size = G * layer_.H, step = panels.width(p) * L;
    for (int64_t k = 0; k < k_size; k += kPass) {
      const int64_t stop = k + kPass < k_size ? k + kPass : k_size;
      input_block(d, panels, p, packed + k * step, row, end, k, stop, stop < k_size ? packed + stop * step : following);
    }
  }

  void input_block(int d, const Panels& panels, int64_t p, const Scalar* packed, int64_t row, int64_t end, int64_t k0,
                   int64_t k1, const Scalar* next) {
    const int64_t I = layer_.I, column = panels.first(p) * L;
    const int nv = static_cast<int>(panels.width(p));
    const bool whole = !task_.places && column + nv * L <= I, start = d == 0 && k0 == 0;
    TileArgs<Scalar> args{};
    args.k = k1 - k0;
    args.chain = kShortChain;
    args.a_row = d_row_;
    args.a_step = 1;
    args.w = packed;
    args.w_panel = 0;
    args.init_row = args.out_row = whole ? I : nv * L;
    const RowTiles tiles(end - row, Tiles<V>::rows(nv));
    for (int64_t q = 0; q < tiles.tiles; ++q) {
      const int64_t first = row + tiles.first(q);
      const int m = static_cast<int>(row + tiles.first(q + 1) - first);
      Scalar* const d_x = out(task_.layer->d_x) + first * I + column;
      const auto place = [&](int j) {
        return task_.places ? out(task_.layer->d_x) + task_.places[first + j] * I + column : d_x + j * I;
      };
      args.a = in(task_.d_gates[d]) + first * d_row_ + Cell::kInput * layer_.H + k0;
      if (whole && !start) {
        for (int j = 0; j < m; ++j) fetch(d_x + j * I, nv * L);
      }
      args.ahead = next && q < nv ? next + q * (k1 - k0) * static_cast<int64_t>(64 / sizeof(Scalar)) : nullptr;
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

  // A product panel^T * rows that is wanted: rows in column panels of `width` columns, the result [.., width].
  struct Operand {
    Scalar* d_w;  // null: not wanted
    Panels panels;
    const Scalar* packed;
  };

  void weights(int d) {
    const DirectionBackward& backward = task_.layer->direction[d];
    const int64_t member = task_.team.member, N = layer_.N;
    const bool gates = backward.d_w_ih || backward.d_w_hh || backward.d_b_ih || backward.d_b_hh;
    if (!gates && !backward.d_w_hr && !backward.d_parameters) return;  // the same for every member: nobody waits
    Operand x{out(backward.d_w_ih), Panels(layer_.I, L, 4), nullptr};
    Operand h{out(backward.d_w_hh), Panels(r_, L, 4), nullptr};
    Operand m{out(backward.d_w_hr), Panels(layer_.H, L, 4), nullptr};
    const int64_t half = kSumRows * (padded(layer_.I) + padded(r_) + (layer_.P ? padded(layer_.H) : 0));
    Cursor cursor(layer_, task_.first_row, d);
    for (int64_t n0 = 0; n0 < N; n0 += kSumRows) {
      const int64_t rows = N - n0 < kSumRows ? N - n0 : kSumRows;
      cursor.collect(rows, x_rows_, h_rows_, mask_rows_, r_);
      Scalar* packed = out(task_.panels) + (turn_++ & 1) * half;  // the other half may still be read
      const auto pack = [&](Operand& operand, int64_t width, const auto& row) {
        operand.packed = packed;
        if (operand.d_w) {
          const Panels& panels = operand.panels;
          const int64_t first = share(panels.count, member);
          pack_columns<V>(row, rows, panels, first, share(panels.count, member + 1),
                          packed + panels.first(first) * L * rows);
        }
        packed += kSumRows * padded(width);
      };
      pack(x, layer_.I, [&](int64_t k) { return x_rows_[k]; });
      pack(h, r_, [&](int64_t k) { return h_rows_[k]; });
      if (h.d_w && layer_.direction[d].h_mask) mask_panels(h, rows);
      if (layer_.P) pack(m, layer_.H, [&](int64_t k) { return in(task_.cell_h[d]) + (n0 + k) * layer_.H; });
      join();
      for (int s = 0, wide; gates && s < Cell::kStored; s += wide) {
        const int input = window(s, Cell::kInput), recurrent = window(s, Cell::kRecurrent);
        for (wide = 1; s + wide < Cell::kStored && follows(s, wide); ++wide) {
        }
        const int64_t x_row = input < 0 ? -1 : Cell::input_gate(input) * layer_.H;
        const int64_t h_row = recurrent < 0 ? -1 : Cell::recurrent_gate(recurrent) * layer_.H;
        const Scalar* a = in(task_.d_gates[d]) + n0 * d_row_ + s * layer_.H;
        columns(a, d_row_, rows, wide * layer_.H, n0 == 0, x_row < 0 ? nullptr : &x, x_row, h_row < 0 ? nullptr : &h,
                h_row, x_row < 0 ? nullptr : out(backward.d_b_ih), h_row < 0 ? nullptr : out(backward.d_b_hh));
      }
      if constexpr (Cell::kParameters > 0) {  // sums of rows alone, as those of biases
        const Scalar* a = in(task_.d_gates[d]) + n0 * d_row_ + (Cell::kStored - Cell::kParameters) * layer_.H;
        columns(a, d_row_, rows, Cell::kParameters * layer_.H, n0 == 0, nullptr, 0, nullptr, 0,
                out(backward.d_parameters), nullptr);
      }
      if (layer_.P && m.d_w) {
        columns(in(task_.d_h[d]) + n0 * r_, r_, rows, r_, n0 == 0, &m, 0, nullptr, 0, nullptr, nullptr);
      }
    }
  }

  // This thread's share of the packed h becomes what W_hh multiplied: h times the mask of its sequence.
  void mask_panels(const Operand& h, int64_t rows) {
    const Panels& panels = h.panels;
    for (int64_t p = share(panels.count, task_.team.member); p < share(panels.count, task_.team.member + 1); ++p) {
      const int nv = static_cast<int>(panels.width(p));
      Scalar* packed = const_cast<Scalar*>(h.packed) + panels.first(p) * L * rows;
      for (int64_t k = 0; k < rows; ++k) {
        for (int v = 0; v < nv; ++v, packed += L) {
          const int64_t unit = (panels.first(p) + v) * L;
          const int lanes = r_ - unit < L ? static_cast<int>(r_ - unit) : L;
          (V::load(packed) * load_lanes<V>(mask_rows_[k] + unit, lanes)).store(packed);
        }
      }
    }
  }

  // Position of stored gradient s in a window, -1 if outside.
  static constexpr int window(int s, int first) { return s >= first && s < first + G ? s - first : -1; }
  // Whether stored gradients s .. s+j are rows that follow each other in the same weights.
  static constexpr bool follows(int s, int j) {
    const int input = window(s, Cell::kInput), recurrent = window(s, Cell::kRecurrent);
    const int input_j = window(s + j, Cell::kInput), recurrent_j = window(s + j, Cell::kRecurrent);
    if ((input < 0) != (input_j < 0) || (recurrent < 0) != (recurrent_j < 0)) return false;
    return (input < 0 || Cell::input_gate(input_j) == Cell::input_gate(input) + j) &&
           (recurrent < 0 || Cell::recurrent_gate(recurrent_j) == Cell::recurrent_gate(recurrent) + j);
  }

  // This thread's share of `size` columns of a: products with up to two operands, and sums.
  void columns(const Scalar* a, int64_t a_row, int64_t rows, int64_t size, bool start, const Operand* x, int64_t x_row,
               const Operand* h, int64_t h_row, Scalar* d_b_ih, Scalar* d_b_hh) {
    const int64_t end = share(size, task_.team.member + 1);
    for (int64_t column = share(size, task_.team.member); column < end; column += kStripColumns) {
      const int64_t wide = end - column < kStripColumns ? end - column : kStripColumns;
      if ((x && x->d_w) || (h && h->d_w)) {
        pack_strip<V>(a + column, a_row, rows, wide, kTileRows, kStripTile, out(task_.strip));
        if (x && x->d_w) product(*x, x_row + column, rows, wide, start);
        if (h && h->d_w) product(*h, h_row + column, rows, wide, start);
      }
      if (d_b_ih || d_b_hh) {
        sum(a + column, a_row, rows, wide);
        if (d_b_ih) add(out(task_.sums), wide, start, d_b_ih + x_row + column);
        if (d_b_hh) add(out(task_.sums), wide, start, d_b_hh + h_row + column);
      }
    }
  }

  void product(const Operand& operand, int64_t w_row, int64_t rows, int64_t size, bool start) {
    const Panels& panels = operand.panels;
    TileArgs<Scalar> args{};
    args.k = rows;
    args.chain = kShortChain;
    args.a_row = 1;
    args.a_step = kTileRows;
    for (int64_t p = 0; p < panels.count; ++p) {
      const int nv = static_cast<int>(panels.width(p));
      const int64_t column = panels.first(p) * L;
      const int64_t left = panels.n - column < nv * L ? panels.n - column : nv * L;
      const bool whole = left == nv * L;
      args.w = operand.packed + column * rows;
      args.init_row = args.out_row = whole ? panels.n : nv * L;
      args.a = in(task_.strip);
      for (int64_t row = 0; row < size; row += kTileRows, args.a += kStripTile) {
        const int m = size - row < kTileRows ? static_cast<int>(size - row) : kTileRows;
        Scalar* d_w = operand.d_w + (w_row + row) * panels.n + column;
        args.out = whole ? d_w : buffer_;
        args.init = start ? nullptr : args.out;
        args.ahead = p + 1 < panels.count && row < nv * kTileRows ? operand.packed + panels.first(p + 1) * L * rows +
                                                                        row / kTileRows * rows * (64 / sizeof(Scalar))
                                                                  : nullptr;
        if (whole) {
          for (int j = 0; j < m; ++j) fetch(d_w + j * panels.n, nv * L);
        }
        if (!whole && !start) {
          for (int j = 0; j < m; ++j) load_row<V>(d_w + j * panels.n, left, 0, nv * L, buffer_ + j * nv * L);
        }
        Tiles<V>::get(m, nv, 1)(args);
        if (!whole) {
          for (int j = 0; j < m; ++j) store_row<V>(buffer_ + j * nv * L, left, 0, nv * L, d_w + j * panels.n);
        }
      }
    }
  }

  static void add(const Scalar* from, int64_t n, bool start, Scalar* to) {
    for (int64_t j = 0; j < n; j += L) {
      const int lanes = n - j < L ? static_cast<int>(n - j) : L;
      const V a = V::load(from + j);
      store_lanes(start ? a : load_lanes<V>(to + j, lanes) + a, to + j, lanes);
    }
  }

  void sum(const Scalar* a, int64_t a_row, int64_t rows, int64_t size) {
    for (int64_t j = 0; j < size; j += L) {
      const int lanes = size - j < L ? static_cast<int>(size - j) : L;
      V total = V::zero();
      for (int64_t row = 0; row < rows;) {
        V chain = V::zero();
        for (int64_t end = row + kShortChain < rows ? row + kShortChain : rows; row < end; ++row) {
          chain = chain + load_lanes<V>(a + row * a_row + j, lanes);
        }
        total = total + chain;
      }
      total.store(out(task_.sums) + j);
    }
  }

  // Walks the rows of x in order and finds for each the h that its step started from, and the mask of its sequence.
  class Cursor {
   public:
    Cursor(const LayerForward& layer, const int64_t* first_row, int d)
        : layer_(layer),
          direction_(layer.direction[d]),
          rows_(layer, d, Team{0, 1, false, false, nullptr}, first_row),
          d_(d) {}

    void collect(int64_t rows, const Scalar** x, const Scalar** h, const Scalar** mask, int64_t r) {
      for (int64_t j = 0; j < rows; ++j) {
        x[j] = rows_.template x<Scalar>(t_, row_);
        const int64_t before = d_ == 1 ? t_ + 1 : t_ - 1;
        if (rows_.reset(t_, row_)) {
          h[j] = rows_.template replacement<Scalar>(direction_.reset_h, row_, r);
        } else if (before < 0 || before >= layer_.T || row_ >= rows_.active(before)) {
          h[j] = in(direction_.h0) + rows_.batch(row_) * r;
        } else {
          h[j] = in(layer_.y) + rows_.index(before, row_) * layer_.D * r + d_ * r;
        }
        if (direction_.h_mask) mask[j] = in(direction_.h_mask) + rows_.batch(row_) * r;
        if (++row_ == rows_.active(t_)) ++t_, row_ = 0;
      }
    }

   private:
    const LayerForward& layer_;
    const DirectionForward& direction_;
    const Rows rows_;
    int d_;
    int64_t t_ = 0, row_ = 0;
  };

  const GradientTask& task_;
  const LayerForward& layer_;
  const int64_t r_, d_row_;
  int turn_ = 0;
  const Scalar* x_rows_[kSumRows];
  const Scalar* h_rows_[kSumRows];
  const Scalar* mask_rows_[kSumRows];
  alignas(64) Scalar buffer_[Tiles<V>::kMostRows * 4 * L];
};

template <class Cell, class V>
void gradients(const GradientTask& task) {
  Gradients<Cell, V>(task).run();
}

}  // namespace cpu
}  // namespace fastrnn
