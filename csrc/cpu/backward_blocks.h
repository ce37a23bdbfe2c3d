// SPDX-License-Identifier: BSD-3-Clause
// The backward sweep of one direction with products in bfloat16: x, y, h0, d_y, the weights and the gradients of the
// gates are bfloat16; sums, gradients of the states and the derivative of the cell float. One instance per cell and
// instruction set. Time loop, states and the derivative are those of backward_steps.h.
#pragma once
#include "backward_steps.h"
#include "blocks.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V, class Blocks>
class BackwardBlockSweep : public BackwardSteps<BackwardBlockSweep<Cell, V, Blocks>, Cell, V, Blocks> {
  using Steps = BackwardSteps<BackwardBlockSweep<Cell, V, Blocks>, Cell, V, Blocks>;
  friend Steps;
  using Steps::buffer_, Steps::d_h_row_, Steps::d_row_, Steps::first_panel_, Steps::forward_, Steps::last_panel_;
  using Steps::differentiate, Steps::elements, Steps::recurs, Steps::settle;
  using Steps::G, Steps::L, Steps::kBufferRows;
  using Steps::layer_, Steps::units_;
  using Steps::pack_first_, Steps::pack_last_, Steps::r_, Steps::rows_, Steps::states_, Steps::t_before_, Steps::task_;
  static_assert(L == kBlockLanes && kBufferRows % kRowsAtOnce == 0);

 public:
  explicit BackwardBlockSweep(const BackwardTask& task)
      : Steps(task, gate_gradients_row(Cell::kStored, task.layer->forward.H)) {}

  void end() { blocks_.end(); }

 private:
  const Bfloat16* panel(int64_t p) const {
    return elements(task_.w_hh) + states_.first(p) * L * in_blocks(G * layer_.H);
  }

  void pack() {
    if constexpr (Cell::kProjects) pack_projection();
    if (!recurs()) return;
    const Bfloat16* w_hh = elements(forward_.w_hh);
    const int64_t H = layer_.H;
    pack_column_blocks<Blocks>(
        [&](int64_t k) {
          const int64_t gate = k / H;
          return w_hh + (Cell::recurrent_gate(static_cast<int>(gate)) * H + (k - gate * H)) * r_;
        },
        G * H, states_, pack_first_, pack_last_, const_cast<Bfloat16*>(panel(pack_first_)));
  }

  void pack_projection() {
    const int64_t member = task_.team.member, members = task_.team.members;
    const int64_t first = units_.count * member / members, last = units_.count * (member + 1) / members;
    if (layer_.P) {
      pack_column_blocks<Blocks>([&](int64_t k) { return elements(forward_.w_hr) + k * layer_.H; }, layer_.P, units_,
                                 first, last, elements(task_.w_hr) + units_.first(first) * L * d_h_row_);
    }
  }

  void recur_rows(int64_t from, int64_t to, int64_t p) { recur_rows(from, to, p, p, from, to); }

  // sums = d_r[t_before] * W_hh for rows [from, to) of all [first, last) of a step, and panel p; `next`: the panel
  // fetched meanwhile, p for none.
  void recur_rows(int64_t from, int64_t to, int64_t p, int64_t next, int64_t first, int64_t last) {
    const int64_t nv = states_.width(p);
    BlockTerms d{};
    d.k = G * layer_.H;
    d.a_row = d_row_ * rows_.stride();
    d.w = panel(p);
    d.a = elements(task_.d_gates) + Cell::kRecurrent * layer_.H;
    multiply_rows(d, d_row_, t_before_, nv, next == p ? nullptr : panel(next), from, to, first, last);
  }

  // sums = d_h[t] * W_hr for rows [from, to) of n, and panel p of units.
  void unproject_rows(int64_t t, int64_t from, int64_t to, int64_t p, int64_t next, int64_t n) {
    const auto place = [&](int64_t q) { return elements(task_.w_hr) + units_.first(q) * L * d_h_row_; };
    BlockTerms d{};
    d.k = layer_.P;
    d.a_row = d_h_row_ * rows_.stride();
    d.w = place(p);
    d.a = elements(task_.d_h);
    multiply_rows(d, d_h_row_, t, units_.width(p), next == p ? nullptr : place(next), from, to, 0, n);
  }

  // The product of rows [from, to) of all [first, last) of step t, of which d.a has one every `size` elements.
  void multiply_rows(const BlockTerms& d, int64_t size, int64_t t, int64_t nv, const Bfloat16* next, int64_t from,
                     int64_t to, int64_t first, int64_t last) {
    BlockArgs args{};
    args.terms[0] = d;
    args.init = zeros_;
    args.out_row = nv * L;
    args.room = static_cast<int>(last - first < kBlockRows ? last - first : kBlockRows);
    for (int64_t row = from; row < to; row += kRowsAtOnce) {
      args.rows = static_cast<int>(to - row < kRowsAtOnce ? to - row : kRowsAtOnce);
      args.terms[0].a = d.a + rows_.packed(t, row) * size;
      fetch_ahead(args.terms[0], nv, next, row - first, last - first);
      args.out = buffer_ + (row - from) * nv * L;
      blocks_.multiply(args, static_cast<int>(nv));
    }
  }

  void step(int64_t s, int64_t t, int64_t both, int64_t n) {
    if constexpr (Cell::kProjects) {
      if (layer_.P) {
        this->gather_d_h(t, 0, both, true);
        this->gather_d_h(t, both, n, false);
        return rows(s, t, 0, n, true);
      }
    }
    rows(s, t, 0, both, true);
    rows(s, t, both, n, false);
  }

  // Rows [from, to) of one step; `active`: they took part in the step after it. Panels in alternating order.
  void rows(int64_t s, int64_t t, int64_t from, int64_t to, bool active) {
    const Panels& panels = layer_.P ? units_ : states_;
    const int64_t begin_panel = layer_.P ? 0 : first_panel_, end_panel = layer_.P ? units_.count : last_panel_;
    for (int64_t j = begin_panel; from < to && j < end_panel; ++j) {
      const int64_t p = s & 1 ? begin_panel + end_panel - 1 - j : j, next = s & 1 ? p - 1 : p + 1;
      const int64_t nv = panels.width(p), follows = j + 1 < end_panel ? next : p;
      for (int64_t begin = from, end; begin < to; begin = end) {
        end = to - begin < kBufferRows ? to : begin + kBufferRows;
        if (layer_.P) {
          unproject_rows(t, begin, end, p, follows, to);
        } else if (active) {
          recur_rows(begin, end, p, follows, from, to);
          settle(begin, end, p, buffer_);
        } else {
          for (int64_t k = 0; k < (end - begin) * nv * L; ++k) buffer_[k] = 0;
        }
        differentiate(t, begin, end, p);
      }
    }
  }

  Blocks blocks_;
  alignas(64) float zeros_[4 * kBlockLanes] = {};
};

template <class Cell, class V, class Blocks>
void backward_blocks(const BackwardTask& task) {
  BackwardBlockSweep<Cell, V, Blocks> sweep(task);
  sweep.run();
  sweep.end();
}

}  // namespace cpu
}  // namespace fastrnn
