#include "processors.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace vim {
namespace {

int64_t smaller_quota(int64_t a, int64_t b) { return a == 0 || b == 0 ? a + b : std::min(a, b); }

// Version 2 has "max 100000" or "150000 100000" in one file, version 1 quota and period in two; -1 says there is none.
int64_t quota_of_folder(const std::string& folder) {
  int64_t quota = 0, period = 0;
  if (!(std::ifstream(folder + "/cpu.max") >> quota >> period)) {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? (quota + period - 1) / period : 0;
}

// A group is bound by the quotas of those above it. Inside a container its path may start outside: folders that are not
// there have no quota.
int64_t quota_of_path(const std::string& mount, std::string path) {
  int64_t quota = quota_of_folder(mount);
  while (path.size() > 1) {
    quota = smaller_quota(quota, quota_of_folder(mount + path));
    path.resize(path.rfind('/'));
  }
  return quota;
}

int64_t processors_of_thread() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

}  // namespace

int64_t quota_of_groups(const std::string& membership, const std::string& mount) {
  int64_t quota = 0;
  std::ifstream lines(membership);
  for (std::string line; std::getline(lines, line);) {  // "4:cpu,cpuacct:/path", or "0::/path" for version 2
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos || line.compare(second + 1, 1, "/") != 0) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",",
                      path = line.substr(second + 1);
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    for (const char* folder : {unified ? "" : "/cpu", unified ? "/unified" : "/cpu,cpuacct"}) {
      quota = smaller_quota(quota, quota_of_path(mount + folder, path));
    }
  }
  return quota;
}

int64_t processors() {
  using Clock = std::chrono::steady_clock;
  static const int64_t quota = quota_of_groups("/proc/self/cgroup", "/sys/fs/cgroup");
  // Asking the system takes longer than some kernels.
  thread_local int64_t count = 0;
  thread_local Clock::time_point asked;
  const auto now = Clock::now();
  if (count == 0 || now - asked > std::chrono::milliseconds(10)) {
    count = smaller_quota(processors_of_thread(), quota);
    asked = now;
  }
  return count;
}

}  // namespace vim
