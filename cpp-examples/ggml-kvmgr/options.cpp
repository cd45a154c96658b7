#include "options.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>

#include "kvmgr.h"

namespace {
Options the_options;

// Lines "NAME=value"; the environment wins.
std::map<std::string, std::string> read_file(const char *path, bool &ok) {
    std::map<std::string, std::string> found;
    std::ifstream file(path);
    ok = bool(file);
    for (std::string line; std::getline(file, line);) {
        const size_t equals = line.find('=');
        if (line.empty() || line[0] == '#' || equals == std::string::npos) continue;
        found[line.substr(0, equals)] = line.substr(equals + 1);
    }
    return found;
}

// The index of `value` in `words`, or -1 with a message.
int choose(const char *name, const std::string &value, std::initializer_list<const char *> words) {
    int i = 0;
    std::string list;
    for (const char *word : words) {
        if (value == word) return i;
        list += (i++ ? ", " : "") + std::string(word);
    }
    report("%s is \"%s\", must be one of: %s", name, value.c_str(), list.c_str());
    return -1;
}
}  // namespace

const Options &options() { return the_options; }

void report(const char *format, ...) {
    va_list args;
    va_start(args, format);
    std::fputs("ggml-kvmgr: ", stderr);
    std::vfprintf(stderr, format, args);
    std::fputc('\n', stderr);
    va_end(args);
}

bool read_options() {
    std::map<std::string, std::string> file;
    if (const char *path = std::getenv("KVMGR_CONFIG")) {
        bool ok = false;
        file = read_file(path, ok);
        if (!ok) return report("KVMGR_CONFIG: cannot read \"%s\"", path), false;
    }
    const auto get = [&](const char *name, const char *otherwise) {
        const char *value = std::getenv(name);
        if (value) return std::string(value);
        return file.count(name) ? file[name] : std::string(otherwise);
    };
    Options &o = the_options;
    o.spec = get("KVMGR_SPEC", "");
    if (!o.spec.empty() && kvmgr_slots_check_spec(o.spec.c_str()) != KVMGR_OK)
        return report("KVMGR_SPEC=\"%s\": %s", o.spec.c_str(), kvmgr_last_error_message()), false;
    const std::string mode = get("KVMGR_MODE", o.spec.empty() ? "transparent" : "opaque");
    const int m = choose("KVMGR_MODE", mode, {"transparent", "opaque"});
    const int c = choose("KVMGR_COMPRESS", get("KVMGR_COMPRESS", "prompt"), {"prompt", "piece"});
    const int s = choose("KVMGR_STATS", get("KVMGR_STATS", "0"), {"0", "1"});
    const int l = choose("KVMGR_LOG", get("KVMGR_LOG", "warn"), {"off", "error", "warn", "info", "debug"});
    if (m < 0 || c < 0 || s < 0 || l < 0) return false;
    o.opaque = m == 1, o.pieces = c == 1, o.stats = s == 1, o.log = unsigned(l);
    if (!o.opaque && !o.spec.empty())
        return report("KVMGR_MODE=transparent keeps the cache as llama.cpp lays it out; "
                      "KVMGR_SPEC needs KVMGR_MODE=opaque"), false;
    return true;
}
