// Generic scans: any number of states, B and C per token, per group or constant, any strides. One thread computes one
// channel of one batch element, reading its operands directly from global memory. It loops over the directions and over
// groups of sixteen states. scan_forward.cu and scan_backward.cu are the fast kernels for common shapes.
#pragma once

#include "scan_math.h"

namespace vim {
namespace VIM_ISA {

constexpr int kGroup = 16;  // states at a time

// Where a thread of a general kernel works. Threads beyond the last channel of their block are not `active`.
struct GeneralThread {
  int64_t block, b, channel;
  bool active;

  VIM_DEVICE explicit GeneralThread(const Scan& scan) {
    const ChannelBlocks blocks(scan, kWarp);
    block = blockIdx.x % blocks.count;
    b = blockIdx.x / blocks.count;
    channel = blocks.first(block, kWarp) + threadIdx.x;
    active = channel < blocks.end(block, kWarp);
    if (!active) channel = blocks.first(block, kWarp);
  }
};

// Whether a sequence starts at a token and the token before it in scan order belongs to another one.
VIM_DEVICE bool restarts_at(const Scan& scan, const ScanDirection& side, int64_t b, int64_t token) {
  const int64_t before = side.reverse ? token + 1 : token - 1;
  if (scan.seq_idx == nullptr || before < 0 || before >= scan.length) return false;
  return scan.seq_idx[b * scan.length + token] != scan.seq_idx[b * scan.length + before];
}

// One channel's share of a scan: sixteen states from n0 on.
template <class T>
struct GeneralStates {
  const Scan& scan;
  const ScanDirection& side;
  int64_t b, channel, n0;
  float A[kGroup], h[kGroup];

  VIM_DEVICE GeneralStates(const Scan& scan_, const ScanDirection& side_, int64_t b_, int64_t channel_, int64_t n0_)
      : scan(scan_), side(side_), b(b_), channel(channel_), n0(n0_) {
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
      A[n] = n0 + n < scan.d_state ? decay_rate(scan, side, channel, n0 + n) : 0.0f;
      h[n] = 0.0f;
    }
  }

  // The state before the first token.
  VIM_DEVICE void begin() {
    if (side.initial_state == nullptr) return;
#pragma unroll
    for (int n = 0; n < kGroup && n0 + n < scan.d_state; ++n) {
      h[n] = side.initial_state[(b * scan.dim + channel) * scan.d_state + n0 + n];
    }
  }

  VIM_DEVICE float B(int64_t token, int n) const {
    return n0 + n < scan.d_state ? read<T>(scan, side.B, b, token, channel, n0 + n) : 0.0f;
  }
  VIM_DEVICE float C(int64_t token, int n) const {
    return n0 + n < scan.d_state ? read<T>(scan, side.C, b, token, channel, n0 + n) : 0.0f;
  }

  VIM_DEVICE float step(int64_t token, float* slope = nullptr) const {
    const float raw = raw_step<T>(scan, side, b, token, channel);
    if (slope != nullptr) *slope = 1.0f;
    return scan.softplus ? softplus(raw, slope) : raw;
  }

  VIM_DEVICE void advance(int64_t token, float delta, float u) {
    const bool restarts = restarts_at(scan, side, b, token);
#pragma unroll
    for (int n = 0; n < kGroup; ++n) {
      if (restarts) h[n] = 0.0f;
      h[n] = fmaf(exp2_approx(delta * (A[n] * kLog2e)), h[n], delta * u * B(token, n));
    }
  }

  VIM_DEVICE float read_out(int64_t token) const {
    float y = 0.0f;
#pragma unroll
    for (int n = 0; n < kGroup; ++n) y = fmaf(h[n], C(token, n), y);
    return y;
  }

  // A saved state (.., d_state, dim), given at its first number.
  VIM_DEVICE void save(float* target) const {
#pragma unroll
    for (int n = 0; n < kGroup && n0 + n < scan.d_state; ++n) target[(n0 + n) * scan.dim + channel] = h[n];
  }
  VIM_DEVICE void load(const float* source) {
#pragma unroll
    for (int n = 0; n < kGroup; ++n) h[n] = n0 + n < scan.d_state ? source[(n0 + n) * scan.dim + channel] : 0.0f;
  }
};

// The token at a place in scan order.
VIM_INLINE int64_t token_at(const ScanDirection& side, int64_t length, int64_t place) {
  return side.reverse ? length - 1 - place : place;
}

}  // namespace VIM_ISA
}  // namespace vim
