#include "team.hpp"

#include <omp.h>

#include "layer.hpp"

Team::Team() : threads(unsigned(omp_get_max_threads())) { succeeded(kvmgr_meeting_create(&meeting), "threads"); }

Team::~Team() { kvmgr_meeting_destroy(meeting); }

// The CPU backend of ggml uses OpenMP too. Its threads spin for a while when they have nothing to do;
// here they do our work instead of standing in the way of other threads that do.
void Team::run(const Work &work) const {
#pragma omp parallel num_threads(int(threads))
    work(unsigned(omp_get_thread_num()), unsigned(omp_get_num_threads()));
}
