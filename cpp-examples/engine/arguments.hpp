// arguments.hpp: walks over a command line. next() steps to an argument, value() takes the one
// that belongs to it.
#pragma once

#include <stdexcept>
#include <string>

namespace engine {

class Arguments {
 public:
  Arguments(int count, char **values) : count_(count), values_(values) {}

  /// Steps to the next argument; false at the end.
  bool next() { return ++at_ < count_; }

  std::string current() const { return values_[at_]; }

  /// The value after the current argument; throws if there is none.
  std::string value() {
    const std::string name = current();
    if (!next()) throw std::runtime_error(name + " needs a value");
    return current();
  }

  /// Takes the current argument as the first positional one, or throws.
  void positional(std::string &target) const {
    if (current()[0] == '-' || !target.empty())
      throw std::runtime_error("unknown argument " + current());
    target = current();
  }

 private:
  int count_;
  char **values_;
  int at_ = 0;
};

}  // namespace engine
