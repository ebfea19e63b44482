// movmatrix: an 8x8 matrix of 16-bit elements across a warp, transposed.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE u32 movmatrix_trans(u32 x) {
    auto const words = emulator::exchange(x);
    int const lane = emulator::lane_id();
    u32 y = 0;
    for (int i = 0; i < 2; ++i) {
        u32 const word = words[(2 * (lane % 4) + i) * 4 + lane / 4 / 2];
        y |= (word >> 16 * (lane / 4 % 2) & 0xffffu) << 16 * i;
    }
    return y;
}
