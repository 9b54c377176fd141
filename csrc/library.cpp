// What the Python side asks the library about itself.

#include "common.h"

// 0 generic C++, 1 AVX2 with FMA, 2 AVX-512 (F, BW, DQ, VL), 3 with BF16 dot products.
ABYSSAL_EXPORT int32_t abyssal_isa() { return abyssal::choose_isa(-1); }

// Raised whenever a record in this library changes; the Python side refuses another number.
ABYSSAL_EXPORT int32_t abyssal_abi_version() { return 15; }
