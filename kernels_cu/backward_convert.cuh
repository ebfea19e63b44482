// Attention backward, last step: d_q = scale * (the float32 sum over key blocks), rounded to the element type.
//
// What    one query tile of the main kernel per thread block: [block_m, head_dim].
// Blocks  grid.x = m_blocks * num_heads * batch.
// Who     each warp takes what the warp of the same number in the main kernel has added, so that a lane finds
//         its accumulators again; rows are put together in shared memory. They may come as columns (transposed).
#pragma once
#include "attention/config.cuh"
#include "attention/dq_accum.cuh"
#include "attention/epilogue.cuh"
#include "attention/params.cuh"

template <BackwardConvertConfig cfg>
struct BackwardConvertTiles {
    using dQ = SmemTile<cfg.block_m, cfg.head_dim, elem_bytes(cfg.mma)>;
    static constexpr int kBytes = dQ::kBytes;
};

template <BackwardConvertConfig cfg>
CUFLASH_DEVICE void backward_convert(BackwardParams const& params, u32 smem) {
    using TileDQ = typename BackwardConvertTiles<cfg>::dQ;
    constexpr int kRows = cfg.transposed ? 16 * cfg.num_warps : cfg.block_m;
    constexpr int kCols = cfg.transposed ? cfg.block_m : cfg.head_dim;
    static_assert(!cfg.transposed || cfg.dq_warps_m == cfg.num_warps, "transposed, every warp holds 16 columns of d_q");
    using Accum = DqAccum<kRows, kCols, cfg.num_warps, cfg.dq_warps_m, cfg.reduce_width>;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_m_blocks = params.rows / cfg.block_m;
    // From the last tile to the first: sums of the last ones are still in the cache.
    int const tile = gridDim.x - 1 - blockIdx.x;
    int const m_block = tile % num_m_blocks;
    int const head = tile / num_m_blocks % shape.num_heads;
    int const batch = tile / num_m_blocks / shape.num_heads;
    int const thread = threadIdx.x;
    int const lane = thread % 32;
    int const warp = thread / 32;
    int const q_begin = m_block * cfg.block_m;

    // ---- load: all of it is under way before anything is waited for ----
    float const* const source =
        reinterpret_cast<float const*>(params.dq_accum) + static_cast<i64>(tile) * Accum::kElems +
        Accum::lane_offset(warp, lane);
    float sums[Accum::kM][Accum::kN][4];
#pragma unroll
    for (int m = 0; m < Accum::kM; ++m)
#pragma unroll
        for (int n = 0; n < Accum::kN; ++n) {
            if constexpr (cfg.reduce_width == 4) {
                float4 const x = __ldg(reinterpret_cast<float4 const*>(source + Accum::offset(m, n, 0)));
                sums[m][n][0] = x.x;
                sums[m][n][1] = x.y;
                sums[m][n][2] = x.z;
                sums[m][n][3] = x.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[m][n][i] =
                        __ldg(source + i % cfg.reduce_width + Accum::offset(m, n, i / cfg.reduce_width));
            }
        }

    // ---- rows ----
    float const scale = static_cast<float>(params.scale);
#pragma unroll
    for (int m = 0; m < Accum::kM; ++m)
#pragma unroll
        for (int n = 0; n < Accum::kN; n += 2) {
            float block[1][2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) block[0][j][i] = scale * sums[m][n + j][i];
            if constexpr (cfg.transposed) {
                if (Accum::row(warp) < TileDQ::kCols) acc_to_smem_trans<cfg.mma, TileDQ>(smem, block[0], 8 * n, Accum::row(warp), lane);
            } else {
                acc_to_smem<cfg.mma, TileDQ>(smem, block, Accum::row(warp) + 16 * cfg.dq_warps_m * m, lane,
                                             Accum::col(warp) + 8 * Accum::kWarpsN * n);
            }
        }
    __syncthreads();

    // ---- store ----
    store_tile<TileDQ, cfg.block_m, cfg.threads(), cfg.copy>(
        params.d_q.at(batch, head, q_begin), params.d_q.row_stride, smem, 0, shape.seqlen_q - q_begin,
        shape.head_dim * TileDQ::kElemBytes, thread);
}
