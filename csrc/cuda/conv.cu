// Fast kernels for the common case: four taps, contiguous channels, both directions from one read of x. A thread moves
// along the tokens and keeps the last few in registers. Other cases use the generic kernels. The order of sums depends
// on sizes alone.
#include "conv.h"
#include "scan_math.h"
#include "vector.h"

namespace vim {
namespace VIM_ISA {
namespace {

constexpr int kTaps = 4;
constexpr int kReach = kTaps - 1;
constexpr int kThreads = 128;
// Threads that fill the largest GPUs: a sequence is cut until there are as many, or its pieces are short.
constexpr int64_t kEnoughThreads = 132 * 1024;
constexpr int64_t kShortest = 8;
constexpr int64_t kLongest = 64;

// Pieces of a sequence: `segments` in all batch elements together, each of up to `tokens` tokens.
struct Pieces {
  int64_t tokens, of_sequence, segments;

  // The piece's tokens, from the first to before the last; a sequence has fewer than 2^30.
  VIM_DEVICE int first(int64_t segment) const { return static_cast<int>(segment % of_sequence * tokens); }
  VIM_DEVICE int last(int first_, int length) const { return static_cast<int>(smaller(first_ + tokens, length)); }
};

Pieces cut(const Conv& conv, int64_t threads_of_token) {
  const int64_t wanted = conv.batch * conv.length * threads_of_token / kEnoughThreads;
  Pieces pieces;
  pieces.tokens = round_up(smaller(larger(wanted, kShortest), kLongest), kShortest);
  pieces.of_sequence = blocks_in(conv.length, pieces.tokens);
  pieces.segments = conv.batch * pieces.of_sequence;
  return pieces;
}

template <class T>
VIM_DEVICE T* at(const Activation& x, int64_t b, int64_t token, int64_t channel) {
  return static_cast<T*>(x.data) + b * x.batch + token * x.token + channel * x.channel;
}

// Tokens of a channel, near one that moves on. Distances are counted in 32 bits: see kLongestStride.
template <class T>
struct Rows {
  T* here;
  int stride;

  VIM_DEVICE Rows(const Activation& x, int64_t b, int64_t token, int64_t channel)
      : here(vim::VIM_ISA::at<T>(x, b, token, channel)), stride(static_cast<int>(x.token)) {}
  VIM_DEVICE T* at(int t) const { return here + t * stride; }
  VIM_DEVICE void move(int tokens) { here += tokens * stride; }
};
constexpr int64_t kLongestStride = int64_t{1} << 26;

// The taps of kVector channels, and their biases.
template <int kVector>
struct Taps {
  Floats<kVector> weight[kTaps], bias;

  template <class W>
  VIM_DEVICE void load(const W* from, const Weight& biases, int64_t channel, bool vectors) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float row[kTaps];
      load_row(from + (channel + i) * kTaps, kTaps, vectors, row);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) weight[k][i] = row[k];
      bias[i] = read_or_zero(elements_like(from, biases), channel + i);
    }
  }

  // bias + sum_k weight[k] x[k], or with the taps in the other order.
  template <bool kReverse>
  VIM_DEVICE Floats<kVector> convolve(const Floats<kVector>* x) const {
    Floats<kVector> sum = bias;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += weight[kReverse ? kReach - k : k][i] * x[k][i];
    }
    return sum;
  }
};

// The taps of two directions, loaded together
template <int kVector>
VIM_DEVICE void load_taps(const ConvDirection& before, const ConvDirection& after, int64_t channel, Taps<kVector>& taps,
                          Taps<kVector>& taps_after) {
  with_elements(before.weight, [&](const auto* from) {
    taps.load(from, before.bias, channel, in_fours(before.weight));
    taps_after.load(elements_like(from, after.weight), after.bias, channel, in_fours(after.weight));
  });
}

// Moves a window of tokens on by one.
template <int kVector, int kSize>
VIM_DEVICE void push(Floats<kVector> (&window)[kSize], const Floats<kVector>& next) {
#pragma unroll
  for (int t = 0; t + 1 < kSize; ++t) window[t] = window[t + 1];
  window[kSize - 1] = next;
}

// ---- forward ---------------------------------------------------------------------------------------------------

constexpr int kForwardVector = 4;

// Tokens whose loads are on their way: 64 bytes a thread.
template <class T>
constexpr int kAhead = 16 / static_cast<int>(sizeof(T));

template <bool kSilu, int kVector, class T>
VIM_DEVICE void write(Floats<kVector> sum, T* to) {
  if (kSilu) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] = silu(sum[i]);
  }
  store_floats(sum, to);
}

// kBefore and kAfter say which directions there are: one that looks back, one that looks ahead. The one that looks
// ahead is the second where there are both.
template <class T, bool kBefore, bool kAfter, bool kSilu>
__global__ void __launch_bounds__(kThreads, 4) conv_fwd_kernel(Conv conv, Pieces pieces) {
  constexpr int kVector = kForwardVector, kLookBack = kBefore ? kReach : 0, kLookAhead = kAfter ? kReach : 0;
  constexpr int kBatch = kAhead<T>;
  const int64_t vectors = conv.dim / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channel = index % vectors * kVector, segment = index / vectors;
  if (segment >= pieces.segments) return;
  const int64_t b = segment / pieces.of_sequence;
  const int length = static_cast<int>(conv.length), first = pieces.first(segment), last = pieces.last(first, length);
  const ConvDirection &before = conv.direction[0], &after = conv.direction[kBefore && kAfter ? 1 : 0];
  Taps<kVector> taps, taps_after;
  load_taps(before, after, channel, taps, taps_after);
  Rows<const T> x(conv.x, b, first, channel);
  Rows<T> out(before.out, b, first, channel), out_after(after.out, b, first, channel);
  const auto load = [&](int tile, int t) {  // a token near the tile that rows are at
    if (static_cast<unsigned>(tile + t) >= static_cast<unsigned>(length)) return Vector<T, kVector>{};
    return load_vector<kVector>(x.at(t));
  };

  Floats<kVector> window[kLookBack + 1 + kLookAhead];
#pragma unroll
  for (int t = 0; t < kLookBack + kLookAhead; ++t) window[t + 1] = widen<kVector>(load(first, t - kLookBack));
  Vector<T, kVector> next[kBatch];
#pragma unroll
  for (int t = 0; t < kBatch; ++t) next[t] = load(first, kLookAhead + t);
  for (int tile = first; tile < last; tile += kBatch) {
#pragma unroll
    for (int t = 0; t < kBatch; ++t) {
      push(window, widen<kVector>(next[t]));
      // Nothing beyond what the piece needs
      if (tile + kBatch + t < last) next[t] = load(tile, kBatch + kLookAhead + t);
      if (tile + t >= last) continue;
      if (kBefore) write<kSilu>(taps.template convolve<false>(window), out.at(t));
      if (kAfter) write<kSilu>(taps_after.template convolve<true>(window + kLookBack), out_after.at(t));
    }
    x.move(kBatch);
    out.move(kBatch);
    out_after.move(kBatch);
  }
}

// An output a thread; `tokens_first` says that neighbouring threads take neighbouring tokens.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_fwd_general_kernel(Conv conv, bool tokens_first) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_batch = conv.length * conv.dim, b = index / of_batch, rest = index % of_batch;
  if (b >= conv.batch) return;
  const int64_t token = tokens_first ? rest % conv.length : rest / conv.dim;
  const int64_t channel = tokens_first ? rest / conv.length : rest % conv.dim;
  for (int d = 0; d < conv.directions; ++d) {
    const ConvDirection& side = conv.direction[d];
    float sum = read_or_zero(side.bias, channel);
    for (int64_t k = 0; k < side.width; ++k) {
      const int64_t distance = side.width - 1 - k, source = side.reverse ? token + distance : token - distance;
      if (source < 0 || source >= conv.length) continue;
      sum += read_or_zero(side.weight, channel * side.width + k) * to_float(*at<T>(conv.x, b, source, channel));
    }
    from_float(conv.silu ? silu(sum) : sum, at<T>(side.out, b, token, channel));
  }
}

// ---- backward --------------------------------------------------------------------------------------------------
// g is the gradient before SiLU, of a direction at a token. dx is the convolution of g in the other direction, and
// dweight[k] is the sum of g times the input of tap k. g is never stored: it is recomputed from x.

constexpr int kBackwardVector = 2;
constexpr int kBackwardChannels = kWarp * kBackwardVector;  // of a block; its warps have different pieces
constexpr int kBackwardWarps = 8;
// Tokens whose loads are on their way, of x and both gradients: as many as 128 registers allow.
template <class T>
constexpr int kBackwardAhead = sizeof(T) == 4 ? 2 : 3;
constexpr int kRows = kTaps + 1;  // of a direction's partials: the taps and the bias

template <int kVector>
VIM_DEVICE Floats<kVector> before_silu(Floats<kVector> gradient, const Floats<kVector>& sum, bool applied) {
  if (applied) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) gradient[i] *= silu_slope(sum[i]);
  }
  return gradient;
}

// Adds what g of a token gives to dweight and dbias; x is what the taps have seen, the first tap first or last.
template <int kVector, bool kReverse>
VIM_DEVICE void accumulate(Floats<kVector> (&sums)[kRows], const Floats<kVector>& g, const Floats<kVector>* x) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) sums[k][i] += g[i] * x[kReverse ? kReach - k : k][i];
    sums[kTaps][i] += g[i];
  }
}

// Adds the sums of the block's warps; the first warp writes them, (rows, dim) from `partial` on.
template <int kVector>
VIM_DEVICE void write_sums(const Floats<kVector> (&sums)[kRows], int64_t channel, int64_t dim, float* partial) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // (warps, rows, channels of the block)
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    store_floats(sums[k], shared + (warp * kRows + k) * kBackwardChannels + lane * kVector);
  }
  __syncthreads();
  if (warp != 0 || channel >= dim) return;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    Floats<kVector> sum = sums[k];
    for (int w = 1; w < kBackwardWarps; ++w) {
      const float* other = shared + (w * kRows + k) * kBackwardChannels + lane * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] += other[i];
    }
    store_floats(sum, partial + k * dim + channel);
  }
}

// At token l the window of x holds l to l + 3: what g of the direction that looks back needs at l + 3, and g of the one
// that looks ahead at l. dx[l] takes the former from l to l + 3 and the latter from l - 3 to l.
template <class T, bool kBefore, bool kAfter>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 2) conv_bwd_kernel(Conv conv, Pieces pieces) {
  constexpr int kVector = kBackwardVector;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kBackwardChannels + lane * kVector;
  const int64_t segment = static_cast<int64_t>(blockIdx.x) * kBackwardWarps + warp;
  const ConvDirection &before = conv.direction[0], &after = conv.direction[kBefore && kAfter ? 1 : 0];
  Floats<kVector> sums[kRows], sums_after[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) sums[k] = sums_after[k] = filled<kVector>(0);

  if (segment < pieces.segments && channel < conv.dim) {
    const int64_t b = segment / pieces.of_sequence;
    const int length = static_cast<int>(conv.length), first = pieces.first(segment), last = pieces.last(first, length);
    Taps<kVector> taps, taps_after;
    load_taps(before, after, channel, taps, taps_after);
    constexpr int kBatch = kBackwardAhead<T>;
    using Numbers = Vector<T, kVector>;
    const int start = first - kReach;
    Rows<const T> x_rows(conv.x, b, start, channel), rows_before(before.dout, b, start, channel),
        rows_after(after.dout, b, start, channel);
    Rows<T> dx_rows(conv.dx, b, start, channel);
    const auto load = [&](const Rows<const T>& rows, int tile, int t) {  // a token near the tile that rows are at
      if (static_cast<unsigned>(tile + t) >= static_cast<unsigned>(length)) return Numbers{};
      return load_vector<kVector>(rows.at(t));
    };
    Floats<kVector> x[kTaps], g[kTaps], g_after[kTaps];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      g[t] = g_after[t] = filled<kVector>(0);
      if (t > 0) x[t] = widen<kVector>(load(x_rows, start, t - 1));
    }
    Numbers next_x[kBatch], next[kBatch] = {}, next_after[kBatch] = {};
    const auto load_ahead = [&](int tile, int place, int t) {
      next_x[place] = load(x_rows, tile, t + kReach);
      if (kBefore) next[place] = load(rows_before, tile, t + kReach);
      if (kAfter) next_after[place] = load(rows_after, tile, t);
    };
#pragma unroll
    for (int t = 0; t < kBatch; ++t) load_ahead(start, t, t);
    for (int tile = start; tile < last; tile += kBatch) {
#pragma unroll
      for (int t = 0; t < kBatch; ++t) {
        const int token = tile + t;
        push(x, widen<kVector>(next_x[t]));
        const Floats<kVector> dout = widen<kVector>(next[t]), dout_after = widen<kVector>(next_after[t]);
        if (token + kBatch < last) load_ahead(tile, t, kBatch + t);
        if (token >= last) continue;
        if (kBefore) {
          push(g, before_silu(dout, taps.template convolve<false>(x), conv.silu));
          // Other threads sum the tokens before and after this piece.
          if (token + kReach < last) accumulate<kVector, false>(sums, g[kReach], x);
        }
        if (kAfter) {
          push(g_after, before_silu(dout_after, taps_after.template convolve<true>(x), conv.silu));
          if (token >= first) accumulate<kVector, true>(sums_after, g_after[kReach], x);
        }
        if (token < first) continue;
        Floats<kVector> dx = filled<kVector>(0);
#pragma unroll
        for (int k = 0; k < kTaps; ++k) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            if (kBefore) dx[i] += taps.weight[kReach - k][i] * g[k][i];
            if (kAfter) dx[i] += taps_after.weight[k][i] * g_after[k][i];
          }
        }
        store_floats(dx, dx_rows.at(t));
      }
      x_rows.move(kBatch);
      rows_before.move(kBatch);
      rows_after.move(kBatch);
      dx_rows.move(kBatch);
    }
  }

  const int64_t rows = (kBefore && kAfter ? 2 : 1) * kRows;
  float* partial = conv.partials + static_cast<int64_t>(blockIdx.x) * rows * conv.dim;
  if (kBefore) write_sums(sums, channel, conv.dim, partial);
  if (kAfter) write_sums(sums_after, channel, conv.dim, partial + (kBefore ? kRows * conv.dim : 0));
}

// Adds the partials of `blocks` blocks: a lane has a channel of a row, a warp every kBackwardWarps-th block.
__global__ void __launch_bounds__(kBackwardWarps* kWarp) conv_reduce_kernel(Conv conv, int64_t blocks) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t row = blockIdx.y, rows = gridDim.y, k = row % kRows;
  float sum = 0;
  for (int64_t block = warp; channel < conv.dim && block < blocks; block += kBackwardWarps) {
    sum += conv.partials[(block * rows + row) * conv.dim + channel];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || channel >= conv.dim) return;
  for (int w = 1; w < kBackwardWarps; ++w) sum += shared[w * kWarp + lane];
  const ConvDirection& side = conv.direction[row / kRows];
  if (k < kTaps) {
    write_gradient(side.dweight, channel * kTaps + k, sum);
  } else {
    write_gradient(side.dbias, channel, sum);
  }
}

// g of a direction at a token, which may be outside the sequence.
template <class T>
VIM_DEVICE float gradient_before_silu(const Conv& conv, const ConvDirection& side, int64_t b, int64_t token,
                                      int64_t channel) {
  if (token < 0 || token >= conv.length) return 0;
  const float gradient = to_float(*at<T>(side.dout, b, token, channel));
  if (!conv.silu) return gradient;
  float sum = read_or_zero(side.bias, channel);
  for (int64_t k = 0; k < side.width; ++k) {
    const int64_t distance = side.width - 1 - k, source = side.reverse ? token + distance : token - distance;
    if (source < 0 || source >= conv.length) continue;
    sum += read_or_zero(side.weight, channel * side.width + k) * to_float(*at<T>(conv.x, b, source, channel));
  }
  return gradient * silu_slope(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) conv_bwd_general_kernel(Conv conv, bool tokens_first) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t of_batch = conv.length * conv.dim, b = index / of_batch, rest = index % of_batch;
  if (b >= conv.batch) return;
  const int64_t token = tokens_first ? rest % conv.length : rest / conv.dim;
  const int64_t channel = tokens_first ? rest / conv.length : rest % conv.dim;
  float dx = 0;
  for (int d = 0; d < conv.directions; ++d) {
    const ConvDirection& side = conv.direction[d];
    for (int64_t k = 0; k < side.width; ++k) {
      const int64_t distance = side.width - 1 - k, seen_by = side.reverse ? token - distance : token + distance;
      dx += read_or_zero(side.weight, channel * side.width + k) *
            gradient_before_silu<T>(conv, side, b, seen_by, channel);
    }
  }
  from_float(dx, at<T>(conv.dx, b, token, channel));
}

// A block sums one tap of one channel, or its bias (blockIdx.y beyond the taps), over all tokens.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_weight_general_kernel(Conv conv, int d) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const ConvDirection& side = conv.direction[d];
  const int64_t channel = blockIdx.x, k = blockIdx.y, distance = side.width - 1 - k;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < conv.batch * conv.length; i += kThreads) {
    const int64_t b = i / conv.length, token = i % conv.length;
    const int64_t source = side.reverse ? token + distance : token - distance;
    const bool is_bias = k == side.width;
    if (!is_bias && (source < 0 || source >= conv.length)) continue;
    const float g = gradient_before_silu<T>(conv, side, b, token, channel);
    sum += is_bias ? g : g * to_float(*at<T>(conv.x, b, source, channel));
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int t = 1; t < kThreads; ++t) sum += shared[t];
  if (k < side.width) {
    write_gradient(side.dweight, channel * side.width + k, sum);
  } else {
    write_gradient(side.dbias, channel, sum);
  }
}

// ---- which kernels ---------------------------------------------------------------------------------------------

template <int kVector>
bool has_vectors(Element element, const Activation& x) {
  bool aligned = false;
  with_element(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    aligned = x.channel == 1 && is_aligned<kVector, T>(x.data, x.batch) && x.token % kVector == 0 && x.token >= 0 &&
              x.token < kLongestStride;
  });
  return aligned;
}

template <int kVector>
bool is_fast(const Conv& conv, bool backward) {
  bool fast = conv.dim % kVector == 0 && conv.length < (1 << 30) && has_vectors<kVector>(conv.element, conv.x);
  if (backward) fast = fast && has_vectors<kVector>(conv.element, conv.dx);
  for (int d = 0; d < conv.directions; ++d) {
    const ConvDirection& side = conv.direction[d];
    fast = fast && side.width == kTaps && has_vectors<kVector>(conv.element, backward ? side.dout : side.out);
  }
  // Two directions are one of each kind, the one that looks back first.
  return fast && (conv.directions == 1 || (!conv.direction[0].reverse && conv.direction[1].reverse));
}

bool tokens_first(const Conv& conv) { return conv.x.token == 1 && conv.x.channel != 1; }

unsigned blocks_of(int64_t threads, int64_t size) { return static_cast<unsigned>(blocks_in(threads, size)); }

// Calls function(before, after) with constants that say which directions there are.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <class Function>
void with_directions(const Conv& conv, const Function& function) {
  if (conv.directions == 2) return function(Flag<true>{}, Flag<true>{});
  if (conv.direction[0].reverse) return function(Flag<false>{}, Flag<true>{});
  return function(Flag<true>{}, Flag<false>{});
}

Pieces backward_pieces(const Conv& conv) { return cut(conv, conv.dim / kBackwardVector); }

int64_t backward_blocks(const Conv& conv) { return blocks_in(backward_pieces(conv).segments, kBackwardWarps); }

}  // namespace

void conv_forward(const Conv& conv, Stream stream) {
  with_element(conv.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!is_fast<kForwardVector>(conv, false)) {
      const Geometry geometry{dim3(blocks_of(conv.batch * conv.length * conv.dim, kThreads)), dim3(kThreads), 0};
      return launch(conv_fwd_general_kernel<T>, geometry, stream, conv, tokens_first(conv));
    }
    const Pieces pieces = cut(conv, conv.dim / kForwardVector);
    const int64_t threads = pieces.segments * (conv.dim / kForwardVector);
    const Geometry geometry{dim3(blocks_of(threads, kThreads)), dim3(kThreads), 0};
    with_directions(conv, [&](auto before, auto after) {
      constexpr bool kBefore = decltype(before)::value, kAfter = decltype(after)::value;
      if (conv.silu) return launch(conv_fwd_kernel<T, kBefore, kAfter, true>, geometry, stream, conv, pieces);
      launch(conv_fwd_kernel<T, kBefore, kAfter, false>, geometry, stream, conv, pieces);
    });
  });
}

int64_t conv_partial_floats(const Conv& conv) {
  return is_fast<kBackwardVector>(conv, true) ? backward_blocks(conv) * conv.directions * kRows * conv.dim : 0;
}

void conv_backward(const Conv& conv, Stream stream) {
  with_element(conv.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (is_fast<kBackwardVector>(conv, true)) {
      const Pieces pieces = backward_pieces(conv);
      const int64_t blocks = backward_blocks(conv);
      const unsigned threads = kBackwardWarps * kWarp;
      with_directions(conv, [&](auto before, auto after) {
        const size_t shared = sizeof(float) * kBackwardWarps * kRows * kBackwardChannels;
        const dim3 grid(static_cast<unsigned>(blocks), blocks_of(conv.dim, kBackwardChannels));
        launch(conv_bwd_kernel<T, decltype(before)::value, decltype(after)::value>, {grid, dim3(threads), shared},
               stream, conv, pieces);
      });
      const dim3 grid(blocks_of(conv.dim, kWarp), static_cast<unsigned>(conv.directions) * kRows);
      return launch(conv_reduce_kernel, {grid, dim3(threads), sizeof(float) * threads}, stream, conv, blocks);
    }
    const Geometry geometry{dim3(blocks_of(conv.batch * conv.length * conv.dim, kThreads)), dim3(kThreads), 0};
    launch(conv_bwd_general_kernel<T>, geometry, stream, conv, tokens_first(conv));
    for (int d = 0; d < conv.directions; ++d) {
      const dim3 grid(static_cast<unsigned>(conv.dim), static_cast<unsigned>(conv.direction[d].width) + 1);
      launch(conv_weight_general_kernel<T>, {grid, dim3(kThreads), sizeof(float) * kThreads}, stream, conv, d);
    }
  });
}

}  // namespace VIM_ISA
}  // namespace vim
