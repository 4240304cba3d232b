// The fast forward pass of a scan: up to 16 states, in registers from the first token to the last.
//
// A block computes a few channels of one batch element. Each direction has its own warps, and a thread owns one or two
// channels. The two directions start at opposite ends of the sequence. In its first half each writes its y (`partial`).
// In its second half it adds the y that the other direction has written, applies the gate and writes the result. This
// needs one launch, and neither a flip nor a pass to merge.
//
// Tokens are staged in tiles of eight, in a double buffer in shared memory. dt, B and C are converted to float32 there,
// once for all channels. The step sizes of four tokens are computed before their states, so that latencies overlap.
//
// Step sizes are kept in units of ln 2, so that a decay is 2^(step A) without a factor. States and the y of one
// direction are therefore too large by log2(e), and are scaled back when they are written.
//
// A long sequence of few channels is cut into chunks that run in parallel. A first kernel computes the final state of
// each chunk for a zero initial state, and the sum of its step sizes; the chunk's decay is exp(A sum). A second kernel
// turns these into the initial states of the chunks.
#pragma once

#include "projection.h"
#include "scan_forward.h"
#include "tiles.h"

namespace vim {
namespace VIM_ISA {

// A variant for measurements: the number of decays, out of sixteen per step, that are computed by polynomials. This
// moves work from the special function units to the multipliers.
#if !defined(VIM_POLYNOMIAL_DECAYS)
#define VIM_POLYNOMIAL_DECAYS 0
#endif

// Threads of a multiprocessor whose registers suffice for all of them. 384 leave 168 registers to a thread: six blocks
// of 64 threads, with a few numbers in local memory between tiles, none in the loops over tokens. A variant for
// measurements is 256: no local memory, but four blocks.
#if !defined(VIM_FORWARD_THREADS)
#define VIM_FORWARD_THREADS 384
#endif
static_assert(VIM_FORWARD_THREADS >= kMaxThreads, "a block must fit");

VIM_DEVICE float decay_of(float x, int n) { return n < VIM_POLYNOMIAL_DECAYS ? exp2_polynomial(x) : exp2_approx(x); }

// What the kernels are compiled for: kGiven where delta is an operand, otherwise the rank from which it is projected. 0
// is any rank; other ranks have kernels of their own, which need operands that are loaded in vectors (see
// `in_vectors`).
constexpr int kGiven = -1;

// Ranks from which on there are kernels whose tensor cores compute dt_proj, for two channels of a thread and weights in
// bfloat16
constexpr int kLargeRank = 32;

VIM_INLINE int weight_stride(const RowLayout& layout) { return (layout.padded / 4 | 1) * 4; }

// Bytes of shared memory of one direction, in order.
template <class T, int kRank>
struct SharedLayout {
  int u, z, delta, partial, raw, rows, weights, total;

  VIM_INLINE SharedLayout(const Scan& scan, int columns, const RowLayout& layout) {
    const int tile = kTile * columns * static_cast<int>(sizeof(T));
    u = 0;
    z = u + 2 * tile;
    delta = z + (scan.z.data != nullptr ? 2 * tile : 0);
    partial = delta + (scan.direction[0].delta.data != nullptr ? 2 * tile : 0);
    raw = partial + (scan.directions == 2 ? 2 * kTile * columns * 4 : 0);
    rows = raw + 2 * kTile * layout.size() * static_cast<int>(sizeof(T));
    weights = rows + (sizeof(T) == 4 ? 0 : kTile * layout.size() * 4);
    total = weights;
    if constexpr (kRank == 0) total += columns * weight_stride(layout) * 4;
    if constexpr (kRank >= kLargeRank) total += columns / Projection<kRank>::kChannels * Projection<kRank>::kBytes;
  }
};

enum class Phase {
  partial,  // y of one direction, for the other one to add
  merge,    // add the y that the other direction has written
  alone,    // y of the only direction
  ends,     // no y: the state at the end and the sum of step sizes
};

// ---- a thread's walk -------------------------------------------------------------------------------------------

template <class T, int kChannels, int kRank>
struct Walk {
  static constexpr int kRow = TileLayout<kChannels>::kRow;
  static constexpr bool kVectors = kRank > 0, kLarge = kRank >= kLargeRank, kInRegisters = kVectors && !kLarge;

  const ForwardPlan& plan;
  const Scan& scan;
  const ScanDirection& side;
  const int d;
  Walkers walkers;
  const RowLayout layout;
  const int columns;
  int chunk, channel;  // of the sequence; of this thread, the first one
  int live;            // of its channels: all or none
  int own;             // offset of its values in a row of a tile
  T *u, *z, *delta, *raw;
  float *partial, *rows, *weights;
  T* y_at;  // its channels of the next token in the walk
  float* partial_at;
  int token_at;   // that token
  int direction;  // 1 or -1
  int64_t y_step, partial_step;

  float A[kChannels][kStates], h[kChannels][kStates];
  float dt_weight[kChannels][kInRegisters ? kRank : 1];
  Projection<kLarge ? kRank : 16> projection;
  float bias[kChannels], D[kChannels], time[kChannels];

  VIM_DEVICE Walk(const ForwardPlan& plan_, int d_)
      : plan(plan_),
        scan(plan_.scan),
        side(plan_.scan.direction[d_]),
        d(d_),
        layout(kRank == kGiven ? 0
               : kRank > 0     ? kRank
                               : plan_.scan.dt_rank),
        columns(static_cast<int>(blockDim.x) * kChannels) {
    const int index = static_cast<int>(blockIdx.x), block = index % plan.blocks, segment = block / plan.per_segment;
    walkers.thread = static_cast<int>(threadIdx.x);
    walkers.threads = static_cast<int>(blockDim.x);
    walkers.group = d;
    chunk = index / plan.blocks % plan.chunks;
    walkers.b = index / plan.blocks / plan.chunks;
    walkers.channel = segment * plan.segment + block % plan.per_segment * columns;
    walkers.end = static_cast<int>(smaller(walkers.channel + columns, (segment + 1) * plan.segment));
    walkers.length = static_cast<int>(scan.length);
    channel = walkers.channel + walkers.thread * kChannels;
    live = channel < walkers.end ? kChannels : 0;
    own = TileLayout<kChannels>::own(walkers.thread);
    place_shared();
    load_weights();
  }

  VIM_DEVICE void place_shared() {
    const SharedLayout<T, kRank> at(scan, columns, layout);
    char* memory = shared_memory() + d * at.total;
    u = reinterpret_cast<T*>(memory + at.u);
    z = reinterpret_cast<T*>(memory + at.z);
    delta = reinterpret_cast<T*>(memory + at.delta);
    partial = reinterpret_cast<float*>(memory + at.partial);
    raw = reinterpret_cast<T*>(memory + at.raw);
    rows = reinterpret_cast<float*>(memory + at.rows);
    weights = reinterpret_cast<float*>(memory + at.weights);
    if constexpr (kLarge) {
      const int warp = walkers.thread / kWarp;
      projection = {memory + at.weights + warp * projection.kBytes, walkers.thread % kWarp};
    }
  }

  // Channels beyond the last compute what the last one does, and write nothing.
  VIM_DEVICE int existing(int c) const { return channel + c < walkers.end ? channel + c : walkers.end - 1; }

  VIM_DEVICE void load_weights() {
    if constexpr (kLarge) {
      const bfloat16* projected = static_cast<const bfloat16*>(side.dt_weight.data);
      projection.load(projected, channel - walkers.thread % kWarp * kChannels, walkers.end);
      load_weights(static_cast<const bfloat16*>(side.A.data));
    } else {
      with_elements(side.A, [&](const auto* rates) { load_weights(rates); });
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        if (scan.A_is_log) A[c][n] = n < scan.d_state ? -expf(A[c][n]) : 0.0f;
      }
      if constexpr (kInRegisters) {
#pragma unroll
        for (int r = 0; r < kRank; ++r) dt_weight[c][r] *= kLog2e;
      }
      time[c] = 0.0f;
    }
  }

  // All loads come before the first exponential, so that they are on their way together.
  template <class W>
  VIM_DEVICE void load_weights(const W* rates) {
    const bool vectors = kVectors || plan.vectors[d].weights;
    const W *projected = elements_like(rates, side.dt_weight), *biases = elements_like(rates, side.bias),
            *skips = elements_like(rates, side.D);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t at = existing(c);
      load_row(rates + at * scan.d_state, scan.d_state, vectors, A[c]);
      bias[c] = kLog2e * read_or_zero(biases, at);
      D[c] = kLog2e * read_or_zero(skips, at);
      if constexpr (kInRegisters) load_row(projected + at * kRank, kRank, vectors, dt_weight[c]);
      if constexpr (kRank == 0) {
        for (int r = 0; r < layout.padded; ++r) {
          weight_row(c)[r] = r < layout.ranks ? kLog2e * to_float(projected[at * layout.ranks + r]) : 0.0f;
        }
      }
    }
  }

  // For a generic rank the weights of a thread's channels are in shared memory; other threads do not read them.
  VIM_DEVICE float* weight_row(int c) const {
    return weights + (c * walkers.threads + walkers.thread) * weight_stride(layout);
  }

  // (states, channels): the state in which the chunk is entered, or what scan_ends_kernel leaves there.
  VIM_DEVICE float* entry() const {
    return plan.entries + ((d * scan.batch + walkers.b) * plan.chunks + chunk) * kStates * scan.dim;
  }

  VIM_DEVICE void enter(const float* entered) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int at = existing(c);
#pragma unroll
      for (int n = 0; n < kStates; ++n) h[c][n] = entered == nullptr ? 0.0f : entered[n * scan.dim + at];
    }
  }

  // ---- tiles

  // The rows of a tile that has arrived, in float32.
  VIM_DEVICE const float* widened(int tile) const {
    const T* source = raw + tile % 2 * kTile * layout.size();
    if constexpr (sizeof(T) == 4) {
      return source;
    } else if constexpr (kLarge) {
      projection.project(source, layout.size());
      for (int i = 4 * walkers.thread; i < kTile * 2 * kStates; i += 4 * walkers.threads) {
        const T* maps = source + i / (2 * kStates) * layout.size() + kRank;
        *reinterpret_cast<float4*>(rows + i) = widen(maps + i % (2 * kStates));
      }
      walkers.sync();
      return rows;
    } else {
      for (int i = 4 * walkers.thread; i < kTile * layout.size(); i += 4 * walkers.threads) {
        *reinterpret_cast<float4*>(rows + i) = widen(source + i);
      }
      walkers.sync();
      return rows;
    }
  }

  VIM_DEVICE auto row_stream(const Range& range) const {
    if constexpr (kVectors) {
      return WholeRowStream<T, kRank>(walkers, side, range);
    } else {
      return RowStream<T, kRank>(walkers, scan, side, layout, plan.vectors[d].rows, range);
    }
  }

  template <Phase kPhase>
  VIM_DEVICE void walk(const Range& range) {
    constexpr bool kGated = kPhase == Phase::merge || kPhase == Phase::alone;
    const bool gated = kGated && (kVectors || scan.z.data != nullptr);
    TileStream<T, kChannels> inputs(walkers, side.u, kVectors || plan.vectors[d].u, range);
    TileStream<T, kChannels> deltas(walkers, side.delta, kRank == kGiven && plan.vectors[d].delta, range);
    TileStream<T, kChannels> gates(walkers, scan.z, gated && (kVectors || plan.vector_z), range);
    TileStream<float, kChannels> partials(walkers, plan.partial,
                                          kPhase == Phase::merge && (kVectors || plan.vector_partial), range);
    auto maps = row_stream(range);
    const auto stage = [&](int tile) {  // called in one place, so that the streams can live in registers
      const int place = tile * kTile, at = tile % 2 * kTile * columns;
      inputs.stage(place, u + at);
      if constexpr (kRank == kGiven) deltas.stage(place, delta + at);
      if (gated) gates.stage(place, z + at);
      if constexpr (kPhase == Phase::merge) partials.stage(place, partial + at);
      maps.stage(place, raw + tile % 2 * kTile * layout.size());
      commit_copies();
    };

    const int units = range.units(), tiles = (units + 1) / 2;
    int save_at = kPhase == Phase::ends || side.checkpoints == nullptr ? units : first_save(range);
    token_at = range.token(0);
    direction = range.reverse ? -1 : 1;
    y_step = direction * scan.y.token;
    partial_step = direction * plan.partial.token;
    y_at = static_cast<T*>(scan.y.data) + walkers.b * scan.y.batch + token_at * scan.y.token + channel * scan.y.channel;
    partial_at = static_cast<float*>(plan.partial.data) + walkers.b * plan.partial.batch +
                 token_at * plan.partial.token + channel;
    for (int arriving = 0; arriving <= tiles; ++arriving) {
      wait_copies<0>();
      walkers.sync();
      if (arriving < tiles) stage(arriving);
      const int tile = arriving - 1;
      if (tile < 0) continue;
      const float* tile_rows = widened(tile);
      const int end = static_cast<int>(smaller(2 * tile + 2, units)), buffer = tile % 2 * kTile * columns;
      int unit = 2 * tile, at = buffer + own, row_at = 0;
      while (unit < end) {
        if (kPhase != Phase::ends && unit == save_at) save_at += save(range.token(unit * kUnit));
        const int stop = save_at < end ? save_at : end;
#pragma unroll 1
        for (; unit < stop; ++unit, at += kUnit * kRow, row_at += kUnit * row_size()) {
          step<kPhase>(at, tile_rows + row_at);
        }
      }
    }
    walkers.sync();
  }

  // ---- saved states

  // Units from the start of a range to where the first state is to be saved.
  VIM_DEVICE int first_save(const Range& range) const {
    const int every = static_cast<int>(scan.checkpoint_every);
    if (!range.reverse) return (every - range.bottom % every) % every / kUnit;
    return range.top >= walkers.length ? 0 : range.top % every / kUnit;
  }

  // Saves the state in which a chunk is entered at this token; returns the units to the next one.
  VIM_DEVICE int save(int token) const {
    const int every = static_cast<int>(scan.checkpoint_every);
    const int64_t saved = blocks_in(scan.length, every);
    float* target = side.checkpoints + (walkers.b * saved + token / every) * scan.d_state * scan.dim + channel;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (n < scan.d_state && c < live) target[n * scan.dim + c] = kLn2 * h[c][n];
      }
    }
    return side.reverse ? (token / kUnit + 1) - token / every * (every / kUnit) : every / kUnit;
  }

  // ---- steps

  VIM_DEVICE int row_size() const {
    return kRank == kGiven || kLarge ? 2 * kStates : kRank > 0 ? (kRank + 3) / 4 * 4 + 2 * kStates : layout.size();
  }

  // Step sizes of four tokens
  VIM_DEVICE void step_sizes(const float* unit_rows, int at, float (&steps)[kUnit][kChannels]) const {
    const int size = row_size();
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if constexpr (kRank == kGiven) load_channels<kChannels>(delta + at + j * kRow, steps[j]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) steps[j][c] = kRank == kGiven ? fmaf(steps[j][c], kLog2e, bias[c]) : bias[c];
    }
    if constexpr (kLarge) {
      const int first = static_cast<int>(unit_rows - rows) / (2 * kStates);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        float projected[kChannels];
        projection.read(first + j, projected);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) steps[j][c] = fmaf(projected[c], kLog2e, steps[j][c]);
      }
    }
    if constexpr (kInRegisters) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
#pragma unroll
        for (int r = 0; r < kRank; r += 4) {
          const float4 dt = *reinterpret_cast<const float4*>(unit_rows + j * size + r);
          const float values[4] = {dt.x, dt.y, dt.z, dt.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
              if (r + i < kRank) steps[j][c] = fmaf(values[i], dt_weight[c][r + i], steps[j][c]);
            }
          }
        }
      }
    }
    if constexpr (kRank == 0) {
#pragma unroll 2
      for (int r = 0; r < layout.padded; r += 4) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const float4 w = *reinterpret_cast<const float4*>(weight_row(c) + r);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) {
            const float4 dt = *reinterpret_cast<const float4*>(unit_rows + j * size + r);
            steps[j][c] = fmaf(dt.x, w.x, fmaf(dt.y, w.y, fmaf(dt.z, w.z, fmaf(dt.w, w.w, steps[j][c]))));
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (kRank != kGiven || scan.softplus) steps[j][c] = softplus2(steps[j][c]);
      }
    }
  }

  // Four tokens, whose numbers of this thread start at `at` in a tile
  template <Phase kPhase>
  VIM_DEVICE void step(int at, const float* unit_rows) {
    const int size = row_size(), padded = size - 2 * kStates;
    float steps[kUnit][kChannels];
    step_sizes(unit_rows, at, steps);
    // Past the end of the sequence a state stays as it is: it may be asked for.
    if constexpr (kPhase == Phase::alone) {
#pragma unroll
      for (int j = 1; j < kUnit; ++j) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          steps[j][c] = token_at + direction * j < walkers.length ? steps[j][c] : 0.0f;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      float input[kChannels], y[kChannels] = {};
      load_channels<kChannels>(u + at + j * kRow, input);
      if constexpr (kPhase == Phase::merge) load_channels<kChannels>(partial + at + j * kRow, y);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        y[c] = fmaf(D[c], input[c], y[c]);
        input[c] *= steps[j][c];
        if constexpr (kPhase == Phase::ends) time[c] += steps[j][c];
      }
      const float4* row = reinterpret_cast<const float4*>(unit_rows + j * size + padded);
#pragma unroll
      for (int four = 0; four < kStates / 4; ++four) {
        const float4 B4 = row[four], C4 = kPhase == Phase::ends ? B4 : row[kStates / 4 + four];
        const float B[4] = {B4.x, B4.y, B4.z, B4.w}, C[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 4 * four + i;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            h[c][n] = fmaf(decay_of(steps[j][c] * A[c][n], n), h[c][n], input[c] * B[i]);
            if constexpr (kPhase != Phase::ends) y[c] = fmaf(h[c][n], C[i], y[c]);
          }
        }
      }
      if constexpr (kPhase != Phase::ends) finish<kPhase>(at + j * kRow, y);
    }
  }

  // Writes y of a token and goes on to the next.
  template <Phase kPhase>
  VIM_DEVICE void finish(int at, float (&y)[kChannels]) {
    const bool exists = live != 0 && token_at < walkers.length;
    token_at += direction;
    if constexpr (kPhase == Phase::partial) {
      if (exists) store_channels<kChannels>(partial_at, y);
      partial_at += partial_step;
    } else {
      if (kPhase == Phase::merge || scan.z.data != nullptr) {
        float gate[kChannels];
        load_channels<kChannels>(z + at, gate);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) y[c] *= scaled_silu(gate[c], plan.inverse_scale);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) y[c] *= kLn2 * scan.scale;
      }
      if (exists) store_channels<kChannels>(y_at, y);
      y_at += y_step;
    }
  }
};

VIM_DEVICE Range chunk_of(const ForwardPlan& plan, int chunk, bool reverse) {
  const int end = static_cast<int>(round_up(plan.scan.length, kUnit));
  return {chunk * plan.chunk, static_cast<int>(smaller(int64_t{chunk + 1} * plan.chunk, end)), reverse};
}

template <class T, int kChannels, int kRank>
__global__ void __launch_bounds__(VIM_FORWARD_THREADS) scan_forward_kernel(const __grid_constant__ ForwardPlan plan) {
  Walk<T, kChannels, kRank> walk(plan, static_cast<int>(threadIdx.y));
  const ScanDirection& side = walk.side;
  const Range range = chunk_of(plan, walk.chunk, side.reverse);
  walk.enter(plan.entries == nullptr ? nullptr : walk.entry());
  if constexpr (kRank == kGiven) {
    walk.template walk<Phase::alone>(range);
    if (side.last_state != nullptr && walk.chunk == (side.reverse ? 0 : plan.chunks - 1)) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c >= walk.live) break;
        float* target = side.last_state + (walk.walkers.b * plan.scan.dim + walk.channel + c) * plan.scan.d_state;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
          if (n < plan.scan.d_state) target[n] = kLn2 * walk.h[c][n];
        }
      }
    }
  } else {
    const int middle = range.bottom + range.units() / 2 * kUnit;
    const bool reverse = side.reverse;
    // Choose between numbers, not between ranges, which the compiler would put into local memory.
    walk.template walk<Phase::partial>({reverse ? middle : range.bottom, reverse ? range.top : middle, reverse});
    __syncthreads();
    walk.template walk<Phase::merge>({reverse ? range.bottom : middle, reverse ? middle : range.top, reverse});
  }
}

// ---- chunks ----------------------------------------------------------------------------------------------------

constexpr int kEndsThreads = 2 * kWarp;  // of a direction

template <class T, int kRank>
__global__ void __launch_bounds__((kRank == kGiven ? 1 : 2) * kEndsThreads)
    scan_ends_kernel(const __grid_constant__ ForwardPlan plan) {
  Walk<T, 1, kRank> walk(plan, static_cast<int>(threadIdx.y));
  walk.enter(nullptr);
  walk.template walk<Phase::ends>(chunk_of(plan, walk.chunk, walk.side.reverse));
  if (walk.live == 0) return;
  const int64_t index = (walk.d * plan.scan.batch + walk.walkers.b) * plan.chunks + walk.chunk;
  plan.times[index * plan.scan.dim + walk.channel] = walk.time[0];
  float* left = walk.entry() + walk.channel;
#pragma unroll
  for (int n = 0; n < kStates; ++n) left[n * plan.scan.dim] = walk.h[0][n];
}

// ---- host ------------------------------------------------------------------------------------------------------

template <class T, int kChannels, int kRank>
Geometry geometry_of(const ForwardPlan& plan, int threads) {
  const Scan& scan = plan.scan;
  const RowLayout layout(kRank == kGiven ? 0 : scan.dt_rank);
  return {static_cast<unsigned>(scan.batch * plan.chunks * plan.blocks),
          dim3(static_cast<unsigned>(threads), static_cast<unsigned>(scan.directions)),
          static_cast<size_t>(scan.directions * SharedLayout<T, kRank>(scan, threads * kChannels, layout).total)};
}

// The plan for blocks of so many channels.
inline ForwardPlan in_blocks(ForwardPlan plan, int columns) {
  const ChannelBlocks blocks(plan.scan, columns);
  plan.segment = static_cast<int>(blocks.segment);
  plan.per_segment = static_cast<int>(blocks.per_segment);
  plan.blocks = static_cast<int>(blocks.count);
  return plan;
}

template <class T, int kChannels, int kRank>
void run_walks(const ForwardPlan& plan, const ScanTuning& tuning, Stream stream) {
  int threads = tuning.warps * kWarp;
  while (threads > kWarp && geometry_of<T, kChannels, kRank>(plan, threads).shared_bytes > kMostSharedBytes)
    threads /= 2;
  const ForwardPlan cut = in_blocks(plan, threads * kChannels);
  launch(scan_forward_kernel<T, kChannels, kRank>, geometry_of<T, kChannels, kRank>(cut, threads), stream, cut);
}

// Whether dt, B and C of a token are one row in memory.
inline bool side_by_side(const Scan& scan, const ScanDirection& side) {
  const int64_t element = scan.row_element == Element::float32 ? 4 : 2;
  const auto follows = [&](const void* b, const void* a, int64_t count) {
    return static_cast<const char*>(b) == static_cast<const char*>(a) + count * element;
  };
  return side.dt.batch == side.B.batch && side.B.batch == side.C.batch && side.B.channels_per_group == scan.dim &&
         side.C.channels_per_group == scan.dim && follows(side.B.data, side.dt.data, scan.dt_rank) &&
         follows(side.C.data, side.B.data, scan.d_state);
}

// Whether everything of both directions can be loaded in vectors, as kernels for a rank need it.
inline bool in_vectors(const ForwardPlan& plan) {
  bool fits = plan.scan.directions == 2 && plan.scan.z.data != nullptr && plan.vector_z && plan.vector_partial;
  for (int d = 0; d < 2; ++d) {
    const Vectors& v = plan.vectors[d];
    fits = fits && v.u && v.rows && v.weights && side_by_side(plan.scan, plan.scan.direction[d]);
  }
  return fits;
}

// Whether two channels of a thread can be written at once.
inline bool in_pairs(const ForwardPlan& plan, int64_t element) {
  return ChannelBlocks(plan.scan, 1).segment % 2 == 0 && aligned(plan.scan.y, element, 2 * element) &&
         aligned(plan.partial, 4, 8);
}

template <class T, int kRank>
void run_ends(const ForwardPlan& plan, Stream stream) {
  const ForwardPlan cut = in_blocks(plan, kEndsThreads);
  launch(scan_ends_kernel<T, kRank>, geometry_of<T, 1, kRank>(cut, kEndsThreads), stream, cut);
}

}  // namespace VIM_ISA
}  // namespace vim
