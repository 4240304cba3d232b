// The table behind scan_tuning.h. A row holds from its number of channels per multiprocessor on, a channel being one of
// one batch element in one direction. The figures follow from the counts in docs/kernel_figures.md; scripts that
// measure on a GPU try others through vim_cuda_tune_scan.
#include "scan_math.h"
#include "scan_tuning.h"

namespace vim {
namespace VIM_ISA {

namespace {

struct Row {
  int64_t channels_per_multiprocessor;
  int channels, warps;
  bool chunks;  // whether a sequence may be cut
};

// Two channels a thread halve the reads of B and C, but leave half the threads. Chunks cost every exponential twice,
// which two of them do not win back.
constexpr Row kTable[] = {
    {0, 1, 1, true},
    {300, 1, 1, false},
    {720, 2, 1, false},
    {2880, 2, 2, false},
};
constexpr int64_t kShortestChunk = 128, kFewestChunks = 3;
constexpr int64_t kWarps = 12;  // of a multiprocessor: what VIM_FORWARD_THREADS leaves registers for

// The length of chunks whose blocks, of a warp for each direction, are on the GPU all at once; 0 for too few of them.
int64_t chunk_of(const Scan& scan) {
  const int64_t blocks = scan.batch * ChannelBlocks(scan, kWarp).count;
  const int64_t chunks = kWarps / scan.directions * multiprocessors() / larger(1, blocks);
  if (chunks < kFewestChunks) return 0;
  const int64_t chunk = larger(kShortestChunk, round_up(blocks_in(scan.length, chunks), 64));
  return blocks_in(scan.length, chunk) < kFewestChunks ? 0 : chunk;
}

// Blocks of the backward pass that a multiprocessor holds: registers and shared memory suffice for two of four warps.
constexpr int64_t kBackwardBlocks = 2;

ScanTuning chosen;
int64_t chosen_chunks = 0;

}  // namespace

ScanTuning scan_tuning(const Scan& scan) {
  const int64_t count = scan.directions * scan.batch * scan.dim, processors = multiprocessors();
  const Row* row = kTable;
  for (const Row& candidate : kTable) {
    if (count >= candidate.channels_per_multiprocessor * processors) row = &candidate;
  }
  ScanTuning tuning{row->channels, row->warps, row->chunks ? chunk_of(scan) : 0};
  if (chosen.channels != 0) tuning.channels = chosen.channels;
  if (chosen.warps != 0) tuning.warps = chosen.warps;
  if (chosen.chunk != 0) tuning.chunk = chosen.chunk < scan.length ? chosen.chunk : 0;
  return tuning;
}

int64_t backward_chunks_of_segment(const Scan& scan, int64_t blocks) {
  const int64_t all = larger(1, blocks_in(scan.length, larger(1, scan.checkpoint_every)));
  if (chosen_chunks != 0) return smaller(chosen_chunks, all);
  const int64_t segments = kBackwardBlocks * multiprocessors() / larger(1, scan.directions * scan.batch * blocks);
  return segments < 2 ? all : blocks_in(all, segments);
}

}  // namespace VIM_ISA
}  // namespace vim

// For measurements and tests: choices for every shape from now on. 0 leaves one to the table; returns 0 where a value
// is not one of those that exist.
extern "C" __attribute__((visibility("default"))) int vim_cuda_tune_scan(int channels, int warps, int64_t chunk) {
  const bool fits = channels >= 0 && channels <= 2 && (warps == 0 || warps == 1 || warps == 2 || warps == 4) &&
                    chunk >= 0 && chunk % 64 == 0;
  if (fits) vim::cuda::chosen = {channels, warps, chunk};
  return fits;
}

// Likewise for the backward pass: the chunks between saved states in a segment; 0 leaves it to the table.
extern "C" __attribute__((visibility("default"))) int vim_cuda_tune_backward(int64_t chunks) {
  if (chunks < 0) return 0;
  vim::cuda::chosen_chunks = chunks;
  return 1;
}
