// The fast backward pass of a scan: up to 16 states, saved states at most 64 tokens apart; the mathematics are at the
// top of generic_backward.cu.
//
// A block computes 64 channels (32 in float32) of one batch element in one direction, and processes the chunks between
// saved states in reverse scan order. First, a thread writes the values that depend on token and channel alone (step
// sizes, inputs, incoming gradients) of two channels to shared memory. Then four lanes share two channels, each with
// four states of both. They scan the chunk forward and save the state at every eighth token. Going back, they recompute
// the states and decays of eight tokens at a time in registers.
//
// dB and dC are summed over a lane's two channels, over the warp's eight pairs by a butterfly, which leaves one of
// eight sums in each lane, and after the chunk over the warps. What is summed over a channel's states is exchanged for
// four tokens at once, so that each of four lanes ends with one token, and finishes it. Then the gradients of dt and of
// dt_proj's weight are computed from the step sizes' gradients. Of dB, dC and dt's gradient a block writes a partial
// sum; scan_reduce.cu adds them.
//
// A long sequence of few channels is cut into segments that run in parallel. A first kernel goes back through each with
// no gradient of its last state, which gives the gradient that it passes on; a second one chains these.
#pragma once

#include "scan_backward.h"
#include "scan_math.h"
#include "vector.h"
#include "workspace.h"

namespace vim {
namespace VIM_ISA {

// Warps of a block. A variant for measurements is 2 for all types: half as many channels, twice as many partial sums.
#if !defined(VIM_BACKWARD_WARPS)
#define VIM_BACKWARD_WARPS 4
#endif

constexpr int kStates = 16, kOwn = 4;  // states of a channel, and of a lane
constexpr int kLanes = kStates / kOwn;
constexpr int kChunk = 64, kEight = 8;
// What the kernels are compiled for: kGiven where delta is an operand, otherwise the rank from which it is projected.
// For kMostRanks it is that or less. Other ranks need operands that are loaded in vectors (see BackwardPlan::whole).
constexpr int kGiven = -1, kMostRanks = 64;

// For an element type and a rank: how many threads a block has, and where its shared memory is, in floats. Tokens are
// in scan order. Rows of `delta` are 4 floats apart in their banks, so that threads may read a column.
template <class T, int kRank>
struct BackwardShape {
  static constexpr int kWarps = sizeof(T) == 4 ? 2 : VIM_BACKWARD_WARPS, kThreads = kWarps * kWarp;
  static constexpr int kChannels = kWarps * 2 * kWarp / kLanes;
  static constexpr int kRanks = kRank > 0 ? kRank : 0;
  static constexpr int kRow = kChannels + 4;
  static constexpr int kOfWarp = 2 * kWarp * kOwn;  // a warp's states at a token; or its sums of eight tokens
  static_assert(kOfWarp == kEight * 2 * kStates, "sums take the place of states");
  static constexpr int kEntries = kChunk / kEight * kWarps * kOfWarp;
  static constexpr int kProjection = (kChunk + kChannels) * kRanks;

  static constexpr int kDelta = 0;                       // (kChunk, kRow); becomes ddelta
  static constexpr int kDy = kDelta + kChunk * kRow;     // (kChunk, kChannels)
  static constexpr int kB = kDy + kChunk * kChannels;    // (kChunk, kStates)
  static constexpr int kC = kB + kChunk * kStates;       // likewise
  static constexpr int kShared = kC + kChunk * kStates;  // entries, then sums; or dt and weights
  static constexpr int kU = kShared + (kEntries > kProjection ? kEntries : kProjection);  // (kChunk, kChannels) of T
  static constexpr size_t kBytes = kU * sizeof(float) + kChunk * kChannels * sizeof(T);
};

// A chunk in scan order
struct Chunk {
  int first, direction, count;
  VIM_DEVICE int token(int place) const { return first + direction * place; }
};

// Four numbers of a lane
struct Four {
  float x[kOwn];
};

VIM_DEVICE Four load_four(const float* at) {
  const float4 v = *reinterpret_cast<const float4*>(at);
  return {{v.x, v.y, v.z, v.w}};
}

VIM_DEVICE void store_four(float* at, const float (&x)[kOwn]) {
  *reinterpret_cast<float4*>(at) = {x[0], x[1], x[2], x[3]};
}

// Two neighbouring channels
struct Two {
  float x[2];
};

VIM_DEVICE Two load_two(const float* at) {
  const float2 v = *reinterpret_cast<const float2*>(at);
  return {{v.x, v.y}};
}
template <class T>
VIM_DEVICE Two load_two(const T* at) {
  const uint32_t raw = *reinterpret_cast<const uint32_t*>(at);
  return {{to_float(T{static_cast<uint16_t>(raw)}), to_float(T{static_cast<uint16_t>(raw >> 16)})}};
}

VIM_DEVICE void store_two(float* at, const Two& v) { *reinterpret_cast<float2*>(at) = {v.x[0], v.x[1]}; }
template <class T>
VIM_DEVICE void store_two(T* at, const Two& v) {
  T out[2];
  from_float(v.x[0], &out[0]);
  from_float(v.x[1], &out[1]);
  *reinterpret_cast<uint32_t*>(at) = out[0].raw | static_cast<uint32_t>(out[1].raw) << 16;
}

// A run of kCount numbers in shared memory that all threads of a warp read
template <int kCount>
VIM_DEVICE void load_run(const float* at, float (&to)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(at + i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 v = *reinterpret_cast<const float2*>(at + i);
      to[i] = v.x, to[i + 1] = v.y;
    }
  }
}

// One of two numbers, plus the same one of the lane whose index differs in `bit`: that of `upper` for lanes with the
// bit.
VIM_DEVICE float halve(float lower, float upper, int bit, int lane) {
  const bool up = (lane & bit) != 0;
  return (up ? upper : lower) + __shfl_xor_sync(kFullWarp, up ? lower : upper, bit);
}

// Sums eight numbers over the eight pairs of channels of a warp: the lanes of pair k get the sum of the k-th.
VIM_DEVICE float sum_eight(const float (&x)[8], int lane) {
  float half[4], quarter[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) half[i] = halve(x[i], x[i + 4], 4 * kLanes, lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) quarter[i] = halve(half[i], half[i + 2], 2 * kLanes, lane);
  return halve(quarter[0], quarter[1], kLanes, lane);
}

// The sum over the lanes of a channel, in each of them
VIM_DEVICE float sum_channel(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// The derivative of softplus, given its result
VIM_DEVICE float slope_of(float delta) {
  float p = -1.0f / 720;
  p = fmaf(p, delta, 1.0f / 120);
  p = fmaf(p, delta, -1.0f / 24);
  p = fmaf(p, delta, 1.0f / 6);
  p = fmaf(p, delta, -0.5f);
  p = fmaf(p, delta, 1.0f);
  return delta < 0.25f ? p * delta : 1.0f - exp2_approx(-kLog2e * delta);
}

template <class T, int kRank>
struct Backward {
  using Shape = BackwardShape<T, kRank>;
  static constexpr int kWarps = Shape::kWarps, kThreads = Shape::kThreads, kChannels = Shape::kChannels;
  static constexpr int kRow = Shape::kRow, kRanks = Shape::kRanks;
  static constexpr bool kProjects = kRank > 0, kWhole = kRank > 0 && kRank < kMostRanks;
  static constexpr int kHalf = kProjects ? kRank / 2 : 1;  // ranks of a thread where it computes gradients of dt

  const BackwardPlan& plan;
  const ScanBackwardPasses& passes;
  const Scan& scan;
  int d, b, block, segment, first_channel, end_channel;
  const ScanDirection& side;
  float *delta, *dy, *B, *C, *shared;
  T* u;
  int warp, lane;
  // As a lane of two channels
  int local, lane_state;                           // the first channel within the block, first state of the lane
  float A[2][kOwn], g[2][kOwn], dA[2][kOwn] = {};  // A in units that make a decay 2^(delta A)
  float D[2], dbias[2] = {}, dD[2] = {};
  float time[2] = {};            // the sum of step sizes, if that is asked for
  float ddt_weight[kHalf] = {};  // of channel threadIdx.x % kChannels

  VIM_DEVICE static int direction_of(const BackwardPlan& plan) {
    return static_cast<int>(blockIdx.x) / plan.blocks / plan.batch % plan.passes.k.scan.directions;
  }

  VIM_DEVICE explicit Backward(const BackwardPlan& plan_)
      : plan(plan_),
        passes(plan_.passes),
        scan(plan_.passes.k.scan),
        d(direction_of(plan_)),
        side(plan_.passes.k.scan.direction[d]) {
    const int index = static_cast<int>(blockIdx.x);
    block = index % plan.blocks;
    b = index / plan.blocks % plan.batch;
    segment = index / plan.blocks / plan.batch / scan.directions;
    const int group = block / plan.per_group;
    first_channel = group * plan.group + block % plan.per_group * kChannels;
    end_channel = static_cast<int>(smaller(first_channel + kChannels, (group + 1) * plan.group));
    float* memory = reinterpret_cast<float*>(shared_memory());
    delta = memory + Shape::kDelta;
    dy = memory + Shape::kDy;
    B = memory + Shape::kB;
    C = memory + Shape::kC;
    shared = memory + Shape::kShared;
    u = reinterpret_cast<T*>(memory + Shape::kU);
    warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = static_cast<int>(threadIdx.x) % kWarp;
    local = static_cast<int>(threadIdx.x) / kLanes * 2;
    lane_state = lane % kLanes * kOwn;
    const float* incoming = segment == 0 ? passes.k.grads[d].dlast_state : nullptr;
    with_elements(side.A, [&](const auto* rates) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t channel = existing(local + c);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          A[c][i] = lane_state + i < scan.d_state ? to_float(rates[channel * scan.d_state + lane_state + i]) : 0.0f;
        }
        D[c] = read_or_zero(elements_like(rates, side.D), channel);
      }
    });
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t channel = existing(local + c);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int n = lane_state + i;
        const bool real = n < scan.d_state, arrives = real && incoming != nullptr && exists(local + c);
        A[c][i] = real ? kLog2e * decay_rate(scan, A[c][i]) : 0.0f;
        g[c][i] = arrives ? incoming[(b * scan.dim + channel) * scan.d_state + n] : 0.0f;
      }
    }
  }

  // Channels beyond the last compute what the last one does; nothing of it is used.
  VIM_DEVICE int existing(int c) const { return first_channel + c < end_channel ? first_channel + c : end_channel - 1; }
  VIM_DEVICE bool exists(int c) const { return first_channel + c < end_channel; }

  // ---- from and to global memory

  VIM_DEVICE bool in_pairs() const { return kWhole || plan.pairs; }
  VIM_DEVICE bool whole_maps() const { return kWhole || plan.whole_maps; }
  VIM_DEVICE bool whole_weights() const { return kWhole || (plan.weights[d] && scan.dt_rank == kRank); }

  // Two channels of a token, zero where there are none. Where the plan says so, they are loaded at once.
  VIM_DEVICE Two read_two(const Activation& x, int token, int c) const {
    const T* at = static_cast<const T*>(x.data) + b * x.batch + token * x.token + (first_channel + c) * x.channel;
    if (in_pairs()) return exists(c) ? load_two(at) : Two{};
    return {{exists(c) ? to_float(at[0]) : 0.0f, exists(c + 1) ? to_float(at[x.channel]) : 0.0f}};
  }

  VIM_DEVICE void write_two(const Activation& x, int token, int c, const Two& v) const {
    T* at = static_cast<T*>(x.data) + b * x.batch + token * x.token + (first_channel + c) * x.channel;
    if (in_pairs()) {
      if (exists(c)) store_two(at, v);
    } else {
      if (exists(c)) from_float(v.x[0], at);
      if (exists(c + 1)) from_float(v.x[1], at + x.channel);
    }
  }

  VIM_DEVICE float* map_of(int token) const { return map_row(passes, block, d, b, token); }

  // ---- into shared memory

  VIM_DEVICE void load_map(const Chunk& chunk, const StateMap& map, float* target) const {
    const T* base =
        static_cast<const T*>(map.data) + b * map.batch + first_channel / map.channels_per_group * map.group;
    for (int i = static_cast<int>(threadIdx.x); i < kChunk * kStates / 4; i += kThreads) {
      const int place = i / (kStates / 4), n = i % (kStates / 4) * 4;
      load_items<kStates>(base, chunk, place, n, map.token, map.state, static_cast<int>(scan.d_state),
                          target + place * kStates + n);
    }
  }

  // Four of a token's numbers, zero beyond `count` and outside the chunk.
  template <int kCount>
  VIM_DEVICE void load_items(const T* base, const Chunk& chunk, int place, int item, int64_t token_stride,
                             int64_t stride, int count, float* target) const {
    float4 v{};
    if (place < chunk.count) {
      const T* at = base + chunk.token(place) * token_stride + item * stride;
      if (kWhole || (plan.rows[d] && count == kCount)) {
        const Floats<4> four = load_floats<4>(at);
        v = {four[0], four[1], four[2], four[3]};
      } else {
        v.x = item < count ? to_float(at[0]) : 0.0f;
        v.y = item + 1 < count ? to_float(at[stride]) : 0.0f;
        v.z = item + 2 < count ? to_float(at[2 * stride]) : 0.0f;
        v.w = item + 3 < count ? to_float(at[3 * stride]) : 0.0f;
      }
    }
    *reinterpret_cast<float4*>(target) = v;
  }

  // dt, (kChunk, kRanks)
  VIM_DEVICE void load_dt(const Chunk& chunk) const {
    constexpr int kPerRow = kProjects ? kRank / 4 : 1;
    const T* base = static_cast<const T*>(side.dt.data) + b * side.dt.batch;
    for (int i = static_cast<int>(threadIdx.x); i < kChunk * kPerRow; i += kThreads) {
      const int place = i / kPerRow, r = i % kPerRow * 4;
      load_items<kRanks>(base, chunk, place, r, side.dt.token, side.dt.channel, static_cast<int>(scan.dt_rank),
                         shared + place * kRanks + r);
    }
  }

  VIM_DEVICE void load_channels(const Chunk& chunk) const {
    constexpr int kPairs = kChannels / 2;
    const int c = static_cast<int>(threadIdx.x) % kPairs * 2;
    float weights[2][kProjects ? kRank : 1];
    Two bias{};
    with_elements(side.A, [&](const auto* rates) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int64_t channel = existing(c + k);
        if constexpr (kProjects) {
          load_row(elements_like(rates, side.dt_weight) + channel * scan.dt_rank, scan.dt_rank, whole_weights(),
                   weights[k]);
        }
        bias.x[k] = read_or_zero(elements_like(rates, side.bias), channel);
      }
    });
#pragma unroll 4
    for (int place = static_cast<int>(threadIdx.x) / kPairs; place < kChunk; place += kThreads / kPairs) {
      Two steps{}, inputs{}, gradients{};
      if (place < chunk.count) {
        const int token = chunk.token(place);
        inputs = read_two(side.u, token, c);
        gradients = read_two(passes.k.dy, token, c);
        if (scan.z.data != nullptr) {
          const Two z = read_two(scan.z, token, c);
#pragma unroll
          for (int k = 0; k < 2; ++k) gradients.x[k] *= silu(z.x[k]);
        }
        steps = bias;
        if constexpr (kProjects) {
#pragma unroll
          for (int r = 0; r < kRank; r += 4) {
            const Four dt = load_four(shared + place * kRank + r);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int k = 0; k < 2; ++k) steps.x[k] = fmaf(dt.x[i], weights[k][r + i], steps.x[k]);
            }
          }
        } else {
          const Two given = read_two(side.delta, token, c);
#pragma unroll
          for (int k = 0; k < 2; ++k) steps.x[k] += given.x[k];
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          gradients.x[k] *= scan.scale;
          if (scan.softplus) steps.x[k] = softplus(steps.x[k]);
        }
      }
      store_two(delta + place * kRow + c, steps);
      store_two(dy + place * kChannels + c, gradients);
      store_two(u + place * kChannels + c, inputs);
    }
  }

  // ---- through the states

  VIM_DEVICE float* of_warp(int eight) const { return shared + (eight * kWarps + warp) * Shape::kOfWarp; }
  // This lane's states of the channel c of its two
  VIM_DEVICE float* entry_of(int eight, int c) const { return of_warp(eight) + (c * kWarp + lane) * kOwn; }

  // Leaves the state that each eight of tokens is entered in.
  VIM_DEVICE void run_through(const float* saved, int eights) const {
    float h[2][kOwn];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = existing(local + c);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int n = lane_state + i;
        h[c][i] = n < scan.d_state ? saved[n * scan.dim + channel] : 0.0f;
      }
    }
    for (int eight = 0; eight < eights; ++eight) {
#pragma unroll
      for (int c = 0; c < 2; ++c) store_four(entry_of(eight, c), h[c]);
      if (eight + 1 == eights) break;
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        const int place = eight * kEight + j;
        const Two steps = load_two(delta + place * kRow + local), inputs = load_two(u + place * kChannels + local);
        const Four b4 = load_four(B + place * kStates + lane_state);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float drive = steps.x[c] * inputs.x[c];
#pragma unroll
          for (int i = 0; i < kOwn; ++i) h[c][i] = fmaf(exp2_approx(steps.x[c] * A[c][i]), h[c][i], drive * b4.x[i]);
        }
      }
    }
  }

  // Goes back through eight tokens.
  VIM_DEVICE void sweep(const Chunk& chunk, int eight) {
    float h[kEight + 1][2][kOwn], e[kEight][2][kOwn];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Four entry = load_four(entry_of(eight, c));
#pragma unroll
      for (int i = 0; i < kOwn; ++i) h[0][c][i] = entry.x[i];
    }
    __syncwarp();  // sums will take the place of the states
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const int place = eight * kEight + j;
      const Two steps = load_two(delta + place * kRow + local), inputs = load_two(u + place * kChannels + local);
      const Four b4 = load_four(B + place * kStates + lane_state);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float drive = steps.x[c] * inputs.x[c];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          e[j][c][i] = exp2_approx(steps.x[c] * A[c][i]);
          h[j + 1][c][i] = fmaf(e[j][c][i], h[j][c][i], drive * b4.x[i]);
        }
      }
    }
    const int pair = lane / kLanes;
    // Sum k is of dB (k < 4) or dC of the lane's state k % 4.
    float* sums = of_warp(eight) + pair / kOwn * kStates + lane_state + pair % kOwn;
#pragma unroll
    for (int first = kEight - 4; first >= 0; first -= 4) {
      // Sums over a channel's states: through the drive, through the decay, y. Four tokens' are exchanged among four
      // lanes, first between neighbours, so that each ends with one token.
      float pairs[2][3][2];
#pragma unroll
      for (int half = 1; half >= 0; --half) {
        float tokens[2][3][2];
#pragma unroll
        for (int k = 1; k >= 0; --k) {
          const int j = first + 2 * half + k, place = eight * kEight + j;
          const Two steps = load_two(delta + place * kRow + local), inputs = load_two(u + place * kChannels + local),
                    gradients = load_two(dy + place * kChannels + local);
          const Four b4 = load_four(B + place * kStates + lane_state), c4 = load_four(C + place * kStates + lane_state);
          float maps[2 * kOwn];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float drive = steps.x[c] * inputs.x[c];
            float through_drive = 0.0f, through_decay = 0.0f, y = 0.0f;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
              const float dh = fmaf(gradients.x[c], c4.x[i], g[c][i]), after = h[j + 1][c][i];
              maps[i] = c == 0 ? dh * drive : fmaf(dh, drive, maps[i]);
              maps[kOwn + i] = c == 0 ? gradients.x[c] * after : fmaf(gradients.x[c], after, maps[kOwn + i]);
              y = fmaf(after, c4.x[i], y);
              through_drive = fmaf(dh, b4.x[i], through_drive);
              g[c][i] = dh * e[j][c][i];
              const float dlog = g[c][i] * h[j][c][i];
              through_decay = fmaf(dlog, A[c][i], through_decay);
              dA[c][i] = fmaf(dlog, steps.x[c], dA[c][i]);
            }
            tokens[k][0][c] = through_drive;
            tokens[k][1][c] = through_decay;
            tokens[k][2][c] = y;
          }
          sums[j * 2 * kStates] = sum_eight(maps, lane);
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) pairs[half][i][c] = halve(tokens[0][i][c], tokens[1][i][c], 1, lane);
        }
      }
      Two own[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) own[i].x[c] = halve(pairs[0][i][c], pairs[1][i][c], 2, lane);
      }
      finish(chunk, eight * kEight + first + lane % kLanes, own[0], own[1], own[2]);
    }
  }

  // Writes what is known of a token: a lane's own one of four.
  VIM_DEVICE void finish(const Chunk& chunk, int place, const Two& through_drive, const Two& through_decay, Two y) {
    const bool inside = place < chunk.count;
    const Two steps = load_two(delta + place * kRow + local), inputs = load_two(u + place * kChannels + local),
              gradients = load_two(dy + place * kChannels + local);
    Two ddelta, du;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float slope = scan.softplus ? slope_of(steps.x[c]) : 1.0f;
      ddelta.x[c] = inside ? fmaf(through_drive.x[c], inputs.x[c], kLn2 * through_decay.x[c]) * slope : 0.0f;
      du.x[c] = fmaf(through_drive.x[c], steps.x[c], D[c] * gradients.x[c]);
      y.x[c] = fmaf(D[c], inputs.x[c], y.x[c]);
      dbias[c] += ddelta.x[c];
      dD[c] = fmaf(gradients.x[c], inputs.x[c], dD[c]);
    }
    __syncwarp();  // all lanes have read what is replaced
    store_two(delta + place * kRow + local, ddelta);
    if (!inside) return;
    const int token = chunk.token(place);
    write_two(passes.k.grads[d].du, token, local, du);
    if (!kProjects) write_two(passes.k.grads[d].ddelta, token, local, ddelta);
    if (scan.z.data == nullptr) return;
    float* at = passes.sums + ((d * scan.batch + b) * scan.length + token) * scan.dim + first_channel + local;
    if (in_pairs()) {
      if (exists(local)) store_two(at, y);
    } else {
      if (exists(local)) at[0] = y.x[0];
      if (exists(local + 1)) at[1] = y.x[1];
    }
  }

  // ---- out of shared memory

  VIM_DEVICE void write_maps(const Chunk& chunk) const {
    const int states = static_cast<int>(scan.d_state);
    for (int i = static_cast<int>(threadIdx.x); i < kChunk * 2 * kStates / 4; i += kThreads) {
      const int place = i / (2 * kStates / 4), item = i % (2 * kStates / 4) * 4, n = item % kStates;
      if (place >= chunk.count || (!kWhole && n >= states)) continue;
      float sum[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const Four v =
            load_four(shared + (place / kEight * kWarps + w) * Shape::kOfWarp + place % kEight * 2 * kStates + item);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k] += v.x[k];
      }
      float* row = map_of(chunk.token(place)) + item / kStates * states;
      if (whole_maps()) {
        store_four(row + n, sum);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (n + k < states) row[n + k] = sum[k];
        }
      }
    }
  }

  // The gradients of dt, as a partial sum after dB and dC, and of dt_proj's weight, both from ddelta.
  VIM_DEVICE void project_back(const Chunk& chunk) {
    load_dt(chunk);
    float* weights = shared + kChunk * kRanks;  // (kChannels, kRanks)
    for (int i = static_cast<int>(threadIdx.x); i < kChannels * kRanks / 4; i += kThreads) {
      const int c = i / (kRanks / 4), r = i % (kRanks / 4) * 4;
      float v[4];
      with_elements(side.dt_weight, [&](const auto* from) {
        load_row(from + existing(c) * scan.dt_rank + r, scan.dt_rank - r, whole_weights(), v);
      });
      store_four(weights + c * kRanks + r, v);
    }
    __syncthreads();
    {
      const int c = static_cast<int>(threadIdx.x) % kChannels;
      const float* dt = shared + static_cast<int>(threadIdx.x) / kChannels * kHalf;
#pragma unroll 4
      for (int place = 0; place < kChunk; ++place) {
        float row[kHalf];
        load_run(dt + place * kRanks, row);
        const float ddelta = delta[place * kRow + c];
#pragma unroll
        for (int r = 0; r < kHalf; ++r) ddt_weight[r] = fmaf(ddelta, row[r], ddt_weight[r]);
      }
    }
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kChunk; i += kThreads) {
      const int place = i % kChunk, first = i / kChunk * kHalf;
      float sum[kHalf] = {};
#pragma unroll 2
      for (int c = 0; c < kChannels; c += 4) {
        const Four ddelta = load_four(delta + place * kRow + c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float row[kHalf];
          load_run(weights + (c + k) * kRanks + first, row);
#pragma unroll
          for (int r = 0; r < kHalf; ++r) sum[r] = fmaf(ddelta.x[k], row[r], sum[r]);
        }
      }
      if (place >= chunk.count) continue;
      float* row = map_of(chunk.token(place)) + 2 * scan.d_state;
      if (kWhole || (plan.whole_maps && scan.dt_rank == kRank)) {
#pragma unroll
        for (int r = 0; r < kHalf; r += 2) store_two(row + first + r, Two{{sum[r], sum[r + 1]}});
      } else {
#pragma unroll
        for (int r = 0; r < kHalf; ++r) {
          if (first + r < scan.dt_rank) row[first + r] = sum[r];
        }
      }
    }
  }

  VIM_DEVICE void write_weights() {
    const WeightRows rows(scan);
    const int64_t part = static_cast<int64_t>(b) * plan.segments + segment;
    const auto at = [&](int64_t row, int c) { return weight_row(passes, d, part, row) + first_channel + c; };
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float bias = sum_channel(dbias[c]), skip = sum_channel(dD[c]);
      if (!exists(local + c)) continue;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (lane_state + i < scan.d_state) *at(rows.A + lane_state + i, local + c) = dA[c][i];
      }
      if (lane_state != 0) continue;
      *at(rows.bias, local + c) = bias;
      *at(rows.D, local + c) = skip;
    }
    if constexpr (kProjects) {
      const int c = static_cast<int>(threadIdx.x) % kChannels,
                first = static_cast<int>(threadIdx.x) / kChannels * kHalf;
#pragma unroll
      for (int r = 0; r < kHalf; ++r) {
        if (exists(c) && first + r < scan.dt_rank) *at(rows.dt + first + r, c) = ddt_weight[r];
      }
    }
  }

  // ---- segments

  // The gradient with which a segment is entered; segments are counted in the order in which they are gone through.
  VIM_DEVICE float* adjoint(int64_t of) const {
    return plan.passes.adjoints + ((d * scan.batch + b) * plan.segments + of) * kStates * scan.dim;
  }

  VIM_DEVICE void enter() {
    if (segment == 0) return;
    const float* entered = adjoint(segment);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int channel = existing(local + c);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        g[c][i] = exists(local + c) ? entered[(lane_state + i) * scan.dim + channel] : 0.0f;
      }
    }
  }

  // Goes back through a chunk for the gradient of its first state alone.
  VIM_DEVICE void run_back() {
    for (int place = kChunk - 1; place >= 0; --place) {
      const Two steps = load_two(delta + place * kRow + local), gradients = load_two(dy + place * kChannels + local);
      const Four c4 = load_four(C + place * kStates + lane_state);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        time[c] += steps.x[c];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          g[c][i] = exp2_approx(steps.x[c] * A[c][i]) * fmaf(gradients.x[c], c4.x[i], g[c][i]);
        }
      }
    }
  }

  // What the segment passes on, for the next one.
  VIM_DEVICE void leave() const {
    float* left = adjoint(segment);
    float* times = passes.adjoints + scan.directions * scan.batch * plan.segments * kStates * scan.dim +
                   ((d * scan.batch + b) * plan.segments + segment) * scan.dim;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (!exists(local + c)) continue;
      const int channel = first_channel + local + c;
      if (lane_state == 0) times[channel] = time[c];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) left[(lane_state + i) * scan.dim + channel] = g[c][i];
    }
  }

  // Calls function(chunk, saved) for the chunks of the segment, whose step sizes and so on are in shared memory;
  // `saved` is the state in which the chunk is entered.
  template <class Function>
  VIM_DEVICE void for_chunks(const Function& function) {
    const int every = static_cast<int>(scan.checkpoint_every), length = static_cast<int>(scan.length);
    const int saved = (length + every - 1) / every;
    const int last = static_cast<int>(smaller((segment + 1) * plan.of_segment, saved));
    for (int i = segment * plan.of_segment; i < last; ++i) {
      const int index = side.reverse ? i : saved - 1 - i, begin = index * every;
      const int end = static_cast<int>(smaller(begin + every, length));
      const Chunk chunk{side.reverse ? end - 1 : begin, side.reverse ? -1 : 1, end - begin};
      __syncthreads();  // what the chunk before has left is read
      load_map(chunk, side.B, B);
      load_map(chunk, side.C, C);
      if constexpr (kProjects) load_dt(chunk);
      __syncthreads();
      load_channels(chunk);
      __syncthreads();
      function(chunk, side.checkpoints + (static_cast<int64_t>(b) * saved + index) * scan.d_state * scan.dim);
    }
  }

  VIM_DEVICE void run() {
    enter();
    for_chunks([&](const Chunk& chunk, const float* saved) {
      const int eights = (chunk.count + kEight - 1) / kEight;
      run_through(saved, eights);
      for (int eight = eights - 1; eight >= 0; --eight) sweep(chunk, eight);
      __syncthreads();
      write_maps(chunk);
      if constexpr (kProjects) {
        // No gradient comes from tokens that no eight has gone through; their step sizes are zero.
        __syncthreads();
        project_back(chunk);
      }
    });
    write_weights();
  }

  VIM_DEVICE void run_adjoint() {
    for_chunks([&](const Chunk&, const float*) { run_back(); });
    leave();
  }
};

template <class T, int kRank>
__global__ void __launch_bounds__((BackwardShape<T, kRank>::kThreads), 256 / BackwardShape<T, kRank>::kThreads)
    scan_backward_kernel(const __grid_constant__ BackwardPlan plan) {
  Backward<T, kRank> backward(plan);
  backward.run();
}

template <class T, int kRank>
__global__ void __launch_bounds__((BackwardShape<T, kRank>::kThreads), 256 / BackwardShape<T, kRank>::kThreads)
    scan_adjoint_kernel(const __grid_constant__ BackwardPlan plan) {
  Backward<T, kRank> backward(plan);
  backward.run_adjoint();
}

// ---- host ------------------------------------------------------------------------------------------------------

// A rank as a type
template <int kRank>
struct Rank {
  static constexpr int value = kRank;
};

template <class T, int kRank>
Geometry geometry_of(const BackwardPlan& plan, int segments) {
  using Shape = BackwardShape<T, kRank>;
  const int64_t blocks = int64_t{plan.blocks} * plan.batch * plan.passes.k.scan.directions * segments;
  return {static_cast<unsigned>(blocks), Shape::kThreads, Shape::kBytes};
}

template <class T, int kRank>
void run_adjoints(const BackwardPlan& plan, Stream stream) {
  // The last segment passes nothing on.
  launch(scan_adjoint_kernel<T, kRank>, geometry_of<T, kRank>(plan, plan.segments - 1), stream, plan);
}

template <class T, int kRank>
void run_sweeps(const BackwardPlan& plan, Stream stream) {
  launch(scan_backward_kernel<T, kRank>, geometry_of<T, kRank>(plan, plan.segments), stream, plan);
}

// The kernel for the scan's rank, if it is one of these and all is whole, and otherwise the one for any.
template <class T, int... kRanks>
void run_backward(const BackwardPlan& plan, Stream stream, bool adjoint) {
  const auto run = [&](auto rank) {
    constexpr int kRank = decltype(rank)::value;
    adjoint ? run_adjoints<T, kRank>(plan, stream) : run_sweeps<T, kRank>(plan, stream);
  };
  const Scan& scan = plan.passes.k.scan;
  if (scan.direction[0].delta.data != nullptr) return run(Rank<kGiven>{});
  const bool found = plan.whole && ((scan.dt_rank == kRanks && (run(Rank<kRanks>{}), true)) || ...);
  if (!found) run(Rank<kMostRanks>{});
}

}  // namespace VIM_ISA
}  // namespace vim
