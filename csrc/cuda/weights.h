// Weights of any element type, read as float32, and their gradients, written from it.
#pragma once

#include "vector.h"

namespace vim {
namespace VIM_ISA {

// Calls function(pointer to the weight's elements). All threads take the same branch, but the loads after it wait for
// those before it: what should be on its way together is loaded by one function.
template <class Function>
VIM_DEVICE void with_elements(const Weight& weight, const Function& function) {
  if (weight.element == Element::float32) return function(static_cast<const float*>(weight.data));
  if (weight.element == Element::bfloat16) return function(static_cast<const bfloat16*>(weight.data));
  function(static_cast<const float16*>(weight.data));
}

// The elements of another weight, of the same type
template <class T>
VIM_DEVICE const T* elements_like(const T*, const Weight& weight) {
  return static_cast<const T*>(weight.data);
}

// 0 where there is no weight
template <class T>
VIM_DEVICE float read_or_zero(const T* weight, int64_t i) {
  return weight == nullptr ? 0.0f : to_float(weight[i]);
}

VIM_DEVICE float read_or_zero(const Weight& weight, int64_t i) {
  float value = 0.0f;
  with_elements(weight, [&](const auto* from) { value = read_or_zero(from, i); });
  return value;
}

template <int kWidth>
VIM_DEVICE Floats<kWidth> load_floats(const Weight& weight, int64_t at) {
  Floats<kWidth> out;
  with_elements(weight, [&](const auto* from) { out = load_floats<kWidth>(from + at); });
  return out;
}

// A row of weights; what is beyond `count` is zero. With `vectors`, kCount numbers are loaded four at a time.
template <class T, int kCount>
VIM_DEVICE void load_row(const T* row, int64_t count, bool vectors, float (&to)[kCount]) {
  if (kCount % 4 == 0 && vectors) {
#pragma unroll
    for (int i = 0; i + 3 < kCount; i += 4) {
      const Floats<4> four = load_floats<4>(row + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) to[i + k] = four[k];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < count ? to_float(row[i]) : 0.0f;
  }
}

// Whether rows of a multiple of four numbers can be loaded four at a time.
VIM_INLINE bool in_fours(const Weight& weight) {
  const uintptr_t bytes = weight.element == Element::float32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(weight.data) % bytes == 0;
}

// Nothing is written where the gradient is not wanted.
VIM_DEVICE void write_gradient(const WeightGrad& gradient, int64_t i, float value) {
  if (gradient.data == nullptr) return;
  if (gradient.element == Element::float32) {
    static_cast<float*>(gradient.data)[i] = value;
  } else if (gradient.element == Element::bfloat16) {
    from_float(value, static_cast<bfloat16*>(gradient.data) + i);
  } else {
    from_float(value, static_cast<float16*>(gradient.data) + i);
  }
}

}  // namespace VIM_ISA
}  // namespace vim
