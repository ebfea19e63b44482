// stmatrix (sm_90+): four 8x8 matrices of 16-bit elements from fragments to rows of 16 bytes, each matrix transposed.
// Lane l gives the address of row l % 8 of matrix l / 8 as it is stored. PTX ISA 9.7.14.5.16.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void stmatrix_x4_trans(u32 smem, u32 const (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
