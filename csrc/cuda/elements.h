// SPDX-License-Identifier: BSD-3-Clause
// Elements of tensors on their way into registers and back. The math runs in float or double; what a tensor holds is
// known at run time, so that one kernel serves float32, bfloat16 and float16: the branch is the same for every thread.
// Compiled by nvcc for the device, and by any C++ compiler for the tests that run the kernels' bodies on the host.
#pragma once
#include <stdint.h>

#include "../cells/cell.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastrnn {
namespace cuda {

enum class Element : int { float64, float32, bfloat16, float16 };

constexpr int64_t bytes_of(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

// Both round to the nearest, ties to even, and keep NaN.
FASTRNN_INLINE float from_bfloat16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __bfloat162float(__ushort_as_bfloat16(bits));
#else
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
#endif
}
FASTRNN_INLINE uint16_t to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
FASTRNN_INLINE float from_float16(uint16_t bits) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(bits));
#else
  _Float16 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
#endif
}
FASTRNN_INLINE uint16_t to_float16(float value) {
#if defined(__CUDACC__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  __builtin_memcpy(&bits, &half, sizeof bits);
  return bits;
#endif
}

// W neighbours, moved by one instruction: 16 bytes for four floats. Their address is a multiple of the size.
template <class Scalar, int W>
struct alignas(sizeof(Scalar) * W) Pack {
  Scalar v[W];
};

template <int W, class Scalar>
FASTRNN_INLINE Pack<Scalar, W> pack_at(const void* data, int64_t index) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const Pack<Scalar, W>*>(static_cast<const Scalar*>(data) + index);
#else
  Pack<Scalar, W> pack;
  __builtin_memcpy(&pack, static_cast<const Scalar*>(data) + index, sizeof pack);
  return pack;
#endif
}
template <int W, class Scalar>
FASTRNN_INLINE void put_pack(void* data, int64_t index, const Pack<Scalar, W>& pack) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<Pack<Scalar, W>*>(static_cast<Scalar*>(data) + index) = pack;
#else
  __builtin_memcpy(static_cast<Scalar*>(data) + index, &pack, sizeof pack);
#endif
}

// Arrays in the type of the math: states, sums, what is saved.
template <class A, int W>
FASTRNN_INLINE void load(A (&to)[W], const void* data, int64_t index) {
  const Pack<A, W> pack = pack_at<W, A>(data, index);
  for (int w = 0; w < W; ++w) to[w] = pack.v[w];
}
template <class A, int W>
FASTRNN_INLINE void store(const A (&from)[W], void* data, int64_t index) {
  Pack<A, W> pack;
  for (int w = 0; w < W; ++w) pack.v[w] = from[w];
  put_pack<W, A>(data, index, pack);
}
template <class A, int W>
FASTRNN_INLINE void fill(A (&to)[W], A value) {
  for (int w = 0; w < W; ++w) to[w] = value;
}

// Arrays in the type of the tensors. With A = double they are float64.
template <int W>
FASTRNN_INLINE void load(double (&to)[W], const void* data, int64_t index, Element) {
  load<double, W>(to, data, index);
}
template <int W>
FASTRNN_INLINE void load(float (&to)[W], const void* data, int64_t index, Element element) {
  if (element == Element::float32) {
    load<float, W>(to, data, index);
  } else {
    const Pack<uint16_t, W> pack = pack_at<W, uint16_t>(data, index);
    for (int w = 0; w < W; ++w) {
      to[w] = element == Element::bfloat16 ? from_bfloat16(pack.v[w]) : from_float16(pack.v[w]);
    }
  }
}
template <int W>
FASTRNN_INLINE void store(const double (&from)[W], void* data, int64_t index, Element) {
  store<double, W>(from, data, index);
}
template <int W>
FASTRNN_INLINE void store(const float (&from)[W], void* data, int64_t index, Element element) {
  if (element == Element::float32) {
    store<float, W>(from, data, index);
  } else {
    Pack<uint16_t, W> pack;
    for (int w = 0; w < W; ++w) {
      pack.v[w] = element == Element::bfloat16 ? to_bfloat16(from[w]) : to_float16(from[w]);
    }
    put_pack<W, uint16_t>(data, index, pack);
  }
}

}  // namespace cuda
}  // namespace fastrnn
