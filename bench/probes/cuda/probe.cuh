// SPDX-License-Identifier: BSD-3-Clause
// What every probe of this folder uses: errors, events, the bounded wait, JSON. A probe prints one JSON object; it ends
// with status 1 and a sentence on stderr where CUDA reports an error or its own check of the results fails.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

inline void require(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "probe: line %d: %s\n", line, what);
  std::exit(1);
}

#define REQUIRE(condition) require((condition), "does not hold: " #condition, __LINE__)
#define CHECK(call)                                                                                             \
  do {                                                                                                          \
    const cudaError_t status = (call);                                                                          \
    require(status == cudaSuccess, (std::string(#call) + ": " + cudaGetErrorString(status)).c_str(), __LINE__); \
  } while (false)

// Polls before a wait gives up: at 0.5 to 1 us a poll some seconds, far beyond any latency that is measured.
constexpr unsigned kMostPolls = 1u << 22;

// The same for waits that the hardware itself suspends for some microseconds a poll.
constexpr unsigned kMostWaits = 1u << 16;

// Device memory of `count` elements, zeroed; freed with the object.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : bytes_(count * sizeof(T)) {
    CHECK(cudaMalloc(&data_, bytes_));
    clear();
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void clear() {
    CHECK(cudaMemset(data_, 0, bytes_));
    CHECK(cudaDeviceSynchronize());  // streams that do not wait for the default one must find zeros, too
  }
  T* data() const { return data_; }
  T first() const {
    T value;
    CHECK(cudaMemcpy(&value, data_, sizeof(T), cudaMemcpyDeviceToHost));
    return value;
  }

 private:
  T* data_ = nullptr;
  size_t bytes_;
};

// Seconds between two events around `work` on a stream; errors of kernels end the program.
template <typename Work>
double seconds(cudaStream_t stream, const Work& work) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaEventRecord(start, stream));
  work();
  CHECK(cudaEventRecord(end, stream));
  CHECK(cudaEventSynchronize(end));
  CHECK(cudaGetLastError());
  float milliseconds = 0.0f;
  CHECK(cudaEventElapsedTime(&milliseconds, start, end));
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  return milliseconds * 1e-3;
}

// The least of a few repetitions, after one that is not counted: latencies have a floor and are disturbed upwards.
template <typename Work>
double least_seconds(cudaStream_t stream, const Work& work) {
  work();
  double least = seconds(stream, work);
  for (int repetition = 0; repetition < 4; ++repetition) {
    const double now = seconds(stream, work);
    least = now < least ? now : least;
  }
  return least;
}

// One JSON object, filled in the order of the calls.
class Json {
 public:
  void number(const std::string& name, double value) {
    char text[64];
    std::snprintf(text, sizeof(text), "%.6g", value);
    raw(name, text);
  }
  void text(const std::string& name, const std::string& value) {
    raw(name, std::string(1, '"').append(value).append(1, '"'));
  }
  void print() const { std::printf("{%s}\n", body_.c_str()); }

 private:
  void raw(const std::string& name, const std::string& value) {
    body_.append(body_.empty() ? "\"" : ", \"").append(name).append("\": ").append(value);
  }
  std::string body_;
};

// The name of a figure, its numbers printed into it.
template <typename... Numbers>
std::string named(const char* format, Numbers... numbers) {
  char text[96];
  std::snprintf(text, sizeof(text), format, numbers...);
  return text;
}

inline cudaDeviceProp properties() {
  cudaDeviceProp found;
  CHECK(cudaSetDevice(0));
  CHECK(cudaGetDeviceProperties(&found, 0));
  return found;
}
