#pragma once
#include "types.cuh"

CUFLASH_DEVICE void warpgroup_arrive() { emulator::wgmma_arrive(); }
CUFLASH_DEVICE void warpgroup_commit() { emulator::wgmma_commit(); }

template <int kPending>
CUFLASH_DEVICE void warpgroup_wait() {
    emulator::wgmma_wait(kPending);
}

// The compiler cannot know whether a pointer to the registers was kept: it has to leave such touches where they are.
template <int kTiles>
CUFLASH_DEVICE void warpgroup_pin(float (&d)[kTiles][4]) {
    asm volatile("" ::"r"(&d[0][0]) : "memory");
}

template <u32 kHigh>
CUFLASH_DEVICE u64 join_words(u32 low) {
    return u64{kHigh} << 32 | low;
}

template <int kRegisters>
CUFLASH_DEVICE void warpgroup_release_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    emulator::set_registers(kRegisters, false);
}
template <int kRegisters>
CUFLASH_DEVICE void warpgroup_take_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    emulator::set_registers(kRegisters, true);
}

constexpr emulator::Element element_of(bool is_bf16) {
    return is_bf16 ? emulator::Element::kBF16 : emulator::Element::kF16;
}

template <bool kBF16, bool kAdd, bool kTransA, bool kTransB, int kTiles>
CUFLASH_DEVICE void wgmma_ss(float (&d)[kTiles][4], u64 a, u64 b) {
    emulator::wgmma({kTiles, element_of(kBF16), kAdd, kTransA, kTransB, false, a, b}, &d[0][0], nullptr);
}
template <bool kBF16, bool kAdd, bool kTransB, int kTiles>
CUFLASH_DEVICE void wgmma_rs(float (&d)[kTiles][4], u32 const (&a)[4], u64 b) {
    emulator::wgmma({kTiles, element_of(kBF16), kAdd, false, kTransB, true, 0, b}, &d[0][0], a);
}
