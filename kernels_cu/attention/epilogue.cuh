// Leaving the kernel: accumulators to memory, by way of the warp's own rows in shared memory, so that
// global memory sees whole 16-byte pieces.
#pragma once
#include "../tile/copy.cuh"
#include "../tile/fragment.cuh"

// Rounds 16 * kM rows of accumulators to the element type and puts them at row `row` and column `col`
// (multiples of 8) of a shared tile; columns beyond the tile's are left out.
template <Mma kMma, class Tile, int kM, int kN>
CUFLASH_DEVICE void acc_to_smem(u32 smem, float const (&acc)[kM][kN][4], int row, int lane, int col = 0) {
    int const byte = acc_col(lane, 0) * Tile::kElemBytes;
    u32 const place = Tile::lane_address(smem + row * Tile::kSlabBytes, acc_row(lane, 0), byte / 16) + byte % 16;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < (8 * kN < Tile::kCols ? kN : Tile::kCols / 8); ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                u32 const address = Tile::at(place, 16 * m + 8 * h, (col + 8 * n) * Tile::kElemBytes / 16);
                float const x = acc[m][n][2 * h], y = acc[m][n][2 * h + 1];
                if constexpr (Tile::kElemBytes == 2) {
                    st_shared(address, pack<kMma>(x, y));
                } else {
                    st_shared_v2(address, __float_as_uint(x), __float_as_uint(y));
                }
            }
}
