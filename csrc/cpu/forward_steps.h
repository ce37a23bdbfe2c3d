// SPDX-License-Identifier: BSD-3-Clause
// What every forward sweep does around its products: the time loop, the states of the rows, and the cell with its sums
// in registers. The products are those of the derived class: forward.h, forward_blocks.h. The cell is known here by its
// constants only.
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
//   pack()          lays out the weights, this thread's share
//   project(s)      the input gates of the steps from s on that fit a chunk, unless step() computes them; the step
//                   after them
//   step(s, t, n, at)   the product of one step of n rows, whose input gates begin at row `at` of the chunk; calls
//                   activate() on what it leaves in buffer_
template <class Sweep, class Cell, class V, class Elements>
class ForwardSteps {
 protected:
  using Scalar = typename V::Scalar;
  using Element = typename Elements::Element;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  static constexpr int kBufferRows = 64;  // 16 KiB of sums: in the first-level cache beside a part of a panel
  // Pieces of the cell's math side by side, so that one waits for another's divisions. Four are no faster, for no cell
  // (H 64 and 128, Ice Lake).
  static constexpr int kAtOnce = V::kRegisters >= 32 ? 2 : 1;
  static constexpr bool kConverts = !Elements::kRounds && sizeof(Scalar) == 4;  // LayerForward::conversion, if given
  // Where a cell has one gradient for both, it knows x and r as their sum alone: products in bfloat16 then go on from
  // the input gates to the recurrent ones in one sum, to which the cell adds b_hh.
  static constexpr bool kSummed = Elements::kRounds && Cell::kInput == Cell::kRecurrent;

  explicit ForwardSteps(const ForwardTask& task)
      : task_(task),
        layer_(*task.layer),
        direction_(task.layer->direction[task.direction]),
        rows_(*task.layer, task.direction, task.team, task.first_row),
        units_(layer_.H, L, kForwardPanel<Cell>),
        r_(layer_.P ? layer_.P : layer_.H),
        h_row_(padded(r_)),
        c_row_(padded(layer_.H)),
        y_row_(layer_.D * r_),
        noisy_(direction_.h_mask || layer_.zoneout_h.data || layer_.zoneout_c.data) {
    const int64_t member = task.team.member, members = task.team.members;
    pack_first_ = units_.count * member / members;
    pack_last_ = units_.count * (member + 1) / members;
    first_panel_ = task.team.split_units ? pack_first_ : 0;
    last_panel_ = task.team.split_units ? pack_last_ : units_.count;
    first_unit_ = units_.first(first_panel_) * L;
    end_unit_ = units_.first(last_panel_) * L;
    x_gates_row_ = (end_unit_ - first_unit_) * G;
  }

 public:
  void run() {
    Sweep& sweep = static_cast<Sweep&>(*this);
    sweep.pack();
    load_states();
    reset_states(0);
    wait(task_.team);
    for (int64_t s = 0; s < layer_.T;) {
      const int64_t end = sweep.project(s);
      int64_t at = rows_.reversed() ? chunk_rows_ : 0;
      for (; s < end; ++s) {
        const int64_t t = rows_.time(s), n = rows_.active(t);
        if (rows_.reversed()) at -= n;
        if (n > 0 && task_.team.members > 1 && !task_.team.split_units) {
          const int64_t first = rows_.index(t, 0), column = task_.direction * r_;
          fetch_results<Cell, Scalar, Element>(layer_, direction_, first, n, column, y_row_, c_row_);
        }
        sweep.step(s, t, n, at);
        if (layer_.conversion) narrow_y(t, n, (s & 1) ^ 1);
        if (!rows_.reversed()) at += n;
        if (s + 1 < layer_.T) reset_states(s + 1);
        if (task_.team.split_units) {
          wait(task_.team);
          const Element* const h = elements(task_.masked_h[(s & 1) ^ 1]);
          fetch_others(h, n, Elements::kRounds ? in_blocks(r_) : h_row_, r_, first_unit_, end_unit_);
        }
        const int64_t stay = s + 1 < layer_.T ? rows_.active(rows_.time(s + 1)) : 0;
        if (stay < n) store_states(stay, n, (s + 1) & 1);
      }
    }
  }

 protected:
  static const Scalar* in(const void* p) { return static_cast<const Scalar*>(p); }
  static Scalar* out(void* p) { return static_cast<Scalar*>(p); }
  static const Element* elements(const void* p) { return static_cast<const Element*>(p); }
  static Element* elements(void* p) { return static_cast<Element*>(p); }
  Given<Element> given(const void* p) const { return {p, layer_.conversion}; }

  // Takes as many steps from s on as fit a chunk; returns the step after them. A chunk holds its rows in ascending
  // time, whichever way the sweep runs.
  int64_t next_chunk(int64_t s) {
    int64_t end = s;
    chunk_rows_ = 0;
    whole_ = rows_.whole(rows_.time(s));
    do {
      chunk_rows_ += rows_.active(rows_.time(end++));
    } while (end < layer_.T && chunk_rows_ + rows_.active(rows_.time(end)) <= task_.chunk_rows &&
             rows_.whole(rows_.time(end)) == whole_);
    return end;
  }

  // The rows of x of times [t0, t1) one behind the other, row_size apart, in the scratch; zero past I.
  const Element* gather_x(int64_t t0, int64_t t1, int64_t row_size) {
    whole_ = false;  // they lie in the order of the states
    Element* to = elements(task_.x_rows);
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t n = rows_.active(t);
      for (int64_t row = 0; row < n; ++row, to += row_size) {
        if constexpr (kConverts) {
          if (layer_.conversion) {
            layer_.conversion->widen(rows_.template x<uint16_t>(t, row), to, layer_.I);
            continue;
          }
        }
        const Element* from = rows_.template x<Element>(t, row);
        for (int64_t k = 0; k < layer_.I; ++k) to[k] = from[k];
        for (int64_t k = layer_.I; k < row_size; ++k) to[k] = Element{};
      }
    }
    return elements(task_.x_rows);
  }

  // A row that enters late (reverse, ragged) finds its state in either buffer; so do operands in bfloat16, whose end is
  // zero in both.
  void load_states() {
    const int64_t active = rows_.active(rows_.time(0));
    for (int64_t row = 0; row < rows_.count(); ++row) {
      const int64_t b = rows_.batch(row);
      const Scalar* c0 = Cell::kStates == 2 ? in(direction_.c0) + b * layer_.H : nullptr;
      const int buffers = Elements::kRounds || row >= active ? 2 : 1;
      for (int which = 0; which < buffers; ++which) load_state(row, which, given(direction_.h0).at(b * r_), c0);
    }
  }

  // Before the s-th step of the sweep: the rows whose state is replaced then.
  void reset_states(int64_t s) {
    const int64_t t = rows_.time(s), n = rows_.active(t);
    if (!rows_.resets(t)) return;
    for (int64_t row = 0; row < n; ++row) {
      if (!rows_.reset(t, row)) continue;
      const void* h = given(direction_.reset_h).at(rows_.replacement(row, r_));
      const Scalar* c = nullptr;
      if (Cell::kStates == 2) c = in(direction_.reset_c) + rows_.replacement(row, layer_.H);
      load_state(row, s & 1, h, c);
    }
  }

  void load_state(int64_t row, int which, const void* h, const Scalar* c) {
    Scalar* state = out(task_.h[which]) + row * h_row_;
    load_h(h, state);
    if constexpr (Elements::kRounds) {
      for (int64_t j = first_state(); j < end_state(); j += L) {
        const int lanes = r_ - j < L ? static_cast<int>(r_ - j) : L;
        store_operand(V::load(state + j), row, j, lanes, L, which);
      }
      if (end_state() == h_row_) {
        Element* operand = elements(task_.masked_h[which]) + row * in_blocks(r_);
        for (int64_t j = h_row_; j < in_blocks(r_); ++j) operand[j] = Element{};
      }
    } else if (direction_.h_mask) {
      const Scalar* mask = in(direction_.h_mask) + rows_.batch(row) * r_;
      Scalar* masked = out(task_.masked_h[which]) + row * h_row_;
      for (int64_t j = first_state(); j < end_state() && j < r_; ++j) masked[j] = state[j] * mask[j];
    }
    if (Cell::kStates == 2) {
      load_row<V>(c, layer_.H, first_unit_, end_unit_, out(task_.c) + row * c_row_);
    }
  }

  // This thread's columns of a row of elements into the state.
  void load_h(const void* h, Scalar* state) const {
    const int64_t first = first_state(), end = end_state();
    if constexpr (kConverts) {
      if (layer_.conversion) {
        layer_.conversion->widen(static_cast<const uint16_t*>(h) + first, state + first, (end < r_ ? end : r_) - first);
        for (int64_t j = first > r_ ? first : r_; j < end; ++j) state[j] = 0;
        return;
      }
    }
    load_row<V>(elements(h), r_, first, end, state);
  }

  // h after the step at time t, of n rows, into y: this thread's columns.
  void narrow_y(int64_t t, int64_t n, int which) const {
    if constexpr (kConverts) {
      const int64_t first = first_state(), end = end_state() < r_ ? end_state() : r_;
      const Scalar* const h = in(task_.h[which]) + first;
      uint16_t* const y = static_cast<uint16_t*>(layer_.y) + task_.direction * r_ + first;
      for (int64_t row = 0; row < n; ++row) {
        layer_.conversion->narrow(h + row * h_row_, y + rows_.index(t, row) * y_row_, end - first);
      }
    }
  }

  // Rows that have taken their last step hand over their state.
  void store_states(int64_t from, int64_t to, int which) {
    for (int64_t row = from; row < to; ++row) {
      const int64_t b = rows_.batch(row);
      store_row<V>(in(task_.h[which]) + row * h_row_, r_, first_state(), end_state(), out(direction_.h_n) + b * r_);
      if (Cell::kStates == 2) {
        store_row<V>(in(task_.c) + row * c_row_, layer_.H, first_unit_, end_unit_, out(direction_.c_n) + b * layer_.H);
      }
    }
  }

  // With a projection a team never splits units.
  int64_t first_state() const { return layer_.P ? 0 : first_unit_; }
  int64_t end_state() const { return layer_.P ? h_row_ : end_unit_; }
  // The math of the cell for m rows and `blocks` unit blocks; r waits in buffer_.
  void activate(int64_t t, int64_t first, int m, int64_t block, int blocks, int64_t at, int which) {
    if (noisy_) {
      activate_rows<1, true>(t, first, m, block, blocks, at, which);
    } else {
      activate_rows<kAtOnce, false>(t, first, m, block, blocks, at, which);
    }
  }

  // The input gates of a row from `unit` on, in a chunk where those of its step begin at row `at`.
  const Scalar* x_gates(int64_t at, int64_t row, int64_t unit) const {
    return in(task_.x_gates) + (at + (whole_ ? rows_.batch(row) : row)) * x_gates_row_ + (unit - first_unit_) * G;
  }

  using Places = ForwardPlaces<Scalar, Element>;

  // Pieces (a vector of units of one row) are taken kTogether at a time: rows of one block, or blocks of a single row.
  // Noisy: with zoneout or a mask on h, which nobody else shall pay for.
  template <int kTogether, bool kNoisy>
  __attribute__((noinline)) void activate_rows(int64_t t, int64_t first, int m, int64_t block, int blocks, int64_t at,
                                               int which) {
    Places places{};
    places.r = buffer_;
    places.x = in(task_.x_gates) + at * x_gates_row_, places.x_unit = first_unit_;
    places.h_before = in(task_.h[which]), places.h_after = out(task_.h[which ^ 1]);
    places.c = out(task_.c), places.cells = out(direction_.cells), places.gates = out(direction_.gates);
    places.y = layer_.conversion ? nullptr : elements(layer_.y) + task_.direction * r_;
    places.operand = elements(task_.masked_h[which ^ 1]);
    places.t = t, places.which = which, places.first = first, places.unit = block * L, places.r_row = blocks * G * L;
    places.H = layer_.H, places.h_row = h_row_, places.c_row = c_row_, places.x_row = x_gates_row_;
    places.y_row = y_row_, places.index = rows_.index(t, first), places.index_stride = rows_.stride();
    places.ordered = layer_.order != nullptr, places.whole = whole_, places.projected = layer_.P != 0;
    if (m == 1) {
      activate_run<kTogether, kNoisy>(places, first, block * L, blocks, 0, L);
      return;
    }
    for (int k = 0; k < blocks; ++k) {
      const int64_t unit = (block + k) * L;
      if constexpr (!kNoisy && kHasLines) {
        const bool saves = places.gates || places.cells;
        if (is_line<Cell, V>(places, unit, saves)) {
          if (saves) {
            activate_line<Cell, V, true>(places, unit, m);
          } else {
            activate_line<Cell, V, false>(places, unit, m);
          }
          continue;
        }
      }
      activate_run<kTogether, kNoisy>(places, first, unit, m, 1, 0);
    }
  }

  static constexpr bool kHasLines = !Elements::kRounds && Cell::kParameters == 0;

  // n pieces, of which the next is row_step rows and unit_step units on.
  template <int K, bool kNoisy>
  inline __attribute__((always_inline)) void activate_run(const Places& places, int64_t row, int64_t unit, int n,
                                                          int64_t row_step, int64_t unit_step) {
    int j = 0;
    for (; j + K <= n; j += K) {
      activate_pieces<K, kNoisy>(places, row, unit, row_step, unit_step);
      row += K * row_step, unit += K * unit_step;
    }
    if constexpr (K > 1) {
      if (j < n) activate_pieces<1, kNoisy>(places, row, unit, row_step, unit_step);
    }
  }

  // Zoneout of lanes [unit, unit + lanes) of one row: `keep` of `before` stays. Two products and a sum, none fused, so
  // that backward finds a candidate of zero exactly.
  V blend(const Strided& keep, int64_t t, int64_t row, int64_t column, int lanes, V before, V candidate) const {
    const V kept = load_lanes<V>(rows_.template at<Scalar>(keep, t, row) + column, lanes);
    return kept * before + (V::one() - kept) * candidate;
  }

  // What the product with W_hh reads of h: times the mask, if there is one, and rounded. A product in bfloat16 reads
  // whole blocks: the zeros past the last unit come with the initial state, of which all lanes are stored, and stay; an
  // infinite x makes NaN of the lanes that pad a cell.
  inline __attribute__((always_inline)) void store_operand(V h, int64_t row, int64_t unit, int lanes, int stored,
                                                           int which) const {
    if (direction_.h_mask) {
      h = h * load_lanes<V>(in(direction_.h_mask) + rows_.batch(row) * r_ + unit, lanes);
    }
    if constexpr (Elements::kRounds) {
      Elements::store(h, elements(task_.masked_h[which]) + row * in_blocks(r_) + unit, stored);
    } else {
      h.store(out(task_.masked_h[which]) + row * h_row_ + unit);
    }
  }

  // What W_hr multiplies.
  inline __attribute__((always_inline)) void store_unprojected(V m, int64_t row, int64_t unit, int lanes) const {
    if constexpr (Elements::kRounds) {
      Elements::store(m, elements(task_.cell_h) + row * in_blocks(layer_.H) + unit, lanes);
    } else {
      m.store(out(task_.cell_h) + row * c_row_ + unit);
    }
  }

  // h of rows [first, end) after a projection, units from `unit` on: nv vectors of each row wait in buffer_.
  void take_projected(int64_t t, int64_t first, int64_t end, int64_t unit, int nv, int which) {
    for (int64_t row = first; row < end; ++row) {
      const int64_t y = rows_.index(t, row) * y_row_ + task_.direction * r_;
      for (int v = 0; v < nv; ++v) {
        const int64_t left = r_ - (unit + v * L), at = unit + v * L;
        const int lanes = left < L ? static_cast<int>(left) : L;
        V h = V::load(buffer_ + ((row - first) * nv + v) * L);
        if (layer_.zoneout_h.data) {
          const V before = V::load(in(task_.h[which]) + row * h_row_ + at);
          h = blend(layer_.zoneout_h, t, row, task_.direction * r_ + at, lanes, before, h);
        }
        h.store(out(task_.h[which ^ 1]) + row * h_row_ + at);
        if (!layer_.conversion) Elements::store(h, elements(layer_.y) + y + at, lanes);
        if (Elements::kRounds || direction_.h_mask) store_operand(h, row, at, lanes, lanes, which ^ 1);
      }
    }
  }

  struct Piece {
    int64_t unit, row, index;  // first unit; row of the states; row of y, gates and cells
    int lanes;                 // of units that exist
  };

  template <int K, bool kNoisy>
  inline __attribute__((always_inline)) void activate_pieces(const Places& places, int64_t row, int64_t unit,
                                                             int64_t row_step, int64_t unit_step) {
    using W = Group<V, K>;
    Piece pieces[K];
    W xs[G], rs[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved + 1];
    W parameters[Cell::kParameters + 1];
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      Piece& piece = pieces[j.value];
      piece.row = row + j.value * row_step, piece.unit = unit + j.value * unit_step;
      piece.index = places.index + (piece.row - places.first) * places.index_stride;
      if (places.ordered) piece.index = rows_.index(places.t, piece.row);
      piece.lanes = places.H - piece.unit < L ? static_cast<int>(places.H - piece.unit) : L;
    });
    load_parameters<Cell>(in(direction_.parameters), places.H, unit, unit_step, parameters);
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      const Piece& piece = pieces[j.value];
      const Scalar* const r = places.r + (piece.row - places.first) * places.r_row + (piece.unit - places.unit) * G;
      const Scalar* x;
      if constexpr (kSummed) {
        x = in(task_.b_hh) + piece.unit * G;
      } else {
        x = places.x + (places.whole ? rows_.batch(piece.row) : piece.row) * places.x_row +
            (piece.unit - places.x_unit) * G;
      }
      unroll<G>([&](auto g) __attribute__((always_inline)) {
        xs[g.value].v[j.value] = V::load(x + g.value * L);
        rs[g.value].v[j.value] = V::load(r + g.value * L);
      });
      if constexpr (Cell::kStates == 2) {
        prev[0].v[j.value] = V::zero();
        prev[1].v[j.value] = V::load(places.c + piece.row * places.c_row + piece.unit);
      } else {
        prev[0].v[j.value] = V::load(places.h_before + piece.row * places.h_row + piece.unit);
      }
    });
    forward_cell<Cell>(xs, rs, prev, next, saved, parameters);
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      const Piece& piece = pieces[j.value];
      const int lanes = piece.lanes;
      V h = next[0].v[j.value];
      if constexpr (kNoisy) {
        if (layer_.zoneout_h.data && !places.projected) {
          const V before = V::load(places.h_before + piece.row * places.h_row + piece.unit);
          h = blend(layer_.zoneout_h, places.t, piece.row, task_.direction * r_ + piece.unit, lanes, before, h);
        }
      }
      if (places.projected) {
        store_unprojected(h, piece.row, piece.unit, lanes);
      } else {
        h.store(places.h_after + piece.row * places.h_row + piece.unit);
        if (!kConverts || places.y) Elements::store(h, places.y + piece.index * places.y_row + piece.unit, lanes);
        if constexpr (Elements::kRounds && !kNoisy) {
          Elements::store(h, places.operand + piece.row * in_blocks(r_) + piece.unit, lanes);
        }
        if constexpr (kNoisy) {
          if (Elements::kRounds || direction_.h_mask) {
            store_operand(h, piece.row, piece.unit, lanes, lanes, places.which ^ 1);
          }
        }
      }
      if constexpr (Cell::kStates == 2) {
        V c = next[1].v[j.value];
        Scalar* const state = places.c + piece.row * places.c_row + piece.unit;
        if constexpr (kNoisy) {
          if (layer_.zoneout_c.data) {
            const int64_t column = task_.direction * layer_.H + piece.unit;
            c = blend(layer_.zoneout_c, places.t, piece.row, column, lanes, V::load(state), c);
          }
        }
        c.store(state);
        if (places.cells) store_lanes(c, places.cells + piece.index * places.H + piece.unit, lanes);
      }
      if constexpr (Cell::kSaved > 0) {
        if (places.gates) {
          Scalar* gates = places.gates + saved_offset<Cell>(piece.index, places.c_row, piece.unit);
          unroll<Cell::kSaved>(
              [&](auto k) __attribute__((always_inline)) { saved[k.value].v[j.value].store(gates + k.value * 16); });
          if constexpr (L < 16) {  // no byte of a block stays unwritten
            for (int64_t rest = piece.unit + L; rest < places.c_row && places.H <= rest; rest += L) {
              gates = places.gates + saved_offset<Cell>(piece.index, places.c_row, rest);
              for (int k = 0; k < Cell::kSaved; ++k) V::zero().store(gates + k * 16);
            }
          }
        }
      }
    });
  }

  const ForwardTask& task_;
  const LayerForward& layer_;
  const DirectionForward& direction_;
  const Rows rows_;
  const Panels units_;
  const int64_t r_, h_row_, c_row_, y_row_;  // width of h; row lengths of the states and of y
  const bool noisy_;
  int64_t pack_first_, pack_last_, first_panel_, last_panel_, first_unit_, end_unit_, x_gates_row_, chunk_rows_ = 0;
  bool whole_ = false;  // the chunk has its rows in the order of the batch
  alignas(64) Scalar buffer_[kBufferRows * 4 * L];
};

}  // namespace cpu
}  // namespace fastrnn
