// Attention backward, gradients by the arrays that the user's expression captures, on warp-level tensor-core instructions.
//
// What    for each pair (i, j) that is seen, and each element that the expression reads there: its derivative by the element
//         times the gradient by the changed score, added to the gradient by the element.
// Maths   S = Q K^T, dP = dO V^T                              [block_m, block_n]
//         P = exp2(changed(scale S) - lse),  dS = P (dP - delta)
// Blocks  grid.x = m_blocks * num_heads * batch.
// Who     each warp owns 16 query rows, whose scores stay in registers; all threads copy tiles. Nothing here is tuned: the
//         kernel runs where such gradients are asked for, after those that compute the others, whose delta it reads.
#pragma once
#include "attention/block_range.cuh"
#include "attention/captured.cuh"
#include "attention/config.cuh"
#include "attention/recomputed_tile.cuh"

// `Params`: those of the main kernel.
template <BackwardCapturedConfig cfg, class Params>
CUFLASH_DEVICE void backward_captured(Params const& params, u32 smem) {
    using Tile = RecomputedTile<cfg, Params>;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_m_blocks = (shape.seqlen_q + cfg.block_m - 1) / cfg.block_m;
    int const m_block = num_m_blocks - 1 - static_cast<int>(blockIdx.x % num_m_blocks);
    int const head = blockIdx.x / num_m_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_m_blocks / shape.num_heads;
    int const q_begin = m_block * cfg.block_m;
    int const q_end = min(shape.seqlen_q, q_begin + cfg.block_m);
    BlockRange const range = key_blocks(shape, q_begin, q_end, cfg.block_n);

    // ---- load ----
    Tile tile(params, smem);
    tile.load_queries(batch, head, q_begin, q_end);
    typename Tile::Changes const head_scores(params, batch, head);
    CapturedSums<typename Tile::Changes, float> sums(head_scores);

    // ---- mainloop ----
#pragma unroll 1
    for (int n_block = range.first; n_block < range.last; ++n_block) {
        int const k_first = n_block * cfg.block_n;
        __syncthreads();  // the tiles before have been read
        tile.load_keys(batch, head / shape.group_size, k_first, range.k_begin, range.k_end);
        tile.wait_loads();
        __syncthreads();
        tile.for_each_pair(head_scores, batch, head, k_first, range.needs_mask(n_block),
                           [&](int, int, float s, float d_score, int q_idx, int k_idx) { sums.add(s, d_score, q_idx, k_idx); });
    }
    sums.finish();
    tile.wait_loads();  // with no tile at all, Q is still on its way
}
