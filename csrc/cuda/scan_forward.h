// How a fast forward pass is cut, and the kernels for each element type.
#pragma once

#include "scan_math.h"
#include "scan_tuning.h"

namespace vim {
namespace VIM_ISA {

constexpr int kMostRanks = 64;
constexpr int kMaxThreads = 256;
constexpr size_t kMostSharedBytes = 96 * 1024;  // what every GPU from sm_80 on has for one block

// Operands that may be copied 16 bytes (rows: four numbers) at a time; weights are A and dt_weight.
struct Vectors {
  bool u, delta, rows, weights;
};

struct ForwardPlan {
  Scan scan;
  Activation partial;         // float, (batch, token, channel)
  float* entries = nullptr;   // (directions, batch, chunks, kStates, dim)
  float* times = nullptr;     // (directions, batch, chunks, dim): sums of step sizes
  float inverse_scale = 1;    // of what takes y of the walks to the result
  int chunk = 0, chunks = 1;  // tokens of a chunk
  // Blocks of channels, and those of a segment, which no block goes beyond: see ChannelBlocks.
  int segment = 0, per_segment = 1, blocks = 0;
  Vectors vectors[2] = {};
  bool vector_z = false, vector_partial = false;
};

// Runs the walks with the choice that is nearest to `tuning` among the kernels that exist.
void run_walks(const ForwardPlan& plan, const ScanTuning& tuning, Stream stream, float*);
void run_walks(const ForwardPlan& plan, const ScanTuning& tuning, Stream stream, bfloat16*);
void run_walks(const ForwardPlan& plan, const ScanTuning& tuning, Stream stream, float16*);

// Fills the states that chunks end in, and the sums of their step sizes.
void run_ends(const ForwardPlan& plan, Stream stream, float*);
void run_ends(const ForwardPlan& plan, Stream stream, bfloat16*);
void run_ends(const ForwardPlan& plan, Stream stream, float16*);

}  // namespace VIM_ISA
}  // namespace vim
