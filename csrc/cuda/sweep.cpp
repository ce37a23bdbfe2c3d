// SPDX-License-Identifier: BSD-3-Clause
// The loops over time. Nothing here allocates on the device, waits for it, or reads what it has computed: the same
// calls may be captured in a CUDA graph.
#include "sweep.h"

#include <vector>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"

namespace fastrnn {
namespace cuda {
namespace {

void* offset(void* data, int64_t elements, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + elements * bytes;
}
const void* offset(const void* data, int64_t elements, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * bytes;
}

// Which rows of an array [N, ...] belong to which step.
class Steps {
 public:
  Steps(const Layer& layer, const int64_t* batch_sizes) : layer_(layer), first_(layer.T + 1) {
    for (int64_t t = 0; t < layer.T; ++t) first_[t + 1] = first_[t] + (batch_sizes ? batch_sizes[t] : layer.B);
  }
  int64_t first(int64_t t) const { return first_[t]; }
  int64_t rows(int64_t t) const { return t < 0 || t >= layer_.T ? 0 : first_[t + 1] - first_[t]; }
  // The s-th step of the sweep of a direction, in time.
  int64_t time(int64_t direction, int64_t s) const { return direction == 0 ? s : layer_.T - 1 - s; }

  Step of(int64_t direction, int64_t s) const {
    const int64_t t = time(direction, s), earlier = time(direction, s - 1), later = time(direction, s + 1);
    Step step{};
    step.t = t, step.row = first_[t], step.rows = rows(t);
    step.earlier_t = earlier, step.earlier_rows = rows(earlier);
    step.earlier_row = step.earlier_rows == 0 ? 0 : first_[earlier];
    step.later_t = later, step.later_rows = rows(later);
    return step;
  }
  void set(Layer& layer, int64_t s) const {
    for (int64_t d = 0; d < layer.D; ++d) layer.step[d] = of(d, s);
  }

 private:
  const Layer& layer_;
  std::vector<int64_t> first_;
};

// A product of each direction with the rows of its step: one call where both have as many.
void multiply_steps(Machine& machine, const Layer& layer, Product product) {
  product.m = layer.step[0].rows;
  if (layer.D == 1 || layer.step[1].rows == product.m) {
    product.count = layer.D;
    return machine.multiply(product);
  }
  const int64_t operand = bytes_of(product.element), sum = product.element == Element::float64 ? 8 : 4;
  product.count = 1;
  machine.multiply(product);
  product.m = layer.step[1].rows;
  product.a = offset(product.a, product.a_next, operand);
  product.b = offset(product.b, product.b_next, operand);
  product.out = offset(product.out, product.out_next, product.rounded ? operand : sum);
  machine.multiply(product);
}

// The constants of a cell that the loops need.
struct CellFacts {
  int64_t G, stored, saved, input_first, recurrent_first, input_gate[4], recurrent_gate[4];
};
template <class C>
CellFacts facts_of() {
  CellFacts facts{C::kGates, C::kStored, C::kSaved, C::kInput, C::kRecurrent, {}, {}};
  for (int s = 0; s < C::kGates; ++s) {
    facts.input_gate[s] = C::input_gate(s);
    facts.recurrent_gate[s] = C::recurrent_gate(s);
  }
  return facts;
}
CellFacts facts_of(Cell cell) {
  switch (cell) {
    case Cell::lstm:
      return facts_of<Lstm>();
    case Cell::gru:
      return facts_of<Gru>();
    default:
      return facts_of<Rnn<Tanh>>();
  }
}

// The products of one layer, with what they have in common.
class Products {
 public:
  Products(Machine& machine, const Layer& layer, int64_t features, const CellFacts& facts)
      : machine_(machine),
        l_(layer),
        I_(features),
        facts_(facts),
        operand_(bytes_of(layer.element)),
        sum_(layer.element == Element::float64 ? 8 : 4) {}

  int64_t operand_bytes() const { return operand_; }
  int64_t sum_bytes() const { return sum_; }

  // out [rows, G*H] = x [rows, I] * w_ih^T
  void input_gates(const void* x, const void* w_ih, int64_t rows, void* out, int64_t out_row) const {
    Product p = product(rows, facts_.G * l_.H, I_);
    p.a = x, p.a_row = I_;
    p.b = w_ih, p.b_row = I_, p.b_transposed = true;
    p.out = out, p.out_row = out_row;
    machine_.multiply(p);
  }
  // out [D, B, width_out] = in [D, B, width_in] * weight [D, width_out, width_in]^T, for the rows of the step
  void forward_step(const Layer& layer, const void* in, int64_t width_in, const void* weight, int64_t width_out,
                    const void* out) const {
    Product p = product(0, width_out, width_in);
    p.a = in, p.a_row = width_in, p.a_next = l_.B * width_in;
    p.b = weight, p.b_row = width_in, p.b_transposed = true, p.b_next = width_out * width_in;
    p.out = const_cast<void*>(out), p.out_row = width_out, p.out_next = l_.B * width_out;
    multiply_steps(machine_, layer, p);
  }
  // out [D, B, width_out] = columns of the step's rows of in [D, N, row] * weight [D, width_in, width_out]
  void backward_step(const Layer& layer, const void* in, int64_t row, int64_t column, int64_t width_in,
                     const void* weight, int64_t width_out, const void* out) const {
    Product p = product(0, width_out, width_in);
    p.a = offset(in, layer.step[0].row * row + column, operand_), p.a_row = row;
    p.a_next = (l_.N + layer.step[1].row - layer.step[0].row) * row;
    p.b = weight, p.b_row = width_out, p.b_next = width_in * width_out;
    p.out = const_cast<void*>(out), p.out_row = width_out, p.out_next = l_.B * width_out;
    multiply_steps(machine_, layer, p);
  }
  // out [width, features] = columns of gradient [N, row]^T * of [N, features], over all steps
  void weight(const void* gradient, int64_t row, int64_t column, int64_t width, const void* of, int64_t features,
              void* out) const {
    Product p = product(width, features, l_.N);
    p.a = offset(gradient, column, operand_), p.a_row = row, p.a_transposed = true;
    p.b = of, p.b_row = features;
    p.out = out, p.out_row = features, p.rounded = true;
    machine_.multiply(p);
  }
  // d_x [N, I] (+)= columns of d_gates [N, row] * w_ih [width, I]
  void input(const void* d_gates, int64_t row, int64_t column, int64_t width, const void* w_ih, void* d_x,
             bool added) const {
    Product p = product(l_.N, I_, width);
    p.a = offset(d_gates, column, operand_), p.a_row = row;
    p.b = w_ih, p.b_row = I_;
    p.out = d_x, p.out_row = I_, p.added = added;
    machine_.multiply(p);
  }

 private:
  Product product(int64_t m, int64_t n, int64_t k) const {
    Product p{};
    p.m = m, p.n = n, p.k = k, p.element = l_.element, p.count = 1;
    return p;
  }

  Machine& machine_;
  const Layer& l_;
  const int64_t I_;
  const CellFacts& facts_;
  const int64_t operand_, sum_;
};

// Gates of the input window that are adjacent both in d_gates and in w_ih: GRU has them in two pieces, others in one.
struct Piece {
  int64_t entry, gate, count;
};
std::vector<Piece> pieces_of(const CellFacts& facts) {
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < facts.G; ++s) {
    const int64_t gate = facts.input_gate[s];
    if (!pieces.empty() && gate == pieces.back().gate + pieces.back().count) {
      ++pieces.back().count;
    } else {
      pieces.push_back({facts.input_first + s, gate, 1});
    }
  }
  return pieces;
}

}  // namespace

int64_t chunk_rows(const Machine& machine, Cell cell, int64_t T, int64_t B, int64_t H) {
  const int64_t steps = machine.most_input_gates() / (gates_per_unit(cell) * H * B);
  return B * (steps < 1 ? 1 : steps < T ? steps : T);
}

void run_forward(Machine& machine, const LayerForward& layer) {
  Forward a = layer.step;
  Layer& l = a.layer;
  const CellFacts facts = facts_of(layer.cell);
  const Steps steps(layer.step.layer, layer.batch_sizes);
  const Products products(machine, layer.step.layer, layer.I, facts);
  const bool saved = facts.saved != 0 && l.gates != nullptr;
  const int64_t chunk = saved ? l.T : chunk_rows(machine, layer.cell, l.T, l.B, l.H) / l.B;  // in steps
  a.input_row = saved ? l.gates_row : facts.G * l.H;

  steps.set(l, 0);
  machine.forward(Stage::begin, layer.cell, a);
  void* gates[2] = {};     // of each direction, where the input gates of the chunk lie
  int64_t origin[2] = {};  // and which of the N rows comes first there
  for (int64_t s = 0; s < l.T; ++s) {
    if (s % chunk == 0) {
      const int64_t end = s + chunk < l.T ? s + chunk : l.T;
      for (int64_t d = 0; d < l.D; ++d) {
        const int64_t from = steps.first(d == 0 ? s : l.T - end), to = steps.first(d == 0 ? end : l.T - s);
        gates[d] = saved ? offset(l.gates, d * l.N * a.input_row, products.sum_bytes())
                         : offset(layer.input_gates, d * chunk * l.B * a.input_row, products.sum_bytes());
        origin[d] = saved ? 0 : from;
        products.input_gates(offset(layer.x, from * layer.I, products.operand_bytes()), layer.weights.w_ih[d],
                             to - from, offset(gates[d], (from - origin[d]) * a.input_row, products.sum_bytes()),
                             a.input_row);
      }
    }
    steps.set(l, s);
    for (int64_t d = 0; d < l.D; ++d) {
      a.input[d] = offset(gates[d], (l.step[d].row - origin[d]) * a.input_row, products.sum_bytes());
    }
    products.forward_step(l, a.operand, l.R, layer.weights.w_hh, facts.G * l.H, a.recurrent);
    machine.forward(Stage::cell, layer.cell, a);
    if (layer.weights.w_hr != nullptr) {
      products.forward_step(l, a.unprojected, l.H, layer.weights.w_hr, l.R, a.projected);
      machine.forward(Stage::project, layer.cell, a);
    }
  }
}

void run_backward(Machine& machine, const LayerBackward& layer) {
  Backward a = layer.step;
  Layer& l = a.layer;
  const CellFacts facts = facts_of(layer.cell);
  const Steps steps(layer.step.layer, layer.batch_sizes);
  const Products products(machine, layer.step.layer, layer.I, facts);
  const int64_t row = facts.stored * l.H, operand = products.operand_bytes();

  machine.backward(Stage::begin, layer.cell, a);
  for (int64_t s = l.T - 1; s >= 0; --s) {
    steps.set(l, s);
    if (layer.weights.w_hr != nullptr) {
      machine.backward(Stage::project, layer.cell, a);
      products.backward_step(l, a.d_projected, l.R, 0, l.R, layer.weights.w_hr, l.H, a.d_unprojected);
    }
    machine.backward(Stage::cell, layer.cell, a);
    products.backward_step(l, a.d_gates, row, facts.recurrent_first * l.H, facts.G * l.H, layer.weights.w_hh, l.R,
                           a.through);
  }
  machine.backward(Stage::end, layer.cell, a);

  const std::vector<Piece> pieces = pieces_of(facts);
  bool biases = false, added = false;
  for (int64_t d = 0; d < l.D; ++d) {
    const void* const d_gates = offset(a.d_gates, d * l.N * row, operand);
    const void* const entered = offset(a.entered, d * l.N * l.R, operand);
    for (const Piece& piece : pieces) {
      const int64_t column = piece.entry * l.H, gate = piece.gate * l.H * layer.I, width = piece.count * l.H;
      if (layer.d_x != nullptr) {
        products.input(d_gates, row, column, width, offset(layer.weights.w_ih[d], gate, operand), layer.d_x, added);
        added = true;
      }
      if (layer.d_w_ih[d] != nullptr) {
        products.weight(d_gates, row, column, width, layer.x, layer.I, offset(layer.d_w_ih[d], gate, operand));
      }
    }
    if (layer.d_w_hh[d] != nullptr) {
      products.weight(d_gates, row, facts.recurrent_first * l.H, facts.G * l.H, entered, l.R, layer.d_w_hh[d]);
    }
    if (layer.d_w_hr[d] != nullptr) {
      products.weight(offset(a.d_projected, d * l.N * l.R, operand), l.R, 0, l.R,
                      offset(a.unprojected, d * l.N * l.H, operand), l.H, layer.d_w_hr[d]);
    }
    biases = biases || layer.d_b_ih[d] != nullptr || layer.d_b_hh[d] != nullptr;
  }
  if (!biases) return;
  Sums sums{};
  sums.element = l.element;
  sums.N = l.N, sums.H = l.H, sums.D = l.D, sums.G = facts.G, sums.stored = facts.stored;
  sums.input_first = facts.input_first, sums.recurrent_first = facts.recurrent_first;
  for (int s = 0; s < 4; ++s) {
    sums.input_gate[s] = facts.input_gate[s];
    sums.recurrent_gate[s] = facts.recurrent_gate[s];
  }
  sums.d_gates = a.d_gates, sums.partial = layer.partial;
  for (int d = 0; d < 2; ++d) sums.d_b_ih[d] = layer.d_b_ih[d], sums.d_b_hh[d] = layer.d_b_hh[d];
  machine.sum(sums);
}

}  // namespace cuda
}  // namespace fastrnn
