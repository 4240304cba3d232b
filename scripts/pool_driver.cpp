// Puts the pool of threads under stress without torch, for scripts/sanitize.sh: every task runs once, whoever calls,
// from within tasks too, and whatever the numbers of threads and tasks. Then quotas of containers, read from made-up
// folders.
#include <stdlib.h>
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/pool.h"
#include "../csrc/cpu/processors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace vim;

namespace {

std::atomic<int> failures{0}, parts_of_workers{0};

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

template <class Function>
bool run(int64_t tasks, int64_t grain, int64_t useful, int64_t threads, const Function& function) {
  return run_in_pool({[](const void* context, int64_t begin, int64_t end) {
                        return (*static_cast<const Function*>(context))(begin, end);
                      },
                      &function, tasks, grain, useful, threads});
}

// Plain numbers, so that ThreadSanitizer sees whether the caller may read what others have written.
void check_job(int64_t tasks, int64_t grain, int64_t useful, int64_t threads, int64_t failing) {
  std::vector<int> times(static_cast<size_t>(tasks));
  const auto caller = std::this_thread::get_id();
  const bool ok = run(tasks, grain, useful, threads, [&](int64_t begin, int64_t end) {
    parts_of_workers += std::this_thread::get_id() != caller;
    for (int64_t i = begin; i < end; ++i) {
      ++times[static_cast<size_t>(i)];
      if (i % 97 == 0) {
        int inner[3] = {};
        run(3, 1, threads, threads, [&](int64_t first, int64_t last) {
          for (int64_t k = first; k < last; ++k) ++inner[k];
          return true;
        });
        times[static_cast<size_t>(i)] += 10 * inner[0] * inner[1] * inner[2];
      }
    }
    return failing < begin || failing >= end;
  });
  expect(ok == (failing < 0 || failing >= tasks), "a part's failure is the job's");
  bool once = true;
  for (int64_t i = 0; i < tasks; ++i) once = once && times[static_cast<size_t>(i)] == (i % 97 == 0 ? 11 : 1);
  expect(once, "a task ran never or twice");
}

void call_often(unsigned seed, int jobs) {
  const auto random = [&](unsigned most) {
    return static_cast<int64_t>((seed = seed * 1664525u + 1013904223u) >> 8) % most;
  };
  for (int i = 0; i < jobs; ++i) {
    const int64_t threads = 1 + random(7), tasks = random(4) == 0 ? random(5000) : random(20);
    check_job(tasks, 1 + random(3), 1 + random(8), threads, random(5) == 0 ? random(20) : -1);
    if (random(64) == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));  // workers fall asleep
  }
}

void check_floating_point_mode() {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  for (const bool flushes : {true, false}) {
    _MM_SET_FLUSH_ZERO_MODE(flushes ? _MM_FLUSH_ZERO_ON : _MM_FLUSH_ZERO_OFF);
    std::atomic<int> wrong{0};
    run(4000, 1, 4, 4, [&](int64_t begin, int64_t end) {
      volatile float tiny = 1e-30f;
      for (int64_t i = begin; i < end; ++i) wrong += (tiny * 1e-10f == 0.0f) != flushes;
      return true;
    });
    expect(wrong == 0, "a worker treats denormals as its caller does not");
  }
  expect(((_mm_getcsr() ^ before) & ~0x3fu) == 0, "a job changed the caller's floating point mode");
#endif
}

void check_quotas() {
  char folder[] = "/tmp/pool_driver.XXXXXX";
  if (mkdtemp(folder) == nullptr) return expect(false, "no temporary folder");
  const std::string root = folder, membership = root + "/membership";
  const auto write = [&](const std::string& path, const char* text) { std::ofstream(root + path) << text; };
  for (const char* path : {"/a", "/a/b", "/cpu", "/cpu/inner"}) mkdir((root + path).c_str(), 0700);
  const auto quota = [&](const char* text) {
    write("/membership", text);
    return quota_of_groups(membership, root);
  };
  write("/a/cpu.max", "max 100000\n");
  write("/a/b/cpu.max", "250000 100000\n");
  expect(quota("0::/a\n") == 0, "no quota");
  expect(quota("0::/a/b\n") == 3, "a quota is rounded up");
  write("/a/cpu.max", "100000 100000\n");
  expect(quota("0::/a/b\n") == 1, "the group above has the smaller quota");
  write("/cpu/cpu.cfs_quota_us", "-1\n");
  write("/cpu/cpu.cfs_period_us", "100000\n");
  write("/cpu/inner/cpu.cfs_quota_us", "150000\n");
  write("/cpu/inner/cpu.cfs_period_us", "100000\n");
  expect(quota("3:cpuset:/inner\n2:cpuacct,cpu:/inner\n") == 2, "version 1");
  expect(quota("2:cpu:/outside/of/the/container\n") == 0, "version 1 without a quota");
  expect(quota("2:cpu:/outside\n0::/outside\n") == 0 && quota("") == 0 && quota("nonsense\n:\n") == 0,
         "nothing to read");
  write("/cpu/cpu.cfs_quota_us", "50000\n");
  expect(quota("2:cpu:/outside/of/the/container\n") == 1, "the container's own folder");
  for (const char* path :
       {"/a/cpu.max", "/a/b/cpu.max", "/cpu/cpu.cfs_quota_us", "/cpu/cpu.cfs_period_us", "/cpu/inner/cpu.cfs_quota_us",
        "/cpu/inner/cpu.cfs_period_us", "/membership", "/a/b", "/a", "/cpu/inner", "/cpu", ""}) {
    std::remove((root + path).c_str());
  }
}

}  // namespace

int main() {
  expect(processors() >= 1, "there are processors");
  call_often(1, 2000);
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 20; ++i) callers.emplace_back(call_often, i, 1000);  // more than jobs have room
  for (std::thread& caller : callers) caller.join();
  expect(parts_of_workers > 1000, "the caller did everything");
  check_floating_point_mode();
  check_quotas();
  std::printf("pool: %d failures\n", failures.load());
  return failures != 0;
}
