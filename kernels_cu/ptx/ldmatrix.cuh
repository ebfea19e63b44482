// ldmatrix (sm_75+): four 8x8 matrices of 16-bit elements (8 rows of 16 bytes) into fragments.
// Lane l gives the address of row l % 8 of matrix l / 8. PTX ISA 9.7.14.5.15.
// A row of 16 bytes may as well hold four 32-bit elements: lane l then receives element (l / 4, l % 4).
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void ldmatrix_x4(u32 (&r)[4], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}

CUFLASH_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}
