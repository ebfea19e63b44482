// Plain shared- and global-memory accesses by address, for data that no copy engine moves.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE u32 ld_shared(u32 smem) {
    u32 value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(smem) : "memory");
    return value;
}

CUFLASH_DEVICE float ld_shared_f32(u32 smem) { return __uint_as_float(ld_shared(smem)); }

CUFLASH_DEVICE uint2 ld_shared_v2(u32 smem) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(smem) : "memory");
    return v;
}

CUFLASH_DEVICE uint4 ld_shared_v4(u32 smem) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(smem)
                 : "memory");
    return v;
}

CUFLASH_DEVICE void st_shared(u32 smem, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(value) : "memory");
}

CUFLASH_DEVICE void st_shared_v2(u32 smem, u32 x, u32 y) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(smem), "r"(x), "r"(y) : "memory");
}

CUFLASH_DEVICE void st_shared_v4(u32 smem, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
