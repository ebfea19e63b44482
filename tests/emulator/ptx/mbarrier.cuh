#pragma once
#include "types.cuh"

CUFLASH_DEVICE void mbarrier_init(u32 barrier, int count) { emulator::mbarrier_init(barrier, count); }
CUFLASH_DEVICE void mbarrier_init_fence() {}
CUFLASH_DEVICE void mbarrier_arrive(u32 barrier) { emulator::mbarrier_arrive(barrier, 0); }
CUFLASH_DEVICE void mbarrier_arrive_expect(u32 barrier, int bytes) { emulator::mbarrier_arrive(barrier, bytes); }
CUFLASH_DEVICE bool mbarrier_test(u32 barrier, u32 parity) { return emulator::mbarrier_test(barrier, parity); }
CUFLASH_DEVICE void mbarrier_wait(u32 barrier, u32 parity) { emulator::mbarrier_wait(barrier, parity); }
