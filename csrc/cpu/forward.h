// SPDX-License-Identifier: BSD-3-Clause
// The forward sweep of one direction: time loop, input gates a chunk of steps at a time, recurrence step by step with
// the gates in registers. One instance per cell and lane class; the cell is known here by its constants only.
#pragma once
#include "direct.h"
#include "group.h"
#include "kernels.h"
#include "matmul.h"
#include "rows.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V>
class ForwardSweep {
  using Scalar = typename V::Scalar;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  // An RNN's h is nearly its sum: the gates of LSTM and GRU forgive more.
  static constexpr int64_t kSweepChain = G == 1 ? kShortChain : kChain;
  static constexpr int kPanel = kForwardPanel<Cell>;
  static constexpr int kBufferRows = 48;  // 12 KiB of sums: in the first-level cache beside a part of a panel
  static constexpr int64_t kRowBytes = 256 * 1024;
  static constexpr int kAtOnce = V::kRegisters >= 32 ? 2 : 1;

 public:
  explicit ForwardSweep(const ForwardTask& task)
      : task_(task),
        layer_(*task.layer),
        direction_(task.layer->direction[task.direction]),
        rows_(*task.layer, task.direction, task.team, task.first_row),
        units_(layer_.H, L, kPanel),
        r_(layer_.P ? layer_.P : layer_.H),
        h_row_(padded(r_)),
        c_row_(padded(layer_.H)),
        y_row_(layer_.D * r_),
        lazy_(!task.packed && (task.team.members == 1 || task.team.split_units)),
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

  void run() {
    pack();
    load_states();
    reset_states(0);
    wait(task_.team.barrier, task_.team.members);
    for (int64_t s = 0; s < layer_.T;) {
      const int64_t end = project(s);
      int64_t at = rows_.reversed() ? chunk_rows_ : 0;
      for (; s < end; ++s) {
        const int64_t t = rows_.time(s), n = rows_.active(t);
        if (rows_.reversed()) at -= n;
        step(s, t, n, at);
        if (!rows_.reversed()) at += n;
        if (s + 1 < layer_.T) reset_states(s + 1);
        if (task_.team.split_units) wait(task_.team.barrier, task_.team.members);
        const int64_t stay = s + 1 < layer_.T ? rows_.active(rows_.time(s + 1)) : 0;
        if (stay < n) store_states(stay, n, (s + 1) & 1);
      }
    }
  }

 private:
  static const Scalar* in(const void* p) { return static_cast<const Scalar*>(p); }
  static Scalar* out(void* p) { return static_cast<Scalar*>(p); }

  void pack() {
    if (task_.packed) return;
    if (!lazy_) {
      const int64_t first = units_.first(pack_first_) * G * L;
      pack_gates<V, G>(in(direction_.w_ih), layer_.I, units_, pack_first_, pack_last_,
                       out(task_.w_ih) + first * layer_.I);
      pack_gates<V, G>(in(direction_.w_hh), r_, units_, pack_first_, pack_last_, out(task_.w_hh) + first * r_);
    }
    pack_bias<V, G>(in(direction_.b_ih), units_, pack_first_, pack_last_, out(task_.b_ih));
    pack_bias<V, G>(in(direction_.b_hh), units_, pack_first_, pack_last_, out(task_.b_hh));
    if (layer_.P) {
      const Panels panels(layer_.P, L, 4);
      const int64_t member = task_.team.member, members = task_.team.members;
      const int64_t first = panels.count * member / members, last = panels.count * (member + 1) / members;
      if (first < last) {
        pack_gates<V, 1>(in(direction_.w_hr), layer_.H, panels, first, last,
                         out(task_.w_hr) + panels.first(first) * L * layer_.H);
      }
    }
  }

  // The packed panels [p, p + n) of w. A thread that alone uses a panel packs it at its first use, when it is needed
  // in the cache anyway; if that use is the only one, every panel takes the place of the one before, and the packed
  // weights never leave the cache.
  const Scalar* panel(const void* w, void* packed, int64_t k, int64_t p, int64_t n, bool first, bool only) const {
    Scalar* place = out(packed) + units_.first(lazy_ && only ? first_panel_ : p) * G * L * k;
    if (lazy_ && first) pack_gates<V, G>(in(w), k, units_, p, p + n, place);
    return place;
  }

  // Whether the product of n rows of k terms with the panels [p, p + count) reads the weights where they lie: a call of
  // one or two steps does not earn back the packing, and whole blocks can be turned over in registers.
  bool reads_in_place(int64_t n, int64_t k, int64_t p, int64_t count) const {
    return lazy_ && repacks() && n <= DirectTiles<V>::kMostRows && k % V::kColumns == 0 &&
           units_.first(p + count) * L <= layer_.H;
  }

  // to[n rows][pieces] = bias + rows * w for the `pieces` pieces (a block of units, one gate) from panel p on.
  void product_in_place(const void* w, const void* bias, int64_t p, int pieces, const Scalar* a, int64_t a_row,
                        int64_t n, int64_t k, Scalar* to, int64_t to_row) const {
    const int most = DirectTiles<V>::pieces(static_cast<int>(n));
    DirectArgs<Scalar> args{};
    args.k = k;
    args.chain = kSweepChain;
    args.a = a;
    args.a_row = a_row;
    args.w_row = k;
    args.out_row = to_row;
    for (int piece = 0; piece < pieces; piece += most) {
      const int count = pieces - piece < most ? 1 : most;
      for (int j = 0; j < count; ++j) {
        const int64_t gate = (piece + j) % G, unit = (units_.first(p) + (piece + j) / G) * L;
        args.w[j] = in(w) + (gate * layer_.H + unit) * k;
      }
      args.init = in(bias) + (units_.first(p) * G + piece) * L;
      args.out = to + piece * L;
      DirectTiles<V>::get(static_cast<int>(n), count)(args);
    }
  }

  // Both state buffers start as h0, so that a row which enters late (reverse, ragged) finds its state in either.
  void load_states() {
    for (int64_t row = 0; row < rows_.count(); ++row) {
      const int64_t b = rows_.batch(row);
      const Scalar* c0 = Cell::kStates == 2 ? in(direction_.c0) + b * layer_.H : nullptr;
      for (int which = 0; which < 2; ++which) load_state(row, which, in(direction_.h0) + b * r_, c0);
    }
  }

  // Before the s-th step of the sweep: the rows whose state is replaced then.
  void reset_states(int64_t s) {
    if (!rows_.resets()) return;
    const int64_t t = rows_.time(s), n = rows_.active(t);
    for (int64_t row = 0; row < n; ++row) {
      if (!rows_.reset(t, row)) continue;
      const Scalar* h = rows_.template replacement<Scalar>(direction_.reset_h, row, r_);
      const Scalar* c = nullptr;
      if (Cell::kStates == 2) c = rows_.template replacement<Scalar>(direction_.reset_c, row, layer_.H);
      load_state(row, s & 1, h, c);
    }
  }

  void load_state(int64_t row, int which, const Scalar* h, const Scalar* c) {
    Scalar* state = out(task_.h[which]) + row * h_row_;
    load_row<V>(h, r_, first_state(), end_state(), state);
    if (direction_.h_mask) {
      const Scalar* mask = in(direction_.h_mask) + rows_.batch(row) * r_;
      Scalar* masked = out(task_.masked_h[which]) + row * h_row_;
      for (int64_t j = first_state(); j < end_state() && j < r_; ++j) masked[j] = state[j] * mask[j];
    }
    if (Cell::kStates == 2) {
      load_row<V>(c, layer_.H, first_unit_, end_unit_, out(task_.c) + row * c_row_);
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

  // x_gates = W_ih x + b_ih for the steps from s on that fit a chunk; returns the step after them. A chunk holds its
  // rows in ascending time, whichever way the sweep runs.
  int64_t project(int64_t s) {
    int64_t end = s;
    chunk_rows_ = 0;
    whole_ = rows_.whole(rows_.time(s));
    do {
      chunk_rows_ += rows_.active(rows_.time(end++));
    } while (end < layer_.T && chunk_rows_ + rows_.active(rows_.time(end)) <= task_.chunk_rows &&
             rows_.whole(rows_.time(end)) == whole_);
    const int64_t t0 = rows_.reversed() ? rows_.time(end - 1) : s, t1 = t0 + (end - s);

    TileArgs<Scalar> args{};
    args.k = layer_.I;
    args.chain = kSweepChain;
    args.a_step = 1;
    const Scalar* a = rows_.template x_at_one_stride<Scalar>(t0, t1, &args.a_row);
    if (!a) {
      a = out(task_.x_rows);
      args.a_row = layer_.I;
      Scalar* to = out(task_.x_rows);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t n = rows_.active(t);
        for (int64_t row = 0; row < n; ++row, to += layer_.I) {
          const Scalar* from =
              whole_ ? rows_.template x_in_batch_order<Scalar>(t, row) : rows_.template x<Scalar>(t, row);
          for (int64_t k = 0; k < layer_.I; ++k) to[k] = from[k];
        }
      }
    }
    args.init_row = 0;
    args.out_row = x_gates_row_;
    // As many rows at a time as stay in the cache beside a panel while all panels pass.
    const int64_t bytes = layer_.I * static_cast<int64_t>(sizeof(Scalar));
    const int64_t fit = kRowBytes / bytes > 48 ? kRowBytes / bytes : 48;
    for (int64_t begin = 0; begin < chunk_rows_; begin += fit) {
      const int64_t rows = chunk_rows_ - begin < fit ? chunk_rows_ - begin : fit;
      for (int64_t p = first_panel_; p < last_panel_; ++p) {
        const int nv = static_cast<int>(units_.width(p)) * G;
        const int64_t block = units_.first(p);
        const bool first = s == 0 && begin == 0;
        Scalar* const x_gates = out(task_.x_gates) + begin * x_gates_row_ + (block * L - first_unit_) * G;
        if (reads_in_place(rows, layer_.I, p, 1)) {
          product_in_place(direction_.w_ih, task_.b_ih, p, nv, a + begin * args.a_row, args.a_row, rows, layer_.I,
                           x_gates, x_gates_row_);
          continue;
        }
        args.w = panel(direction_.w_ih, task_.w_ih, layer_.I, p, 1, first, end - s == layer_.T && rows == chunk_rows_);
        args.init = in(task_.b_ih) + block * G * L;
        const RowTiles tiles(rows, Tiles<V>::rows(nv));
        for (int64_t j = 0; j < tiles.tiles; ++j) {
          const int64_t row = begin + tiles.first(j);
          args.a = a + row * args.a_row;
          const bool fetches = p + 1 < last_panel_ && j < nv && !(lazy_ && first);
          args.ahead = fetches ? panel_line(task_.w_ih, p + 1, layer_.I, j) : nullptr;
          args.out = x_gates + tiles.first(j) * x_gates_row_;
          Tiles<V>::get(static_cast<int>(begin + tiles.first(j + 1) - row), nv, 1)(args);
        }
      }
    }
    return end;
  }

  // Two steps: packing again what the cache did not keep is cheaper than writing it to memory and reading it back.
  bool repacks() const { return layer_.T <= 2; }

  // Where the j-th share of k cache lines of a panel begins: the tile fetches one line for each k.
  const Scalar* panel_line(const void* packed, int64_t panel, int64_t k, int64_t j) const {
    return in(packed) + (units_.first(panel) * G * L + j * static_cast<int64_t>(64 / sizeof(Scalar))) * k;
  }

  // One step of n rows, whose input gates begin at row `at` of the chunk. Panels are walked upwards in even steps and
  // downwards in odd ones: what was read last is still in the cache.
  void step(int64_t s, int64_t t, int64_t n, int64_t at) {
    if (n == 0) return;
    const int which = s & 1;
    const Scalar* h = in(task_.masked_h[which]);
    TileArgs<Scalar> args{};
    args.k = r_;
    args.chain = kSweepChain;
    args.a_row = h_row_;
    args.a_step = 1;
    args.init_row = 0;
    const int pair = n <= Tiles<V>::kPaired && G > 1 ? 2 : 1;
    const int64_t groups = (last_panel_ - first_panel_ + pair - 1) / pair;
    for (int64_t j = 0; j < groups; ++j) {
      const int64_t p = first_panel_ + (which ? groups - 1 - j : j) * pair;
      const int np = p + pair <= last_panel_ ? pair : 1;
      const int nv = static_cast<int>(units_.width(p)) * G;
      const int64_t block = units_.first(p);
      if (reads_in_place(n, r_, p, np)) {
        product_in_place(direction_.w_hh, task_.b_hh, p, np * nv, h, h_row_, n, r_, buffer_, np * nv * L);
        activate(t, 0, static_cast<int>(n), block, np * nv / G, at, which);
        continue;
      }
      args.w = panel(direction_.w_hh, task_.w_hh, r_, p, np, s == 0 || repacks(), repacks());
      args.w_panel = nv * L * r_;
      args.init = in(task_.b_hh) + block * G * L;
      args.out_row = np * nv * L;
      // Several tiles before the cell: a tile alone would leave its last additions and the first of the cell exposed.
      const RowTiles tiles(n, Tiles<V>::rows(nv));
      for (int64_t q = 0; q < tiles.tiles;) {
        const int64_t begin = tiles.first(q);
        int64_t end = begin;
        for (int64_t next; q < tiles.tiles && (next = tiles.first(q + 1)) - begin <= kBufferRows; end = next, ++q) {
          args.a = h + end * h_row_;
          const bool fetches = q < np * nv && j + 1 < groups && !(lazy_ && (s == 0 || repacks()));
          args.ahead = fetches ? panel_line(task_.w_hh, which ? p - pair : p + pair, r_, q) : nullptr;
          args.out = buffer_ + (end - begin) * args.out_row;
          for (int64_t row = end; row < next; ++row) {
            fetch(in(task_.x_gates) + (at + row) * x_gates_row_ + (block * L - first_unit_) * G, args.out_row);
          }
          Tiles<V>::get(static_cast<int>(next - end), nv, np)(args);
        }
        activate(t, begin, static_cast<int>(end - begin), block, np * nv / G, at, which);
      }
    }
    if (layer_.P) project_h(t, n, which);
  }

  // The math of the cell for m rows and `blocks` unit blocks; r waits in buffer_.
  void activate(int64_t t, int64_t first, int m, int64_t block, int blocks, int64_t at, int which) {
    if (noisy_) {
      activate_rows<1, true>(t, first, m, block, blocks, at, which);
    } else {
      activate_rows<kAtOnce, false>(t, first, m, block, blocks, at, which);
    }
  }

  // Pieces of one row and one block are taken kTogether at a time. Noisy: with zoneout or a mask on h, which nobody
  // else shall pay for.
  template <int kTogether, bool kNoisy>
  __attribute__((noinline)) void activate_rows(int64_t t, int64_t first, int m, int64_t block, int blocks, int64_t at,
                                               int which) {
    Piece pieces[kTogether];
    int n = 0;
    for (int j = 0; j < m; ++j) {
      const int64_t row = first + j;
      for (int k = 0; k < blocks; ++k) {
        Piece& piece = pieces[n++];
        piece.r = buffer_ + (j * blocks + k) * G * L;
        piece.unit = (block + k) * L;
        piece.row = row;
        piece.index = rows_.index(t, row);
        piece.t = t;
        piece.x = in(task_.x_gates) + (at + (whole_ ? rows_.batch(row) : row)) * x_gates_row_ +
                  (piece.unit - first_unit_) * G;
        if (n == kTogether) {
          activate_pieces<kTogether, kNoisy>(pieces, which);
          n = 0;
        }
      }
    }
    for (int j = 0; j < n; ++j) activate_pieces<1, kNoisy>(pieces + j, which);
  }

  struct Piece {
    const Scalar *r, *x;
    int64_t unit, row, index, t;  // first unit; row of the states; row of y, gates and cells
  };

  // Zoneout of lanes [unit, unit + lanes) of one row: `keep` of `before` stays. Two products and a sum, none fused, so
  // that backward finds a candidate of zero exactly.
  V blend(const Strided& keep, int64_t t, int64_t row, int64_t column, int lanes, V before, V candidate) const {
    const V kept = load_lanes<V>(rows_.template at<Scalar>(keep, t, row) + column, lanes);
    return kept * before + (V::one() - kept) * candidate;
  }

  // What the next step's product reads of h, with a mask.
  void store_masked(V h, int64_t row, int64_t unit, int lanes, int which) const {
    const V mask = load_lanes<V>(in(direction_.h_mask) + rows_.batch(row) * r_ + unit, lanes);
    (h * mask).store(out(task_.masked_h[which ^ 1]) + row * h_row_ + unit);
  }

  template <int K, bool kNoisy>
  inline __attribute__((always_inline)) void activate_pieces(const Piece* pieces, int which) {
    using W = Group<V, K>;
    W xs[G], rs[G], prev[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved + 1];
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      const Piece& piece = pieces[j.value];
      unroll<G>([&](auto g) __attribute__((always_inline)) {
        xs[g.value].v[j.value] = V::load(piece.x + g.value * L);
        rs[g.value].v[j.value] = V::load(piece.r + g.value * L);
      });
      if constexpr (Cell::kStates == 2) {
        prev[0].v[j.value] = V::zero();
        prev[1].v[j.value] = V::load(in(task_.c) + piece.row * c_row_ + piece.unit);
      } else {
        prev[0].v[j.value] = V::load(in(task_.h[which]) + piece.row * h_row_ + piece.unit);
      }
    });
    Cell::forward(xs, rs, prev, next, saved);
    unroll<K>([&](auto j) __attribute__((always_inline)) {
      const Piece& piece = pieces[j.value];
      const int lanes = layer_.H - piece.unit < L ? static_cast<int>(layer_.H - piece.unit) : L;
      V h = next[0].v[j.value];
      if constexpr (kNoisy) {
        if (layer_.zoneout_h.data && !layer_.P) {
          const V before = V::load(in(task_.h[which]) + piece.row * h_row_ + piece.unit);
          h = blend(layer_.zoneout_h, piece.t, piece.row, task_.direction * r_ + piece.unit, lanes, before, h);
        }
      }
      if (layer_.P) {
        h.store(out(task_.cell_h) + piece.row * c_row_ + piece.unit);
      } else {
        h.store(out(task_.h[which ^ 1]) + piece.row * h_row_ + piece.unit);
        store_lanes(h, out(layer_.y) + piece.index * y_row_ + task_.direction * r_ + piece.unit, lanes);
        if constexpr (kNoisy) {
          if (direction_.h_mask) store_masked(h, piece.row, piece.unit, lanes, which);
        }
      }
      if constexpr (Cell::kStates == 2) {
        V c = next[1].v[j.value];
        if constexpr (kNoisy) {
          if (layer_.zoneout_c.data) {
            const V before = V::load(in(task_.c) + piece.row * c_row_ + piece.unit);
            const int64_t column = task_.direction * layer_.H + piece.unit;
            c = blend(layer_.zoneout_c, piece.t, piece.row, column, lanes, before, c);
          }
        }
        c.store(out(task_.c) + piece.row * c_row_ + piece.unit);
        if (direction_.cells) store_lanes(c, out(direction_.cells) + piece.index * layer_.H + piece.unit, lanes);
      }
      if constexpr (Cell::kSaved > 0) {
        if (direction_.gates) {
          Scalar* gates = out(direction_.gates) + saved_offset<Cell>(piece.index, c_row_, piece.unit);
          unroll<Cell::kSaved>(
              [&](auto k) __attribute__((always_inline)) { saved[k.value].v[j.value].store(gates + k.value * 16); });
          for (int64_t unit = piece.unit + L; unit < c_row_ && layer_.H <= unit; unit += L) {
            gates = out(direction_.gates) + saved_offset<Cell>(piece.index, c_row_, unit);
            for (int k = 0; k < Cell::kSaved; ++k) V::zero().store(gates + k * 16);  // no byte stays unwritten
          }
        }
      }
    });
  }

  // h = W_hr * (o * tanh(c))
  void project_h(int64_t t, int64_t n, int which) {
    const Panels panels(layer_.P, L, 4);
    TileArgs<Scalar> args{};
    args.k = layer_.H;
    args.chain = kSweepChain;
    args.a_row = c_row_;
    args.a_step = 1;
    args.init = nullptr;
    args.init_row = args.w_panel = 0;
    args.out = buffer_;
    for (int64_t p = 0; p < panels.count; ++p) {
      const int nv = static_cast<int>(panels.width(p));
      const int64_t unit = panels.first(p) * L;
      args.w = in(task_.w_hr) + unit * layer_.H;
      args.out_row = nv * L;
      const RowTiles tiles(n, Tiles<V>::rows(nv));
      for (int64_t q = 0; q < tiles.tiles; ++q) {
        const int64_t first = tiles.first(q), end = tiles.first(q + 1);
        args.a = in(task_.cell_h) + first * c_row_;
        Tiles<V>::get(static_cast<int>(end - first), nv, 1)(args);
        for (int64_t row = first; row < end; ++row) {
          Scalar* y = out(layer_.y) + rows_.index(t, row) * y_row_ + task_.direction * r_;
          for (int v = 0; v < nv; ++v) {
            const int64_t left = r_ - (unit + v * L), at = unit + v * L;
            const int lanes = left < L ? static_cast<int>(left) : L;
            V h = V::load(buffer_ + ((row - first) * nv + v) * L);
            if (layer_.zoneout_h.data) {
              const V before = V::load(in(task_.h[which]) + row * h_row_ + at);
              h = blend(layer_.zoneout_h, t, row, task_.direction * r_ + at, lanes, before, h);
            }
            h.store(out(task_.h[which ^ 1]) + row * h_row_ + at);
            store_lanes(h, y + at, lanes);
            if (direction_.h_mask) store_masked(h, row, at, lanes, which);
          }
        }
      }
    }
  }

  const ForwardTask& task_;
  const LayerForward& layer_;
  const DirectionForward& direction_;
  const Rows rows_;
  const Panels units_;
  const int64_t r_, h_row_, c_row_, y_row_;  // width of h; row lengths of the states and of y
  const bool lazy_;                          // panels are packed at their first use
  const bool noisy_;
  int64_t pack_first_, pack_last_, first_panel_, last_panel_, first_unit_, end_unit_, x_gates_row_, chunk_rows_ = 0;
  bool whole_ = false;  // the chunk has its rows in the order of the batch
  alignas(64) Scalar buffer_[kBufferRows * 4 * L];
};

template <class Cell, class V>
void forward(const ForwardTask& task) {
  ForwardSweep<Cell, V>(task).run();
}

}  // namespace cpu
}  // namespace fastrnn
