// SPDX-License-Identifier: BSD-3-Clause
// The backward sweep of one direction: steps in the opposite order, from d_y, d_h_n and d_c_n to the gradients of the
// gates at every step and of the initial state. The large products over all steps follow in gradients.h.
//
//   dL/dh[t] = d_y[t] + d_r[t+1] * W_hh + (what reaches h[t] past W_hh)        W_hh as it lies: no transpose
//   with a projection h = W_hr m:   dL/dm[t] = dL/dh[t] * W_hr
#pragma once
#include "kernels.h"
#include "matmul.h"
#include "rows.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V>
class BackwardSweep {
  using Scalar = typename V::Scalar;
  static constexpr int L = V::kLanes, G = Cell::kGates;

 public:
  explicit BackwardSweep(const BackwardTask& task)
      : task_(task),
        layer_(task.layer->forward),
        forward_(layer_.direction[task.direction]),
        backward_(task.layer->direction[task.direction]),
        rows_(layer_, task.direction, task.team, task.first_row),
        r_(layer_.P ? layer_.P : layer_.H),
        states_(r_, L, 4),
        units_(layer_.H, L, 4),
        state_row_(padded(r_)),
        c_row_(padded(layer_.H)),
        y_row_(layer_.D * r_),
        d_row_(Cell::kStored * layer_.H) {
    const int64_t member = task.team.member, members = task.team.members;
    pack_first_ = states_.count * member / members;
    pack_last_ = states_.count * (member + 1) / members;
    first_panel_ = task.team.split_units ? pack_first_ : 0;
    last_panel_ = task.team.split_units ? pack_last_ : states_.count;
  }

  void run() {
    pack();
    load_gradients();
    wait(task_.team.barrier, task_.team.members);
    int64_t before = 0;  // rows active at the step done before this one, at time t_before_
    for (int64_t s = layer_.T - 1; s >= 0; --s) {
      const int64_t t = rows_.time(s), n = rows_.active(t), both = before < n ? before : n;
      if (n < before) finish(n, before);
      if (layer_.P) {
        gather_d_h(t, 0, both, true);
        gather_d_h(t, both, n, false);
        step(s, t, 0, n, true);
      } else {
        step(s, t, 0, both, true);
        step(s, t, both, n, false);
      }
      if (task_.team.split_units) wait(task_.team.barrier, task_.team.members);
      before = n;
      t_before_ = t;
    }
    finish(0, before);
  }

 private:
  static const Scalar* in(const void* p) { return static_cast<const Scalar*>(p); }
  static Scalar* out(void* p) { return static_cast<Scalar*>(p); }

  void pack() {
    const int64_t H = layer_.H;
    const Scalar* w_hh = in(forward_.w_hh);
    pack_columns<V>(
        [&](int64_t k) {
          const int64_t gate = k / H;
          return w_hh + (Cell::recurrent_gate(static_cast<int>(gate)) * H + (k - gate * H)) * r_;
        },
        G * H, states_, pack_first_, pack_last_, out(task_.w_hh));
    if (layer_.P) {
      const int64_t member = task_.team.member, members = task_.team.members;
      pack_columns<V>([&](int64_t k) { return in(forward_.w_hr) + k * H; }, layer_.P, units_,
                      units_.count * member / members, units_.count * (member + 1) / members, out(task_.w_hr));
    }
  }

  int64_t first_state() const { return states_.first(first_panel_) * L; }
  int64_t end_state() const { return states_.first(last_panel_) * L; }
  int64_t first_unit() const { return layer_.P ? 0 : first_state(); }
  int64_t end_unit() const { return layer_.P ? units_.blocks * L : end_state(); }

  void load_gradients() {
    for (int64_t row = 0; row < rows_.count(); ++row) {
      const int64_t b = rows_.batch(row);
      const Scalar* d_h_n = in(backward_.d_h_n);
      load_row<V>(d_h_n ? d_h_n + b * r_ : nullptr, d_h_n ? r_ : 0, first_state(), end_state(),
                  out(task_.d_state) + row * state_row_);
      if (Cell::kStates == 2) {
        const Scalar* d_c_n = in(backward_.d_c_n);
        load_row<V>(d_c_n ? d_c_n + b * layer_.H : nullptr, d_c_n ? layer_.H : 0, first_unit(), end_unit(),
                    out(task_.d_c) + row * c_row_);
      }
    }
  }

  // The product d_r[t_before] * W_hh for m rows and one panel, into buffer_.
  void recur(int64_t row, int m, int64_t panel, bool active) {
    const int nv = static_cast<int>(states_.width(panel));
    TileArgs<Scalar> args;
    args.k = active ? G * layer_.H : 0;
    args.a = in(task_.d_gates) + (active ? rows_.index(t_before_, row) * d_row_ + Cell::kRecurrent * layer_.H : 0);
    args.a_row = d_row_ * rows_.stride();
    args.a_step = 1;
    args.w = in(task_.w_hh) + states_.first(panel) * L * G * layer_.H;
    args.w_panel = args.init_row = 0;
    args.init = nullptr;
    args.out = buffer_;
    args.out_row = nv * L;
    Tiles<V>::get(m, nv, 1)(args);
  }

  // Rows [from, to) of one step; `active`: they took part in the step after it. Panels in alternating order, as forward.
  void step(int64_t s, int64_t t, int64_t from, int64_t to, bool active) {
    if (from == to) return;
    const Panels& panels = layer_.P ? units_ : states_;
    const int64_t first = layer_.P ? 0 : first_panel_, last = layer_.P ? units_.count : last_panel_;
    for (int64_t j = 0; j < last - first; ++j) {
      const int64_t p = s & 1 ? last - 1 - j : first + j;
      const int nv = static_cast<int>(panels.width(p));
      const RowTiles tiles(to - from, Tiles<V>::rows(nv));
      for (int64_t i = 0; i < tiles.tiles; ++i) {
        const int64_t row = from + tiles.first(i);
        const int m = static_cast<int>(from + tiles.first(i + 1) - row);
        if (layer_.P) {
          TileArgs<Scalar> args;
          args.k = layer_.P;
          args.a = in(task_.d_h) + rows_.index(t, row) * layer_.P;
          args.a_row = layer_.P * rows_.stride();
          args.a_step = 1;
          args.w = in(task_.w_hr) + panels.first(p) * L * layer_.P;
          args.w_panel = args.init_row = 0;
          args.init = nullptr;
          args.out = buffer_;
          args.out_row = nv * L;
          Tiles<V>::get(m, nv, 1)(args);
        } else {
          recur(row, m, p, active);
        }
        differentiate(t, row, m, panels.first(p), nv);
      }
    }
  }

  // With a projection: dL/dh at time t into d_h.
  void gather_d_h(int64_t t, int64_t from, int64_t to, bool active) {
    for (int64_t p = 0; from < to && p < states_.count; ++p) {
      const int nv = static_cast<int>(states_.width(p));
      const RowTiles tiles(to - from, Tiles<V>::rows(nv));
      for (int64_t i = 0; i < tiles.tiles; ++i) {
        const int64_t first = from + tiles.first(i), end = from + tiles.first(i + 1);
        recur(first, static_cast<int>(end - first), p, active);
        for (int64_t row = first; row < end; ++row) {
          for (int v = 0; v < nv; ++v) {
            const int64_t unit = (states_.first(p) + v) * L;
            const int lanes = r_ - unit < L ? static_cast<int>(r_ - unit) : L;
            Scalar* d_state = out(task_.d_state) + row * state_row_ + unit;
            const int64_t n = rows_.index(t, row);
            V d_h = V::load(buffer_ + ((row - first) * nv + v) * L) + V::load(d_state);
            V::zero().store(d_state);
            if (task_.layer->d_y) {
              d_h = d_h + load_lanes<V>(in(task_.layer->d_y) + n * y_row_ + task_.direction * r_ + unit, lanes);
            }
            store_lanes(d_h, out(task_.d_h) + n * r_ + unit, lanes);
          }
        }
      }
    }
  }

  // What `row` held before its step at time t: a row of y or cells (`row_size` apart, from `offset`), or of the
  // initial state.
  const Scalar* previous(int64_t t, int64_t row, const void* all, int64_t row_size, int64_t offset, const void* initial,
                         int64_t width) const {
    const int64_t t_previous = rows_.reversed() ? t + 1 : t - 1;
    if (t_previous < 0 || t_previous >= layer_.T || row >= rows_.active(t_previous)) {
      return in(initial) + rows_.batch(row) * width;
    }
    return in(all) + rows_.index(t_previous, row) * row_size + offset;
  }

  // The derivative of the cell for m rows and `blocks` unit blocks; what came through W_hh (or W_hr) waits in buffer_.
  __attribute__((noinline)) void differentiate(int64_t t, int64_t first, int m, int64_t block, int blocks) {
    const int64_t H = layer_.H, y_offset = task_.direction * r_;
    const bool projected = layer_.P != 0;
    const Scalar* buffer = buffer_;
    for (int64_t row = first; row < first + m; ++row) {
      const int64_t n = rows_.index(t, row);
      const Scalar* d_y = task_.layer->d_y && !projected ? in(task_.layer->d_y) + n * y_row_ + y_offset : nullptr;
      const Scalar* h_prev = Cell::kStates == 2 ? nullptr : previous(t, row, layer_.y, y_row_, y_offset, forward_.h0, r_);
      const Scalar* c_prev = Cell::kStates == 2 ? previous(t, row, forward_.cells, H, 0, forward_.c0, H) : nullptr;
      for (int64_t unit = block * L; unit < (block + blocks) * L; unit += L, buffer += L) {
        const int lanes = H - unit < L ? static_cast<int>(H - unit) : L;
        V d_next[Cell::kStates], saved[Cell::kSaved + 1], prev[Cell::kStates], next[Cell::kStates];
        V d[Cell::kStored], d_prev[Cell::kStates];
        Scalar* d_state = out(task_.d_state) + row * state_row_ + unit;
        Scalar* d_c = out(task_.d_c) + row * c_row_ + unit;
        d_next[0] = V::load(buffer);
        if (!projected) d_next[0] = d_next[0] + V::load(d_state);
        if (d_y) d_next[0] = d_next[0] + load_lanes<V>(d_y + unit, lanes);
        if constexpr (Cell::kSaved > 0) {
          const Scalar* gates = in(forward_.gates) + (n * c_row_ + unit) * Cell::kSaved;
          unroll<Cell::kSaved>([&](auto k) __attribute__((always_inline)) {
            saved[k.value] = V::load(gates + k.value * L);
          });
        }
        if constexpr (Cell::kStates == 2) {
          d_next[1] = V::load(d_c);
          prev[0] = next[0] = V::zero();
          prev[1] = load_lanes<V>(c_prev + unit, lanes);
          next[1] = load_lanes<V>(in(forward_.cells) + n * H + unit, lanes);
        } else {
          prev[0] = load_lanes<V>(h_prev + unit, lanes);
          next[0] = load_lanes<V>(in(layer_.y) + n * y_row_ + y_offset + unit, lanes);
        }
        Cell::backward(d_next, saved, prev, next, d, d_prev);

        Scalar* d_gates = out(task_.d_gates) + n * d_row_ + unit;
        unroll<Cell::kStored>([&](auto k) __attribute__((always_inline)) {
          store_lanes(d[k.value], d_gates + k.value * H, lanes);
        });
        if (!projected) d_prev[0].store(d_state);
        if constexpr (Cell::kStates == 2) d_prev[1].store(d_c);
        if constexpr (Cell::kProjects) {
          if (task_.cell_h) store_lanes(Cell::unprojected(saved, next), out(task_.cell_h) + n * H + unit, lanes);
        }
      }
    }
  }

  // Rows [from, to) have reached their initial state.
  void finish(int64_t from, int64_t to) {
    for (int64_t p = first_panel_; backward_.d_h0 && from < to && p < last_panel_; ++p) {
      const int nv = static_cast<int>(states_.width(p));
      const RowTiles tiles(to - from, Tiles<V>::rows(nv));
      for (int64_t i = 0; i < tiles.tiles; ++i) {
        const int64_t first = from + tiles.first(i), end = from + tiles.first(i + 1);
        recur(first, static_cast<int>(end - first), p, true);
        for (int64_t row = first; row < end; ++row) {
          for (int v = 0; v < nv; ++v) {
            const int64_t unit = (states_.first(p) + v) * L;
            const V d_h = V::load(buffer_ + ((row - first) * nv + v) * L) +
                          V::load(in(task_.d_state) + row * state_row_ + unit);
            store_lanes(d_h, out(backward_.d_h0) + rows_.batch(row) * r_ + unit,
                        r_ - unit < L ? static_cast<int>(r_ - unit) : L);
          }
        }
      }
    }
    if (Cell::kStates == 2 && backward_.d_c0) {
      for (int64_t row = from; row < to; ++row) {
        store_row<V>(in(task_.d_c) + row * c_row_, layer_.H, first_unit(), end_unit(),
                     out(backward_.d_c0) + rows_.batch(row) * layer_.H);
      }
    }
  }

  const BackwardTask& task_;
  const LayerForward& layer_;
  const DirectionForward& forward_;
  const DirectionBackward& backward_;
  const Rows rows_;
  const int64_t r_;               // width of h
  const Panels states_, units_;   // over h, and over the units of the cell: the same without a projection
  const int64_t state_row_, c_row_, y_row_, d_row_;
  int64_t pack_first_, pack_last_, first_panel_, last_panel_, t_before_ = 0;
  alignas(64) Scalar buffer_[Tiles<V>::kMostRows * 4 * L];
};

template <class Cell, class V>
void backward(const BackwardTask& task) {
  BackwardSweep<Cell, V>(task).run();
}

}  // namespace cpu
}  // namespace fastrnn
