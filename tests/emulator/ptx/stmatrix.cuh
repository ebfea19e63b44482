#pragma once
#include "types.cuh"

CUFLASH_DEVICE void stmatrix_x4_trans(u32 smem, u32 const (&r)[4]) {
    auto const rows = emulator::exchange(smem);
    int const lane = emulator::lane_id();
    for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
            u16 const element = static_cast<u16>(r[m] >> (16 * i));
            emulator::store_shared(rows[8 * m + 2 * (lane % 4) + i] + 2 * (lane / 4), &element, 2);
        }
}
