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
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const char* wanted = std::getenv("VIM_CPU_CAPABILITY");
  // Whether a table is at most what is wanted, asked from the highest table down.
  bool any = wanted == nullptr;
  const auto allowed = [&](const char* name) { return any = any || std::strcmp(wanted, name) == 0; };
  if (allowed("avx512bf16") && avx512bf16) return kernels_avx512bf16();
  if (allowed("avx512") && avx512) return kernels_avx512();
  if (allowed("avx2") && avx2) return kernels_avx2();
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

// For vim/ops/_fingerprint.py: a hash of one number of each row of matrices of four-byte words, in different columns. It
// touches a line of cache a row, a sixteenth of a matrix or less.
struct Matrix {
  const uint32_t* data;
  int64_t rows, columns;
};

extern "C" __attribute__((visibility("default"))) uint64_t vim_fingerprint(const Matrix* matrices, int64_t count) {
  uint64_t hash = 1469598103934665603u;
  for (const Matrix* m = matrices; m != matrices + count; ++m) {
    const int64_t step = 40503 % m->columns;
    const uint32_t* row = m->data;
    for (int64_t i = 0, column = 0; i < m->rows; ++i, row += m->columns) {
      hash = (hash ^ row[column]) * 1099511628211u;
      column += step;
      if (column >= m->columns) column -= m->columns;
    }
  }
  return hash;
}
