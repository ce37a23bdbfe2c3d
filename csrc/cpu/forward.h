// SPDX-License-Identifier: BSD-3-Clause
// The forward sweep of one direction on the register tile: input gates a chunk of steps at a time, recurrence step by
// step. One instance per cell and lane class. Time loop, states and the cell are those of forward_steps.h.
#pragma once
#include "direct.h"
#include "forward_steps.h"

namespace fastrnn {
namespace cpu {

template <class Cell, class V>
class ForwardSweep : public ForwardSteps<ForwardSweep<Cell, V>, Cell, V, SameElements<V>> {
  using Steps = ForwardSteps<ForwardSweep<Cell, V>, Cell, V, SameElements<V>>;
  friend Steps;
  using Steps::buffer_, Steps::c_row_, Steps::chunk_rows_, Steps::direction_, Steps::end_unit_, Steps::first_panel_,
      Steps::first_unit_;
  using Steps::G, Steps::L, Steps::kBufferRows, Steps::given, Steps::in, Steps::out, Steps::activate;
  using Steps::h_row_, Steps::last_panel_, Steps::layer_, Steps::pack_first_, Steps::pack_last_, Steps::r_,
      Steps::rows_;
  using Steps::next_chunk, Steps::gather_x, Steps::task_, Steps::units_, Steps::x_gates_row_;
  using typename Steps::Scalar;
  // An RNN's h is nearly its sum: the gates of LSTM and GRU forgive more.
  static constexpr int64_t kSweepChain = G == 1 ? kShortChain : kChain;
  static_assert(Tiles<V>::kPaired <= Tiles<V>::rows(4) && Tiles<V>::kPaired <= Tiles<V>::rows(3));  // one tile
  static constexpr int64_t kRowBytes = 256 * 1024, kVectorBytes = L * sizeof(Scalar);
  // What packing the weights costs grows with their size, and what it gains at a later step does not: T steps of so few
  // rows that their number does not change how panels are paired read a W_hh in place that has at least T^2 times this
  // many bytes. LSTM, B = 1, time packed by the first step over that in place (Ice Lake): H = 256, T = 3, 4 1.08, .99;
  // H = 512, T = 3, 5, 8, 12 1.56, 1.36, 1.20, .93; H = 1024, T = 4, 8, 12, 16 1.18, 1.08, 1.00, .96.
  static constexpr int64_t kInPlaceBytes = 80 * 1024;

 public:
  explicit ForwardSweep(const ForwardTask& task)
      : Steps(task),
        lazy_(!task.packed && (task.team.members == 1 || task.team.split_units)),
        kept_(recurrent_bytes(end_unit_ - first_unit_) <= core.kept_bytes),
        far_(recurrent_bytes(layer_.H) > kFarBytes),
        joined_(layer_.T == 1 && rows_.count() <= DirectTiles<V>::kMostRows && !task.parts),
        in_place_(lazy_ &&
                  (repacks() || (rows_.count() <= DirectTiles<V>::kPaired &&
                                 layer_.T <= recurrent_bytes(end_unit_ - first_unit_) / kInPlaceBytes / layer_.T))) {}

 private:
  void pack() {
    if (task_.packed) return;
    if (!lazy_) {
      const int64_t first = units_.first(pack_first_) * G * L;
      if (!task_.parts) {
        pack_gates<V, G>(given(direction_.w_ih), layer_.I, units_, pack_first_, pack_last_,
                         out(task_.w_ih) + first * layer_.I);
      } else if constexpr (kHasParts<V>) {
        pack_gate_parts<G>(*task_.parts, in(direction_.w_ih), layer_.I, units_, pack_first_, pack_last_, task_.w_ih);
      }
      pack_gates<V, G>(given(direction_.w_hh), r_, units_, pack_first_, pack_last_, out(task_.w_hh) + first * r_);
    }
    pack_bias<V, G>(in(direction_.b_ih), units_, pack_first_, pack_last_, out(task_.b_ih));
    pack_bias<V, G>(in(direction_.b_hh), units_, pack_first_, pack_last_, out(task_.b_hh));
    if (layer_.P) {
      const Panels panels(layer_.P, L, 4);
      const int64_t member = task_.team.member, members = task_.team.members;
      const int64_t first = panels.count * member / members, last = panels.count * (member + 1) / members;
      if (first < last) {
        pack_gates<V, 1>(given(direction_.w_hr), layer_.H, panels, first, last,
                         out(task_.w_hr) + panels.first(first) * L * layer_.H);
      }
    }
  }

  // The packed panels [p, p + n) of w. A thread that alone uses a panel packs it at its first use, when it is needed
  // in the cache anyway; if that use is the only one, every panel takes the place of the one before, and the packed
  // weights never leave the cache.
  Scalar* panel(const void* w, void* packed, int64_t k, int64_t p, int64_t n, bool first, bool only) const {
    Scalar* place = out(packed) + units_.first(lazy_ && only ? first_panel_ : p) * G * L * k;
    if (lazy_ && first) pack_gates<V, G>(given(w), k, units_, p, p + n, place);
    return place;
  }

  // Whether the product of n rows of k terms with the panels [p, p + count) can read the weights where they lie: whole
  // blocks of them are turned over in registers. Those of 16 bits only if they are not packed besides.
  bool can_read_in_place(int64_t n, int64_t k, int64_t p, int64_t count) const {
    if (!lazy_ || n > DirectTiles<V>::kMostRows || units_.first(p + count) * L > layer_.H) return false;
    if (!layer_.conversion) return k % V::kColumns == 0;
    if constexpr (kTurnsWidening<V>) return in_place_ && k % V::kWidenedColumns == 0;
    return false;
  }

  // Whether panels [p, p + count) can be packed while the first of n rows, too many to read weights in place, are
  // multiplied: turning columns over takes slots that multiply-adds leave free.
  bool can_pack_in_passing(int64_t n, int64_t k, int64_t p, int64_t count) const {
    return lazy_ && n > DirectTiles<V>::kMostRows && !layer_.conversion && k % V::kColumns == 0 &&
           units_.first(p + count) * L <= layer_.H;
  }

  // The first of n rows for both, of x or, behind them, h.
  FewRows<Scalar> few_of(const Scalar* a, int64_t a_row, int64_t n, int64_t k, bool of_h) const {
    if (!lazy_ || k % V::kColumns || (layer_.conversion && (!in_place_ || n > DirectTiles<V>::kMostRows))) return {};
    Scalar* const place = out(task_.few_rows) + (of_h ? layer_.I * DirectTiles<V>::kMostRows : 0);
    return few_rows<V>(a, a_row, n, k, place);
  }

  // Lets the q-th tile of a panel fetch its share of what panel p will be packed from.
  void set_ahead_of_packing(TileArgs<Scalar>& args, int64_t q, int64_t tiles, const void* w, int64_t p,
                            int64_t pieces) const {
    const int shift = tiles >= 4 * pieces ? 2 : tiles >= 2 * pieces ? 1 : 0;  // one, two or four tiles to a piece
    const int64_t bytes = layer_.conversion ? L * static_cast<int64_t>(sizeof(uint16_t)) : kVectorBytes;
    const int64_t piece = q >> shift, part = q - (piece << shift), step = bytes >> shift;
    if (piece >= pieces) return;
    args.ahead = static_cast<const char*>(direct_.source(w, p, piece, args.k)) + part * args.k * step;
    args.ahead_step = step;
  }

  // Rows of x, a_row apart.
  struct Chunk {
    const Scalar* a;
    int64_t a_row;
    bool first, only;     // of all chunks
    FewRows<Scalar> few;  // the first of them
  };

  // x_gates = W_ih x + b_ih for the steps from s on that fit a chunk; returns the step after them. Where a call joins
  // the products of a panel, walk() computes them.
  int64_t project(int64_t s) {
    const int64_t end = next_chunk(s);
    const int64_t t0 = rows_.reversed() ? rows_.time(end - 1) : s, t1 = t0 + (end - s);
    int64_t a_row = 0;
    const Scalar* a = layer_.conversion ? nullptr : rows_.template x_at_one_stride<Scalar>(t0, t1, &a_row);
    if (!a) {
      a = gather_x(t0, t1, layer_.I);
      a_row = layer_.I;
    }
    if constexpr (kHasParts<V>) {
      if (task_.parts) {
        project_by_parts(*task_.parts, a, a_row, s == 0, end == layer_.T && s == 0);
        return end;
      }
    }
    Chunk chunk{a, a_row, s == 0, end - s == layer_.T, {}};
    if (chunk.first || repacks()) chunk.few = few_of(a, a_row, chunk_rows_, layer_.I, false);
    if (joined_) {
      chunk_ = chunk;
    } else {
      project_panels(chunk, first_panel_, last_panel_);
    }
    return end;
  }

  // The input gates of panels [first_panel, last_panel) for a chunk.
  void project_panels(const Chunk& chunk, int64_t first_panel, int64_t last_panel) {
    TileArgs<Scalar> args{};
    args.chain = kSweepChain;
    args.a_row = chunk.a_row;
    args.a_step = 1;
    args.out_row = x_gates_row_;
    // As many rows at a time as stay in the cache beside a panel while all panels pass.
    const int64_t bytes = layer_.I * static_cast<int64_t>(sizeof(Scalar));
    const int64_t fit = kRowBytes / bytes > 48 ? kRowBytes / bytes : 48;
    for (int64_t begin = 0; begin < chunk_rows_; begin += fit) {
      const int64_t rows = chunk_rows_ - begin < fit ? chunk_rows_ - begin : fit;
      const Scalar* const a = chunk.a + begin * args.a_row;
      const bool few_left = begin && repacks() && rows <= DirectTiles<V>::kMostRows;
      const FewRows<Scalar> few = few_left ? few_of(a, args.a_row, rows, layer_.I, false) : chunk.few;
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const int nv = static_cast<int>(units_.width(p)) * G;
        const int64_t block = units_.first(p);
        const bool first = begin == 0 && (chunk.first || repacks());
        Scalar* const x_gates = out(task_.x_gates) + begin * x_gates_row_ + (block * L - first_unit_) * G;
        if (repacks() && can_read_in_place(rows, layer_.I, p, 1)) {
          direct_.multiply(direction_.w_ih, in(task_.b_ih), p, nv, few, layer_.I, x_gates, x_gates_row_);
          continue;
        }
        const bool fetches = p + 1 < last_panel, packed = !(lazy_ && first);
        const int64_t done = !packed && can_pack_in_passing(rows, layer_.I, p, 1) ? few.n : 0;
        Scalar* const weights =
            panel(direction_.w_ih, task_.w_ih, layer_.I, p, 1, first && !done, chunk.only && rows == chunk_rows_);
        if (done) {
          direct_.multiply(direction_.w_ih, in(task_.b_ih), p, nv, few, layer_.I, x_gates, x_gates_row_, weights);
        }
        const RowTiles tiles(rows - done, Tiles<V>::rows(nv));
        const Scalar* const following = fetches && packed ? packed_panel(task_.w_ih, p + 1, layer_.I) : nullptr;
        const int64_t pass = packed && tiles.tiles > 1 ? pass_ : layer_.I;
        int64_t k0 = 0;
        do {
          args.k = next_pass(pass, layer_.I - k0);
          const int64_t k1 = k0 + args.k;
          const Ahead ahead(tiles.tiles, args.k, nv * kVectorBytes);
          args.w = weights + k0 * nv * L;
          for (int64_t j = 0; j < tiles.tiles; ++j) {
            const int64_t row = done + tiles.first(j);
            args.a = a + row * args.a_row + k0;
            ahead.set(args, j, k1 < layer_.I ? weights + k1 * nv * L : following);
            if (fetches && !packed) set_ahead_of_packing(args, j, tiles.tiles, direction_.w_ih, p + 1, nv);
            args.out = x_gates + row * x_gates_row_;
            args.init = k0 ? args.out : in(task_.b_ih) + block * G * L;
            args.init_row = k0 ? x_gates_row_ : 0;
            Tiles<V>::get(static_cast<int>(done + tiles.first(j + 1) - row), nv, 1)(args);
          }
          k0 = k1;
        } while (k0 < layer_.I);
      }
    }
  }

  // x_gates of a chunk in parts (parts.h), from rows of x that lie a_row apart; `first`: of all chunks, `only`: there
  // is no other.
  void project_by_parts(const PartProducts& parts, const Scalar* a, int64_t a_row, bool first, bool only) {
    Bfloat16* const rows = static_cast<Bfloat16*>(task_.x_parts);
    if (lazy_ && only && chunk_rows_ <= kFewRows) return project_few(parts, a, a_row);
    parts.pack_rows(a, a_row, chunk_rows_, layer_.I, rows);
    PartArgs args{};
    args.blocks = (layer_.I + 31) / 32;
    args.a_row = part_row(layer_.I);
    args.out_row = x_gates_row_;
    parts.begin();
    // As many rows at a time as stay in the second-level cache while all panels pass.
    const int64_t fit = 2 * kRowBytes / (args.a_row * 2) / kPartRows * kPartRows;
    const int64_t together = fit < 2 * kPartRows ? 2 * kPartRows : fit;
    for (int64_t begin = 0, stop; begin < chunk_rows_; begin = stop, first = false) {
      stop = chunk_rows_ - begin < together ? chunk_rows_ : begin + together;
      project_rows(parts, args, begin, stop, first, only && stop - begin == chunk_rows_);
    }
    parts.end();
  }

  // All rows of a call too short to pay for packing.
  void project_few(const PartProducts& parts, const Scalar* a, int64_t a_row) {
    FewRowsArgs args{};
    parts.pack_few(a, a_row, chunk_rows_, layer_.I, static_cast<Bfloat16*>(task_.x_parts));
    args.x = static_cast<const Bfloat16*>(task_.x_parts);
    args.rows = static_cast<int>(chunk_rows_);
    args.w = in(direction_.w_ih);
    args.k = layer_.I, args.units = layer_.H, args.unit = first_unit_;
    args.blocks = (end_unit_ - first_unit_) / L;
    args.gates = G;
    args.init = in(task_.b_ih) + first_unit_ * G;
    args.out = out(task_.x_gates);
    args.out_row = x_gates_row_;
    parts.begin();
    parts.multiply_few(args);
    parts.end();
  }

  // Rows [begin, stop) of a chunk.
  void project_rows(const PartProducts& parts, PartArgs args, int64_t begin, int64_t stop, bool first, bool only) {
    const Bfloat16* const rows = static_cast<const Bfloat16*>(task_.x_parts);
    for (int64_t p = first_panel_; p < last_panel_; ++p) {
      const int64_t block = units_.first(p);
      Bfloat16* const place =
          static_cast<Bfloat16*>(task_.w_ih) + part_panel(layer_.I, units_.first(lazy_ && only ? first_panel_ : p) * G);
      if (lazy_ && first) {
        parts.pack_gates(in(direction_.w_ih), layer_.I, layer_.H, block * L, units_.width(p), G, place);
      }
      args.w = place;
      args.columns = static_cast<int>(units_.width(p)) * G * L;
      args.init = in(task_.b_ih) + block * G * L;
      for (int64_t row = begin; row < stop; row += kPartRows) {
        args.rows = static_cast<int>(stop - row < kPartRows ? stop - row : kPartRows);
        args.a = rows + row * args.a_row;
        args.out = out(task_.x_gates) + row * x_gates_row_ + (block * L - first_unit_) * G;
        parts.multiply(args);
      }
    }
  }

  int64_t recurrent_bytes(int64_t units) const { return units * G * r_ * static_cast<int64_t>(sizeof(Scalar)); }

  // One or two steps: packing again what the cache did not keep is cheaper than writing it to memory and reading it
  // back.
  bool repacks() const { return layer_.T <= 2; }

  const Scalar* packed_panel(const void* packed, int64_t panel, int64_t k) const {
    return in(packed) + units_.first(panel) * G * L * k;
  }

  // One step of n rows, whose input gates begin at row `at` of the chunk.
  void step(int64_t s, int64_t t, int64_t n, int64_t at) {
    if (n == 0) return;
    if (lazy_ && (s == 0 || in_place_)) {
      walk<true>(s, t, n, at);
    } else {
      walk<false>(s, t, n, at);
    }
    if (layer_.P) project_h(t, n, s & 1);
  }

  // The panels of one step, upwards and downwards in turns: what was read last is still in the cache.
  // kUnpacked: weights are read where they lie, and packed now where they cannot be, or by step 0 alone if it is the
  // first of more than two.
  template <bool kUnpacked>
  void walk(int64_t s, int64_t t, int64_t n, int64_t at) {
    const int which = s & 1;
    const bool down = (which != 0) != task_.downwards;
    const Scalar* h = in(task_.masked_h[which]);
    TileArgs<Scalar> args{};
    args.k = r_;
    args.chain = kSweepChain;
    args.a_row = h_row_;
    args.a_step = 1;
    args.init_row = 0;
    args.far = far_;
    const FewRows<Scalar> few = kUnpacked ? few_of(h, h_row_, n, r_, true) : FewRows<Scalar>{};
    const int pair = n <= Tiles<V>::kPaired && G > 2 ? 2 : 1;
    const int64_t groups = (last_panel_ - first_panel_ + pair - 1) / pair;
    for (int64_t j = 0; j < groups; ++j) {
      const int64_t p = first_panel_ + (down ? groups - 1 - j : j) * pair;
      const int np = p + pair <= last_panel_ ? pair : 1;
      const int nv = static_cast<int>(units_.width(p)) * G;
      const int64_t block = units_.first(p);
      if (joined_) project_panels(chunk_, p, p + np);
      if constexpr (kUnpacked) {
        if (can_read_in_place(n, r_, p, np)) {
          Scalar* const place = in_place_ ? nullptr : out(task_.w_hh) + units_.first(p) * G * L * r_;
          direct_.multiply(direction_.w_hh, in(task_.b_hh), p, np * nv, few, r_, buffer_, np * nv * L, place, far_);
          activate(t, 0, static_cast<int>(n), block, np * nv / G, at, which);
          continue;
        }
      }
      const bool packs = kUnpacked && (s == 0 || repacks());
      const int64_t done = packs && (repacks() || kept_) && can_pack_in_passing(n, r_, p, np) ? few.n : 0;
      Scalar* const weights = panel(direction_.w_hh, task_.w_hh, r_, p, np, packs && !done, repacks());
      if (done) {
        direct_.multiply(direction_.w_hh, in(task_.b_hh), p, np * nv, few, r_, buffer_, np * nv * L, weights);
      }
      args.w = weights;
      args.w_panel = nv * L * r_;
      args.init = in(task_.b_hh) + block * G * L;
      args.out_row = np * nv * L;
      const Scalar* const x_gates = in(task_.x_gates) + at * x_gates_row_ + (block * L - first_unit_) * G;
      // Several tiles before the cell: a tile alone would leave its last additions and the first of the cell exposed.
      const RowTiles tiles(n - done, Tiles<V>::rows(nv));
      const bool fetches = j + 1 < groups && (np == 1 ? kUnpacked || !kept_ : far_);
      const int64_t next_panel = down ? p - pair : p + pair;
      const Scalar* const following = fetches && !kUnpacked ? packed_panel(task_.w_hh, next_panel, r_) : nullptr;
      if (!kUnpacked && next_pass(pass_, r_) < r_ && tiles.tiles > 1) {
        const int64_t together = tiles.together(kBufferRows, Tiles<V>::rows(nv));
        for (int64_t q = 0, stop; q < tiles.tiles; q = stop) {
          stop = q + together < tiles.tiles ? q + together : tiles.tiles;
          multiply_in_passes(args, tiles, q, stop, h, x_gates, nv, following);
          const int64_t begin = tiles.first(q);
          activate(t, begin, static_cast<int>(tiles.first(stop) - begin), block, nv / G, at, which);
        }
        continue;
      }
      const Ahead ahead(tiles.tiles, r_, np * nv * kVectorBytes);
      for (int64_t q = 0; q < tiles.tiles;) {
        const int64_t begin = q ? done + tiles.first(q) : 0;
        int64_t end = q ? begin : done;
        for (int64_t next; q < tiles.tiles && (next = done + tiles.first(q + 1)) - begin <= kBufferRows;
             end = next, ++q) {
          args.a = h + end * h_row_;
          ahead.set(args, q, following);
          if (kUnpacked && fetches) set_ahead_of_packing(args, q, tiles.tiles, direction_.w_hh, next_panel, np * nv);
          args.out = buffer_ + (end - begin) * args.out_row;
          for (int64_t row = end; row < next; ++row) fetch(x_gates + row * x_gates_row_, args.out_row);
          Tiles<V>::get(static_cast<int>(next - end), nv, np)(args);
        }
        activate(t, begin, static_cast<int>(end - begin), block, np * nv / G, at, which);
      }
    }
  }

  // Tiles [q, stop) of a panel into the buffer, a pass of terms of all of them after the other. The first tiles of a
  // panel fetch the passes that are to come, the last ones what follows the panel.
  void multiply_in_passes(TileArgs<Scalar> args, const RowTiles& tiles, int64_t q, int64_t stop, const Scalar* h,
                          const Scalar* x_gates, int nv, const Scalar* following) {
    const int64_t begin = tiles.first(q);
    for (int64_t k = 0; k < r_; k += args.k) {
      args.k = next_pass(pass_, r_ - k);
      const bool last = k + args.k == r_;
      const Scalar* const after = args.w + args.k * nv * L;
      const Scalar* const next = last ? (stop < tiles.tiles ? nullptr : following) : q ? nullptr : after;
      const Ahead ahead(stop - q, args.k, nv * kVectorBytes);
      for (int64_t tile = q; tile < stop; ++tile) {
        const int64_t row = tiles.first(tile), end = tiles.first(tile + 1);
        args.a = h + row * h_row_ + k;
        ahead.set(args, tile - q, next);
        args.out = buffer_ + (row - begin) * args.out_row;
        if (k) args.init = args.out;
        for (int64_t j = row; last && j < end; ++j) fetch(x_gates + j * x_gates_row_, args.out_row);
        Tiles<V>::get(static_cast<int>(end - row), nv, 1)(args);
      }
      args.w = after;
      args.init_row = args.out_row;
    }
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
        this->take_projected(t, first, end, unit, nv, which);
      }
    }
  }

  const DirectPanels<V, G, kSweepChain> direct_{layer_, units_};
  const int64_t pass_ = pass_terms<V>(kSweepChain, core.forward_pass);
  const bool lazy_;  // panels are packed at their first use
  // This thread's packed W_hh stays in the second-level cache from step to step: LSTM, H = 128, B = 4, 16
  // are 1.02, 1.01 times as fast without fetching the next panel (Ice Lake). plan.cpp asks how many threads pay, and
  // goes by the cache there is.
  const bool kept_;
  // W_hh, of all threads together, is larger than kFarBytes. Paired panels are then fetched ahead too, and a first step
  // that reads in place packs past the caches (AVX-512): LSTM of 1024 units, B = 1, T = 25 1.15 times as fast (Ice
  // Lake). At H = 512 (4 MB) neither gains. No fence follows: a thread reads no panels but its own.
  const bool far_;
  // The only step of few rows computes the input gates of a panel right before its recurrent product. So the next call,
  // which walks the other way, finds panels of both weights in the caches.
  const bool joined_;
  Chunk chunk_ = {};     // then: the rows of that step
  const bool in_place_;  // steps read W_hh where it lies
};

template <class Cell, class V>
void forward(const ForwardTask& task) {
  ForwardSweep<Cell, V>(task).run();
}

}  // namespace cpu
}  // namespace fastrnn
