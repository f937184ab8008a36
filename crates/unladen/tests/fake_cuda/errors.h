// The driver's errors by number and by name.
#pragma once

#include "api.h"

namespace fake {

// Null for an unknown one.
const char* error_name(CUresult error);
// False when no error has this name.
bool error_number(const char* name, CUresult* error);

}  // namespace fake
