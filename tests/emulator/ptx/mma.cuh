#pragma once
#include "types.cuh"

CUFLASH_DEVICE void mma_m16n8k16_f16(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    emulator::mma(c, a, b0, b1, emulator::Element::kF16);
}
CUFLASH_DEVICE void mma_m16n8k16_bf16(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    emulator::mma(c, a, b0, b1, emulator::Element::kBF16);
}
CUFLASH_DEVICE void mma_m16n8k8_f16_twice(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    emulator::mma(c, a, b0, b1, emulator::Element::kF16);
}
CUFLASH_DEVICE void mma_m16n8k8_tf32(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    emulator::mma(c, a, b0, b1, emulator::Element::kTF32);
}
