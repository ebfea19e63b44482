// weights.cuh on ordinary FMA instructions: what tensor cores do not take, which is float64, float32 before sm_80, and a
// head_dim above 256.
//
// Who     16 threads share a row of a tile (tile/block_gemm.cuh). For sums each half of a warp leaves what it has of a column, and
//         they are added up in their order.
#pragma once
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "tile/block_gemm.cuh"

template <WeightsSimtConfig cfg>
CUFLASH_DEVICE void weights_simt(ParamsOf<cfg.score, WeightsParams> const& params, u32 smem) {
    using Gemm = BlockGemm<cfg.dtype, cfg.block_m, cfg.block_n, cfg.columns, cfg.threads()>;
    using Acc = typename Gemm::Acc;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_rows = params.num_rows;
    int const num_blocks =
        cfg.sums ? (shape.seqlen_k + cfg.block_n - 1) / cfg.block_n : (num_rows + cfg.block_m - 1) / cfg.block_m;
    int const block = blockIdx.x % num_blocks;
    int const head = blockIdx.x / num_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_blocks / shape.num_heads;
    i64 const of_head = static_cast<i64>(batch) * shape.num_heads + head;
    Gemm const gemm(smem, threadIdx.x);
    HeadScores<cfg.score, Acc> const head_scores(params, batch, head);
    auto query = [&](int row) { return params.first_row + row * params.row_step; };

    // ---- weights of a tile ----
    typename Gemm::TileS p;
    auto compute = [&](int first_row, int k_first, BlockRange const& keys) {
        RowTile const q{params.q.at(batch, head, query(first_row)), params.q.row_stride * params.row_step, 0,
                        num_rows - first_row};
        RowTile const k{params.k.at(batch, head / shape.group_size, k_first), params.k.row_stride, keys.k_begin - k_first,
                        keys.k_end - k_first};
#pragma unroll
        for (int i = 0; i < Gemm::kM; ++i)
#pragma unroll
            for (int j = 0; j < Gemm::kN; ++j) p[i][j] = 0;
        gemm.multiply_nt(p, q, k, shape.head_dim);
#pragma unroll
        for (int i = 0; i < Gemm::kM; ++i) {
            int const row = first_row + gemm.row(i), q_idx = query(min(row, num_rows - 1));
            Acc const lse = __ldg(reinterpret_cast<Acc const*>(params.lse) + of_head * shape.seqlen_q + q_idx);
#pragma unroll
            for (int j = 0; j < Gemm::kN; ++j) {
                int const k_idx = k_first + gemm.col(j);
                Acc const s = head_scores(p[i][j] * static_cast<Acc>(params.scale), q_idx, min(k_idx, shape.seqlen_k - 1));
                bool const visible = row < num_rows && lse != -infinity() && is_visible(shape, q_idx, k_idx);
                p[i][j] = visible ? exp2_acc(s - lse * Log2<Acc>::kE) : Acc(0);
            }
        }
    };

    if constexpr (!cfg.sums) {
        int const first_row = block * cfg.block_m, end_row = min(first_row + cfg.block_m, num_rows);
        BlockRange const range = key_blocks(shape, query(first_row), query(end_row - 1) + 1, cfg.block_n);
#pragma unroll 1
        for (int n_block = 0; n_block * cfg.block_n < shape.seqlen_k; ++n_block) {
            int const k_first = n_block * cfg.block_n;
            bool const is_seen = n_block >= range.first && n_block < range.last;
            if (is_seen) compute(first_row, k_first, range);
#pragma unroll
            for (int i = 0; i < Gemm::kM; ++i) {
                int const row = first_row + gemm.row(i);
                if (row >= num_rows) continue;
                Acc* const target = reinterpret_cast<Acc*>(params.weights) + (of_head * num_rows + row) * shape.seqlen_k;
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j) {
                    int const k_idx = k_first + gemm.col(j);
                    if (k_idx < shape.seqlen_k) target[k_idx] = is_seen ? p[i][j] : Acc(0);
                }
            }
        }
    } else {
        int const k_first = block * cfg.block_n, k_end = min(k_first + cfg.block_n, shape.seqlen_k);
        BlockRange const range = query_blocks(shape, k_first, k_end, cfg.block_m);
        BlockRange const seen = key_blocks(shape, 0, shape.seqlen_q, cfg.block_n);
        Acc sum[Gemm::kN] = {};
#pragma unroll 1
        for (int m_block = range.first; m_block < range.last; ++m_block) {
            compute(m_block * cfg.block_m, k_first, seen);
#pragma unroll
            for (int i = 0; i < Gemm::kM; ++i)
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j) sum[j] += p[i][j];
        }
        __syncthreads();  // the stage is free
        constexpr int kParts = cfg.threads() / 16;
        static_assert(kParts * cfg.block_n <= Gemm::kStage, "all sums fit the stage");
#pragma unroll
        for (int j = 0; j < Gemm::kN; ++j) gemm.stage[threadIdx.x / 16 * cfg.block_n + gemm.col(j)] = sum[j];
        __syncthreads();
        for (int i = threadIdx.x; i < k_end - k_first; i += cfg.threads()) {
            Acc total = 0;
#pragma unroll
            for (int part = 0; part < kParts; ++part) total += gemm.stage[part * cfg.block_n + i];
            reinterpret_cast<Acc*>(params.weights)[of_head * shape.seqlen_k + k_first + i] = total;
        }
    }
}
