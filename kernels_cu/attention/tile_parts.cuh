// Tiles of keys that several blocks of backward_wgmma.cuh have parts of (cuflash/plan.py: TileParts): who has which, and
// the float32 workspace where they leave what they have of d_k and d_v, for backward_gather.cuh to sum up.
#pragma once
#include "params.cuh"

// The part that begins at step `begin` of the tail has its place behind that of the part before it; a part that reaches
// into several tiles has one for each.
struct Places {
    int first;
    int end;

    // Of all parts of the tail's tile `n`.
    CUFLASH_DEVICE static Places of_tile(TileParts const& tail, int n) {
        return Places{at_step(tail, n * tail.tile_steps, n), at_step(tail, (n + 1) * tail.tile_steps - 1, n) + 1};
    }
    // Of the part that has a step, where that belongs to tile `n`.
    CUFLASH_DEVICE static int at_step(TileParts const& tail, int step, int n) { return step / tail.part_steps + n; }
};

// Warps leave their accumulators as they hold them: 16 keys, and so many tiles of eight columns. By keys a warp has d_k, and
// behind it d_v; by role the first four have d_v, the others d_k.
template <int kBlockN, int kHeadDim, int kHeadDimV>
struct PartAccum {
    static constexpr bool kByRole = kBlockN == 64;
    static constexpr int kWarps = 8;
    static constexpr int kN = (!kByRole ? kHeadDim + kHeadDimV : kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV) / 8;
    static constexpr int kElems = kWarps * kN * 128;

    CUFLASH_DEVICE static bool is_dv(int warp, int n) { return kByRole ? warp < 4 : n >= kHeadDim / 8; }
    // The first of a warp's keys, in the tile.
    CUFLASH_DEVICE static int row(int warp) { return warp % (kBlockN / 16) * 16; }
    // Of the four numbers that a lane has of tile `n` of columns.
    CUFLASH_DEVICE static int offset(int warp, int n, int lane) { return (warp * kN + n) * 128 + lane * 4; }
};
