// Tasks in torch's pool of threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "../common/binding.h"
#include "kernels.h"

namespace vim {

// Runs function(begin, end) over the tasks in torch's pool; `work` is the number of channel-steps in all of them. Small
// work stays on the calling thread.
template <class Function>
void parallel(int64_t tasks, int64_t work, const Function& function) {
  constexpr int64_t kWorkPerThread = 16384;
  if (tasks == 0) return;
  const double per_task = std::max(1.0, static_cast<double>(work) / static_cast<double>(tasks));
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kWorkPerThread / per_task));
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    if (!function(begin, end)) ok = false;
  });
  STD_TORCH_CHECK(ok.load(), "vim: not enough memory");
}

}  // namespace vim
