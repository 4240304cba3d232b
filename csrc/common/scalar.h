// Numbers one at a time: half precision, bits, sizes.
//
// A kernel file is compiled with VIM_ISA naming its instruction set ("cuda" for a GPU), which is also the namespace of
// everything in it: no inline function compiled for one processor can be picked by the linker for another. For the same
// reason kernel files for the CPU call no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "arguments.h"

#if !defined(VIM_ISA)
#define VIM_ISA baseline
#endif

#if defined(__CUDACC__)
#define VIM_INLINE __host__ __device__ __forceinline__
#else
#define VIM_INLINE inline __attribute__((always_inline))
#endif

namespace vim {
namespace VIM_ISA {

VIM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VIM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
VIM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
VIM_INLINE int64_t blocks_in(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class To, class From>
VIM_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct bfloat16 {
  uint16_t raw;
};
struct float16 {
  uint16_t raw;
};

VIM_INLINE float to_float(float x) { return x; }

VIM_INLINE float to_float(bfloat16 x) { return bits<float>(static_cast<uint32_t>(x.raw) << 16); }

VIM_INLINE float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.raw));
  return value;
#else
  // Moving the exponent field and multiplying by 2^112 is exact for subnormals too; infinity and NaN are patched.
  const uint32_t magnitude = static_cast<uint32_t>(x.raw & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.raw & 0x8000) << 16;
  float value = bits<float>(magnitude) * 0x1p112f;
  if (magnitude >= 0x0f800000u) value = bits<float>(magnitude | 0x7f800000u);
  return bits<float>(bits<uint32_t>(value) | sign);
#endif
}

VIM_INLINE void from_float(float x, float* out) { *out = x; }

VIM_INLINE void from_float(float x, bfloat16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->raw) : "f"(x));
#else
  const uint32_t raw = bits<uint32_t>(x);
  out->raw = x != x ? 0x7fc0 : static_cast<uint16_t>((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
#endif
}

VIM_INLINE void from_float(float x, float16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->raw) : "f"(x));
#else
  const uint32_t raw = bits<uint32_t>(x), magnitude = raw & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((raw >> 16) & 0x8000);
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // from 65520 on everything rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Adding 1/2 leaves the subnormal, rounded to even, in the low bits.
    half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->raw = static_cast<uint16_t>(half | sign);
#endif
}

// Calls function(static_cast<T*>(nullptr)) with the element's type.
template <class Function>
inline __attribute__((always_inline)) void with_element(Element element, const Function& function) {
  switch (element) {
    case Element::float32:
      return function(static_cast<float*>(nullptr));
    case Element::bfloat16:
      return function(static_cast<bfloat16*>(nullptr));
    case Element::float16:
      return function(static_cast<float16*>(nullptr));
  }
}

}  // namespace VIM_ISA
}  // namespace vim
