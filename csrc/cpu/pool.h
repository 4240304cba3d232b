// Threads that share out the tasks of a kernel. They know nothing of torch.
#pragma once

#include <cstdint>

namespace vim {

struct Job {
  bool (*run)(const void* context, int64_t begin, int64_t end);  // tasks [begin, end); false when memory runs out
  const void* context;
  int64_t tasks;
  int64_t grain;    // tasks that are worth handing out on their own
  int64_t useful;   // threads that are worth waking for it, the caller among them
  int64_t threads;  // threads that may take part, the caller among them
};

// Runs all tasks, each once; false where a part returned false. It may be called by several threads at once, by tasks
// (it runs in their thread then) and after a fork. Exits of the process do not wait for the pool's threads.
bool run_in_pool(const Job& job);

}  // namespace vim
