// The report that FAKE_CUDA_REPORT names.
#pragma once

namespace fake {

// Writes it, all of it, by way of a file beside it. With the lock held.
void write_report();

}  // namespace fake
