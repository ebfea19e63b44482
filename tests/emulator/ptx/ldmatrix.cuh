#pragma once
#include "types.cuh"

// Lane l has elements (l / 4, 2 (l % 4)) and the next of each matrix, or of its transpose.
CUFLASH_DEVICE void load_matrices(u32 (&r)[4], u32 smem, bool is_transposed) {
    auto const rows = emulator::exchange(smem);
    for (int m = 0; m < 4; ++m) {
        r[m] = 0;
        for (int i = 0; i < 2; ++i) {
            int const major = emulator::lane_id() / 4;
            int const minor = 2 * (emulator::lane_id() % 4) + i;
            u32 const row = rows[8 * m + (is_transposed ? minor : major)];
            r[m] |= u32{emulator::load_shared<u16>(row + 2 * (is_transposed ? major : minor))} << (16 * i);
        }
    }
}

CUFLASH_DEVICE void ldmatrix_x4(u32 (&r)[4], u32 smem) { load_matrices(r, smem, false); }
CUFLASH_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 smem) { load_matrices(r, smem, true); }
