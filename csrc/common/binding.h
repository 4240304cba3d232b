// Shared code of the bindings. It uses PyTorch's stable ABI only, so one build works with every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

// Before torch 2.12 this check has its older name, and says less.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace vim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// ---- what runs here --------------------------------------------------------------------------------------------

inline std::optional<Element> element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      return std::nullopt;
  }
}

inline bool is_float(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }
inline bool is_float(const OptionalTensor& x) { return !x.has_value() || is_float(*x); }
inline bool same_type(const Tensor& x, const Tensor& like) { return x.scalar_type() == like.scalar_type(); }
inline bool same_type(const OptionalTensor& x, const Tensor& like) { return !x.has_value() || same_type(*x, like); }

template <class... Results, size_t... kIndex>
std::tuple<Results...> results_of(const StableIValue* stack, std::index_sequence<kIndex...>) {
  return {torch::stable::detail::to<Results>(stack[kIndex])...};
}

// Calls an overload of an op; its results come back in order.
template <class... Results, class... Arguments>
std::tuple<Results...> call_overload(const char* name, const char* overload, const Arguments&... arguments) {
  constexpr size_t size = std::max(sizeof...(Arguments), sizeof...(Results));
  std::array<StableIValue, size> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return results_of<Results...>(stack.data(), std::index_sequence_for<Results...>{});
}

// Calls an op that is registered under another name.
template <class... Results, class... Arguments>
std::tuple<Results...> call_op(const char* name, const Arguments&... arguments) {
  return call_overload<Results...>(name, "", arguments...);
}

// ---- shapes ----------------------------------------------------------------------------------------------------

// Checks for memory safety only: the Python side checks arguments with better messages. `side` is the suffix of an
// argument that both directions have.
constexpr const char* kBackwardSide = " of the backward direction";

// Kernels multiply the sizes of different tensors, and an empty or expanded one may have any.
inline void check_extent(std::initializer_list<int64_t> sizes) {
  double extent = 1;
  for (const int64_t size : sizes) extent *= static_cast<double>(std::max<int64_t>(size, 1));
  STD_TORCH_CHECK(extent <= 0x1p52, "vim: sizes whose product is ", extent, " are too large");
}

// Sharding and offloading free the memory of a tensor that keeps its sizes: `untyped_storage().resize_(0)`.
inline void check_memory(const char* name, const Tensor& x, const char* side = "") {
  if (x.numel() == 0) return;
  int64_t last = x.storage_offset(), held = 0;
  for (int64_t axis = 0; axis < x.dim(); ++axis) last += (x.size(axis) - 1) * x.stride(axis);
  const int64_t needed = (last + 1) * static_cast<int64_t>(x.element_size());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &held));
  STD_TORCH_CHECK(held >= needed, "vim: ", name, side, " needs ", needed, " bytes of memory and its storage has ", held,
                  ": it was freed or cut short");
}

// Checks the sizes of a tensor that kernels read, and that its memory holds all elements.
inline void check_sizes(const char* name, const Tensor& x, const Sizes& sizes, const char* side = "") {
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = x.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(same, "vim: ", name, side, " does not have the sizes that the other arguments imply");
  check_memory(name, x, side);
}

inline void check_sizes(const char* name, const OptionalTensor& x, const Sizes& sizes, const char* side = "") {
  if (x.has_value()) check_sizes(name, *x, sizes, side);
}

// A kernel must not follow a pointer into another device's memory.
inline void check_device(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), "vim: ", name,
                  " is on another device than the first argument");
}

inline void check_device(const char* name, const OptionalTensor& x, const Tensor& like) {
  if (x.has_value()) check_device(name, *x, like);
}

inline Sizes sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline Sizes strides_of(const Tensor& x) {
  const auto strides = x.strides();
  return Sizes(strides.begin(), strides.end());
}

// ---- memory ----------------------------------------------------------------------------------------------------

inline Tensor allocate(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}

inline Tensor allocate_like(const Tensor& x) { return allocate(x, sizes_of(x)); }

// The gradient of an absent input.
inline Tensor absent(const Tensor& like, ScalarType type) { return allocate(like, {0}, type); }

// (batch, dim, len), channel-last in memory where x is: `_layout.empty_like_layout`.
inline Tensor allocate_like_layout(const Tensor& x) {
  if (x.stride(1) == 1 && x.stride(2) != 1) {
    return torch::stable::transpose(allocate(x, {x.size(0), x.size(2), x.size(1)}), 1, 2);
  }
  return allocate_like(x);
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline OptionalTensor dense(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(dense(*x)) : std::nullopt;
}

// Rows of x, (..., dim): x itself if its rows have a constant stride, else a copy.
inline Tensor as_rows(const Tensor& x) {
  if (x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1)) return x;
  bool regular = x.stride(x.dim() - 1) == 1;
  for (int64_t axis = 0; axis + 2 < x.dim(); ++axis) {
    regular = regular && x.stride(axis) == x.stride(axis + 1) * x.size(axis + 1);
  }
  return regular ? x : torch::stable::contiguous(x);
}

// Row stride of the result of as_rows. The stride of an axis of size 1 is arbitrary.
inline int64_t row_stride(const Tensor& rows) {
  return rows.is_contiguous() ? rows.size(rows.dim() - 1) : rows.stride(rows.dim() - 2);
}

inline const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
inline const float* floats(const OptionalTensor& x) { return x.has_value() ? floats(*x) : nullptr; }
inline float* mutable_floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline Weight weight_of(const Tensor& x) { return {x.const_data_ptr(), *element_of(x)}; }
inline Weight weight_of(const OptionalTensor& x) { return x.has_value() ? weight_of(*x) : Weight{}; }
inline WeightGrad gradient_of(const Tensor& x) { return {x.mutable_data_ptr(), *element_of(x)}; }

// Inputs are never written; the kernels use one struct for both.
inline void* read_only(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

// The axes of x that are batch, token and channel.
inline Activation input(const Tensor& x, int batch, int token, int channel) {
  return {read_only(x), x.stride(batch), x.stride(token), x.stride(channel)};
}

inline Activation output(const Tensor& x, int batch, int token, int channel) {
  return {x.mutable_data_ptr(), x.stride(batch), x.stride(token), x.stride(channel)};
}

}  // namespace vim
