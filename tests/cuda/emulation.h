// CUDA on the host, for tests. A block's threads are fibers: each runs until it waits for others (at a barrier or in a
// shuffle), then the next one goes on. Blocks run one after the other, in an order that can be turned around as well.
//
// It finds what a GPU may hide: shared memory starts as NaN and has exactly the size asked for (AddressSanitizer sees
// an access beyond it), a copy_async arrives no earlier than it is waited for, a barrier that some threads never reach
// and a copy_async whose addresses are no multiples of its size are errors, and the order in which threads run can be turned around (vim_emulation_order), which changes the result
// of a kernel that lacks a barrier.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace vim::emulation {

constexpr int kLanes = 32;

// What a group of threads that wait for each other shares.
struct Barrier {
  int members = 0, arrived = 0;
  uint64_t passed = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kLanes];  // what lanes offer in a shuffle; the next shuffle uses the other set
};

struct Copy {
  void* target;
  const void* source;
  int bytes;
  bool valid;
  uint64_t group;
};

struct Thread {
  dim3 index;
  int lane = 0;
  Warp* warp = nullptr;
  uint64_t shuffles = 0, copy_group = 0;
  std::vector<Copy> copies;
  const Barrier* waits_for = nullptr;
  uint64_t passed = 0;  // of that barrier, when it was reached
  bool done = false;
  void* context = nullptr;
};

// The state of the one launch that runs.
struct Machine {
  Thread* thread = nullptr;
  dim3 block_index, block_size, grid_size;
  Barrier barrier, groups[2];
  char* shared = nullptr;
  const char* fault = nullptr;  // of a thread; ends the launch
};
extern Machine machine;

// Runs body() as every thread of every block. Throws std::runtime_error when threads wait for ever.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

void wait(Barrier& barrier);

inline void sync_group(int group, int threads) {
  Barrier& barrier = machine.groups[group];
  if (barrier.arrived == 0) barrier.members = threads;
  wait(barrier);
}

inline char* shared_memory() { return machine.shared; }

// Whether results of approximate instructions are as wrong as a GPU's may be (vim_emulation_rounding).
extern bool rounds_badly;

// What an instruction may return that is right to `units` in the last place: another error for every result.
inline float approximate(float exact, int units) {
  if (!rounds_badly || !std::isnormal(exact)) return exact;
  uint32_t raw;
  std::memcpy(&raw, &exact, sizeof raw);
  const int span = 2 * units + 1, error = static_cast<int>((raw * 2654435761u >> 16) % static_cast<unsigned>(span)) - units;
  return exact + static_cast<float>(error) * 0x1p-23f * exact;
}

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves 4 or 8 bytes");
  Thread& thread = *machine.thread;
  uint64_t* slots = thread.warp->slots[thread.shuffles++ % 2];
  std::memcpy(slots + thread.lane, &value, sizeof value);
  wait(thread.warp->barrier);
  std::memcpy(&value, slots + source, sizeof value);
  return value;
}

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes != 0) {
    machine.fault = "emulation: cp.async at an address that is no multiple of its size";
  }
  std::memset(shared, 0xff, kBytes);
  machine.thread->copies.push_back({shared, global, kBytes, valid, machine.thread->copy_group});
}

inline void commit_copies() { ++machine.thread->copy_group; }

void arrive_copies(uint64_t pending);

template <int kPending>
void wait_copies() {
  arrive_copies(kPending);
}

}  // namespace vim::emulation

#define threadIdx (::vim::emulation::machine.thread->index)
#define blockIdx (::vim::emulation::machine.block_index)
#define blockDim (::vim::emulation::machine.block_size)
#define gridDim (::vim::emulation::machine.grid_size)

inline void __syncthreads() { vim::emulation::wait(vim::emulation::machine.barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { vim::emulation::wait(vim::emulation::machine.thread->warp->barrier); }

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  const int lane = vim::emulation::machine.thread->lane;
  return vim::emulation::shuffle(value, lane / width * width + source % width);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  const int lane = vim::emulation::machine.thread->lane, source = lane ^ mask;
  return vim::emulation::shuffle(value, source / width == lane / width ? source : lane);
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance, int width = 32) {
  const int lane = vim::emulation::machine.thread->lane;
  return vim::emulation::shuffle(value, lane % width >= static_cast<int>(distance) ? lane - static_cast<int>(distance) : lane);
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance, int width = 32) {
  const int lane = vim::emulation::machine.thread->lane, source = lane + static_cast<int>(distance);
  return vim::emulation::shuffle(value, lane % width + static_cast<int>(distance) < width ? source : lane);
}
