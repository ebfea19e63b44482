// Moving a tile between global memory (any row stride) and swizzled shared memory.
#pragma once
#include "../ptx/cp_async.cuh"
#include "../ptx/shared.cuh"
#include "swizzle.cuh"

// How the rows of an operand are read.
enum class Copy {
    kTma,      // whole boxes by the tensor memory accelerator: sm_90+, 16-byte aligned rows
    kAsync,    // cp.async, 16 bytes: sm_80+, 16-byte aligned rows
    kVector,   // 16-byte loads through registers: sm_75
    kElement,  // one element at a time: any alignment, any head_dim
};

// How kThreads threads walk over a tile: each keeps one column of 16-byte chunks and steps down the rows,
// so that a step costs one addition per pointer. Threads that do not fill a row stay idle; a row longer
// than all of them is taken in several sweeps, kRowThreads chunks apart.
template <class Tile, int kTileRows, int kThreads>
struct Walk {
    static constexpr int kRowThreads = Tile::kRowChunks < kThreads ? Tile::kRowChunks : kThreads;
    static constexpr int kRowsPerStep = kThreads / kRowThreads;
    static constexpr int kSteps = (kTileRows + kRowsPerStep - 1) / kRowsPerStep;
    int row, chunk;

    CUFLASH_DEVICE explicit Walk(int thread) : row(thread / kRowThreads), chunk(thread % kRowThreads) {
        if (row >= kRowsPerStep) row = kTileRows;  // idle
    }
};

// Rows [row_begin, row_end) of a tile whose row 0 is at `gmem`; everything else becomes zero, unread.
// `row_bytes` is the true length of a row, `row_stride` the distance of rows in bytes.
template <class Tile, int kThreads, Copy kCopy>
CUFLASH_DEVICE void load_tile(u32 smem, char const* gmem, i64 row_stride, int row_begin, int row_end, int row_bytes,
                              int thread) {
    using W = Walk<Tile, Tile::kRows, kThreads>;
    static_assert(W::kRowThreads == Tile::kRowChunks, "loading a row takes at least one thread per 16 bytes");
    W const walk(thread);
    char const* source = gmem + walk.row * row_stride + walk.chunk * 16;
    bool const column_valid = walk.chunk * 16 < row_bytes;
    // Elements one at a time take a register each until they are stored: not too many at once.
    constexpr int kUnroll = kCopy == Copy::kElement ? 2 : W::kSteps;
#pragma unroll kUnroll
    for (int step = 0; step < W::kSteps; ++step, source += W::kRowsPerStep * row_stride) {
        int const row = walk.row + step * W::kRowsPerStep;
        if ((Tile::kRows % W::kRowsPerStep != 0 || kThreads % Tile::kRowChunks != 0) && row >= Tile::kRows) break;
        u32 const target = smem + Tile::offset(row, walk.chunk);
        bool const valid = column_valid && row >= row_begin && row < row_end;
        if constexpr (kCopy == Copy::kAsync) {
            cp_async_16(target, source, valid);
        } else if constexpr (kCopy == Copy::kVector) {
            uint4 value = {0, 0, 0, 0};
            if (valid) value = __ldg(reinterpret_cast<uint4 const*>(source));
            st_shared_v4(target, value);
        } else {
            u32 words[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 16 / Tile::kElemBytes; ++i) {
                bool const inside = valid && walk.chunk * 16 + i * Tile::kElemBytes < row_bytes;
                if constexpr (Tile::kElemBytes == 2) {
                    u32 const value = inside ? __ldg(reinterpret_cast<u16 const*>(source) + i) : 0;
                    words[i / 2] |= value << (16 * (i % 2));
                } else {
                    words[i] = inside ? __ldg(reinterpret_cast<u32 const*>(source) + i) : 0;
                }
            }
            st_shared_v4(target, uint4{words[0], words[1], words[2], words[3]});
        }
    }
}

// The way back: rows [first_row, min(first_row + kRows, row_end)) of a tile in shared memory, by kThreads
// threads; `gmem` is row 0.
template <class Tile, int kRows, int kThreads, Copy kCopy>
CUFLASH_DEVICE void store_tile(char* gmem, i64 row_stride, u32 smem, int first_row, int row_end, int row_bytes,
                               int thread) {
    using W = Walk<Tile, kRows, kThreads>;
    W const walk(thread);
    if (walk.row >= kRows) return;
#pragma unroll
    for (int sweep = 0; sweep < Tile::kRowChunks; sweep += W::kRowThreads) {
        int const chunk = walk.chunk + sweep;
        if (chunk * 16 >= row_bytes) return;
        char* target = gmem + (first_row + walk.row) * row_stride + chunk * 16;
#pragma unroll
        for (int step = 0; step < W::kSteps; ++step, target += W::kRowsPerStep * row_stride) {
            int const row = first_row + walk.row + step * W::kRowsPerStep;
            if (row >= row_end || row >= first_row + kRows) break;
            uint4 const value = ld_shared_v4(smem + Tile::offset(row, chunk));
            if constexpr (kCopy != Copy::kElement) {
                *reinterpret_cast<uint4*>(target) = value;
            } else {
                u32 const words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                for (int i = 0; i < 16 / Tile::kElemBytes; ++i) {
                    if (chunk * 16 + i * Tile::kElemBytes >= row_bytes) continue;
                    if constexpr (Tile::kElemBytes == 2) {
                        reinterpret_cast<u16*>(target)[i] = static_cast<u16>(words[i / 2] >> (16 * (i % 2)));
                    } else {
                        reinterpret_cast<u32*>(target)[i] = words[i];
                    }
                }
            }
        }
    }
}
