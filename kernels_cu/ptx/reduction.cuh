// Sums in global memory by several thread blocks, and the order among them. PTX ISA 9.7.13.7, 9.7.9.8.
#pragma once
#include "types.cuh"

// Adds kWidth neighbouring float32 without returning the old ones; more than one at a time: sm_90+.
template <int kWidth>
CUFLASH_DEVICE void reduce_add(float* gmem, float const* x) {
    static_assert(kWidth == 1 || kWidth == 2 || kWidth == 4, "a reduction adds 1, 2 or 4 floats");
    if constexpr (kWidth == 4) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(gmem), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                     "f"(x[3])
                     : "memory");
    } else if constexpr (kWidth == 2) {
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(gmem), "f"(x[0]), "f"(x[1]) : "memory");
    } else {
        asm volatile("red.global.add.f32 [%0], %1;" ::"l"(gmem), "f"(x[0]) : "memory");
    }
}

// The number before the addition.
CUFLASH_DEVICE int fetch_add(int* gmem, int x) {
    int before;
    asm volatile("atom.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(gmem), "r"(x) : "memory");
    return before;
}

// Everything before `store_release` or `add_release` is visible to whoever reads what it leaves by `load_acquire`.
CUFLASH_DEVICE int load_acquire(int const* gmem) {
    int value;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(gmem) : "memory");
    return value;
}

CUFLASH_DEVICE void store_release(int* gmem, int value) {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(gmem), "r"(value) : "memory");
}

CUFLASH_DEVICE void add_release(int* gmem, int x) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(gmem), "r"(x) : "memory");
}
