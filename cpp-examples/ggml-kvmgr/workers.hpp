// Threads that all run the same function: as many as the host was told to use.
#pragma once
#include <functional>

using Work = std::function<void(unsigned worker, unsigned num_workers)>;

void set_workers(unsigned count);
void run_workers(const Work &work);
