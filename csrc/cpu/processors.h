// How many processors there are for the thread that asks.
#pragma once

#include <cstdint>
#include <string>

namespace vim {

// Those that this thread may run on, asked for again every 10 ms, and no more than the container's quota of time
// allows, which is read once.
int64_t processors();

// The quota of the groups that `membership` (/proc/self/cgroup) names, in processors, rounded up; 0 where there is
// none. `mount` is where they are: version 2 in itself or in "unified", version 1 in "cpu" or "cpu,cpuacct".
int64_t quota_of_groups(const std::string& membership, const std::string& mount);

}  // namespace vim
