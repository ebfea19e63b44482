// Rows of the matrix of weights, or its sums over queries, on warp-level tensor-core instructions.
//
// What    p_ij = exp(s_ij - lse_i), for the scores and the LSE of a forward pass: rows of it, or for every key the sum over all
//         queries, of which the matrix is never stored.
// Maths   S = Q K^T [block_m, block_n], changed as in the forward;  P = exp2(S - lse log2 e), 0 where a pair is hidden.
// Blocks  rows: grid.x = m_blocks * num_heads * batch, each over all keys;
//         sums: grid.x = n_blocks * num_heads * batch, each over the queries that see some of its keys.
// Who     each warp owns 16 rows of a tile; all threads copy. Sums of warps are added up in their order, so that they are
//         the same in every run.
#pragma once
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "tile/gemm.cuh"

template <WeightsConfig cfg>
struct WeightsTiles {
    using Q = SmemTile<cfg.block_m, cfg.head_dim, elem_bytes(cfg.mma)>;
    using K = SmemTile<cfg.block_n, cfg.head_dim, elem_bytes(cfg.mma)>;
    static constexpr int kBytes = Q::kBytes + K::kBytes;
};

template <WeightsConfig cfg>
CUFLASH_DEVICE void weights(ParamsOf<cfg.score, WeightsParams> const& params, u32 smem) {
    static_assert(cfg.block_m % 16 == 0, "every warp owns 16 rows");
    using Tiles = WeightsTiles<cfg>;
    using TileQ = typename Tiles::Q;
    using TileK = typename Tiles::K;
    constexpr Mma kMma = cfg.mma;
    constexpr int kThreads = cfg.threads();
    constexpr int kN = cfg.block_n / 8;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_rows = params.num_rows;
    int const num_blocks =
        cfg.sums ? (shape.seqlen_k + cfg.block_n - 1) / cfg.block_n : (num_rows + cfg.block_m - 1) / cfg.block_m;
    int const block = blockIdx.x % num_blocks;
    int const head = blockIdx.x / num_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_blocks / shape.num_heads;
    int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int const row_bytes = shape.head_dim * elem_bytes(kMma);
    i64 const of_head = static_cast<i64>(batch) * shape.num_heads + head;
    u32 const q_smem = smem, k_smem = smem + TileQ::kBytes;
    auto query = [&](int row) { return params.first_row + row * params.row_step; };

    // ---- load ----
    auto load_queries = [&](int first_row) {
        load_tile<TileQ, kThreads, cfg.copy>(q_smem, params.q.at(batch, head, query(first_row)),
                                             params.q.row_stride * params.row_step, 0, num_rows - first_row, row_bytes,
                                             thread);
    };
    auto load_keys = [&](int k_first, BlockRange const& range) {
        load_tile<TileK, kThreads, cfg.copy>(k_smem, params.k.at(batch, head / shape.group_size, k_first),
                                             params.k.row_stride, range.k_begin - k_first, range.k_end - k_first, row_bytes,
                                             thread);
    };
    auto wait = [] {
        if constexpr (cfg.copy == Copy::kAsync) {
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();
    };

    // ---- weights of a tile that has been loaded ----
    using Changes = HeadScores<cfg.score, float, is_16bit(kMma)>;
    Changes const head_scores(params, batch, head);
    auto compute = [&](float (&p)[1][kN][4], int first_row, int k_first, bool masked) {
        set_zero(p);
        gemm_nt<kMma, TileQ, TileK, cfg.head_dim / step_elems(kMma), 4>(
            p, lane_address_a<TileQ>(q_smem + 16 * warp * TileQ::kSlabBytes, lane), lane_address_b<TileK>(k_smem, lane));
        int q_idx[1][2];
        float lse_log2[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int const row = first_row + 16 * warp + acc_row(lane, 2 * h);
            q_idx[0][h] = query(row);
            float lse = -infinity();
            if (row < num_rows)
                lse = __ldg(reinterpret_cast<float const*>(params.lse) + of_head * shape.seqlen_q + q_idx[0][h]);
            lse_log2[h] = lse == -infinity() ? infinity() : lse * kLog2E;  // where nothing is seen, P is 0
        }
        float const scale = static_cast<float>(params.scale);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                p[0][n][i] = head_scores(p[0][n][i] * scale, min(q_idx[0][i / 2], shape.seqlen_q - 1),
                                         min(k_first + 8 * n + acc_col(lane, i), shape.seqlen_k - 1));
        if (masked) mask_scores(p, shape, q_idx, k_first, lane);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) p[0][n][i] = exp2_approx(p[0][n][i] - lse_log2[i / 2]);
    };

    float p[1][kN][4];
    if constexpr (!cfg.sums) {
        int const first_row = block * cfg.block_m, end_row = min(first_row + cfg.block_m, num_rows);
        BlockRange const range = key_blocks(shape, query(first_row), query(end_row - 1) + 1, cfg.block_n);
        load_queries(first_row);
#pragma unroll 1
        for (int n_block = 0; n_block * cfg.block_n < shape.seqlen_k; ++n_block) {
            int const k_first = n_block * cfg.block_n;
            if (n_block >= range.first && n_block < range.last) {
                load_keys(k_first, range);
                wait();
                compute(p, first_row, k_first, range.needs_mask(n_block));
                __syncthreads();  // before the next tile of keys
            } else {
                set_zero(p);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const row = first_row + 16 * warp + acc_row(lane, i), k_idx = k_first + acc_col(lane, i);
                if (row >= num_rows) continue;
                float* const target =
                    reinterpret_cast<float*>(params.weights) + (of_head * num_rows + row) * shape.seqlen_k + k_idx;
#pragma unroll
                for (int n = 0; n < kN; ++n)
                    if (k_idx + 8 * n < shape.seqlen_k) target[8 * n] = p[0][n][i];
            }
        }
        if constexpr (cfg.copy == Copy::kAsync) cp_async_wait<0>();  // with no tile at all, Q is still on its way
    } else {
        int const k_first = block * cfg.block_n, k_end = min(k_first + cfg.block_n, shape.seqlen_k);
        BlockRange const range = query_blocks(shape, k_first, k_end, cfg.block_m);
        load_keys(k_first, key_blocks(shape, 0, shape.seqlen_q, cfg.block_n));
        float sum[kN][2] = {};
#pragma unroll 1
        for (int m_block = range.first; m_block < range.last; ++m_block) {
            load_queries(m_block * cfg.block_m);
            wait();
            compute(p, m_block * cfg.block_m, k_first, k_end - k_first < cfg.block_n || range.needs_mask(m_block));
            __syncthreads();  // before the next tile of queries
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][i % 2] += p[0][n][i];
        }
        if constexpr (cfg.copy == Copy::kAsync) cp_async_wait<0>();  // with no tile at all, K is still on its way
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2)
                    sum[n][j] += __shfl_xor_sync(0xffffffffu, sum[n][j], distance);
                if (lane < 4)
                    st_shared(smem + (warp * cfg.block_n + 8 * n + acc_col(lane, j)) * 4, __float_as_uint(sum[n][j]));
            }
        __syncthreads();
        for (int i = thread; i < k_end - k_first; i += kThreads) {
            float total = 0.f;
#pragma unroll
            for (int w = 0; w < kThreads / 32; ++w) total += __uint_as_float(ld_shared(smem + (w * cfg.block_n + i) * 4));
            reinterpret_cast<float*>(params.weights)[of_head * shape.seqlen_k + k_first + i] = total;
        }
    }
}
