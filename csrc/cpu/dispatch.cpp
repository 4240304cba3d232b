// Picks the table of kernels for this processor, once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace vim {

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("VIM_CPU_CAPABILITY");
  const bool any = wanted == nullptr || std::strcmp(wanted, "avx512") == 0;
  if (avx512 && any) return kernels_avx512();
  if (avx2 && (any || std::strcmp(wanted, "avx2") == 0)) return kernels_avx2();
#endif
  return kernels_baseline();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace vim

// For people: which of the tables is in use.
extern "C" __attribute__((visibility("default"))) const char* vim_cpu_capability() { return vim::kernels().name; }

// For vim/ops/_packed_weights.py: a hash of one number of each row of a (rows, columns) matrix, in different columns.
// It touches a line of cache a row, a sixteenth of the matrix or less.
extern "C" __attribute__((visibility("default"))) uint64_t vim_fingerprint(const float* data, int64_t rows,
                                                                            int64_t columns) {
  uint64_t hash = 1469598103934665603u;
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t bits;
    std::memcpy(&bits, data + row * columns + row * 40503 % columns, sizeof bits);
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}
