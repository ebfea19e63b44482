// Attention backward, gradient by the bias in a fixed order, on warp-level tensor-core instructions.
//
// What    for each element of the bias the sum of dS over the pairs that it was added to: over batch entries, heads, queries or
//         keys, wherever the bias is broadcast.
// Maths   S = Q K^T, dP = dO V^T                              [block_m, block_n]
//         P = exp2(changed(scale S) - lse),  dS = P (dP - delta)
// Blocks  grid.x = n_blocks, m_blocks, num_heads and batch multiplied, those of them that the bias has.
// Who     a block owns its part of the gradient, takes all that was added to it tile by tile, one after the other, and adds up
//         the tiles in registers: a lane has a place in them. In the end it sums over rows or columns through shared memory, and
//         adds once to each element: launches may follow each other. Each warp owns 16 query rows; all threads copy tiles.
//         Nothing here is tuned: the kernel runs after those that compute the other gradients, whose delta it reads, and where
//         they would add to an element in any order.
#pragma once
#include "attention/bias_sums.cuh"
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/recomputed_tile.cuh"

// `Params`: those of the main kernel.
template <BackwardBiasConfig cfg, class Params>
CUFLASH_DEVICE void backward_bias(Params const& params, u32 smem) {
    using Tile = RecomputedTile<cfg, Params>;
    static_assert(cfg.block_m * cfg.block_n * 4 <= Tile::Tiles::kBytes, "in the end the sums take the place of the operands");

    // ---- coordinates ----
    Shape const& shape = params.shape;
    Pairs const& sums = params.bias_sums;
    BiasPart const part(shape, sums, params.num_batches, cfg.block_m, cfg.block_n);
    BlockRange const seen = key_blocks(shape, 0, shape.seqlen_q, cfg.block_n);  // by anybody
    int const num_n_blocks = (shape.seqlen_k + cfg.block_n - 1) / cfg.block_n;
    Tile tile(params, smem);
    float acc[1][Tile::kN][4];
    set_zero(acc);

    // ---- mainloop ----
    i64 keys_here = -1;  // number of the tile of keys in shared memory
#pragma unroll 1
    for (int batch = part.batches.begin; batch < part.batches.end; ++batch)
#pragma unroll 1
        for (int head = part.heads.begin; head < part.heads.end; ++head) {
            int const head_kv = head / shape.group_size;
            typename Tile::Changes const head_scores(params, batch, head);
#pragma unroll 1
            for (int m_block = part.m_blocks.begin; m_block < part.m_blocks.end; ++m_block) {
                int const q_begin = m_block * cfg.block_m, q_end = min(shape.seqlen_q, q_begin + cfg.block_m);
                BlockRange const range = key_blocks(shape, q_begin, q_end, cfg.block_n);
                int const first = max(part.n_blocks.begin, range.first), last = min(part.n_blocks.end, range.last);
#pragma unroll 1
                for (int n_block = first; n_block < last; ++n_block) {
                    int const k_first = n_block * cfg.block_n;
                    __syncthreads();  // the tiles before have been read
                    if (n_block == first) tile.load_queries(batch, head, q_begin, q_end);
                    i64 const keys = (static_cast<i64>(batch) * shape.num_heads + head_kv) * num_n_blocks + n_block;
                    if (keys != keys_here) tile.load_keys(batch, head_kv, k_first, seen.k_begin, seen.k_end);
                    keys_here = keys;
                    tile.wait_loads();
                    __syncthreads();
                    tile.for_each_pair(head_scores, batch, head, k_first, range.needs_mask(n_block),
                                       [&](int n, int i, float, float d_score, int, int) { acc[0][n][i] += d_score; });
                }
            }
        }

    // ---- epilogue ----
    auto place = [&](int row, int col) { return smem + (row * cfg.block_n + col) * 4; };
    __syncthreads();
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            st_shared(place(tile.warp_row + acc_row(tile.lane, i), 8 * n + acc_col(tile.lane, i)),
                      __float_as_uint(acc[0][n][i]));
    __syncthreads();
    add_tile<cfg.block_m, cfg.block_n, cfg.threads(), float>(
        sums, sums.at(part.batches.begin, part.heads.begin), shape, part.m_blocks.begin * cfg.block_m,
        part.n_blocks.begin * cfg.block_n, [&](int row, int col) { return ld_shared_f32(place(row, col)); },
        [&](int row, int col, float x) { st_shared(place(row, col), __float_as_uint(x)); });
}
