// Vectors of kWidth neighbouring numbers of any element type, loaded and stored at once.
#pragma once

#include "device.h"

namespace vim {
namespace VIM_ISA {

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T items[kWidth];
};

template <int kWidth>
struct Floats {
  float items[kWidth];

  VIM_DEVICE float& operator[](int i) { return items[i]; }
  VIM_DEVICE float operator[](int i) const { return items[i]; }
};

template <int kWidth, class T>
VIM_DEVICE Floats<kWidth> widen(const Vector<T, kWidth>& vector) {
  Floats<kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = to_float(vector.items[i]);
  return out;
}

template <int kWidth, class T>
VIM_DEVICE Vector<T, kWidth> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <int kWidth, class T>
VIM_DEVICE Floats<kWidth> load_floats(const T* from) {
  return widen<kWidth>(load_vector<kWidth>(from));
}

template <int kWidth, class T>
VIM_DEVICE void store_floats(const Floats<kWidth>& from, T* to) {
  Vector<T, kWidth> vector;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) from_float(from[i], vector.items + i);
  if constexpr (sizeof(vector) == 16) {
    store_at_once(to, bits<uint4>(vector));
  } else if constexpr (sizeof(vector) == 8) {
    store_at_once(to, bits<uint2>(vector));
  } else {
    *reinterpret_cast<Vector<T, kWidth>*>(to) = vector;
  }
}

template <int kWidth>
VIM_DEVICE Floats<kWidth> filled(float value) {
  Floats<kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = value;
  return out;
}

// Whether vectors of kWidth can be loaded from `data` and at every multiple of `stride` elements from it.
template <int kWidth, class T>
bool is_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * kWidth) == 0 && stride % kWidth == 0;
}

}  // namespace VIM_ISA
}  // namespace vim
