// SPDX-License-Identifier: BSD-3-Clause
// Which rows of a (padded or packed) batch a thread runs, in which order of time, where they lie, and where their state
// is replaced. Rows are sorted by length, longest first, so that the rows active at a step are always the first ones.
// Used by both sweeps.
#pragma once
#include "flags.h"
#include "kernels.h"

namespace fastrnn {
namespace cpu {
namespace {  // compiled once per instruction set: nothing here may be shared

class Rows {
 public:
  Rows(const LayerForward& layer, int direction, const Team& team, const int64_t* first_row)
      : layer_(layer), first_row_(first_row), reversed_(direction == 1) {
    const int64_t B = layer.B;
    if (team.split_units || team.members == 1) {
      first_ = 0, stride_ = 1, count_ = B;
    } else if (team.deals) {  // in turn, so that every thread gets long and short rows
      first_ = team.member, stride_ = team.members;
      count_ = (B - team.member + team.members - 1) / team.members;
    } else {
      first_ = B * team.member / team.members, stride_ = 1;
      count_ = B * (team.member + 1) / team.members - first_;
    }
  }

  bool reversed() const { return reversed_; }
  int64_t count() const { return count_; }
  int64_t stride() const { return stride_; }
  // The time of the s-th step of the sweep.
  int64_t time(int64_t s) const { return reversed_ ? layer_.T - 1 - s : s; }
  // That of the step before the one at time t; may lie outside of the sequence.
  int64_t time_before(int64_t t) const { return reversed_ ? t + 1 : t - 1; }
  bool exists(int64_t t) const { return t >= 0 && t < layer_.T; }
  // How many of this thread's rows are active at time t.
  int64_t active(int64_t t) const {
    if (!layer_.batch_sizes) return count_;
    const int64_t n = (layer_.batch_sizes[t] - first_ + stride_ - 1) / stride_;
    return n < 0 ? 0 : n < count_ ? n : count_;
  }
  // The batch index of this thread's row, and its row in y, gates and cells at time t.
  int64_t batch(int64_t row) const { return layer_.order ? layer_.order[sorted(row)] : sorted(row); }
  int64_t index(int64_t t, int64_t row) const {
    return layer_.order ? t * layer_.step_rows + batch(row) : packed(t, row);
  }
  // Its row at time t in scratch, where rows that do not exist take no place: stride() apart for successive rows.
  int64_t packed(int64_t t, int64_t row) const { return (first_row_ ? first_row_[t] : t * layer_.B) + sorted(row); }

  // Whether rows [first, first + m) lie stride() rows apart at time t in y and its like, and so do the states before.
  bool at_one_stride(int64_t t, int64_t first, int64_t m) const {
    const int64_t before = time_before(t);
    return !layer_.order && !layer_.reset && (!exists(before) || first + m <= active(before));
  }

  // Its row at time t of an array like x.
  template <class Scalar>
  const Scalar* at(const Strided& array, int64_t t, int64_t row) const {
    const Scalar* data = static_cast<const Scalar*>(array.data);
    return first_row_ && !layer_.order ? data + index(t, row) * array.stride_b
                                       : data + t * array.stride_t + batch(row) * array.stride_b;
  }
  template <class Scalar>
  const Scalar* x(int64_t t, int64_t row) const {
    return at<Scalar>({layer_.x, layer_.x_stride_t, layer_.x_stride_b}, t, row);
  }

  bool resets() const { return layer_.reset != nullptr; }
  // Whether the state before this row's step at time t is replaced. What comes from step t to step t-1 in the reverse
  // direction has its flag at t; the state with which a row starts there has none.
  bool reset(int64_t t, int64_t row) const {
    if (!layer_.reset) return false;
    if (reversed_ && (++t >= layer_.T || row >= active(t))) return false;
    return layer_.reset[t * layer_.step_rows + batch(row)] != 0;
  }
  // Whether reset() may be true for a row at time t: most steps have none, and need not ask for each.
  bool resets(int64_t t) const {
    if (!layer_.reset || (reversed_ && ++t >= layer_.T)) return false;
    return any_set(layer_.reset + t * layer_.step_rows, layer_.step_rows);
  }
  // Where this row begins in what replaces a state of `width` entries.
  int64_t replacement(int64_t row, int64_t width) const { return layer_.reset_by_row ? batch(row) * width : 0; }

  // The active rows of times [t0, t1), in that order, if they lie at one stride; else null.
  template <class Scalar>
  const Scalar* x_at_one_stride(int64_t t0, int64_t t1, int64_t* row_stride) const {
    *row_stride = stride_ * layer_.x_stride_b;
    if (layer_.order && !whole(t0)) return nullptr;
    const Scalar* x0 = layer_.order ? static_cast<const Scalar*>(layer_.x) + t0 * layer_.x_stride_t : x<Scalar>(t0, 0);
    if (t1 - t0 == 1) return x0;
    if (stride_ != 1 || count_ != layer_.B) return nullptr;
    if (first_row_ && !layer_.order) return x0;
    if (layer_.B == 1) *row_stride = layer_.x_stride_t;
    return layer_.B == 1 || layer_.x_stride_t == layer_.B * layer_.x_stride_b ? x0 : nullptr;
  }

  // Whether rows of their own lengths all take part at time t, and this thread has them all: x may then be read in the
  // order of the batch. A copy of the rows in the order of their lengths costs up to a tenth of an RNN.
  bool whole(int64_t t) const { return layer_.order && count_ == layer_.step_rows && active(t) == count_; }

 private:
  int64_t sorted(int64_t row) const { return first_ + row * stride_; }

  const LayerForward& layer_;
  const int64_t* first_row_;
  bool reversed_;
  int64_t first_, stride_, count_;
};

}  // namespace

// Where the saved blocks of `unit` begin in row n of gates, [N, padded(H)/16, kSaved, 16]: the next block is 16
// elements on.
template <class Cell>
inline __attribute__((always_inline)) int64_t saved_offset(int64_t n, int64_t row_units, int64_t unit) {
  return (n * row_units + unit / 16 * 16) * Cell::kSaved + unit % 16;
}

// All lanes, or the first few.
template <class V>
inline __attribute__((always_inline)) void store_lanes(V v, typename V::Scalar* to, int lanes) {
  if (lanes == V::kLanes) {
    v.store(to);
  } else {
    v.store_partial(to, lanes);
  }
}

template <class V>
inline __attribute__((always_inline)) V load_lanes(const typename V::Scalar* from, int lanes) {
  return lanes == V::kLanes ? V::load(from) : V::load_partial(from, lanes);
}

// Columns [first, end) of a row of n columns into a padded row, zero past n; and back.
template <class V, class Element>
void load_row(const Element* from, int64_t n, int64_t first, int64_t end, typename V::Scalar* to) {
  for (int64_t j = first; j < end; ++j) to[j] = j < n ? static_cast<typename V::Scalar>(from[j]) : 0;
}

template <class V>
void store_row(const typename V::Scalar* from, int64_t n, int64_t first, int64_t end, typename V::Scalar* to) {
  for (int64_t j = first; j < end && j < n; ++j) to[j] = from[j];
}

}  // namespace cpu
}  // namespace fastrnn
