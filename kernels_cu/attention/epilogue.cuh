// Leaving the kernel: accumulators to memory, by way of the warp's own rows in shared memory, so that
// global memory sees whole 16-byte pieces.
#pragma once
#include "../ptx/stmatrix.cuh"
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

// The transpose of 16 x 16 accumulators, at row `row` and column `col` (multiples of 16) of a shared tile.
template <Mma kMma, class Tile>
CUFLASH_DEVICE void acc_to_smem_trans(u32 smem, float const (&acc)[2][4], int row, int col, int lane) {
    static_assert(Tile::kElemBytes == 2, "matrices are transposed as 16-bit elements");
    FragmentA<kMma> words;
    acc_to_a(words, acc, 0);
    // Matrices in order: rows 0-7 and columns 0-7 of the target, its columns 8-15, then the same of its rows 8-15.
    stmatrix_x4_trans(smem + Tile::offset(row + lane % 8 + lane / 16 * 8, col / 8 + lane / 8 % 2), words.x);
}

// One row of a warp's accumulators (row g if h is 0, g + 8 if it is 1) straight to memory; `target` is this lane's row.
// The four lanes of a quad swap words until each has 16 neighbouring bytes.
template <Mma kMma, bool kAligned, int kN>
CUFLASH_DEVICE void store_acc_row(char* target, float const (&acc)[kN][4], int h, bool valid, int row_bytes, int lane) {
    static_assert(kN % 4 == 0, "a quad shares four tiles of eight columns");
    int const t = lane % 4;
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
        u32 word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) word[j] = pack<kMma>(acc[n + j][2 * h], acc[n + j][2 * h + 1]);
        if constexpr (kAligned) {
            // Lane t holds word t of four tiles, and wants all words of tile t: a transposition of 4 x 4.
#pragma unroll
            for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (j & bit) continue;
                    u32 const got = __shfl_xor_sync(0xffffffffu, t & bit ? word[j] : word[j + bit], bit);
                    (t & bit ? word[j] : word[j + bit]) = got;
                }
            int const byte = (n + t) * 16;
            if (valid && byte < row_bytes)
                *reinterpret_cast<uint4*>(target + byte) = uint4{word[0], word[1], word[2], word[3]};
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int const byte = (n + j) * 16 + t * 4 + i * 2;
                    if (valid && byte < row_bytes)
                        *reinterpret_cast<u16*>(target + byte) = static_cast<u16>(word[j] >> (16 * i));
                }
        }
    }
}
