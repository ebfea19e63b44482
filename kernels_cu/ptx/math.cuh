// Scalar arithmetic that has an instruction of its own.
#pragma once
#include "types.cuh"

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

CUFLASH_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// 2^x, relative error below 2^-22; exp2(-inf) is 0.
CUFLASH_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

CUFLASH_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, relative error of 2^-23; that of infinity is 0.
CUFLASH_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two float32 rounded to nearest into one register; `low` goes to the lower half.
CUFLASH_DEVICE u32 pack_f16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
#else
    u16 l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
    return static_cast<u32>(l) | (static_cast<u32>(h) << 16);
#endif
}

CUFLASH_DEVICE u32 pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
#else
    // No bf16 conversion before sm_80: round to nearest even on the bits.
    u32 l = __float_as_uint(low), h = __float_as_uint(high);
    l = low != low ? 0x7fffu : (l + 0x7fffu + ((l >> 16) & 1u)) >> 16;
    h = high != high ? 0x7fffu : (h + 0x7fffu + ((h >> 16) & 1u)) >> 16;
    return l | (h << 16);
#endif
}

CUFLASH_DEVICE float unpack_f16(u16 value) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(value));
    return d;
}

CUFLASH_DEVICE float unpack_bf16(u16 value) { return __uint_as_float(static_cast<u32>(value) << 16); }

// x = big + small with big a tf32 number: three tf32 products of such halves (big*big + big*small +
// small*big) have the error of a float32 product (Ootomo and Yokota 2022). Adding half a unit before
// cutting the low 13 bits rounds, which keeps `small` signed and one bit shorter. The tensor core
// ignores the low bits of `small` by itself.
CUFLASH_DEVICE void split_tf32(u32 x, u32& big, u32& small) {
    big = (x + 0x1000u) & 0xffffe000u;
    small = __float_as_uint(__uint_as_float(x) - __uint_as_float(big));
}
