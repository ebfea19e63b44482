// Keeping the compiler from looking through a value.
#pragma once
#include "types.cuh"

// From here on `x` may be anything. Used where a loop would otherwise compute dozens of addresses before it
// starts, each an addition away from another, and spill them.
template <class T>
CUFLASH_DEVICE void opaque(T& x) {
    asm volatile("" : "+r"(x));
}
