// The arithmetic of one step of a scan.
#pragma once

#include "weights.h"

namespace vim {
namespace VIM_ISA {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// 2^x without the special function unit, to 2 units in the last place; results below the normal numbers are about 0.
VIM_DEVICE float exp2_polynomial(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = fmaxf(x, -126.0f) + kRound, f = fmaxf(x, -126.0f) - (shifted - kRound);
  float p = 0.00132764713f;
  p = fmaf(p, f, 0.00967554189f);
  p = fmaf(p, f, 0.0555071309f);
  p = fmaf(p, f, 0.240221202f);
  p = fmaf(p, f, 0.693146944f);
  p = fmaf(p, f, 1.0f);
  return bits<float>(bits<uint32_t>(p) + (bits<uint32_t>(shifted) << 23));
}

// log(1 + e^x) to 3 units in the last place, also where it is tiny, and its derivative where `slope` is given. The
// logarithm is a polynomial: one special function less per step, and those are what limits a scan.
VIM_DEVICE float softplus(float x, float* slope = nullptr) {
  const float e = exp2_approx(-kLog2e * fabsf(x));
  float p = -0.0085392026f;
  p = fmaf(p, e, 0.0440896191f);
  p = fmaf(p, e, -0.107681707f);
  p = fmaf(p, e, 0.177452415f);
  p = fmaf(p, e, -0.244954631f);
  p = fmaf(p, e, 0.332754791f);
  p = fmaf(p, e, -0.499974042f);
  p = fmaf(p, e, 0.999999821f);
  if (slope != nullptr) *slope = (x < 0.0f ? e : 1.0f) * reciprocal_approx(1.0f + e);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

// log2(1 + 2^x), likewise
VIM_DEVICE float softplus2(float x) {
  const float e = exp2_approx(-fabsf(x));
  float p = -0.0123194653f;
  p = fmaf(p, e, 0.0636078748f);
  p = fmaf(p, e, -0.155351864f);
  p = fmaf(p, e, 0.256009719f);
  p = fmaf(p, e, -0.353394831f);
  p = fmaf(p, e, 0.480063686f);
  p = fmaf(p, e, -0.721310071f);
  p = fmaf(p, e, 1.44269478f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

VIM_DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-kLog2e * x)); }

VIM_DEVICE float silu(float x) { return x * sigmoid(x); }

// scale silu(x), given 1 / scale
VIM_DEVICE float scaled_silu(float x, float inverse_scale) {
  return x * reciprocal_approx(fmaf(exp2_approx(-kLog2e * x), inverse_scale, inverse_scale));
}

// The derivative of silu
VIM_DEVICE float silu_slope(float x) {
  const float gate = sigmoid(x);
  return gate * fmaf(x, 1.0f - gate, 1.0f);
}

// A, for any form in which it is given
VIM_DEVICE float decay_rate(const Scan& scan, float A) { return scan.A_is_log ? -expf(A) : A; }

VIM_DEVICE float decay_rate(const Scan& scan, const ScanDirection& side, int64_t channel, int64_t n) {
  return decay_rate(scan, read_or_zero(side.A, channel * scan.d_state + n));
}

template <class T>
VIM_DEVICE float read(const Activation& x, int64_t b, int64_t token, int64_t channel) {
  return to_float(static_cast<const T*>(x.data)[b * x.batch + token * x.token + channel * x.channel]);
}

template <class T>
VIM_DEVICE void write(const Activation& x, int64_t b, int64_t token, int64_t channel, float value) {
  from_float(value, static_cast<T*>(x.data) + b * x.batch + token * x.token + channel * x.channel);
}

// B or C of one state, token and channel.
template <class T>
VIM_DEVICE float read(const Scan& scan, const StateMap& map, int64_t b, int64_t token, int64_t channel, int64_t n) {
  if (map.constant != nullptr) return map.constant[channel * scan.d_state + n];
  const int64_t group = channel / map.channels_per_group;
  return to_float(
      static_cast<const T*>(map.data)[b * map.batch + group * map.group + n * map.state + token * map.token]);
}

// delta before softplus
template <class T>
VIM_DEVICE float raw_step(const Scan& scan, const ScanDirection& side, int64_t b, int64_t token, int64_t channel) {
  float sum = read_or_zero(side.bias, channel);
  if (side.delta.data != nullptr) return sum + read<T>(side.delta, b, token, channel);
  for (int64_t r = 0; r < scan.dt_rank; ++r) {
    sum = fmaf(read<T>(side.dt, b, token, r), read_or_zero(side.dt_weight, channel * scan.dt_rank + r), sum);
  }
  return sum;
}

// Whether `bytes` of neighbouring channels can be loaded at once, for elements of a size.
inline bool aligned(const Activation& x, int64_t element, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(bytes) == 0 && x.channel == 1 &&
         x.batch * element % bytes == 0 && x.token * element % bytes == 0;
}

// Blocks of at most `lanes` channels that do not cross a border between groups of B or C.
struct ChannelBlocks {
  int64_t segment, per_segment, count;

  VIM_INLINE ChannelBlocks(const Scan& scan, int64_t lanes) {
    int64_t a = scan.direction[0].B.channels_per_group, b = scan.direction[0].C.channels_per_group;
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    segment = larger(a, 1);
    per_segment = blocks_in(segment, lanes);
    count = scan.dim / segment * per_segment;
  }
  VIM_INLINE int64_t first(int64_t block, int64_t lanes) const {
    return block / per_segment * segment + block % per_segment * lanes;
  }
  // The first channel of the next block
  VIM_INLINE int64_t end(int64_t block, int64_t lanes) const {
    return smaller(first(block, lanes) + lanes, (block / per_segment + 1) * segment);
  }
};

}  // namespace VIM_ISA
}  // namespace vim
