// The fast backward pass of a scan: up to 16 states, saved states at most 64 tokens apart; the mathematics are at the
// top of generic_backward.cu.
//
// A block computes 32 channels of one batch element in one direction, and processes the chunks between saved states in
// reverse scan order. First, one thread per channel writes the values that depend on token and channel alone (step
// sizes, inputs, incoming gradients) to shared memory. Then four lanes share a channel, each with four of its states.
// They scan the chunk forward and save the state at every eighth token. Going back, they recompute the states and
// decays of eight tokens at a time in registers.
//
// dB and dC are summed over the eight channels of a warp by a butterfly, which leaves one of eight sums in each lane,
// and then over the warps in shared memory. The result is one partial sum per block of channels; scan_reduce.cu adds
// them.
#include "scan_math.h"
#include "workspace.h"

namespace vim {
namespace VIM_ISA {

namespace {

constexpr int kStates = 16, kOwn = 4;  // states of a channel, and of a lane
constexpr int kLanes = kStates / kOwn;
constexpr int kChunk = 64, kEight = 8;
constexpr int kChannels = 32, kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kMostRanks = 64;

// Shared memory, in floats. Tokens are in scan order.
struct Shared {
  float *delta, *slope, *u, *dy;  // (kChunk, kChannels); the first, third and fourth end as ddelta, du and y
  float *B, *C;                   // (kChunk, kStates)
  float* dt;                      // (kChunk, ranks)
  float* weights;                 // (ranks, kChannels)
  float* entries;                 // (kChunk / kEight, kChannels, kStates)
  float* sums;                    // (kWarps, kEight, 2 kStates)

  static VIM_INLINE size_t bytes(int64_t ranks) {
    const int64_t floats = 4 * kChunk * kChannels + 2 * kChunk * kStates + kChunk / kEight * kChannels * kStates +
                           kWarps * kEight * 2 * kStates + (kChunk + kChannels) * ranks;
    return static_cast<size_t>(floats) * sizeof(float);
  }

  VIM_DEVICE explicit Shared(int ranks) {
    delta = reinterpret_cast<float*>(shared_memory());
    slope = delta + kChunk * kChannels;
    u = slope + kChunk * kChannels;
    dy = u + kChunk * kChannels;
    B = dy + kChunk * kChannels;
    C = B + kChunk * kStates;
    entries = C + kChunk * kStates;
    sums = entries + kChunk / kEight * kChannels * kStates;
    dt = sums + kWarps * kEight * 2 * kStates;
    weights = dt + kChunk * ranks;
  }
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

// The sum over the lanes of a channel, in each of them
VIM_DEVICE float sum_channel(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Sums eight numbers over the eight channels of a warp: the lanes of channel k get the sum of the k-th.
VIM_DEVICE float sum_eight(const float (&x)[8], int channel) {
  float half[4], quarter[2];
  const bool upper = (channel & 4) != 0, middle = (channel & 2) != 0, low = (channel & 1) != 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    half[i] = (upper ? x[i + 4] : x[i]) + __shfl_xor_sync(kFullWarp, upper ? x[i] : x[i + 4], 4 * kLanes);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    quarter[i] =
        (middle ? half[i + 2] : half[i]) + __shfl_xor_sync(kFullWarp, middle ? half[i] : half[i + 2], 2 * kLanes);
  }
  return (low ? quarter[1] : quarter[0]) + __shfl_xor_sync(kFullWarp, low ? quarter[0] : quarter[1], kLanes);
}

template <class T>
struct Backward {
  const ScanBackwardPasses& passes;
  const Scan& scan;
  const ScanDirection& side;
  const int d, ranks;
  const Shared shared;
  int64_t b, block, first_channel, end_channel;
  // As a channel's lane
  int local, lane_state;  // channel within the block, first state of the lane
  float A[kOwn], g[kOwn], dA[kOwn];
  float D, dbias = 0, dD = 0;

  VIM_DEVICE Backward(const ScanBackwardPasses& passes_, int d_)
      : passes(passes_),
        scan(passes_.k.scan),
        side(passes_.k.scan.direction[d_]),
        d(d_),
        ranks(static_cast<int>(side.delta.data == nullptr ? scan.dt_rank : 0)),
        shared(ranks) {
    const ChannelBlocks blocks(scan, kChannels);
    block = blockIdx.x % blocks.count;
    b = blockIdx.x / blocks.count % scan.batch;
    first_channel = blocks.first(block, kChannels);
    end_channel = blocks.end(block, kChannels);
    local = static_cast<int>(threadIdx.x) / kLanes;
    lane_state = static_cast<int>(threadIdx.x) % kLanes * kOwn;
    const int64_t channel = existing(local);
    const float* dlast = passes.k.grads[d].dlast_state;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int n = lane_state + i;
      const bool real = n < scan.d_state;
      A[i] = real ? decay_rate(scan, side, channel, n) : 0.0f;
      g[i] = real && dlast != nullptr ? dlast[(b * scan.dim + channel) * scan.d_state + n] : 0.0f;
      dA[i] = 0.0f;
    }
    D = side.D == nullptr ? 0.0f : side.D[channel];
    for (int i = static_cast<int>(threadIdx.x); i < ranks * kChannels; i += kThreads) {
      shared.weights[i] = side.dt_weight[existing(i % kChannels) * ranks + i / kChannels];
    }
  }

  // Channels beyond the last compute what the last one does; nothing of it is used.
  VIM_DEVICE int64_t existing(int c) const { return smaller(first_channel + c, end_channel - 1); }
  VIM_DEVICE bool exists(int c) const { return first_channel + c < end_channel; }

  // ---- into shared memory

  VIM_DEVICE void load_rows(const Chunk& chunk) const {
    const int size = 2 * kStates + ranks;
    for (int i = static_cast<int>(threadIdx.x); i < kChunk * size; i += kThreads) {
      const int place = i / size, item = i % size, n = item % kStates;
      const bool inside = place < chunk.count;
      const int token = chunk.token(place);
      if (item < 2 * kStates) {
        const StateMap& map = item < kStates ? side.B : side.C;
        float* target = item < kStates ? shared.B : shared.C;
        target[place * kStates + n] =
            inside && n < scan.d_state ? read<T>(scan, map, b, token, first_channel, n) : 0.0f;
      } else {
        const int r = item - 2 * kStates;
        shared.dt[place * ranks + r] = inside ? read<T>(side.dt, b, token, r) : 0.0f;
      }
    }
  }

  VIM_DEVICE void load_channels(const Chunk& chunk) const {
    const int c = static_cast<int>(threadIdx.x) % kChannels;
    const int64_t channel = existing(c);
    const float bias = side.bias == nullptr ? 0.0f : side.bias[channel];
    for (int place = static_cast<int>(threadIdx.x) / kChannels; place < kChunk; place += kWarps) {
      float delta = 0.0f, slope = 0.0f, u = 0.0f, dy = 0.0f;
      if (place < chunk.count && exists(c)) {
        const int token = chunk.token(place);
        u = read<T>(side.u, b, token, channel);
        dy = scan.scale * read<T>(passes.k.dy, b, token, channel);
        if (scan.z.data != nullptr) dy *= silu(read<T>(scan.z, b, token, channel));
        delta = bias;
        if (side.delta.data != nullptr) delta += read<T>(side.delta, b, token, channel);
        for (int r = 0; r < ranks; ++r) {
          delta = fmaf(shared.dt[place * ranks + r], shared.weights[r * kChannels + c], delta);
        }
        slope = 1.0f;
        if (scan.softplus) delta = softplus(delta, &slope);
      }
      const int at = place * kChannels + c;
      shared.delta[at] = delta;
      shared.slope[at] = slope;
      shared.u[at] = u;
      shared.dy[at] = dy;
    }
  }

  // ---- through the states

  VIM_DEVICE float decay(float delta, int i) const { return exp2_approx(delta * (kLog2e * A[i])); }

  VIM_DEVICE float* entry_of(int eight) const {
    return shared.entries + (eight * kChannels + local) * kStates + lane_state;
  }

  // Leaves the state that each eight of tokens is entered in.
  VIM_DEVICE void run_through(const float* saved, int eights) const {
    float h[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int n = lane_state + i;
      h[i] = n < scan.d_state ? saved[n * scan.dim + existing(local)] : 0.0f;
    }
    for (int eight = 0; eight < eights; ++eight) {
      *reinterpret_cast<float4*>(entry_of(eight)) = {h[0], h[1], h[2], h[3]};
      if (eight + 1 == eights) break;
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        const int place = eight * kEight + j;
        const float delta = shared.delta[place * kChannels + local],
                    drive = delta * shared.u[place * kChannels + local];
        const Four B = load_four(shared.B + place * kStates + lane_state);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) h[i] = fmaf(decay(delta, i), h[i], drive * B.x[i]);
      }
    }
  }

  // Goes back through eight tokens.
  VIM_DEVICE void sweep(int eight, int count) {
    float h[kEight + 1][kOwn], e[kEight][kOwn];
    const Four entry = load_four(entry_of(eight));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) h[0][i] = entry.x[i];
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const int place = eight * kEight + j;
      const float delta = shared.delta[place * kChannels + local], drive = delta * shared.u[place * kChannels + local];
      const Four B = load_four(shared.B + place * kStates + lane_state);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        e[j][i] = decay(delta, i);
        h[j + 1][i] = fmaf(e[j][i], h[j][i], drive * B.x[i]);
      }
    }
    const int warp = static_cast<int>(threadIdx.x) / kWarp, channel = local % (kWarp / kLanes);
#pragma unroll
    for (int j = kEight - 1; j >= 0; --j) {
      const int place = eight * kEight + j, at = place * kChannels + local;
      const float delta = shared.delta[at], u = shared.u[at], dy = shared.dy[at];
      const Four B = load_four(shared.B + place * kStates + lane_state),
                 C = load_four(shared.C + place * kStates + lane_state);
      float maps[2 * kOwn], through_drive = 0.0f, through_decay = 0.0f, y = 0.0f;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float dh = fmaf(dy, C.x[i], g[i]);
        maps[i] = dh * delta * u;
        maps[kOwn + i] = dy * h[j + 1][i];
        y = fmaf(h[j + 1][i], C.x[i], y);
        through_drive = fmaf(dh, B.x[i], through_drive);
        g[i] = dh * e[j][i];
        const float dlog = g[i] * h[j][i];
        through_decay = fmaf(dlog, A[i], through_decay);
        dA[i] = fmaf(dlog, delta, dA[i]);
      }
      // Sum k is of dB (k < 4) or dC of the lane's state k % 4.
      float* sums = shared.sums + (warp * kEight + j) * 2 * kStates;
      sums[channel / kOwn * kStates + lane_state + channel % kOwn] = sum_eight(maps, channel);
      through_drive = sum_channel(through_drive);
      through_decay = sum_channel(through_decay);
      y = fmaf(D, u, sum_channel(y));
      const float ddelta = place < count ? fmaf(through_drive, u, through_decay) * shared.slope[at] : 0.0f;
      dbias += ddelta;
      dD = fmaf(dy, u, dD);
      // The four lanes have read what the first one now replaces.
      __syncwarp();
      if (lane_state == 0) {
        shared.delta[at] = ddelta;
        shared.u[at] = fmaf(through_drive, delta, D * dy);
        shared.dy[at] = y;
      }
    }
  }

  // ---- out of shared memory

  VIM_DEVICE void write_maps(const Chunk& chunk, int eight) const {
    for (int i = static_cast<int>(threadIdx.x); i < kEight * 2 * kStates; i += kThreads) {
      const int j = i / (2 * kStates), item = i % (2 * kStates), n = item % kStates, place = eight * kEight + j;
      if (place >= chunk.count || n >= scan.d_state) continue;
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[(warp * kEight + j) * 2 * kStates + item];
      map_row(passes, block, d, b, chunk.token(place))[item / kStates * scan.d_state + n] = sum;
    }
  }

  VIM_DEVICE void write_channels(const Chunk& chunk) const {
    const int c = static_cast<int>(threadIdx.x) % kChannels;
    if (!exists(c)) return;
    const int64_t channel = first_channel + c;
    const ScanDirectionGrads& grads = passes.k.grads[d];
    for (int place = static_cast<int>(threadIdx.x) / kChannels; place < chunk.count; place += kWarps) {
      const int token = chunk.token(place), at = place * kChannels + c;
      write<T>(grads.du, b, token, channel, shared.u[at]);
      if (side.delta.data != nullptr) {
        write<T>(grads.ddelta, b, token, channel, shared.delta[at]);
      } else {
        step_row(passes, d, b, token)[channel] = shared.delta[at];
      }
      if (scan.z.data != nullptr) {
        passes.sums[((d * scan.batch + b) * scan.length + token) * scan.dim + channel] = shared.dy[at];
      }
    }
  }

  VIM_DEVICE void write_weights() const {
    if (!exists(local)) return;
    const int64_t channel = first_channel + local;
    const WeightRows rows(scan);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (lane_state + i < scan.d_state) weight_row(passes, d, b, rows.A + lane_state + i)[channel] = dA[i];
    }
    if (lane_state != 0) return;
    weight_row(passes, d, b, rows.bias)[channel] = dbias;
    weight_row(passes, d, b, rows.D)[channel] = dD;
  }

  VIM_DEVICE void run() {
    const int every = static_cast<int>(scan.checkpoint_every), length = static_cast<int>(scan.length);
    const int saved = static_cast<int>(blocks_in(length, every));
    for (int i = 0; i < saved; ++i) {
      const int index = side.reverse ? i : saved - 1 - i, begin = index * every;
      const int end = static_cast<int>(smaller(begin + every, length));
      const Chunk chunk{side.reverse ? end - 1 : begin, side.reverse ? -1 : 1, end - begin};
      __syncthreads();  // what the chunk before has left is written, and the weights are there
      load_rows(chunk);
      __syncthreads();
      load_channels(chunk);
      __syncthreads();
      const int eights = (chunk.count + kEight - 1) / kEight;
      run_through(side.checkpoints + (b * saved + index) * scan.d_state * scan.dim, eights);
      for (int eight = eights - 1; eight >= 0; --eight) {
        sweep(eight, chunk.count);
        __syncthreads();
        write_maps(chunk, eight);
        __syncthreads();
      }
      write_channels(chunk);
    }
    write_weights();
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) scan_backward_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const int64_t per_direction = ChannelBlocks(passes.k.scan, kChannels).count * passes.k.scan.batch;
  Backward<T> backward(passes, static_cast<int>(blockIdx.x / per_direction));
  backward.run();
}

// dz, from y of all directions, and scale y silu(z) where the caller wants it
template <class T>
__global__ void __launch_bounds__(kThreads)
    scan_gate_backward_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
                size = scan.batch * scan.length * scan.dim;
  if (i >= size) return;
  const int64_t channel = i % scan.dim, token = i / scan.dim % scan.length, b = i / scan.dim / scan.length;
  float y = passes.sums[i];
  if (scan.directions == 2) y += passes.sums[size + i];
  const float dout = scan.scale * read<T>(passes.k.dy, b, token, channel), z = read<T>(scan.z, b, token, channel);
  write<T>(passes.k.dz, b, token, channel, dout * y * silu_slope(z));
  if (passes.k.y.data != nullptr) write<T>(passes.k.y, b, token, channel, scan.scale * y * silu(z));
}

}  // namespace

bool scan_backward_is_fast(const ScanBackward& k) {
  const Scan& scan = k.scan;
  bool fast = scan.d_state <= kStates && scan.checkpoint_every <= kChunk && scan.length < (1 << 30);
  for (int d = 0; d < scan.directions; ++d) {
    const ScanDirection& side = scan.direction[d];
    fast = fast && side.B.constant == nullptr && side.C.constant == nullptr &&
           (side.delta.data != nullptr || scan.dt_rank <= kMostRanks);
  }
  return fast;
}

void scan_fast_backward(const ScanBackwardPasses& passes, Stream stream) {
  const Scan& scan = passes.k.scan;
  const int64_t blocks = scan.directions * scan.batch * ChannelBlocks(scan, kChannels).count;
  const size_t shared = Shared::bytes(scan.direction[0].delta.data == nullptr ? scan.dt_rank : 0);
  const int64_t numbers = scan.batch * scan.length * scan.dim;
  with_element(scan.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(scan_backward_kernel<T>, {static_cast<unsigned>(blocks), kThreads, shared}, stream, passes);
    if (scan.z.data == nullptr) return;
    launch(scan_gate_backward_kernel<T>, {static_cast<unsigned>(blocks_in(numbers, kThreads)), kThreads, 0}, stream,
           passes);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
