// Layout of the float32 workspace in which d_q is summed over key blocks.
//
// A tile of block_m x head_dim is stored in the order in which the warps of the main kernel hold it as
// accumulators, so that every reduction of a warp adds to one contiguous piece of memory; only the convert
// kernel has to know which element that is.
#pragma once
#include "../ptx/types.cuh"

template <int kBlockM, int kHeadDim, int kNumWarps, int kWarpsM, int kWidth>
struct DqAccum {
    static constexpr int kWarpsN = kNumWarps / kWarpsM;
    static constexpr int kM = kBlockM / (16 * kWarpsM);  // 16 rows each
    static constexpr int kN = kHeadDim / (8 * kWarpsN);  // 8 columns each
    static constexpr int kElems = kBlockM * kHeadDim;
    static_assert(kNumWarps % kWarpsM == 0 && kBlockM % (16 * kWarpsM) == 0 && kHeadDim % (16 * kWarpsN) == 0,
                  "every warp must own 16 x 16 blocks of d_q");

    // First row and column of the warp; its blocks of 16 x 16 are kWarpsM * 16 rows, kWarpsN * 16 columns apart.
    CUFLASH_DEVICE static int row(int warp) { return warp % kWarpsM * 16; }
    CUFLASH_DEVICE static int col(int warp) { return warp / kWarpsM * 16; }

    // Where registers [part * kWidth, (part + 1) * kWidth) of accumulator (m, n) go, in floats, beyond the
    // place of the lane.
    CUFLASH_DEVICE static int lane_offset(int warp, int lane) { return warp * (kM * kN * 128) + lane * kWidth; }
    CUFLASH_DEVICE static int offset(int m, int n, int part) { return (m * kN + n) * 128 + part * (32 * kWidth); }
};
