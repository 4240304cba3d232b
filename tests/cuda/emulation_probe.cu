// Small kernels that show what csrc/cuda/device.h and the emulation behind it do; prints a line for each.
#include "device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

extern "C" void vim_emulation_order(int order);
extern "C" void vim_emulation_rounding(int badly);

namespace vim {
namespace cuda {

struct Pair {
  const float* in;
  float* out;
};

// Every block turns its own part of an array around, through shared memory.
template <bool kBarrier, bool kTogether = false>
__global__ void turn_around(Pair pair) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned i = threadIdx.x, n = blockDim.x, first = blockIdx.x * n;
  shared[i] = pair.in[first + i];
  // Where threads take turns, all have written before any is past these.
  for (int i = 0; kTogether && i < 2; ++i) __syncwarp();
  if (kBarrier) __syncthreads();
  pair.out[first + i] = shared[n - 1 - i];
}

__global__ void shuffles(float* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float value = static_cast<float>(threadIdx.x);
  float* row = out + threadIdx.x * 6;
  row[0] = sum_warp(value);
  row[1] = __shfl_xor_sync(kFullWarp, value, 3);
  row[2] = __shfl_down_sync(kFullWarp, value, 2u, 8);
  row[3] = __shfl_up_sync(kFullWarp, value, 1u);
  row[4] = __shfl_sync(kFullWarp, value, 5);
  row[5] = __shfl_sync(kFullWarp, value, lane ^ 1, 16);
}

// A ring of two copies of 16 bytes per thread, of which the last one is not valid.
template <int kPending>
__global__ void copies(Pair pair) {
  float4* ring = reinterpret_cast<float4*>(shared_memory()) + 2 * threadIdx.x;
  const float4* in = reinterpret_cast<const float4*>(pair.in) + 2 * threadIdx.x;
  copy_async<16>(ring, in);
  commit_copies();
  copy_async<16>(ring + 1, in + 1, threadIdx.x != 31);
  commit_copies();
  wait_copies<kPending>();
  pair.out[2 * threadIdx.x] = ring[0].x + ring[0].w;
  pair.out[2 * threadIdx.x + 1] = ring[1].x + ring[1].w;
}

__global__ void half_a_barrier(float* out) {
  if (threadIdx.x < 16) __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void early_end(float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

// A race: what a block writes depends on whether the one before has written.
__global__ void passed_on(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x + 1] = out[blockIdx.x] + 1;
}

__global__ void powers(float* out) { out[threadIdx.x] = exp2_approx(static_cast<float>(threadIdx.x) / 7); }

int failures = 0;

void expect(bool right, const char* what) {
  std::printf("%s %s\n", right ? "ok" : "WRONG", what);
  failures += !right;
}

bool turned(const std::vector<float>& out) {
  for (int i = 0; i < 192; ++i) {
    if (out[static_cast<size_t>(i)] != static_cast<float>(i / 64 * 64 + 63 - i % 64)) return false;
  }
  return true;
}

template <class Function>
bool throws(const Function& function) {
  try {
    function();
  } catch (const std::exception&) {
    return true;
  }
  return false;
}

void run_all(int order) {
  vim_emulation_order(order);
  std::vector<float> in(260), out(1024);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  const Pair pair{in.data(), out.data()};

  launch(turn_around<true>, {3, 64, 64 * sizeof(float)}, nullptr, pair);
  expect(turned(out), "blocks, barriers and shared memory");
  launch(turn_around<false>, {3, 64, 64 * sizeof(float)}, nullptr, pair);
  expect(!turned(out), "a missing barrier shows");
  launch(turn_around<false, true>, {3, 64, 64 * sizeof(float)}, nullptr, pair);
  expect(turned(out) == (order < 3), "a missing barrier after one of warps shows where warps run ahead");

  launch(shuffles, {1, 64, 0}, nullptr, out.data());
  bool right = true;
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32, first = t - lane;
    const int expected[6] = {t < 32 ? 496 : 1520, first + (lane ^ 3), lane % 8 < 6 ? t + 2 : t, lane > 0 ? t - 1 : t,
                             first + 5, first + (lane ^ 1)};
    for (int k = 0; k < 6; ++k) right = right && out[static_cast<size_t>(6 * t + k)] == static_cast<float>(expected[k]);
  }
  expect(right, "shuffles");

  launch(copies<0>, {1, 32, 32 * 32}, nullptr, pair);
  right = out[63] == 0 && out[62] == in[248] + in[251];
  for (size_t t = 0; t < 31; ++t) right = right && out[2 * t + 1] == in[8 * t + 4] + in[8 * t + 7];
  expect(right, "asynchronous copies");
  launch(copies<1>, {1, 32, 32 * 32}, nullptr, pair);
  expect(out[0] == in[0] + in[3] && out[1] != out[1], "a copy that is not waited for has not arrived");

  expect(throws([&] { launch(copies<0>, {1, 32, 32 * 32}, nullptr, Pair{in.data() + 1, out.data()}); }),
         "a copy from an address that is no multiple of its size");

  std::fill(out.begin(), out.end(), 0.0f);
  launch(passed_on, {8, 32, 0}, nullptr, out.data());
  expect((out[8] == 8) == (order == 0 || order == 3), "a race between blocks shows in another order of blocks");

  expect(throws([&] { launch(half_a_barrier, {1, 32, 0}, nullptr, out.data()); }), "threads that wait for ever");
  launch(early_end, {1, 64, 0}, nullptr, out.data());
  expect(out[31] == 1, "threads that end are not waited for");
  expect(throws([&] { launch(early_end, {1, 48, 0}, nullptr, out.data()); }), "half a warp is refused");
  launch(early_end, {0, 64, 0}, nullptr, out.data());
}

// Errors of approximate instructions, when they are asked for, are there and no larger than a GPU's.
bool errors() {
  std::vector<float> exact(32), wrong(32);
  launch(powers, {1, 32, 0}, nullptr, exact.data());
  vim_emulation_rounding(1);
  launch(powers, {1, 32, 0}, nullptr, wrong.data());
  vim_emulation_rounding(0);
  float largest = 0;
  for (size_t i = 0; i < exact.size(); ++i) largest = std::max(largest, std::abs(wrong[i] / exact[i] - 1));
  return largest > 0x1p-23f && largest <= 0x1.4p-22f;
}

// Every half-precision number survives, and halves between neighbours are rounded to even.
template <class T>
bool conversions() {
  for (uint32_t raw = 0; raw < 65536; ++raw) {
    const T x{static_cast<uint16_t>(raw)};
    const float value = to_float(x);
    T back;
    from_float(value, &back);
    if (value == value ? back.raw != x.raw : to_float(back) == to_float(back)) return false;
    const float above = to_float(T{static_cast<uint16_t>(raw + 1)});
    if (raw < 0x7000 && above == above) {
      from_float(0.5f * (value + above), &back);
      if (back.raw != raw + raw % 2) return false;
    }
  }
  return true;
}

}  // namespace cuda
}  // namespace vim

int main() {
  using namespace vim::cuda;
  for (int order = 0; order < 5; ++order) run_all(order);
  expect(errors(), "errors of approximate instructions");
  expect(conversions<vim::cuda::bfloat16>(), "bfloat16");
  expect(conversions<vim::cuda::float16>(), "float16");
  return failures == 0 ? 0 : 1;
}
