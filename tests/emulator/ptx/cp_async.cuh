#pragma once
#include "types.cuh"

CUFLASH_DEVICE void cp_async_16(u32 smem, void const* gmem, bool valid) { emulator::cp_async(smem, gmem, 16, valid); }
CUFLASH_DEVICE void cp_async_4(u32 smem, void const* gmem, bool valid) { emulator::cp_async(smem, gmem, 4, valid); }
CUFLASH_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }

template <int kPending>
CUFLASH_DEVICE void cp_async_wait() {
    emulator::cp_async_wait(kPending);
}
