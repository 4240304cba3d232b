// Depthwise convolutions of one or two directions, then SiLU, from one read of x. A task is one block of channels.
#pragma once

#include "staging.h"

namespace vim {
namespace VIM_ISA {

constexpr int64_t kConvTokens = 64;

VIM_INLINE int64_t conv_reach(const Conv& conv, bool reverse) {
  int64_t reach = 0;
  for (int d = 0; d < conv.directions; ++d) {
    if (conv.direction[d].reverse == reverse) reach = larger(reach, conv.direction[d].width - 1);
  }
  return reach;
}

inline int64_t conv_tasks(const Conv& conv) { return conv.batch * blocks_in(conv.dim, kLanes); }

// Tokens [first, first + tokens), with zeros where there is none.
inline void load_padded(const Conv& conv, const Activation& x, int64_t b, int64_t first, int64_t tokens, Block block,
                        float* out) {
  const int64_t begin = larger(first, 0), end = smaller(first + tokens, conv.length);
  if (begin >= end) return fill_zero(out, tokens * kLanes);
  fill_zero(out, (begin - first) * kLanes);
  load_block(conv.element, x, b, begin, end - begin, block, kConvTokens, out + (begin - first) * kLanes);
  fill_zero(out + (end - first) * kLanes, (first + tokens - end) * kLanes);
}

// out[t] = bias + sum_k taps[k] x[t + (k - reach) step], then SiLU, for `tokens` rows `row` apart; `x` points at the
// first of them, in rows of kLanes.
template <int kWidth, bool kSilu>
void convolve_rows(const float* x, const float* taps, int64_t width, vec bias, int64_t step, int64_t tokens, float* out,
                   int64_t row) {
  if (kWidth > 0) width = kWidth;
  vec weight[kWidth > 0 ? kWidth : 1];
  for (int k = 0; k < kWidth; ++k) weight[k] = load(taps + k * kLanes);
  const float* first = x - (width - 1) * step * kLanes;
  for (int64_t t = 0; t < tokens; ++t, first += kLanes) {
    vec sum = bias;
    for (int64_t k = 0; k < width; ++k) {
      sum = fma(kWidth > 0 ? weight[k] : load(taps + k * kLanes), load(first + k * step * kLanes), sum);
    }
    store(out + t * row, kSilu ? silu(sum) : sum);
  }
}

inline void convolve(const float* x, const float* taps, int64_t width, vec bias, int64_t step, bool silu,
                     int64_t tokens, float* out, int64_t row) {
  const auto run = width == 4 ? (silu ? convolve_rows<4, true> : convolve_rows<4, false>)
                              : (silu ? convolve_rows<0, true> : convolve_rows<0, false>);
  run(x, taps, width, bias, step, tokens, out, row);
}

struct ConvBuffers {
  float* taps[2];
  float *x, *out, *gradient[2];

  void take(Scratch& scratch, const Conv& conv, int64_t margin) {
    for (int d = 0; d < conv.directions; ++d) taps[d] = scratch.take((conv.direction[d].width + 1) * kLanes);
    x = scratch.take((kConvTokens + 2 * margin) * kLanes);
    out = scratch.take((kConvTokens + 2 * margin) * kLanes);
    for (float*& rows : gradient) rows = scratch.take((kConvTokens + 2 * margin) * kLanes);
  }

  // Taps and, after them, the bias.
  void pack(const ConvDirection& side, int d, Block block) {
    pack_weight(side.weight.floats(), side.width, side.width, block, taps[d]);
    float* bias = taps[d] + side.width * kLanes;
    if (side.bias.data != nullptr) {
      pack_weight(side.bias.floats(), 1, 1, block, bias);
    } else {
      fill_zero(bias, kLanes);
    }
  }
};

VIM_INLINE size_t row_bytes(int64_t rows) { return static_cast<size_t>(rows * kLanes) * sizeof(float); }

// Calls function(part) for each sequence of a batch element, where `part` is the convolution of its tokens alone.
template <class Function>
void for_each_sequence(const Conv& conv, int64_t b, const Function& function) {
  if (conv.seq_idx == nullptr) return function(conv);
  const int64_t item = conv.element == Element::float32 ? 4 : 2;
  const int32_t* row = conv.seq_idx + b * conv.length;
  for (int64_t first = 0, end = 0; first < conv.length; first = end) {
    while (end < conv.length && row[end] == row[first]) ++end;
    Conv part = conv;
    part.length = end - first;
    Activation* const activations[] = {&part.x, &part.dx, &part.direction[0].out, &part.direction[0].dout};
    for (Activation* x : activations) {
      if (x->data != nullptr) x->data = static_cast<char*>(x->data) + first * x->token * item;
    }
    function(part);
  }
}

// The result of a direction may take the place of x.
inline void convolve_sequence(const Conv& conv, int64_t b, Block block, int64_t before, int64_t after,
                              ConvBuffers& buffers) {
  load_padded(conv, conv.x, b, -before, before, block, buffers.x);
  for (int64_t first = 0; first < conv.length; first += kConvTokens) {
    const int64_t count = smaller(kConvTokens, conv.length - first);
    // A chunk keeps its left context from the previous chunk: a result may have overwritten x there.
    float* own = buffers.x + before * kLanes;
    if (first > 0) std::memmove(buffers.x, own + (kConvTokens - before) * kLanes, row_bytes(before));
    load_padded(conv, conv.x, b, first, count + after, block, own);
    for (int d = 0; d < conv.directions; ++d) {
      const ConvDirection& side = conv.direction[d];
      const float *x = own, *taps = buffers.taps[d];
      const vec bias = load(taps + side.width * kLanes);
      const int64_t step = side.reverse ? -1 : 1;
      if (conv.element == Element::float32 && side.out.channel == 1 && block.lanes == kLanes) {
        float* out = static_cast<float*>(side.out.data) + b * side.out.batch + first * side.out.token + block.channel;
        convolve(x, taps, side.width, bias, step, conv.silu, count, out, side.out.token);
      } else {
        convolve(x, taps, side.width, bias, step, conv.silu, count, buffers.out, kLanes);
        store_block(conv.element, side.out, b, first, count, block, buffers.out);
      }
    }
  }
}

inline bool conv_forward(const Conv& conv, int64_t begin, int64_t end) {
  const Blocks blocks(conv.dim, conv.dim);
  const int64_t before = conv_reach(conv, false), after = conv_reach(conv, true);
  Scratch scratch;
  ConvBuffers buffers;
  buffers.take(scratch, conv, larger(before, after));
  if (!scratch.allocate()) return false;
  buffers.take(scratch, conv, larger(before, after));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks.count();
    const Block block = blocks.at(task % blocks.count());
    for (int d = 0; d < conv.directions; ++d) buffers.pack(conv.direction[d], d, block);
    for_each_sequence(conv, b, [&](const Conv& part) { convolve_sequence(part, b, block, before, after, buffers); });
  }
  return true;
}

// Rows of a block in the partial of the weights' gradients: per direction its taps and its bias.
VIM_INLINE int64_t conv_rows(const Conv& conv) {
  int64_t rows = 0;
  for (int d = 0; d < conv.directions; ++d) rows += conv.direction[d].width + 1;
  return rows;
}

inline int64_t conv_partial_floats(const Conv& conv) {
  return conv.batch_groups * blocks_in(conv.dim, kLanes) * conv_rows(conv) * kLanes;
}

// Adds one chunk's part of dx to dx, and of the weights' gradients to `sums`. Buffers start `margin` tokens before the
// chunk, which is as far as two filters in a row reach.
inline void backward_conv_chunk(const Conv& conv, int d, int64_t b, int64_t first, int64_t count, Block block,
                                int64_t margin, ConvBuffers& buffers, float* dx, float* sums) {
  const ConvDirection& side = conv.direction[d];
  const int64_t reach = side.width - 1, step = side.reverse ? -1 : 1;
  float* gradient = buffers.gradient[0];
  load_padded(conv, side.dout, b, first - margin, count + 2 * margin, block, gradient);
  if (conv.silu) {
    const int64_t from = side.reverse ? margin - reach : margin, tokens = count + reach;
    convolve(buffers.x + from * kLanes, buffers.taps[d], side.width, load(buffers.taps[d] + side.width * kLanes), step,
             false, tokens, buffers.out, kLanes);
    const vec one = set1(1.0f);
    for (int64_t t = 0; t < tokens * kLanes; t += kLanes) {
      const vec before = load(buffers.out + t), gate = sigmoid(before);
      float* target = gradient + from * kLanes + t;
      store(target, load(target) * gate * fma(before, one - gate, one));
    }
  }
  // The gradient of a causal convolution is the same convolution in the other direction.
  float* own = gradient + margin * kLanes;
  convolve(own, buffers.taps[d], side.width, vec{}, -step, false, count, buffers.out, kLanes);
  for (int64_t t = 0; t < count * kLanes; t += kLanes) store(dx + t, load(dx + t) + load(buffers.out + t));
  for (int64_t k = 0; k <= side.width; ++k) {
    vec sum = load(sums + k * kLanes);
    if (k < side.width) {
      const float* x = buffers.x + (margin + (k - reach) * step) * kLanes;
      for (int64_t t = 0; t < count * kLanes; t += kLanes) sum = fma(load(own + t), load(x + t), sum);
    } else {
      for (int64_t t = 0; t < count * kLanes; t += kLanes) sum = sum + load(own + t);
    }
    store(sums + k * kLanes, sum);
  }
}

inline void backward_sequence(const Conv& conv, int64_t b, Block block, int64_t margin, ConvBuffers& buffers,
                              float* partial) {
  float* dx = buffers.gradient[1];
  for (int64_t first = 0; first < conv.length; first += kConvTokens) {
    const int64_t count = smaller(kConvTokens, conv.length - first);
    load_padded(conv, conv.x, b, first - margin, count + 2 * margin, block, buffers.x);
    fill_zero(dx, count * kLanes);
    float* sums = partial;
    for (int d = 0; d < conv.directions; ++d) {
      backward_conv_chunk(conv, d, b, first, count, block, margin, buffers, dx, sums);
      sums += (conv.direction[d].width + 1) * kLanes;
    }
    store_block(conv.element, conv.dx, b, first, count, block, dx);
  }
}

inline bool conv_backward(const Conv& conv, int64_t begin, int64_t end) {
  const Blocks blocks(conv.dim, conv.dim);
  const int64_t margin = larger(conv_reach(conv, false), conv_reach(conv, true)), rows = conv_rows(conv);
  Scratch scratch;
  ConvBuffers buffers;
  buffers.take(scratch, conv, margin);
  if (!scratch.allocate()) return false;
  buffers.take(scratch, conv, margin);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / blocks.count(), i = task % blocks.count();
    const Block block = blocks.at(i);
    float* partial = conv.partials + (group * blocks.count() + i) * rows * kLanes;
    fill_zero(partial, rows * kLanes);
    for (int d = 0; d < conv.directions; ++d) buffers.pack(conv.direction[d], d, block);
    const int64_t last_b = conv.batch * (group + 1) / conv.batch_groups;
    for (int64_t b = conv.batch * group / conv.batch_groups; b < last_b; ++b) {
      for_each_sequence(conv, b,
                        [&](const Conv& part) { backward_sequence(part, b, block, margin, buffers, partial); });
    }
  }
  return true;
}

inline bool conv_reduce(const Conv& conv, int64_t begin, int64_t end) {
  const Blocks blocks(conv.dim, conv.dim);
  const int64_t rows = conv_rows(conv);
  Scratch scratch;
  float* sums = scratch.take(rows * kLanes);
  if (!scratch.allocate()) return false;
  sums = scratch.take(rows * kLanes);
  for (int64_t i = begin; i < end; ++i) {
    fill_zero(sums, rows * kLanes);
    for (int64_t group = 0; group < (conv.batch > 0 ? conv.batch_groups : 0); ++group) {
      const float* partial = conv.partials + (group * blocks.count() + i) * rows * kLanes;
      for (int64_t r = 0; r < rows * kLanes; r += kLanes) store(sums + r, load(sums + r) + load(partial + r));
    }
    const float* part = sums;
    for (int d = 0; d < conv.directions; ++d) {
      const ConvDirection& side = conv.direction[d];
      unpack_weight(part, side.width, blocks.at(i), side.dweight.floats());
      part += side.width * kLanes;
      if (side.dbias.data != nullptr) unpack_weight(part, 1, blocks.at(i), side.dbias.floats());
      part += kLanes;
    }
  }
  return true;
}

}  // namespace VIM_ISA
}  // namespace vim
