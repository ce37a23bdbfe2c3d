// SPDX-License-Identifier: BSD-3-Clause
// What comes after the backward sweeps, d_x first, and then, around their products, the gradients of weights and
// biases: which rows of x and h belong to which step, which gradients of the gates to which rows of the weights, and
// who of the team computes what. The products, and d_x, are those of the derived class: gradients.h,
// gradients_blocks.h.
//
//   d_w_ih = d_gates[input]^T * x                       rows of d_w shared out, never the sum over T*B
//   d_w_hh = d_gates[recurrent]^T * (h one step before)
//   d_w_hr = d_h^T * (o * tanh(c))
#pragma once
#include "elements.h"
#include "kernels.h"
#include "matmul.h"
#include "rows.h"

namespace fastrnn {
namespace cpu {

// Products: the class derived from this one, which takes kRows rows at a time, with
//   pack(row, conversion, rows, operand, first, last)   rows row(0), ..., row(rows - 1) -> column panels [first, last)
//   mask_panels(operand, rows)                what lies in them times the masks of mask_rows_, this thread's share
//   strip(a, a_row, rows, columns)            columns of the gradients of the gates -> task.strip
//   product(operand, w_row, rows, columns, start)   rows [w_row, w_row + columns) of d_w (+)= strip^T * panels
template <class Products, class Cell, class V, class Elements, int64_t kRows>
class WeightGradients {
 protected:
  using Scalar = typename V::Scalar;
  using Element = typename Elements::Element;
  static constexpr int L = V::kLanes, G = Cell::kGates;

  // d_row: elements from one row of d_gates to the next.
  WeightGradients(const GradientTask& task, int64_t d_row)
      : task_(task), layer_(task.layer->forward), r_(layer_.P ? layer_.P : layer_.H), d_row_(d_row) {}

 public:
  void run() {
    if (task_.layer->d_x) static_cast<Products&>(*this).input();
    for (int d = 0; d < layer_.D; ++d) weights(d);
  }

 protected:
  static const Scalar* in(const void* p) { return static_cast<const Scalar*>(p); }
  static Scalar* out(void* p) { return static_cast<Scalar*>(p); }
  static const Element* elements(const void* p) { return static_cast<const Element*>(p); }
  static Element* elements(void* p) { return static_cast<Element*>(p); }
  int64_t share(int64_t n, int64_t member) const { return n * member / task_.team.members; }
  void join() const { wait(task_.team); }

  // A product panel^T * rows: rows in column panels of `width` columns, the result [.., width].
  struct Operand {
    WeightGradient wanted;
    Scalar* d_w;  // its sums, or those of a strip
    Panels panels;
    Element* packed;
    Operand(const WeightGradient& gradient, int64_t width)
        : wanted(gradient), d_w(out(gradient.sums)), panels(width, L, 4), packed(nullptr) {}
  };

  // Elements that an operand of this width takes in the panels: half as many again in parts (parts.h).
  int64_t panel_elements(int64_t width) const { return kRows * padded(width) * (task_.weight_parts ? 3 : 2) / 2; }

  void weights(int d) {
    Products& products = static_cast<Products&>(*this);
    const DirectionBackward& backward = task_.layer->direction[d];
    const int64_t member = task_.team.member, N = layer_.N;
    const bool gates = backward.d_w_ih || backward.d_w_hh || backward.d_b_ih || backward.d_b_hh;
    if (!gates && !backward.d_w_hr && !backward.d_parameters) return;  // the same for every member: nobody waits
    Operand x(backward.d_w_ih, layer_.I), h(backward.d_w_hh, r_), m(backward.d_w_hr, layer_.H);
    const int64_t half = panel_elements(layer_.I) + panel_elements(r_) + (layer_.P ? panel_elements(layer_.H) : 0);
    Cursor cursor(layer_, task_.first_row, d);
    for (int64_t n0 = 0; n0 < N; n0 += kRows) {
      const int64_t rows = N - n0 < kRows ? N - n0 : kRows;
      cursor.collect(rows, x_rows_, h_rows_, mask_rows_, r_);
      Element* packed = elements(task_.panels) + (turn_++ & 1) * half;  // the other half may still be read
      const auto pack = [&](Operand& operand, int64_t width, const Conversion* conversion, const auto& row) {
        operand.packed = packed;
        if (operand.wanted) {
          const int64_t first = share(operand.panels.count, member), last = share(operand.panels.count, member + 1);
          products.pack(row, conversion, rows, operand, first, last);
        }
        packed += panel_elements(width);
      };
      pack(x, layer_.I, layer_.conversion, [&](int64_t k) { return x_rows_[k]; });
      pack(h, r_, layer_.conversion, [&](int64_t k) { return h_rows_[k]; });
      if (h.wanted && layer_.direction[d].h_mask) products.mask_panels(h, rows);
      if (layer_.P) {
        pack(m, layer_.H, nullptr,
             [&](int64_t k) -> const void* { return elements(task_.cell_h[d]) + (n0 + k) * layer_.H; });
      }
      join();
      for (int s = 0, wide; gates && s < Cell::kStored; s += wide) {
        const int input = window(s, Cell::kInput), recurrent = window(s, Cell::kRecurrent);
        for (wide = 1; s + wide < Cell::kStored && follows(s, wide); ++wide) {
        }
        const int64_t x_row = input < 0 ? -1 : Cell::input_gate(input) * layer_.H;
        const int64_t h_row = recurrent < 0 ? -1 : Cell::recurrent_gate(recurrent) * layer_.H;
        const Element* a = elements(task_.d_gates[d]) + n0 * d_row_ + s * layer_.H;
        columns(a, d_row_, rows, wide * layer_.H, n0, x_row < 0 ? nullptr : &x, x_row, h_row < 0 ? nullptr : &h, h_row,
                x_row < 0 ? nullptr : out(backward.d_b_ih), h_row < 0 ? nullptr : out(backward.d_b_hh));
      }
      if constexpr (Cell::kParameters > 0) {  // sums of rows alone, as those of biases
        const Element* a = elements(task_.d_gates[d]) + n0 * d_row_ + (Cell::kStored - Cell::kParameters) * layer_.H;
        columns(a, d_row_, rows, Cell::kParameters * layer_.H, n0, nullptr, 0, nullptr, 0, out(backward.d_parameters),
                nullptr);
      }
      if (layer_.P && m.wanted) {
        const int64_t d_h_row = Elements::kRounds ? in_blocks(r_) : r_;
        columns(elements(task_.d_h[d]) + n0 * d_h_row, d_h_row, rows, r_, n0, &m, 0, nullptr, 0, nullptr, nullptr);
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

  // Rows [w_row, w_row + size) of d_w (+)= strip^T * panels of rows [n0, n0 + rows). Where 16 bits are wanted they are
  // rounded after the last pass over them, while their sums are in the cache; a single pass keeps no other sums.
  void multiply(const Operand& operand, int64_t w_row, int64_t rows, int64_t size, int64_t n0) {
    Products& products = static_cast<Products&>(*this);
    const bool start = n0 == 0, last = n0 + rows == layer_.N;
    if constexpr (sizeof(Scalar) == 4) {
      if (operand.wanted.narrow && last) {
        const int64_t width = operand.panels.n, sums_row = start ? 0 : w_row;
        Operand strip = operand;
        if (start) strip.d_w = out(task_.strip_sums);
        products.product(strip, sums_row, rows, size, start);
        task_.layer->narrowing->narrow(strip.d_w + sums_row * width, operand.wanted.narrow + w_row * width,
                                       size * width);
        return;
      }
    }
    products.product(operand, w_row, rows, size, start);
  }

  // This thread's share of `size` columns of a: products with up to two operands, and sums.
  void columns(const Element* a, int64_t a_row, int64_t rows, int64_t size, int64_t n0, const Operand* x, int64_t x_row,
               const Operand* h, int64_t h_row, Scalar* d_b_ih, Scalar* d_b_hh) {
    Products& products = static_cast<Products&>(*this);
    const bool start = n0 == 0;
    const int64_t end = share(size, task_.team.member + 1);
    for (int64_t column = share(size, task_.team.member); column < end; column += kStripColumns) {
      const int64_t wide = end - column < kStripColumns ? end - column : kStripColumns;
      if ((x && x->wanted) || (h && h->wanted)) {
        products.strip(a + column, a_row, rows, wide);
        if (x && x->wanted) multiply(*x, x_row + column, rows, wide, n0);
        if (h && h->wanted) multiply(*h, h_row + column, rows, wide, n0);
      }
      if (d_b_ih || d_b_hh) {
        sum(a + column, a_row, rows, wide);
        if (d_b_ih) add(out(task_.sums), wide, start, d_b_ih + x_row + column);
        if (d_b_hh) add(out(task_.sums), wide, start, d_b_hh + h_row + column);
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

  // Sums of `size` columns in chains of kShortChain rows, ascending. Eight rows at a time: column by column every
  // element would come from another cache line, of which few fit where rows are a power of two apart.
  void sum(const Element* a, int64_t a_row, int64_t rows, int64_t size) {
    constexpr int64_t kRowsAtOnce = 8;
    static_assert(kShortChain % kRowsAtOnce == 0);
    alignas(64) Scalar chain[kStripColumns + 16];
    Scalar* const total = out(task_.sums);
    for (int64_t first = 0; first < rows; first += kRowsAtOnce, a += kRowsAtOnce * a_row) {
      const int64_t n = rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce, place = first % kShortChain;
      const bool ends = place + kRowsAtOnce == kShortChain || first + n == rows;
      for (int64_t j = 0; j < size; j += L) {
        const int lanes = size - j < L ? static_cast<int>(size - j) : L;
        V part = place == 0 ? V::zero() : V::load(chain + j);
        for (int64_t row = 0; row < n; ++row) part = part + Elements::load(a + row * a_row + j, lanes);
        if (!ends) {
          part.store(chain + j);
        } else {
          (first < kShortChain ? part : V::load(total + j) + part).store(total + j);
        }
      }
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

    void collect(int64_t rows, const void** x, const void** h, const Scalar** mask, int64_t r) {
      const auto given = [&](const void* p) { return Given<Element>{p, layer_.conversion}; };
      for (int64_t j = 0; j < rows; ++j) {
        x[j] = layer_.conversion ? static_cast<const void*>(rows_.template x<uint16_t>(t_, row_))
                                 : rows_.template x<Element>(t_, row_);
        const int64_t before = d_ == 1 ? t_ + 1 : t_ - 1;
        if (rows_.reset(t_, row_)) {
          h[j] = given(direction_.reset_h).at(rows_.replacement(row_, r));
        } else if (before < 0 || before >= layer_.T || row_ >= rows_.active(before)) {
          h[j] = given(direction_.h0).at(rows_.batch(row_) * r);
        } else {
          h[j] = given(layer_.y).at(rows_.index(before, row_) * layer_.D * r + d_ * r);
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
  const Scalar* mask_rows_[kRows];

 private:
  int turn_ = 0;
  const void* x_rows_[kRows];
  const void* h_rows_[kRows];
};

}  // namespace cpu
}  // namespace fastrnn
