// Settings of the plugin, from the environment or from the file that KVMGR_CONFIG names.
#pragma once
#include <string>

struct Options {
    std::string spec;     // KVMGR_SPEC; empty: plain f16
    bool opaque = false;  // KVMGR_MODE=opaque|transparent; opaque is the default with a spec
    bool pieces = false;  // KVMGR_COMPRESS=prompt|piece
    bool stats = false;   // KVMGR_STATS=1
    unsigned log = 2;     // KVMGR_LOG=off|error|warn|info|debug
};

// The settings of this process. Read once, by read_options().
const Options &options();

// Reads and checks; false, with a message on stderr, if something cannot be honoured.
bool read_options();

// A message of the plugin on stderr.
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
