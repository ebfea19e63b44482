#pragma once
#include "types.cuh"

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

CUFLASH_DEVICE float infinity() { return __int_as_float(0x7f800000); }
CUFLASH_DEVICE float exp2_approx(float x) { return std::exp2(x); }
CUFLASH_DEVICE float log2_approx(float x) { return std::log2(x); }
CUFLASH_DEVICE float reciprocal_approx(float x) { return 1.f / x; }

CUFLASH_DEVICE u32 pack_f16(float low, float high) { return emulator::to_f16(low) | u32{emulator::to_f16(high)} << 16; }
CUFLASH_DEVICE u32 pack_bf16(float low, float high) {
    return emulator::to_bf16(low) | u32{emulator::to_bf16(high)} << 16;
}
CUFLASH_DEVICE float unpack_f16(u16 value) { return emulator::from_f16(value); }
CUFLASH_DEVICE float unpack_bf16(u16 value) { return emulator::from_bf16(value); }

CUFLASH_DEVICE void split_tf32(u32 x, u32& big, u32& small) {
    big = (x + 0x1000u) & 0xffffe000u;
    small = __float_as_uint(__uint_as_float(x) - __uint_as_float(big));
}
