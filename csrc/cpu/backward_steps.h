// SPDX-License-Identifier: BSD-3-Clause
// What every backward sweep does around its products: steps in the opposite order, from d_y, d_h_n and d_c_n to the
// gradients of the gates at every step and of the initial state. The products are those of the derived class:
// backward.h, backward_blocks.h; the large ones over all steps follow in gradients.h, gradients_blocks.h.
//
//   dL/dh[t] = d_y[t] + d_r[t+1] * W_hh + (what reaches h[t] past W_hh)        W_hh as it lies: no transpose
//   with a projection h = W_hr m:   dL/dm[t] = dL/dh[t] * W_hr
//   recurrent dropout, W_hh (mask * h):   the product with W_hh times the mask
//   where the state before step t+1 is replaced:   dL/dh[t] = d_y[t], and the rest goes to what replaced it
//   zoneout, s[t] = k*s[t-1] + (1-k)*s'[t]:   dL/ds' = (1-k) * dL/ds[t], and k * dL/ds[t] reaches s[t-1]
#pragma once
#include "elements.h"
#include "group.h"
#include "kernels.h"
#include "lines.h"
#include "matmul.h"
#include "parameters.h"
#include "rows.h"
#include "sharing.h"

namespace fastrnn {
namespace cpu {

// Sweep: the class derived from this one, with
//   pack()                   lays out the weights, this thread's share
//   step(s, t, both, n)      the n rows of one step, of which the first `both` took part in the step after it
//   recur_rows(from, to, p)  sums = what came from the step before to rows [from, to) of panel p, in buffer_
template <class Sweep, class Cell, class V, class Elements>
class BackwardSteps {
 protected:
  using Scalar = typename V::Scalar;
  using Element = typename Elements::Element;
  // What the state before a step lies in: cells are those of the lane class, y and h0 are elements.
  using Before = typename Chosen<Cell::kStates == 2, Scalar, Element>::Type;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  static constexpr int kBufferRows = 64, kAtOnce = V::kRegisters >= 32 ? 2 : 1;  // as forward
  static constexpr bool kConverts = !Elements::kRounds && sizeof(Scalar) == 4;   // likewise

  // d_row: elements from one row of d_gates to the next.
  BackwardSteps(const BackwardTask& task, int64_t d_row)
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
        d_row_(d_row),
        d_h_row_(Elements::kRounds ? in_blocks(r_) : r_) {
    const int64_t member = task.team.member, members = task.team.members;
    pack_first_ = states_.count * member / members;
    pack_last_ = states_.count * (member + 1) / members;
    first_panel_ = task.team.split_units ? pack_first_ : 0;
    last_panel_ = task.team.split_units ? pack_last_ : states_.count;
  }

 public:
  void run() {
    Sweep& sweep = static_cast<Sweep&>(*this);
    sweep.pack();
    load_gradients();
    wait(task_.team);
    int64_t before = 0;  // rows active at the step done before this one, at time t_before_
    for (int64_t s = layer_.T - 1; s >= 0; --s) {
      const int64_t t = rows_.time(s), n = rows_.active(t), both = before < n ? before : n;
      if (n < before) finish(n, before);
      reset_cells(0, both);
      if (task_.team.members > 1 && !task_.team.split_units) {
        fetch_to_write(elements(task_.d_gates) + rows_.packed(t, 0) * d_row_, n * d_row_);
      }
      sweep.step(s, t, both, n);
      if (task_.team.split_units) {
        wait(task_.team);
        const Element* d = elements(task_.d_gates) + rows_.packed(t, 0) * d_row_ + Cell::kRecurrent * layer_.H;
        for (int g = 0; g < G; ++g, d += layer_.H) {
          fetch_others(d, n, d_row_ * rows_.stride(), layer_.H, first_state(), end_state());
        }
      }
      before = n;
      t_before_ = t;
    }
    finish(0, before);
  }

 protected:
  static const Scalar* in(const void* p) { return static_cast<const Scalar*>(p); }
  static Scalar* out(void* p) { return static_cast<Scalar*>(p); }
  static const Element* elements(const void* p) { return static_cast<const Element*>(p); }
  static Element* elements(void* p) { return static_cast<Element*>(p); }
  Given<Element> given(const void* p) const { return {p, layer_.conversion}; }

  // Elements [j, j + lanes) of an array, in one vector.
  V load_vector(const void* p, int64_t j, int lanes) const {
    if constexpr (kConverts) {
      if (layer_.conversion) {
        alignas(64) Scalar room[L]{};
        layer_.conversion->widen(static_cast<const uint16_t*>(p) + j, room, lanes);
        return V::load(room);
      }
    }
    return Elements::load(elements(p) + j, lanes);
  }

  // Whether any gradient goes through W_hh.
  bool recurs() const { return layer_.T > 1 || backward_.d_h0 || backward_.d_reset_h; }

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

  // What came through W_hh to rows [begin, end) and one panel, in `sums`: what is left of it after the mask, and after
  // the replacement of the state, which takes all that would reach the state before it.
  void settle(int64_t begin, int64_t end, int64_t panel, Scalar* sums) {
    if (!forward_.h_mask && !rows_.resets()) return;
    const int nv = static_cast<int>(states_.width(panel));
    for (int64_t row = begin; row < end; ++row, sums += nv * L) {
      const bool reset = rows_.reset(t_before_, row);
      if (!reset && !forward_.h_mask) continue;
      for (int v = 0; v < nv; ++v) {
        const int64_t unit = (states_.first(panel) + v) * L;
        const int lanes = r_ - unit < L ? static_cast<int>(r_ - unit) : L;
        if (forward_.h_mask) {
          const V mask = load_lanes<V>(in(forward_.h_mask) + rows_.batch(row) * r_ + unit, lanes);
          (V::load(sums + v * L) * mask).store(sums + v * L);
        }
        if (!reset) continue;
        Scalar* d_state = out(task_.d_state) + row * state_row_ + unit;
        if (backward_.d_reset_h) {
          Scalar* d_reset = out(backward_.d_reset_h) + rows_.batch(row) * r_ + unit;
          const V through = V::load(sums + v * L) + V::load(d_state);
          store_lanes(load_lanes<V>(d_reset, lanes) + through, d_reset, lanes);
        }
        V::zero().store(sums + v * L);
        V::zero().store(d_state);
      }
    }
  }

  // Likewise what came to c of rows [from, to).
  void reset_cells(int64_t from, int64_t to) {
    if (Cell::kStates != 2 || !rows_.resets()) return;
    for (int64_t row = from; row < to; ++row) {
      if (!rows_.reset(t_before_, row)) continue;
      Scalar* d_c = out(task_.d_c) + row * c_row_;
      Scalar* d_reset = out(backward_.d_reset_c);
      if (d_reset) d_reset += rows_.batch(row) * layer_.H;
      for (int64_t j = first_unit(); j < end_unit() && j < layer_.H; ++j) {
        if (d_reset) d_reset[j] += d_c[j];
        d_c[j] = Scalar(0);
      }
    }
  }

  // With a projection: dL/dh at time t of rows [from, to) into d_h; `active`: they took part in the step after it.
  void gather_d_h(int64_t t, int64_t from, int64_t to, bool active) {
    for (int64_t p = 0; p < states_.count; ++p) {
      const int64_t nv = states_.width(p);
      for (int64_t first = from, end; first < to; first = end) {
        end = to - first < kBufferRows ? to : first + kBufferRows;
        if (active) {
          static_cast<Sweep&>(*this).recur_rows(first, end, p);
          settle(first, end, p, buffer_);
        } else {
          for (int64_t k = 0; k < (end - first) * nv * L; ++k) buffer_[k] = Scalar(0);
        }
        for (int64_t row = first; row < end; ++row) {
          for (int64_t v = 0; v < nv; ++v) {
            gather_d_h(t, row, (states_.first(p) + v) * L, V::load(buffer_ + ((row - first) * nv + v) * L));
          }
        }
      }
    }
  }

  void gather_d_h(int64_t t, int64_t row, int64_t unit, V d_h) {
    const int lanes = r_ - unit < L ? static_cast<int>(r_ - unit) : L;
    Scalar* d_state = out(task_.d_state) + row * state_row_ + unit;
    d_h = d_h + V::load(d_state);
    V::zero().store(d_state);
    if (task_.layer->d_y) {
      const int64_t at = rows_.index(t, row) * y_row_ + task_.direction * r_ + unit;
      d_h = d_h + load_vector(task_.layer->d_y, at, lanes);
    }
    if (layer_.zoneout_h.data) {
      const V keep = kept(layer_.zoneout_h, t, row, task_.direction * r_ + unit, lanes);
      (keep * d_h).store(d_state);
      d_h = (V::one() - keep) * d_h;
    }
    Element* to = elements(task_.d_h) + rows_.packed(t, row) * d_h_row_;
    Elements::store(d_h, to + unit, lanes);
    for (int64_t k = r_; unit + L >= r_ && k < d_h_row_; ++k) to[k] = Element{};  // what a block reads past the end
  }

  // The derivative of the cell for rows [begin, end) and one panel of units; what came through the weights waits in
  // buffer_.
  void differentiate(int64_t t, int64_t begin, int64_t end, int64_t panel) {
    const int m = static_cast<int>(end - begin), blocks = static_cast<int>(units_.width(panel));
    if (layer_.zoneout_h.data || layer_.zoneout_c.data) {
      differentiate_rows<1, true>(t, begin, m, units_.first(panel), blocks);
    } else {
      differentiate_rows<kAtOnce, false>(t, begin, m, units_.first(panel), blocks);
    }
  }

  V kept(const Strided& zoneout, int64_t t, int64_t row, int64_t column, int lanes) const {
    return load_lanes<V>(rows_.template at<Scalar>(zoneout, t, row) + column, lanes);
  }

  // What `row` held before its step at time t: a row of y or cells (`row_size` apart, from `offset`), of the initial
  // state, or of what replaced either.
  const void* previous(int64_t t, int64_t row, const void* all, int64_t row_size, int64_t offset, const void* initial,
                       const void* replacement, int64_t width) const {
    const auto at = [&](const void* p, int64_t j) {
      return Given<Before>{p, Cell::kStates == 2 ? nullptr : layer_.conversion}.at(j);
    };
    if (rows_.reset(t, row)) return at(replacement, rows_.replacement(row, width));
    const int64_t before = rows_.time_before(t);
    if (!rows_.exists(before) || row >= rows_.active(before)) return at(initial, rows_.batch(row) * width);
    return at(all, rows_.index(before, row) * row_size + offset);
  }

  using Row = BackwardRow<Scalar, Element, Before>;

  // A row of elements, to be read at [first, first + units) alone: where they are converted, these lie in `room`.
  const Element* readable(const void* from, int64_t first, int64_t units, Scalar* room) const {
    if constexpr (kConverts) {
      if (layer_.conversion) {
        const int64_t exist = layer_.H - first < units ? layer_.H - first : units;
        layer_.conversion->widen(static_cast<const uint16_t*>(from) + first, room, exist);
        return reinterpret_cast<const Element*>(reinterpret_cast<uintptr_t>(room) -
                                                static_cast<uintptr_t>(first) * sizeof(Element));
      }
    }
    return elements(from);
  }

  // For its units [first, first + units): some are converted into `room`.
  Row row_at(int64_t t, int64_t row, int64_t first, int64_t units, Scalar (*room)[4 * L]) const {
    const int64_t H = layer_.H, index = rows_.index(t, row), packed = rows_.packed(t, row);
    const int64_t y_offset = index * y_row_ + task_.direction * r_;
    Row at{};
    at.row = row, at.t = t;
    if (Cell::kSaved > 0) at.gates = in(forward_.gates) + index * c_row_ * Cell::kSaved;
    if constexpr (Cell::kStates == 2) {
      at.cells = in(forward_.cells) + index * H;
      if (backward_.d_cells) at.d_cells = in(backward_.d_cells) + index * H;
      at.before = in(previous(t, row, forward_.cells, H, 0, forward_.c0, forward_.reset_c, H));
      at.d_c = out(task_.d_c) + row * c_row_;
    } else {
      at.y = readable(given(layer_.y).at(y_offset), first, units, room[0]);
      const void* before = previous(t, row, layer_.y, y_row_, task_.direction * r_, forward_.h0, forward_.reset_h, r_);
      at.before = readable(before, first, units, room[1]);
    }
    if (!layer_.P) {
      at.d_state = out(task_.d_state) + row * state_row_;
      if (task_.layer->d_y) at.d_y = readable(given(task_.layer->d_y).at(y_offset), first, units, room[2]);
    }
    at.d_gates = elements(task_.d_gates) + packed * d_row_;
    if (Cell::kProjects && task_.cell_h) at.cell_h = elements(task_.cell_h) + packed * H;
    return at;
  }

  // From the row that row_at() gives to the next: asked once for all rows of a step.
  RowSteps row_steps(int64_t t) const {
    const int64_t rows = rows_.stride(), H = layer_.H;
    const int64_t before = Cell::kStates == 2 ? H : rows_.exists(rows_.time_before(t)) ? y_row_ : r_;
    return {rows * c_row_ * Cell::kSaved, rows * H, rows * before, rows * y_row_, state_row_, c_row_, rows * d_row_};
  }

  // The derivative of the cell for m rows and `blocks` unit blocks, kTogether blocks of a row at a time; what came
  // through W_hh (or W_hr) waits in buffer_. Blends: with zoneout, which nobody else shall pay for.
  template <int kTogether, bool kBlends>
  __attribute__((noinline)) void differentiate_rows(int64_t t, int64_t first, int m, int64_t block, int blocks) {
    const Scalar* sums = buffer_;
    alignas(64) Scalar room[3][4 * L];
    const bool strides = rows_.at_one_stride(t, first, m) && !(kConverts && layer_.conversion);
    const RowSteps steps = row_steps(t);
    Row at = row_at(t, first, block * L, blocks * L, room);
    for (int j = 0; j < m; ++j) {
      if (j > 0 && strides) at.next(steps);
      if (j > 0 && !strides) at = row_at(t, first + j, block * L, blocks * L, room);
      if (asks_rows_ && strides && j + 1 < m) at.template fetch_next<Cell>(steps, block * L, blocks * L);
      int k = 0;
      for (; k + kTogether <= blocks; k += kTogether, sums += kTogether * L) {
        differentiate_blocks<kTogether, kBlends>(at, sums, (block + k) * L);
      }
      for (; k < blocks; ++k, sums += L) differentiate_blocks<1, kBlends>(at, sums, (block + k) * L);
    }
  }

  // The units of K blocks of a row from `first` on.
  template <int K, bool kBlends>
  inline __attribute__((always_inline)) void differentiate_blocks(const Row& at, const Scalar* sums, int64_t first) {
    using W = Group<V, K>;
    W d_next[Cell::kStates], saved[Cell::kSaved + 1], prev[Cell::kStates], next[Cell::kStates];
    W d[Cell::kStored], d_prev[Cell::kStates], parameters[Cell::kParameters + 1];
    const int64_t H = layer_.H;
    int lanes[K];
    load_parameters<Cell>(in(forward_.parameters), H, first, L, parameters);
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      const int64_t unit = first + j.value * L;
      lanes[j.value] = H - unit < L ? static_cast<int>(H - unit) : L;
      V d_h = V::load(sums + j.value * L);
      if (at.d_state) d_h = d_h + V::load(at.d_state + unit);
      if (at.d_y) d_h = d_h + Elements::load(at.d_y + unit, lanes[j.value]);
      d_next[0].v[j.value] = d_h;
      if constexpr (Cell::kSaved > 0) {
        const Scalar* gates = at.gates + saved_offset<Cell>(0, 0, unit);
        unroll<Cell::kSaved>(
            [&](auto k) __attribute__((always_inline)) { saved[k.value].v[j.value] = V::load(gates + k.value * 16); });
      }
      if constexpr (Cell::kStates == 2) {
        V d_c = V::load(at.d_c + unit);
        if (at.d_cells) d_c = d_c + load_lanes<V>(at.d_cells + unit, lanes[j.value]);
        d_next[1].v[j.value] = d_c;
        prev[0].v[j.value] = next[0].v[j.value] = V::zero();
        prev[1].v[j.value] = load_lanes<V>(at.before + unit, lanes[j.value]);
        next[1].v[j.value] = load_lanes<V>(at.cells + unit, lanes[j.value]);
      } else {
        prev[0].v[j.value] = Elements::load(at.before + unit, lanes[j.value]);
        next[0].v[j.value] = Elements::load(at.y + unit, lanes[j.value]);
      }
    });
    if constexpr (!kBlends) {
      backward_cell<Cell>(d_next, saved, prev, next, d, d_prev, parameters);
    } else {
      W stayed[Cell::kStates];
      unblend<K>(at, first, lanes, saved, prev, next, d_next, stayed);
      backward_cell<Cell>(d_next, saved, prev, next, d, d_prev, parameters);
      unroll<Cell::kStates>(
          [&](auto s) __attribute__((always_inline)) { d_prev[s.value] = d_prev[s.value] + stayed[s.value]; });
    }
    W unprojected;
    if constexpr (Cell::kProjects) {
      if (at.cell_h) unprojected = Cell::unprojected(saved, next);
    }
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      const int64_t unit = first + j.value * L;
      unroll<Cell::kStored>([&](auto k) __attribute__((always_inline)) {
        Elements::store(d[k.value].v[j.value], at.d_gates + k.value * H + unit, lanes[j.value]);
      });
      if constexpr (Elements::kRounds) {
        if (unit + L >= H) {  // what a block of terms reads past the last gate
          for (int64_t k = Cell::kStored * H; k < d_row_; ++k) at.d_gates[k] = Element{};
        }
      }
      if (at.d_state) d_prev[0].v[j.value].store(at.d_state + unit);
      if constexpr (Cell::kStates == 2) d_prev[1].v[j.value].store(at.d_c + unit);
      if constexpr (Cell::kProjects) {
        if (at.cell_h) Elements::store(unprojected.v[j.value], at.cell_h + unit, lanes[j.value]);
      }
    });
  }

  // Zoneout backwards: next becomes what the cell had made, d_next its gradient, stayed what goes past the cell.
  template <int K, class W>
  inline __attribute__((always_inline)) void unblend(const Row& at, int64_t first, const int* lanes, const W* saved,
                                                     const W* prev, W* next, W* d_next, W* stayed) const {
    W keep[Cell::kStates];
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      unroll<Cell::kStates>([&](auto s) __attribute__((always_inline)) {
        const Strided& zoneout = s.value == 0 ? layer_.zoneout_h : layer_.zoneout_c;
        // Of h only without a projection: R = H.
        const int64_t column = task_.direction * layer_.H + first + j.value * L;
        const bool blended = zoneout.data && !(s.value == 0 && layer_.P);
        keep[s.value].v[j.value] = blended ? kept(zoneout, at.t, at.row, column, lanes[j.value]) : V::zero();
      });
    });
    unroll<Cell::kStates>([&](auto s) __attribute__((always_inline)) {
      stayed[s.value] = keep[s.value] * d_next[s.value];
      d_next[s.value] = (W::one() - keep[s.value]) * d_next[s.value];
    });
    if constexpr (Cell::kStates == 2) {
      if (layer_.zoneout_c.data) Cell::candidate(saved, prev, next);
    } else if constexpr (Cell::kSaved == 0) {
      // Where all of it stayed, 0 / tiny: whatever the candidate was, its gradient is 0.
      const W tiny = W::broadcast(Scalar(1e-30));
      next[0] = W::divide(next[0] - keep[0] * prev[0], W::max(W::one() - keep[0], tiny));
    }
  }

  // Rows [from, to) have reached their initial state.
  void finish(int64_t from, int64_t to) {
    reset_cells(from, to);
    const bool wanted = backward_.d_h0 || (rows_.resets() && backward_.d_reset_h);
    for (int64_t p = first_panel_; wanted && p < last_panel_; ++p) {
      const int nv = static_cast<int>(states_.width(p));
      for (int64_t first = from, end; first < to; first = end) {
        end = to - first < kBufferRows ? to : first + kBufferRows;
        static_cast<Sweep&>(*this).recur_rows(first, end, p);
        settle(first, end, p, buffer_);
        if (!backward_.d_h0) continue;
        for (int64_t row = first; row < end; ++row) {
          for (int v = 0; v < nv; ++v) {
            const int64_t unit = (states_.first(p) + v) * L;
            const V d_h =
                V::load(buffer_ + ((row - first) * nv + v) * L) + V::load(in(task_.d_state) + row * state_row_ + unit);
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
  const int64_t r_;              // width of h
  const Panels states_, units_;  // over h, and over the units of the cell: the same without a projection
  const int64_t state_row_, c_row_, y_row_, d_row_, d_h_row_;
  int64_t pack_first_, pack_last_, first_panel_, last_panel_, t_before_ = 0;
  bool asks_rows_ = core.asks_rows;  // differentiate() asks for what the next row is read from
  alignas(64) Scalar buffer_[kBufferRows * 4 * L];
};

}  // namespace cpu
}  // namespace fastrnn
