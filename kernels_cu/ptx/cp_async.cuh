// cp.async (sm_80+): 16 bytes from global to shared memory without passing through registers.
// PTX ISA 9.7.9.25.3. Completion is per thread; a barrier makes the bytes visible to the block.
#pragma once
#include "types.cuh"

// Copies 16 bytes, or writes 16 zero bytes without reading when `valid` is false.
CUFLASH_DEVICE void cp_async_16(u32 smem, void const* gmem, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid ? 16 : 0)
                 : "memory");
}

// The same for 4 bytes.
CUFLASH_DEVICE void cp_async_4(u32 smem, void const* gmem, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(gmem), "r"(valid ? 4 : 0) : "memory");
}

CUFLASH_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the newest groups are still in flight.
template <int kPending>
CUFLASH_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
