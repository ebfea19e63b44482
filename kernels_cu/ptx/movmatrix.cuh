// movmatrix (sm_75+): an 8x8 matrix of 16-bit elements across a warp, transposed. Lane l holds elements 2 (l % 4) and the next
// of row l / 4. PTX ISA 9.7.14.5.17.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE u32 movmatrix_trans(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
