// SPDX-License-Identifier: BSD-3-Clause
// The backward sweep of one direction on the register tile. One instance per cell and lane class. Time loop, states and
// the derivative of the cell are those of backward_steps.h.
#pragma once
#include "backward_steps.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V>
class BackwardSweep : public BackwardSteps<BackwardSweep<Cell, V>, Cell, V, SameElements<V>> {
  using Steps = BackwardSteps<BackwardSweep<Cell, V>, Cell, V, SameElements<V>>;
  friend Steps;
  using Steps::backward_, Steps::buffer_, Steps::c_row_, Steps::d_row_, Steps::first_panel_, Steps::forward_,
      Steps::last_panel_;
  using Steps::differentiate, Steps::recurs, Steps::settle;
  using Steps::G, Steps::L, Steps::kBufferRows, Steps::given, Steps::in, Steps::out;
  using Steps::layer_, Steps::pack_first_, Steps::pack_last_, Steps::r_, Steps::rows_, Steps::states_;
  using Steps::t_before_, Steps::task_, Steps::units_, Steps::y_row_;
  using typename Steps::Scalar;
  static constexpr int64_t kSize = sizeof(Scalar), kVectorBytes = L * kSize;
  // Up to so large a W_hh tiles fetch what the next step reads, in place of the next panel. Zen 5, one thread, time of
  // the latter over that of the former: LSTM, H = 64, 128, 256, 512 1.03, 1.05, 1.02, 1.01, GRU, H = 128, 192 1.06,
  // 1.04, RNN, H = 256 1.05; LSTM, H = 1024 .98.
  static constexpr int64_t kAskedBytes = 4 * 1024 * 1024;
  static constexpr int64_t kNextStepBytes = 256 * 1024;    // of a step that stay in the second-level cache meanwhile
  static constexpr int64_t kPass = pass_terms<V>(kChain);  // of recur_by_rows

 public:
  explicit BackwardSweep(const BackwardTask& task)
      : Steps(task, Cell::kStored * task.layer->forward.H),
        far_(G * layer_.H * r_ * static_cast<int64_t>(sizeof(Scalar)) > kFarBytes),
        by_rows_(layer_.T == 1 && (task.team.members == 1 || task.team.split_units) && rows_.count() <= kBufferRows &&
                 G * layer_.H * r_ * static_cast<int64_t>(sizeof(Scalar)) >= kLargeBytes &&
                 G * layer_.H >= kPass * 2 + kBufferRows),
        asks_steps_(core.asks_rows && layer_.T > 2 && !layer_.order && !layer_.conversion && !layer_.P &&
                    !task.team.split_units && rows_.stride() == 1 && G * layer_.H * r_ * kSize <= kAskedBytes &&
                    can_ask()) {
    if (asks_steps_ && step_bytes() <= kNextStepBytes) this->asks_rows_ = false;
  }

 private:
  void pack() {
    if (recurs() && !by_rows_) {
      pack_rows(0, G * layer_.H, pack_first_, pack_last_,
                out(task_.w_hh) + states_.first(pack_first_) * L * G * layer_.H);
    }
    if (layer_.P) {
      const int64_t member = task_.team.member, members = task_.team.members;
      const int64_t first = units_.count * member / members, last = units_.count * (member + 1) / members;
      const Given<Scalar> w_hr = given(forward_.w_hr);
      pack_columns<V>([&](int64_t k) { return w_hr.at(k * layer_.H); }, layer_.conversion, layer_.P, units_, first,
                      last, out(task_.w_hr) + units_.first(first) * L * layer_.P);
    }
  }

  // Rows [k0, k1) of W_hh, those of the gate gradients, for panels [first, last).
  void pack_rows(int64_t k0, int64_t k1, int64_t first, int64_t last, Scalar* packed) const {
    const Given<Scalar> w_hh = given(forward_.w_hh);
    const auto row = [&](int64_t k) {
      const int64_t gate = (k0 + k) / layer_.H;
      return w_hh.at((Cell::recurrent_gate(static_cast<int>(gate)) * layer_.H + (k0 + k - gate * layer_.H)) * r_);
    };
    pack_columns<V>(row, layer_.conversion, k1 - k0, states_, first, last, packed, by_rows_);
  }

  // The only step back: d_r * W_hh of rows [0, n) for the panels of this thread. W_hh is read from one end to the
  // other, and as many rows as make a pass are packed at a time, each pass in the place of the one before: no packed
  // weights are written to memory and read again. The sums lie behind them, where a sweep of more steps has packed
  // weights.
  void recur_by_rows(int64_t n) {
    const int64_t k_size = G * layer_.H, columns = (states_.first(last_panel_) - states_.first(first_panel_)) * L;
    Scalar* const packed = out(task_.w_hh) + states_.first(first_panel_) * L * k_size;
    sums_ = packed + 2 * kPass * columns;
    for (int64_t k0 = 0, k1; k0 < k_size; k0 = k1) {
      k1 = k0 + next_pass(kPass, k_size - k0);
      pack_rows(k0, k1, first_panel_, last_panel_, packed);
      for (int64_t p = first_panel_; p < last_panel_; ++p) {
        const int64_t column = (states_.first(p) - states_.first(first_panel_)) * L, width = states_.width(p) * L;
        const RowTiles tiles(n, Tiles<V>::rows(static_cast<int>(states_.width(p))));
        for (int64_t q = 0; q < tiles.tiles; ++q) {
          const int64_t row = tiles.first(q);
          TileArgs<Scalar> args = recur_args(row, p, k0, k1, sums_ + column * n + row * width);
          args.w = packed + column * (k1 - k0);
          Tiles<V>::get(static_cast<int>(tiles.first(q + 1) - row), static_cast<int>(states_.width(p)), 1)(args);
        }
      }
    }
  }

  // sums (+)= terms [k0, k1) of d_r[t_before] * W_hh for m rows and one panel. `args` come with what the tile fetches.
  void recur(int64_t row, int m, int64_t panel, int64_t k0, int64_t k1, Scalar* sums, TileArgs<Scalar> args = {}) {
    args = recur_args(row, panel, k0, k1, sums, args);
    args.w = in(task_.w_hh) + states_.first(panel) * L * G * layer_.H + k0 * states_.width(panel) * L;
    Tiles<V>::get(m, static_cast<int>(states_.width(panel)), 1)(args);
  }

  TileArgs<Scalar> recur_args(int64_t row, int64_t panel, int64_t k0, int64_t k1, Scalar* sums,
                              TileArgs<Scalar> args = {}) const {
    args.k = k1 - k0;
    args.chain = kChain;
    args.a = in(task_.d_gates);
    if (k1 > k0) args.a += rows_.packed(t_before_, row) * d_row_ + Cell::kRecurrent * layer_.H + k0;
    args.a_row = d_row_ * rows_.stride();
    args.a_step = 1;
    args.init = k0 ? sums : nullptr;
    args.out = sums;
    args.init_row = args.out_row = states_.width(panel) * L;
    args.far = far_;
    return args;
  }

  void recur_rows(int64_t from, int64_t to, int64_t p) {
    const int nv = static_cast<int>(states_.width(p));
    if (by_rows_) {
      if (p == first_panel_) recur_by_rows(to - from);
      const Scalar* const sums = sums_ + (states_.first(p) - states_.first(first_panel_)) * L * (to - from);
      for (int64_t j = 0; j < (to - from) * nv * L; j += L) V::load(sums + j).store(buffer_ + j);
      return;
    }
    const RowTiles tiles(to - from, Tiles<V>::rows(nv));
    for (int64_t q = 0; q < tiles.tiles; ++q) {
      const int64_t first = tiles.first(q);
      recur(from + first, static_cast<int>(tiles.first(q + 1) - first), p, 0, G * layer_.H, buffer_ + first * nv * L);
    }
  }

  int64_t state_row_size() const { return Cell::kStates == 2 ? layer_.H : y_row_; }
  // What begin_asking() lists, at most.
  int64_t step_bytes() const { return rows_.count() * (c_row_ * Cell::kSaved + y_row_ + state_row_size()) * kSize; }
  // Whether the tiles of a step have sums enough to fetch, and are enough for all of that, each of one array alone.
  bool can_ask() const {
    const int nv = static_cast<int>(states_.width(0));
    const RowTiles tiles(rows_.count(), Tiles<V>::rows(nv));
    if (tiles.tiles == 0 || !fetches<V>(static_cast<int>(rows_.count() / tiles.tiles) * nv)) return false;
    const int64_t all = states_.count * tiles.tiles;
    return all >= 3 && all * G * layer_.H >= step_bytes() / 64;
  }

  // What the step at time t is read from and the step after it was not, so that tiles of that one can fetch it: gates,
  // d_y, and the states before. Of rows that lie one behind the other.
  void begin_asking(int64_t t) {
    const auto list = [&](int which, const void* p, int64_t time, int64_t row_size) {
      asked_[which] = {};
      if (!p || !rows_.exists(time) || rows_.active(time) == 0) return;
      const Scalar* const begin = in(p) + rows_.index(time, 0) * row_size;
      asked_[which] = {reinterpret_cast<const char*>(begin), rows_.active(time) * row_size * kSize};
    };
    list(0, Cell::kSaved > 0 ? forward_.gates : nullptr, t, c_row_ * Cell::kSaved);
    list(1, task_.layer->d_y, t, y_row_);
    list(2, Cell::kStates == 2 ? forward_.cells : layer_.y, rows_.time_before(t), state_row_size());
  }

  // Lets a tile with so many sums fetch as many lines of it as it has terms: a few past the end of an array.
  void ask(TileArgs<Scalar>& args, int sums, int64_t terms) {
    if (!fetches<V>(sums)) return;
    for (Asked& piece : asked_) {
      if (piece.bytes <= 0) continue;
      args.ahead = piece.begin;
      args.ahead_step = 64;
      piece.begin += terms * 64;
      piece.bytes -= terms * 64;
      return;
    }
  }

  void step(int64_t s, int64_t t, int64_t both, int64_t n) {
    if (asks_steps_) begin_asking(rows_.time(s - 1));  // lists nothing at s = 0
    if (layer_.P) {
      this->gather_d_h(t, 0, both, true);
      this->gather_d_h(t, both, n, false);
      rows(s, t, 0, n, true);
    } else {
      rows(s, t, 0, both, true);
      rows(s, t, both, n, false);
    }
  }

  // Rows [from, to) of one step; `active`: they took part in the step after it. Panels in alternating order, as
  // forward.
  void rows(int64_t s, int64_t t, int64_t from, int64_t to, bool active) {
    if (from == to) return;
    const Panels& panels = layer_.P ? units_ : states_;
    const int64_t first_of_all = layer_.P ? 0 : first_panel_, last = layer_.P ? units_.count : last_panel_;
    for (int64_t j = 0; j < last - first_of_all; ++j) {
      const int64_t p = s & 1 ? last - 1 - j : first_of_all + j;
      const int nv = static_cast<int>(panels.width(p));
      const int64_t next = s & 1 ? p - 1 : p + 1;
      const RowTiles tiles(to - from, Tiles<V>::rows(nv));
      for (int64_t q = 0; q < tiles.tiles;) {  // several tiles, then the cell, as forward
        const int64_t begin = from + tiles.first(q), q0 = q;
        int64_t row = begin;
        while (q < tiles.tiles && from + tiles.first(q + 1) - begin <= kBufferRows) row = from + tiles.first(++q);
        const int64_t k_size = layer_.P ? layer_.P : active ? G * layer_.H : 0;
        int64_t k0 = 0;
        do {
          const int64_t k1 = k0 + next_pass(pass_, k_size - k0);
          const Ahead ahead(q - q0, k1 - k0, nv * kVectorBytes);
          const Scalar* const after =
              layer_.P ? nullptr : read_after(p, j + 1 < last - first_of_all ? next : -1, q < tiles.tiles, k1, k_size);
          for (int64_t tile = q0; tile < q; ++tile) {
            const int64_t first = from + tiles.first(tile);
            const int m = static_cast<int>(from + tiles.first(tile + 1) - first);
            Scalar* sums = buffer_ + (first - begin) * nv * L;
            if (layer_.P) {
              unproject(t, first, m, p, k0, k1, sums);
            } else {
              TileArgs<Scalar> args{};
              if (asks_steps_) {
                ask(args, m * nv, k1 - k0);
              } else {
                ahead.set(args, tile - q0, after);
              }
              recur(first, m, p, k0, k1, sums, args);
            }
          }
          k0 = k1;
        } while (k0 < k_size);
        if (!layer_.P && active) settle(begin, row, p, buffer_);
        differentiate(t, begin, row, p);
      }
    }
  }

  // What the tiles fetch while they work on the terms of a panel of W_hh before k1: what is read after them. `next`:
  // the panel that follows, -1 for none; `again`: more rows meet this panel first, of which a single part is still
  // there.
  const Scalar* read_after(int64_t panel, int64_t next, bool again, int64_t k1, int64_t k_size) const {
    const Scalar* const begin = in(task_.w_hh) + states_.first(panel) * L * k_size;
    if (k1 < k_size) return begin + k1 * states_.width(panel) * L;
    if (again) return next_pass(pass_, k_size) < k_size ? begin : nullptr;
    return next < 0 ? nullptr : in(task_.w_hh) + states_.first(next) * L * k_size;
  }

  // sums (+)= terms [k0, k1) of d_h[t] * W_hr for m rows and one panel of units.
  void unproject(int64_t t, int64_t row, int m, int64_t panel, int64_t k0, int64_t k1, Scalar* sums) {
    const int nv = static_cast<int>(units_.width(panel));
    TileArgs<Scalar> args{};
    args.k = k1 - k0;
    args.chain = kChain;
    args.a = in(task_.d_h) + rows_.packed(t, row) * layer_.P + k0;
    args.a_row = layer_.P * rows_.stride();
    args.a_step = 1;
    args.w = in(task_.w_hr) + units_.first(panel) * L * layer_.P + k0 * nv * L;
    args.init = k0 ? sums : nullptr;
    args.out = sums;
    args.init_row = args.out_row = nv * L;
    Tiles<V>::get(m, nv, 1)(args);
  }

  const int64_t pass_ = pass_terms<V>(kChain, core.backward_pass);
  const bool far_;         // W_hh is larger than kFarBytes
  const bool by_rows_;     // recur_by_rows
  const bool asks_steps_;  // tiles fetch what the next step reads
  struct Asked {
    const char* begin;
    int64_t bytes;
  };
  Asked asked_[3] = {};  // what they have not fetched yet
  Scalar* sums_ = nullptr;
};

template <class Cell, class V>
void backward(const BackwardTask& task) {
  BackwardSweep<Cell, V>(task).run();
}

}  // namespace cpu
}  // namespace fastrnn
