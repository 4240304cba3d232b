// Residual addition and RMSNorm, a row at a time.
#pragma once

#include "staging.h"

namespace vim {
namespace VIM_ISA {

VIM_INLINE float inverse_rms(float sum_of_squares, const Norm& norm) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / static_cast<float>(norm.dim) + norm.eps);
}

template <class X, class Y>
void forward_row(const Norm& norm, int64_t i) {
  const int64_t dim = norm.dim;
  const X* x = static_cast<const X*>(norm.x) + i * norm.x_row;
  const float* residual = norm.residual == nullptr ? nullptr : norm.residual + i * dim;
  float* r = norm.r == nullptr ? nullptr : norm.r + i * dim;
  const auto sum_at = [&](int64_t c) {
    const vec value = load_some(x + c, dim - c);
    return residual == nullptr ? value : value + load_some(residual + c, dim - c);
  };
  vec squares[2] = {};
  int which = 0;
  for (int64_t c = 0; c < dim; c += kLanes, which ^= 1) {
    const vec sum = sum_at(c);
    if (r != nullptr) store_some(r + c, dim - c, sum);
    squares[which] = fma(sum, sum, squares[which]);
  }
  const vec factor = set1(inverse_rms(sum_lanes(squares[0] + squares[1]), norm));
  Y* y = static_cast<Y*>(norm.y) + i * dim;
  for (int64_t c = 0; c < dim; c += kLanes) {
    const vec sum = r == nullptr ? sum_at(c) : load_some(r + c, dim - c);
    store_some(y + c, dim - c, sum * factor * load_some(norm.weight.floats() + c, dim - c));
  }
}

inline bool norm_forward(const Norm& norm, int64_t begin, int64_t end) {
  with_element(norm.element, [&](auto* x) {
    with_element(norm.y_element, [&](auto* y) {
      using X = std::remove_reference_t<decltype(*x)>;
      using Y = std::remove_reference_t<decltype(*y)>;
      for (int64_t i = begin; i < end; ++i) forward_row<X, Y>(norm, i);
    });
  });
  return true;
}

// total = dr + (s - n mean(s n)) / rms with n = r / rms and s = dy weight; dweight sums dy n in the group's own row.
template <class T>
void backward_row(const Norm& norm, int64_t i, float* dweight) {
  const int64_t dim = norm.dim;
  const float* r = norm.r + i * dim;
  float* total = norm.total + i * dim;
  const float* dr = norm.dr == nullptr ? nullptr : norm.dr + i * dim;
  const T* dy = norm.dy == nullptr ? nullptr : static_cast<const T*>(norm.dy) + i * dim;
  vec squares{}, products{};
  for (int64_t c = 0; dy != nullptr && c < dim; c += kLanes) {
    const vec value = load_some(r + c, dim - c);
    squares = fma(value, value, squares);
    products = fma(load_some(dy + c, dim - c) * load_some(norm.weight.floats() + c, dim - c), value, products);
  }
  const float scalar = inverse_rms(sum_lanes(squares), norm);
  const vec factor = set1(scalar);
  const vec mean = set1(sum_lanes(products) * scalar / static_cast<float>(dim));
  for (int64_t c = 0; c < dim; c += kLanes) {
    vec sum = dr == nullptr ? vec{} : load_some(dr + c, dim - c);
    if (dy != nullptr) {
      const vec gradient = load_some(dy + c, dim - c), normed = load_some(r + c, dim - c) * factor;
      sum = fma(factor, fnma(normed, mean, gradient * load_some(norm.weight.floats() + c, dim - c)), sum);
      store_some(dweight + c, dim - c, fma(gradient, normed, load_some(dweight + c, dim - c)));
    }
    store_some(total + c, dim - c, sum);
  }
}

inline bool norm_backward(const Norm& norm, int64_t begin, int64_t end) {
  with_element(norm.element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int64_t group = begin; group < end; ++group) {
      float* dweight = norm.partials + group * norm.dim;
      fill_zero(dweight, norm.dim);
      const int64_t last = norm.rows * (group + 1) / norm.row_groups;
      for (int64_t i = norm.rows * group / norm.row_groups; i < last; ++i) backward_row<T>(norm, i, dweight);
    }
  });
  return true;
}

inline bool norm_reduce(const Norm& norm, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    float sum = 0;
    for (int64_t group = 0; group < norm.row_groups; ++group) sum += norm.partials[group * norm.dim + c];
    norm.dweight.floats()[c] = sum;
  }
  return true;
}

}  // namespace VIM_ISA
}  // namespace vim
