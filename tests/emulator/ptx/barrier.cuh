#pragma once
#include "types.cuh"

CUFLASH_DEVICE void barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
CUFLASH_DEVICE void barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }
