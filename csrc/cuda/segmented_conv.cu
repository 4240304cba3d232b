// Convolutions of several sequences in a row, of any width and strides: a filter sees zeros in place of the tokens of
// another sequence. A thread computes one number, and recomputes what others compute as well; conv.cu has the fast
// kernels for rows of one sequence.
#include "conv.h"
#include "scan_math.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int kThreads = 128;

// The number of tokens beside `token` that are of its sequence, `step` (1 or -1) from one to the next; at most `most`.
VIM_DEVICE int64_t tokens_beside(const Conv& conv, int64_t b, int64_t token, int64_t step, int64_t most) {
  const int32_t* row = conv.seq_idx + b * conv.length;
  int64_t count = 0;
  while (count < most) {
    const int64_t next = token + (count + 1) * step;
    if (next < 0 || next >= conv.length || row[next] != row[token]) break;
    ++count;
  }
  return count;
}

// The tap that multiplies the token at a distance.
VIM_DEVICE float tap(const ConvDirection& side, int64_t channel, int64_t distance) {
  return read_or_zero(side.weight, (channel + 1) * side.width - 1 - distance);
}

template <class T>
VIM_DEVICE float convolve(const Conv& conv, int64_t b, int64_t token, int64_t channel) {
  const ConvDirection& side = conv.direction[0];
  const int64_t step = side.reverse ? 1 : -1, seen = tokens_beside(conv, b, token, step, side.width - 1);
  float sum = read_or_zero(side.bias, channel);
  for (int64_t i = seen; i >= 0; --i) sum += tap(side, channel, i) * read<T>(conv.x, b, token + i * step, channel);
  return sum;
}

template <class T>
VIM_DEVICE float gradient_before_silu(const Conv& conv, int64_t b, int64_t token, int64_t channel) {
  const float gradient = read<T>(conv.direction[0].dout, b, token, channel);
  return conv.silu ? gradient * silu_slope(convolve<T>(conv, b, token, channel)) : gradient;
}

// What a thread of a kernel over all numbers of an activation computes.
struct Place {
  int64_t b, token, channel;

  VIM_DEVICE explicit Place(const Conv& conv) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    channel = index % conv.dim;
    token = index / conv.dim % conv.length;
    b = index / conv.dim / conv.length;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) segmented_conv_fwd_kernel(Conv conv) {
  const Place at(conv);
  if (at.b >= conv.batch) return;
  const float sum = convolve<T>(conv, at.b, at.token, at.channel);
  write<T>(conv.direction[0].out, at.b, at.token, at.channel, conv.silu ? silu(sum) : sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) segmented_conv_bwd_kernel(Conv conv) {
  const Place at(conv);
  if (at.b >= conv.batch) return;
  const ConvDirection& side = conv.direction[0];
  const int64_t step = side.reverse ? -1 : 1, seen_by = tokens_beside(conv, at.b, at.token, step, side.width - 1);
  float dx = 0;
  for (int64_t i = 0; i <= seen_by; ++i) {
    dx += tap(side, at.channel, i) * gradient_before_silu<T>(conv, at.b, at.token + i * step, at.channel);
  }
  write<T>(conv.dx, at.b, at.token, at.channel, dx);
}

// A block sums one tap of one channel, or its bias (blockIdx.y beyond the taps), over all tokens.
template <class T>
__global__ void __launch_bounds__(kThreads) segmented_conv_weight_kernel(Conv conv) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const ConvDirection& side = conv.direction[0];
  const int64_t channel = blockIdx.x, k = blockIdx.y, distance = side.width - 1 - k, step = side.reverse ? 1 : -1;
  const bool is_bias = k == side.width;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < conv.batch * conv.length; i += kThreads) {
    const int64_t b = i / conv.length, token = i % conv.length;
    if (!is_bias && tokens_beside(conv, b, token, step, distance) < distance) continue;
    const float g = gradient_before_silu<T>(conv, b, token, channel);
    sum += is_bias ? g : g * read<T>(conv.x, b, token + distance * step, channel);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int t = 1; t < kThreads; ++t) sum += shared[t];
  if (!is_bias) {
    write_gradient(side.dweight, channel * side.width + k, sum);
  } else {
    write_gradient(side.dbias, channel, sum);
  }
}

Geometry a_thread_each(const Conv& conv) {
  const int64_t numbers = conv.batch * conv.length * conv.dim;
  return {dim3(static_cast<unsigned>(blocks_in(numbers, kThreads))), dim3(kThreads), 0};
}

}  // namespace

void segmented_conv_forward(const Conv& conv, Stream stream) {
  with_element(conv.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(segmented_conv_fwd_kernel<T>, a_thread_each(conv), stream, conv);
  });
}

void segmented_conv_backward(const Conv& conv, Stream stream) {
  with_element(conv.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(segmented_conv_bwd_kernel<T>, a_thread_each(conv), stream, conv);
    const dim3 grid(static_cast<unsigned>(conv.dim), static_cast<unsigned>(conv.direction[0].width) + 1);
    launch(segmented_conv_weight_kernel<T>, {grid, dim3(kThreads), sizeof(float) * kThreads}, stream, conv);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
