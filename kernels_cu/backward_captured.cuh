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
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "tile/gemm.cuh"

template <BackwardCapturedConfig cfg>
struct BackwardCapturedTiles {
    static constexpr int kElemBytes = elem_bytes(cfg.mma);
    using Q = SmemTile<cfg.block_m, cfg.head_dim, kElemBytes>;
    using dO = SmemTile<cfg.block_m, cfg.head_dim_v, kElemBytes>;
    using K = SmemTile<cfg.block_n, cfg.head_dim, kElemBytes>;
    using V = SmemTile<cfg.block_n, cfg.head_dim_v, kElemBytes>;
    static constexpr int kDO = Q::kBytes;
    static constexpr int kK = kDO + dO::kBytes;
    static constexpr int kV = kK + K::kBytes;
    static constexpr int kBytes = kV + V::kBytes;
};

// `Params`: those of the main kernel.
template <BackwardCapturedConfig cfg, class Params>
CUFLASH_DEVICE void backward_captured(Params const& params, u32 smem) {
    static_assert(cfg.block_m % 16 == 0, "every warp owns 16 query rows");
    using Tiles = BackwardCapturedTiles<cfg>;
    constexpr Mma kMma = cfg.mma;
    constexpr int kThreads = cfg.threads();
    constexpr int kN = cfg.block_n / 8;
    constexpr int kUnroll = 4;  // code is little beside what the expression becomes

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_m_blocks = (shape.seqlen_q + cfg.block_m - 1) / cfg.block_m;
    int const m_block = num_m_blocks - 1 - static_cast<int>(blockIdx.x % num_m_blocks);
    int const head = blockIdx.x / num_m_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_m_blocks / shape.num_heads;
    int const thread = threadIdx.x, lane = thread % 32;
    int const warp_row = thread / 32 * 16;
    int const q_begin = m_block * cfg.block_m;
    int const q_end = min(shape.seqlen_q, q_begin + cfg.block_m);
    int const head_kv = head / shape.group_size;
    int const qk_bytes = shape.head_dim * Tiles::kElemBytes;
    int const v_bytes = shape.head_dim_v * Tiles::kElemBytes;
    BlockRange const range = key_blocks(shape, q_begin, q_end, cfg.block_n);

    // ---- load ----
    auto load = [&]<class Tile>(Tile, u32 target, Operand const& operand, int from_head, int row, int begin, int end,
                                int row_bytes) {
        load_tile<Tile, kThreads, cfg.copy>(target, operand.at(batch, from_head, row), operand.row_stride, begin, end,
                                            row_bytes, thread);
    };
    auto wait = [] {
        if constexpr (cfg.copy == Copy::kAsync) {
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();
    };
    load(typename Tiles::Q{}, smem, params.q, head, q_begin, 0, q_end - q_begin, qk_bytes);
    load(typename Tiles::dO{}, smem + Tiles::kDO, params.d_out, head, q_begin, 0, q_end - q_begin, v_bytes);

    // ---- the lane's two rows ----
    float lse_log2[2], delta[2];
    int q_idx[1][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        q_idx[0][h] = q_begin + warp_row + acc_row(lane, 2 * h);
        bool const exists = q_idx[0][h] < q_end;
        i64 const of_head = static_cast<i64>(batch) * shape.num_heads + head;
        float const lse =
            exists ? __ldg(reinterpret_cast<float const*>(params.lse) + of_head * shape.seqlen_q + q_idx[0][h]) : 0.f;
        // Where nothing is seen, P is 0.
        lse_log2[h] = exists && lse != -infinity() ? lse * kLog2E : infinity();
        delta[h] = exists ? __ldg(reinterpret_cast<float const*>(params.delta) + of_head * params.rows + q_idx[0][h]) : 0.f;
    }
    using Changes = HeadScores<cfg.score, float, is_16bit(kMma)>;
    Changes const head_scores(params, batch, head);
    CapturedSums<Changes, float> sums(head_scores);
    float const scale = static_cast<float>(params.scale), kept_scale = params.score.kept_scale_f32;

    // ---- mainloop ----
#pragma unroll 1
    for (int n_block = range.first; n_block < range.last; ++n_block) {
        int const k_first = n_block * cfg.block_n;
        int const begin = range.k_begin - k_first, end = range.k_end - k_first;
        __syncthreads();  // the tiles before have been read
        load(typename Tiles::K{}, smem + Tiles::kK, params.k, head_kv, k_first, begin, end, qk_bytes);
        load(typename Tiles::V{}, smem + Tiles::kV, params.v, head_kv, k_first, begin, end, v_bytes);
        wait();
        float s[1][kN][4], p[1][kN][4], dp[1][kN][4];
        set_zero(s);
        set_zero(dp);
        gemm_nt<kMma, typename Tiles::Q, typename Tiles::K, cfg.head_dim / step_elems(kMma), kUnroll>(
            s, lane_address_a<typename Tiles::Q>(smem + warp_row * Tiles::Q::kSlabBytes, lane),
            lane_address_b<typename Tiles::K>(smem + Tiles::kK, lane));
        gemm_nt<kMma, typename Tiles::dO, typename Tiles::V, cfg.head_dim_v / step_elems(kMma), kUnroll>(
            dp, lane_address_a<typename Tiles::dO>(smem + Tiles::kDO + warp_row * Tiles::dO::kSlabBytes, lane),
            lane_address_b<typename Tiles::V>(smem + Tiles::kV, lane));
        auto query = [&](int i) { return min(q_idx[0][i / 2], shape.seqlen_q - 1); };
        auto key = [&](int n, int i) { return min(k_first + 8 * n + acc_col(lane, i), shape.seqlen_k - 1); };
        auto for_each = [&](auto body) {
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) body(n, i);
        };
        for_each([&](int n, int i) {
            s[0][n][i] *= scale;
            p[0][n][i] = head_scores(s[0][n][i], query(i), key(n, i));
        });
        if (range.needs_mask(n_block)) mask_scores(p, shape, q_idx, k_first, lane);
        for_each([&](int n, int i) {
            float const weight = exp2_approx(p[0][n][i] - lse_log2[i / 2]);
            float d = dp[0][n][i];
            if constexpr (cfg.score.dropout)
                d = is_kept(params.score, true, batch, head, query(i), key(n, i)) ? d * kept_scale : 0.f;
            sums.add(s[0][n][i], weight == 0.f ? 0.f : weight * (d - delta[i / 2]), query(i), key(n, i));
        });
    }
    sums.finish();
    if constexpr (cfg.copy == Copy::kAsync) cp_async_wait<0>();  // with no tile at all, Q is still on its way
}
