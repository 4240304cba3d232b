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
  bool any = wanted == nullptr || *wanted == '\0';
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
