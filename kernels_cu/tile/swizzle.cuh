// Where an element of a tile lies in shared memory.
//
// A tile of kRows rows and kCols columns is cut into slabs, 128 bytes wide where the row length allows
// and 64 bytes otherwise; each slab stores its rows one after the other. Inside a row, the 16-byte
// chunks are permuted by XOR with a key made of the row number, so that eight neighbouring rows of one
// column of chunks (what ldmatrix reads) touch all 32 banks once.
#pragma once
#include "../ptx/types.cuh"

template <int kRows_, int kCols_, int kElemBytes_>
struct SmemTile {
    static constexpr int kRows = kRows_;
    static constexpr int kCols = kCols_;
    static constexpr int kElemBytes = kElemBytes_;
    static constexpr int kRowBytes = kCols * kElemBytes;
    static constexpr int kBytes = kRows * kRowBytes;
    static constexpr int kSlabBytes = kRowBytes % 128 == 0 ? 128 : 64;
    static constexpr int kSlabChunks = kSlabBytes / 16;
    static constexpr int kSlabStride = kRows * kSlabBytes;
    static constexpr int kRowChunks = kRowBytes / 16;
    static_assert(kRowBytes % 64 == 0, "a tile row must be a multiple of 64 bytes: pad head_dim to 32 (16-bit) or 16");
    static_assert(kRows % 8 == 0, "the swizzle repeats every 8 rows");

    CUFLASH_DEVICE static int key(int row) { return kSlabBytes == 128 ? row & 7 : (row >> 1) & 3; }

    // Byte offset of a 16-byte chunk.
    CUFLASH_DEVICE static u32 offset(int row, int chunk) {
        int const slab = chunk / kSlabChunks;
        return slab * kSlabStride + row * kSlabBytes + (((chunk % kSlabChunks) ^ key(row)) << 4);
    }

    // A lane that always reads row `row` (mod 8) and chunk parity `half` keeps one address; `at` moves it
    // by a compile-time number of rows (a multiple of 8) and by an even number of chunks. Because the
    // base of a tile is a multiple of the slab width, the XOR of the chunk acts on the address itself.
    CUFLASH_DEVICE static u32 lane_address(u32 base, int row, int half) {
        return base + row * kSlabBytes + ((half ^ key(row)) << 4);
    }
    CUFLASH_DEVICE static u32 at(u32 lane, int rows, int chunk) {
        return (lane ^ ((chunk % kSlabChunks) << 4)) + (chunk / kSlabChunks) * kSlabStride + rows * kSlabBytes;
    }
};
