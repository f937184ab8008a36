// As much of PTX as a launch needs: version, target, the names of kernels and the lengths of their arguments.
#pragma once

#include <map>
#include <string>

#include "world.h"

namespace fake {

struct Ptx {
    int version_major = 0, version_minor = 0;
    int target = 0;  // 80 for sm_80
    std::map<std::string, Kernel> kernels;

    // False: no PTX.
    bool parse(const char* text);
    // The oldest driver whose compiler knows this version of PTX.
    int driver_version_needed() const;
};

}  // namespace fake
