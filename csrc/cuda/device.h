// The device interface of kernel files. nvcc compiles them for GPUs; g++ compiles the same files for tests, against an
// emulation of threads, barriers, shuffles and shared memory (emulation.h). Nothing here depends on torch.
//
// Kernels use threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, the __shfl_*_sync of a full warp, and
// the functions below. They use neither static __shared__ memory nor atomics. A block has a whole number of warps.
// Every thread of a warp takes part in its shuffles, and every thread of a block in its barriers.
#pragma once

#define VIM_ISA cuda

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#else
#include "emulation.h"
#endif

#include "../common/scalar.h"

// Inside kernels only; VIM_INLINE functions run on both sides.
#define VIM_DEVICE __device__ __forceinline__

namespace vim {
namespace VIM_ISA {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A CUDA stream as torch returns it.
using Stream = void*;

// Blocks, threads of a block, and bytes of shared memory of a block.
struct Geometry {
  dim3 grid, block;
  size_t shared_bytes = 0;
};

// Runs a kernel on a stream of the current device. Throws std::runtime_error where it cannot be started.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Geometry& geometry, Stream stream, const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "arguments must have the kernel's own types");
  if (geometry.grid.x == 0 || geometry.grid.y == 0 || geometry.grid.z == 0) return;
#if defined(__CUDACC__)
  constexpr size_t kWithoutAsking = 48 * 1024;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (geometry.shared_bytes > kWithoutAsking) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(geometry.shared_bytes));
  }
  if (error == cudaSuccess) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    error = cudaLaunchKernel(function, geometry.grid, geometry.block, pointers, geometry.shared_bytes,
                             static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string("vim: cannot start a CUDA kernel: ") + cudaGetErrorString(error));
  }
#else
  (void)stream;
  emulation::run(geometry.grid, geometry.block, geometry.shared_bytes, [&] { kernel(arguments...); });
#endif
}

// Multiprocessors of the current device; the emulation says what an H100 has.
inline int multiprocessors() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) {
    return count;
  }
  cudaGetLastError();
#endif
  return 132;
}

// ---- groups of warps -------------------------------------------------------------------------------------------

// A barrier for `threads` threads, whole warps, that name the same group (0 or 1). Writes before it, to shared and
// global memory, are seen after it. The barriers have constant numbers: for one in a register the compiler reserves all
// 16 of a block, and a multiprocessor's 64 then suffice for four blocks.
VIM_DEVICE void sync_group(int group, int threads) {
#if defined(__CUDACC__)
  if (threads == kWarp) {
    __syncwarp();
  } else if (group == 0) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory");
  }
#else
  emulation::sync_group(group, threads);
#endif
}

// ---- shared memory ---------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

// The block's shared memory; its size is the launch's.
VIM_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Starts copying kBytes (4, 8 or 16, which both addresses are multiples of) to shared memory; zeros where not `valid`.
template <int kBytes>
VIM_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int size = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global), "n"(kBytes), "r"(size)
                 : "memory");
  }
}

// Ends a group of copies of this thread.
VIM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest kPending groups of this thread are pending. Other threads see the copied data after a
// barrier.
template <int kPending>
VIM_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

using emulation::commit_copies;
using emulation::copy_async;
using emulation::shared_memory;
using emulation::wait_copies;

#endif

// ---- stores at once ---------------------------------------------------------------------------------------------

// Stores 8 or 16 bytes, which the address is a multiple of, by one instruction. The compiler splits a vector of 16-bit
// numbers into its numbers.
VIM_DEVICE void store_at_once(void* to, uint2 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words.x), "r"(words.y) : "memory");
#else
  *static_cast<uint2*>(to) = words;
#endif
}

VIM_DEVICE void store_at_once(void* to, uint4 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = words;
#endif
}

// ---- special functions -----------------------------------------------------------------------------------------

// 2^x to 2 units in the last place; results below the normal numbers are 0.
VIM_DEVICE float exp2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : emulation::approximate(y, 2);
#endif
}

// 1/x to 1 unit in the last place
VIM_DEVICE float reciprocal_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulation::approximate(1.0f / x, 1);
#endif
}

// ---- sums over a warp ------------------------------------------------------------------------------------------

// The sum over all threads of the warp, in every one of them; one order of additions.
VIM_DEVICE float sum_warp(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

// ---- products of a warp ----------------------------------------------------------------------------------------

// d += a b, for a (16, 16) and b (16, 8) of bfloat16. Lane 4 g + t has pairs of neighbouring columns of a, from 2 t on
// in rows g and g + 8 and from 2 t + 8 on in the same rows; of b, pairs of rows from 2 t and 2 t + 8 on in column g; of
// d, columns 2 t and 2 t + 1 in row g, then in row g + 8.
VIM_DEVICE void multiply_add(float (&d)[4], const uint4& a, const uint2& b) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
#else
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto number = [](uint32_t pair, int i) { return to_float(bfloat16{static_cast<uint16_t>(pair >> 16 * i)}); };
  for (int t = 0; t < 4; ++t) {
    const int row = lane / 4 * 4 + t;  // the lane that has columns from 2 t on of this lane's rows
    const uint32_t of_a[4] = {__shfl_sync(kFullWarp, a.x, row), __shfl_sync(kFullWarp, a.y, row),
                              __shfl_sync(kFullWarp, a.z, row), __shfl_sync(kFullWarp, a.w, row)};
    for (int column = 0; column < 2; ++column) {
      const int source = (lane % 4 * 2 + column) * 4 + t;
      const uint32_t of_b[2] = {__shfl_sync(kFullWarp, b.x, source), __shfl_sync(kFullWarp, b.y, source)};
      for (int i = 0; i < 8; ++i) {
        const int half = i / 4, below = i / 2 % 2, pair = i % 2;
        d[2 * below + column] += number(of_a[2 * half + below], pair) * number(of_b[half], pair);
      }
    }
  }
#endif
}

}  // namespace VIM_ISA
}  // namespace vim
