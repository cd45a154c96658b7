// The threads of one context of the host: as many as it was told to use.
#pragma once
#include <functional>

#include "kvmgr.h"

struct Team {
    using Work = std::function<void(unsigned worker, unsigned num_workers)>;

    Team();
    ~Team();
    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;
    void run(const Work &work) const;

    unsigned threads;
    // Where they meet when they share the rows of a head; NULL if there was no memory for it.
    kvmgr_meeting *meeting = nullptr;
};
