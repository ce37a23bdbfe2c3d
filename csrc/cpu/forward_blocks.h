// SPDX-License-Identifier: BSD-3-Clause
// The forward sweep of one direction with products in bfloat16: x, y, h0 and the weights are bfloat16; sums, input
// gates, states and the cell float; h is rounded where the next product reads it. One instance per cell and instruction
// set. Time loop, states and the cell are those of forward_steps.h.
#pragma once
#include "blocks.h"
#include "forward_steps.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V, class Blocks>
class ForwardBlockSweep : public ForwardSteps<ForwardBlockSweep<Cell, V, Blocks>, Cell, V, Blocks> {
  using Steps = ForwardSteps<ForwardBlockSweep<Cell, V, Blocks>, Cell, V, Blocks>;
  friend Steps;
  using Steps::buffer_, Steps::chunk_rows_, Steps::direction_, Steps::first_panel_, Steps::first_unit_;
  using Steps::G, Steps::L, Steps::kBufferRows, Steps::in, Steps::out, Steps::elements, Steps::activate;
  using Steps::last_panel_, Steps::layer_, Steps::pack_first_, Steps::pack_last_, Steps::r_, Steps::rows_, Steps::task_;
  using Steps::units_, Steps::whole_, Steps::x_gates, Steps::x_gates_row_, Steps::kSummed;
  static_assert(L == kBlockLanes && kBufferRows % kBlockRows == 0);
  static constexpr int64_t kRowBytes = 256 * 1024, kKeptBytes = 1280 * 1024;

 public:
  // One sum where the rows of a step are enough for W_ih, or fill a block and the weights stay in the cache from step
  // to step.
  explicit ForwardBlockSweep(const ForwardTask& task)
      : Steps(task),
        one_sum_(kSummed && (rows_.count() >= 64 ||
                             (rows_.count() > kBlockRows / 2 && G * layer_.H * (r_ + layer_.I) * 2 <= kKeptBytes))) {
    x_gates_row_ += 16;  // rows of whole pages would share one set of the cache: 16 rows of a tile do not fit it
  }

  void end() { blocks_.end(); }

 private:
  int64_t panel(int64_t p, int64_t k) const { return units_.first(p) * G * L * in_blocks(k); }

  void pack() {
    if (layer_.P) clear_unprojected();
    if (task_.packed) return;
    pack_gate_blocks<Blocks, G>(elements(direction_.w_ih), layer_.I, units_, pack_first_, pack_last_,
                                elements(task_.w_ih) + panel(pack_first_, layer_.I));
    pack_gate_blocks<Blocks, G>(elements(direction_.w_hh), r_, units_, pack_first_, pack_last_,
                                elements(task_.w_hh) + panel(pack_first_, r_));
    pack_bias<V, G>(in(direction_.b_ih), units_, pack_first_, pack_last_, out(task_.b_ih));
    pack_bias<V, G>(in(direction_.b_hh), units_, pack_first_, pack_last_, out(task_.b_hh));
    if constexpr (Cell::kProjects) {
      if (layer_.P) pack_projection();
    }
  }

  void pack_projection() {
    const int64_t count = Panels(layer_.P, L, 4).count, member = task_.team.member, members = task_.team.members;
    const int64_t first = count * member / members, last = count * (member + 1) / members;
    pack_projection_blocks<Blocks>(layer_, task_.direction, first, last, task_.w_hr);
  }

  // Past H, where the product of a projection reads whole blocks.
  void clear_unprojected() {
    for (int64_t row = 0; row < rows_.count(); ++row) {
      Bfloat16* const m = elements(task_.cell_h) + row * in_blocks(layer_.H);
      for (int64_t j = layer_.H; j < in_blocks(layer_.H); ++j) m[j] = Bfloat16{};
    }
  }

  // x_gates = W_ih x + b_ih for the steps from s on that fit a chunk; returns the step after them.
  int64_t project(int64_t s) {
    if (one_sum_) return layer_.T;
    const int64_t end = this->next_chunk(s);
    const int64_t t0 = rows_.reversed() ? rows_.time(end - 1) : s, t1 = t0 + (end - s);
    BlockArgs args{};
    BlockTerms& x = args.terms[0];
    x.k = layer_.I;
    const Bfloat16* rows = nullptr;
    if (layer_.I % kBlockTerms == 0) rows = rows_.template x_at_one_stride<Bfloat16>(t0, t1, &x.a_row);
    if (!rows) {
      x.a_row = in_blocks(layer_.I);
      rows = this->gather_x(t0, t1, x.a_row);
    }
    args.out_row = x_gates_row_;
    const int64_t fit = kRowBytes / (in_blocks(layer_.I + 1) * 2) / kBlockRows * kBlockRows;
    const int64_t together = fit < 4 * kBlockRows ? 4 * kBlockRows : fit;
    args.room = static_cast<int>(chunk_rows_ < kBlockRows ? chunk_rows_ : kBlockRows);
    for (int64_t begin = 0; begin < chunk_rows_; begin += together) {
      const int64_t stop = begin + together < chunk_rows_ ? begin + together : chunk_rows_;
      for (int64_t p = first_panel_; p < last_panel_; ++p) {
        const int64_t gates = units_.first(p) * G * L;
        const int nv = static_cast<int>(units_.width(p)) * G;
        args.init = in(task_.b_ih) + gates;
        for (int64_t row = begin; row < stop; row += args.rows) {
          // The last rows are computed together with some before them: once more, to the same bits.
          const int64_t first = row + args.room <= chunk_rows_ ? row : chunk_rows_ - args.room;
          args.rows = stop - row >= kRowsAtOnce ? kRowsAtOnce : args.room;
          x.a = rows + first * x.a_row;
          weights(x, task_.w_ih, layer_.I, p, p + 1 < last_panel_ ? p + 1 : p, row - begin, stop - begin);
          args.out = out(task_.x_gates) + first * x_gates_row_ + gates - first_unit_ * G;
          blocks_.multiply(args, nv);
        }
      }
    }
    return end;
  }

  // Panel p of w, for the tile at `row` of n rows, which fetches its share of the panel that follows, if there is one.
  void weights(BlockTerms& terms, const void* w, int64_t k, int64_t p, int64_t next, int64_t row, int64_t n) const {
    terms.w = elements(w) + panel(p, k);
    fetch_ahead(terms, units_.width(p) * G, next == p ? nullptr : elements(w) + panel(next, k), row, n);
  }

  // The n rows of x at time t, in the order of the states, with as many rows more to read as a tile may want.
  const Bfloat16* x_of_step(int64_t t, int64_t n, int64_t* row) {
    if (layer_.I % kBlockTerms == 0 && !layer_.order && (n < kBlockRows || n % kBlockRows == 0)) {
      if (const Bfloat16* x = rows_.template x_at_one_stride<Bfloat16>(t, t + 1, row)) return x;
    }
    *row = in_blocks(layer_.I);
    return this->gather_x(t, t + 1, *row);
  }

  // One step of n rows, whose input gates begin at row `at` of the chunk; panels in alternating order. Few rows:
  // several panels before the cell, as in forward.h several tiles.
  void step(int64_t s, int64_t t, int64_t n, int64_t at) {
    if (n == 0) return;
    const int which = s & 1;
    BlockArgs args{};
    BlockTerms &x = args.terms[0], &h = args.terms[1];
    const Bfloat16* const x_rows = one_sum_ ? x_of_step(t, n, &x.a_row) : nullptr;
    if (one_sum_) x.k = layer_.I;
    h.k = r_;
    h.a_row = in_blocks(r_);
    args.room = static_cast<int>(n < kBlockRows ? n : kBlockRows);
    const int64_t most = n <= kBlockRows ? kBufferRows / kBlockRows : 1, panels = last_panel_ - first_panel_;
    const int64_t groups = (panels + most - 1) / most;
    for (int64_t j = 0; j < groups; ++j) {
      const int64_t p0 = first_panel_ + (which ? groups - 1 - j : j) * most;
      const int64_t p1 = p0 + most < last_panel_ ? p0 + most : last_panel_;
      const int64_t block = units_.first(p0), blocks = units_.first(p1) - block;
      args.out_row = blocks * G * L;
      for (int64_t begin = 0, stop; begin < n; begin = stop) {
        stop = n - begin < kRowsAtOnce ? n : begin + kRowsAtOnce;
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t next = which ? p - 1 : p + 1;
          const int64_t follows = next >= first_panel_ && next < last_panel_ && most == 1 ? next : p;
          for (int64_t row = begin; row < stop; row += kRowsAtOnce) {
            args.rows = static_cast<int>(stop - row < kRowsAtOnce ? stop - row : kRowsAtOnce);
            args.out = buffer_ + (row - begin) * args.out_row + (units_.first(p) - block) * G * L;
            start(args, one_sum_, at, row, p);
            if (one_sum_) {
              x.a = x_rows + row * x.a_row;
              weights(x, task_.w_ih, layer_.I, p, follows, row, n);
            }
            h.a = elements(task_.masked_h[which]) + row * h.a_row;
            weights(h, task_.w_hh, r_, p, follows, row, n);
            blocks_.multiply(args, static_cast<int>(units_.width(p)) * G);
          }
        }
        activate(t, begin, static_cast<int>(stop - begin), block, static_cast<int>(blocks), at, which);
      }
    }
    if constexpr (Cell::kProjects) {
      if (layer_.P) project_h(t, n, which);
    }
  }

  // h = W_hr * (o * tanh(c)), which is rounded
  void project_h(int64_t t, int64_t n, int which) {
    const Panels panels(layer_.P, L, 4);
    const Bfloat16* const w_hr = elements(task_.w_hr);
    const int64_t row_size = in_blocks(layer_.H);
    BlockArgs args{};
    BlockTerms& m = args.terms[0];
    m.k = layer_.H;
    m.a_row = row_size;
    args.init = zeros_;
    args.out = buffer_;
    args.room = static_cast<int>(n < kBlockRows ? n : kBlockRows);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int nv = static_cast<int>(panels.width(p));
      const bool more = p + 1 < panels.count;
      args.out_row = nv * L;
      m.w = w_hr + panels.first(p) * L * row_size;
      for (int64_t row = 0; row < n; row += kRowsAtOnce) {
        args.rows = static_cast<int>(n - row < kRowsAtOnce ? n - row : kRowsAtOnce);
        m.a = elements(task_.cell_h) + row * row_size;
        fetch_ahead(m, nv, more ? w_hr + panels.first(p + 1) * L * row_size : nullptr, row, n);
        blocks_.multiply(args, nv);
        this->take_projected(t, row, row + args.rows, panels.first(p) * L, nv, which);
      }
    }
  }

  // What the sums of a step start from: the bias, or the input gates where the cell knows the sum of both alone.
  void start(BlockArgs& args, bool one_sum, int64_t at, int64_t row, int64_t p) const {
    const int64_t unit = units_.first(p) * L, width = units_.width(p) * G * L;
    args.init = in(kSummed ? task_.b_ih : task_.b_hh) + unit * G;
    args.init_row = 0;
    if (!kSummed) {
      for (int q = 0; q < args.rows; ++q) fetch(x_gates(at, row + q, unit), width);
    } else if (!one_sum && whole_) {  // in the order of the batch: brought into that of the states
      for (int q = 0; q < args.rows; ++q) {
        __builtin_memcpy(args.out + q * args.out_row, x_gates(at, row + q, unit), static_cast<size_t>(width) * 4);
      }
      args.init = args.out;
      args.init_row = args.out_row;
    } else if (!one_sum) {
      args.init = x_gates(at, row, unit);
      args.init_row = x_gates_row_;
    }
  }

  const bool one_sum_;  // input and recurrent gates are summed together, step by step
  Blocks blocks_;
  alignas(64) float zeros_[4 * kBlockLanes] = {};
};

template <class Cell, class V, class Blocks>
void forward_blocks(const ForwardTask& task) {
  ForwardBlockSweep<Cell, V, Blocks> sweep(task);
  sweep.run();
  sweep.end();
}

}  // namespace cpu
}  // namespace fastrnn
