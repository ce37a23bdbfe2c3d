// SPDX-License-Identifier: BSD-3-Clause
// What the loops of sweep.cpp ask of the machine that they run on. A GPU answers in device.cpp: every call is work put
// on one stream, and none waits. The tests have one that does the same work on the host, with the same bodies, so that
// loops, sizes and pointers are tested without a GPU.
#pragma once
#include "steps.h"

namespace fastrnn {
namespace cuda {

// out[m][n] = sum over k of a[m][k] * b[k][n]; `count` such products side by side, their matrices *_next elements
// apart.
struct Product {
  int64_t m, n, k;
  const void* a;
  int64_t a_row;      // elements from row to row, as it lies in memory
  bool a_transposed;  // memory holds [k, m]
  const void* b;
  int64_t b_row;
  bool b_transposed;  // memory holds [n, k]
  void* out;
  int64_t out_row;
  Element element;  // of a and b; sums are in double for float64, else in float
  bool rounded;     // whether out has the element type of a and b, and not that of the sums
  bool added;       // out += instead of out =
  int64_t count, a_next, b_next, out_next;
};

enum class Stage : int { begin, cell, project, end };

class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  virtual ~Machine() = default;

  // Input gates of one direction that are computed at a time where they are not saved, in elements. Few products beside
  // those of the steps, and memory that does not grow with T: 64 MB of float. Not measured.
  virtual int64_t most_input_gates() const { return int64_t{16} << 20; }
  virtual void multiply(const Product& product) = 0;
  // One kernel of forward.cuh or backward.cuh.
  virtual void forward(Stage stage, Cell cell, const Forward& arguments) = 0;
  virtual void backward(Stage stage, Cell cell, const Backward& arguments) = 0;
  virtual void sum(const Sums& arguments) = 0;
  // Reports, without waiting, a value of lengths [B] that is not in 0..T.
  virtual void check_lengths(const int64_t* lengths, int64_t B, int64_t T) = 0;
};

}  // namespace cuda
}  // namespace fastrnn
