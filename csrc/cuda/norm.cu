// A warp takes a row. Rows of up to 1024 numbers stay in its registers between the sum of squares and the result; wider
// ones are read again. Sums have an order that depends on sizes alone.
#include "norm.h"
#include "weights.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int kWarps = 8;
constexpr int kVector = 4;
// Blocks of the backward pass: each sums its rows' part of dweight. Four for each multiprocessor of the largest GPUs.
constexpr int64_t kGroups = 528;
constexpr int64_t kRowsOfWarp = 4;

VIM_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
VIM_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

VIM_DEVICE float inverse_rms(float squares, const Norm& norm) {
  return 1.0f / sqrtf(squares / static_cast<float>(norm.dim) + norm.eps);
}

// Calls function(item, column) for each of this lane's vectors of a row; `item` is a constant where kItems is not 0.
template <int kWidth, int kItems, class Function>
VIM_DEVICE void for_vectors(int64_t dim, const Function& function) {
  if constexpr (kItems > 0) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t column = (item * kWarp + lane_index()) * kWidth;
      if (column < dim) function(item, column);
    }
  } else {
    for (int64_t column = lane_index() * kWidth; column < dim; column += kWarp * kWidth) function(0, column);
  }
}

template <class T, class Y, int kWidth, int kItems>
__global__ void __launch_bounds__(kWarps* kWarp) norm_fwd_kernel(Norm norm) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(), dim = norm.dim;
  if (row >= norm.rows) return;
  const T* x = static_cast<const T*>(norm.x) + row * norm.x_row;
  const float* residual = norm.residual == nullptr ? nullptr : norm.residual + row * dim;
  float* r = norm.r + row * dim;
  Y* y = static_cast<Y*>(norm.y) + row * dim;
  Floats<kWidth> kept[kItems > 0 ? kItems : 1];
  float squares = 0;
  for_vectors<kWidth, kItems>(dim, [&](int item, int64_t column) {
    Floats<kWidth> sum = load_floats<kWidth>(x + column);
    if (residual != nullptr) {
      const Floats<kWidth> added = load_floats<kWidth>(residual + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += added[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += sum[i] * sum[i];
    store_floats(sum, r + column);
    if (kItems > 0) kept[item] = sum;
  });
  const float factor = inverse_rms(sum_warp(squares), norm);
  for_vectors<kWidth, kItems>(dim, [&](int item, int64_t column) {
    // A lane reads again only what it has written itself.
    Floats<kWidth> value = kItems > 0 ? kept[item] : load_floats<kWidth>(r + column);
    const Floats<kWidth> weight = load_floats<kWidth>(norm.weight, column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] = value[i] * factor * weight[i];
    store_floats(value, y + column);
  });
}

// Threads of a block of the backward pass: one warp where dweight is summed in the block's row of the partials.
constexpr int backward_threads(int items) { return items > 0 ? kWarps * kWarp : kWarp; }

// total = dr + (s - n mean(s n)) / rms with n = r / rms and s = dy weight; dweight sums dy n. For rows that stay in
// registers the lanes sum it in registers, for wider rows in the block's row of the partials.
template <class T, int kWidth, int kItems>
__global__ void __launch_bounds__(backward_threads(kItems)) norm_bwd_kernel(Norm norm) {
  const int64_t dim = norm.dim, groups = gridDim.x, group = blockIdx.x;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  float* partial = norm.partials + group * dim;
  Floats<kWidth> dweight[kItems > 0 ? kItems : 1];
#pragma unroll
  for (auto& sums : dweight) sums = filled<kWidth>(0);
  if (kItems == 0) {
    for_vectors<kWidth, kItems>(dim, [&](int, int64_t column) { store_floats(filled<kWidth>(0), partial + column); });
  }
  const int64_t last = norm.rows * (group + 1) / groups;
  for (int64_t row = norm.rows * group / groups + warp_index(); row < last; row += warps) {
    const float* r = norm.r + row * dim;
    const float* dr = norm.dr == nullptr ? nullptr : norm.dr + row * dim;
    const T* dy = static_cast<const T*>(norm.dy) + row * dim;
    Floats<kWidth> values[kItems > 0 ? kItems : 1], gradients[kItems > 0 ? kItems : 1];
    float squares = 0, products = 0;
    for_vectors<kWidth, kItems>(dim, [&](int item, int64_t column) {
      const Floats<kWidth> value = load_floats<kWidth>(r + column), gradient = load_floats<kWidth>(dy + column);
      const Floats<kWidth> weight = load_floats<kWidth>(norm.weight, column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        squares += value[i] * value[i];
        products += gradient[i] * weight[i] * value[i];
      }
      if (kItems > 0) {
        values[item] = value;
        gradients[item] = gradient;
      }
    });
    const float factor = inverse_rms(sum_warp(squares), norm);
    const float mean = sum_warp(products) * factor / static_cast<float>(dim);
    for_vectors<kWidth, kItems>(dim, [&](int item, int64_t column) {
      const Floats<kWidth> value = kItems > 0 ? values[item] : load_floats<kWidth>(r + column);
      const Floats<kWidth> gradient = kItems > 0 ? gradients[item] : load_floats<kWidth>(dy + column);
      const Floats<kWidth> weight = load_floats<kWidth>(norm.weight, column);
      Floats<kWidth> total = dr == nullptr ? filled<kWidth>(0) : load_floats<kWidth>(dr + column);
      Floats<kWidth> sums = kItems > 0 ? dweight[item] : load_floats<kWidth>(partial + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float normed = value[i] * factor;
        total[i] += factor * (gradient[i] * weight[i] - normed * mean);
        sums[i] += gradient[i] * normed;
      }
      store_floats(total, norm.total + row * dim + column);
      if (kItems > 0) {
        dweight[item] = sums;
      } else {
        store_floats(sums, partial + column);
      }
    });
  }
  if constexpr (kItems > 0) {
    float* shared = reinterpret_cast<float*>(shared_memory());  // (warps, dim)
    for_vectors<kWidth, kItems>(
        dim, [&](int item, int64_t column) { store_floats(dweight[item], shared + warp_index() * dim + column); });
    __syncthreads();
    for (int64_t c = threadIdx.x; c < dim; c += blockDim.x) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += shared[w * dim + c];
      partial[c] = sum;
    }
  }
}

// Adds the groups' partials: a lane has a channel, a warp every kWarps-th group.
__global__ void __launch_bounds__(kWarps* kWarp) norm_reduce_kernel(Norm norm, int64_t groups) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // (warps, channels)
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + lane_index();
  float sum = 0;
  for (int64_t group = warp_index(); c < norm.dim && group < groups; group += kWarps) {
    sum += norm.partials[group * norm.dim + c];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp_index() == 0 && c < norm.dim) {
    for (int w = 1; w < kWarps; ++w) sum += shared[w * kWarp + lane_index()];
    write_gradient(norm.dweight, c, sum);
  }
}

// Where only dr arrives it leaves as it is, and so does a zero for dweight.
__global__ void norm_pass_kernel(Norm norm) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < norm.rows * norm.dim) norm.total[i] = norm.dr == nullptr ? 0 : norm.dr[i];
  if (i < norm.dim) write_gradient(norm.dweight, i, 0);
}

// Calls function(width, items), both as types with a constant `value`, for the kernel that a row needs.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class Function>
void with_shape(int64_t dim, bool aligned, const Function& function) {
  const int64_t items = blocks_in(dim, kWarp * kVector);
  if (!aligned || dim % kVector != 0) return function(Constant<1>{}, Constant<0>{});
  if (items <= 2) return function(Constant<kVector>{}, Constant<2>{});
  if (items <= 4) return function(Constant<kVector>{}, Constant<4>{});
  if (items <= 8) return function(Constant<kVector>{}, Constant<8>{});
  return function(Constant<kVector>{}, Constant<0>{});
}

int64_t groups_of(const Norm& norm) { return smaller(kGroups, blocks_in(norm.rows, kWarps * kRowsOfWarp)); }

}  // namespace

void norm_forward(const Norm& norm, Stream stream) {
  with_element(norm.element, [&](auto* x) {
    with_element(norm.y_element, [&](auto* y) {
      using T = std::remove_pointer_t<decltype(x)>;
      using Y = std::remove_pointer_t<decltype(y)>;
      const bool aligned = is_aligned<kVector, T>(norm.x, norm.x_row) && is_aligned<kVector, Y>(norm.y, norm.dim) &&
                           is_aligned<kVector, float>(norm.residual, norm.dim) && in_fours(norm.weight) &&
                           is_aligned<kVector, float>(norm.r, norm.dim);
      with_shape(norm.dim, aligned, [&](auto width, auto items) {
        const Geometry geometry{dim3(static_cast<unsigned>(blocks_in(norm.rows, kWarps))), dim3(kWarps * kWarp), 0};
        launch(norm_fwd_kernel<T, Y, decltype(width)::value, decltype(items)::value>, geometry, stream, norm);
      });
    });
  });
}

int64_t norm_partial_floats(const Norm& norm) { return groups_of(norm) * norm.dim; }

void norm_backward(const Norm& norm, Stream stream) {
  if (norm.dy == nullptr) {
    const int64_t blocks = larger(blocks_in(norm.rows * norm.dim, 256), blocks_in(norm.dim, 256));
    return launch(norm_pass_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(256), 0}, stream, norm);
  }
  const int64_t groups = groups_of(norm);
  with_element(norm.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = is_aligned<kVector, T>(norm.dy, norm.dim) && is_aligned<kVector, float>(norm.dr, norm.dim) &&
                         in_fours(norm.weight) && is_aligned<kVector, float>(norm.r, norm.dim) &&
                         is_aligned<kVector, float>(norm.total, norm.dim);
    with_shape(norm.dim, aligned, [&](auto width, auto items) {
      constexpr bool kKept = decltype(items)::value > 0;
      const unsigned threads = backward_threads(decltype(items)::value);
      const size_t shared = kKept ? sizeof(float) * kWarps * static_cast<size_t>(norm.dim) : 0;
      launch(norm_bwd_kernel<T, decltype(width)::value, decltype(items)::value>,
             {dim3(static_cast<unsigned>(groups)), dim3(threads), shared}, stream, norm);
    });
  });
  const unsigned blocks = static_cast<unsigned>(blocks_in(norm.dim, kWarp));
  launch(norm_reduce_kernel, {dim3(blocks), dim3(kWarps * kWarp), sizeof(float) * kWarps * kWarp}, stream, norm,
         groups);
}

}  // namespace VIM_ISA
}  // namespace vim
