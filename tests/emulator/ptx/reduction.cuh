#pragma once
#include "types.cuh"

template <int kWidth>
CUFLASH_DEVICE void reduce_add(float* gmem, float const* x) {
    static_assert(kWidth == 1 || kWidth == 2 || kWidth == 4, "a reduction adds 1, 2 or 4 floats");
    if (reinterpret_cast<u64>(gmem) % (4 * kWidth) != 0)
        emulator::error("reduce_add to %p, which is misaligned", static_cast<void*>(gmem));
    emulator::pause(256);
    for (int i = 0; i < kWidth; ++i) gmem[i] += x[i];
}

CUFLASH_DEVICE int fetch_add(int* gmem, int x) {
    emulator::pause(64);
    int const before = *gmem;
    *gmem = before + x;
    return before;
}

CUFLASH_DEVICE int load_acquire(int const* gmem) { return emulator::load_acquire(gmem); }
CUFLASH_DEVICE void store_release(int* gmem, int value) { emulator::store_release(gmem, value); }
CUFLASH_DEVICE void add_release(int* gmem, int x) { emulator::add_release(gmem, x); }
