// Tasks shared out among threads: the one place where kernels meet the pool and torch's number of threads.
#pragma once

#include <algorithm>

#include "../common/binding.h"
#include "kernels.h"
#include "pool.h"
#include "processors.h"

namespace vim {

// Runs function(begin, end) over the tasks; `work` is the number of channel-steps in all of them. Small work stays on
// the calling thread, and there are never more threads than torch is set to or processors for them.
template <class Function>
void parallel(int64_t tasks, int64_t work, const Function& function) {
  constexpr int64_t kWorkPerThread = 2048, kWorkPerPart = 512;
  if (tasks == 0) return;
  Job job;
  job.run = [](const void* context, int64_t begin, int64_t end) {
    return static_cast<bool>((*static_cast<const Function*>(context))(begin, end));
  };
  job.context = &function;
  job.tasks = tasks;
  const double per_task = std::max(1.0, static_cast<double>(work) / static_cast<double>(tasks));
  job.grain = std::max<int64_t>(1, static_cast<int64_t>(kWorkPerPart / per_task));
  job.useful = std::min(tasks, (work - 1) / kWorkPerThread + 1);
  job.threads = job.useful > 1 ? std::min<int64_t>(torch::stable::get_num_threads(), processors()) : 1;
  STD_TORCH_CHECK(run_in_pool(job), "vim: not enough memory");
}

}  // namespace vim
