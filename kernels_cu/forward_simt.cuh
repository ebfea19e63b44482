// Attention forward on ordinary FMA instructions: what the tensor-core kernels do not take, which is float64,
// float32 before sm_80, and a head_dim or head_dim_v above 256.
//
// What    out = softmax(scale * q k^T over visible keys) v and lse, for one (batch, head), block_m query rows
//         and `columns` elements of each output row per thread block.
// Maths   for each key tile:  S = scale_log2 Q K^T, hidden pairs -inf      [block_m, block_n]
//                             m' = max(m, rowmax S), P = exp2(S - m')
//                             alpha = exp2(m - m'), l = l alpha + rowsum P
//                             O = O alpha + P V                            [block_m, columns]
//         and at the end      out = O / l,  lse = (m + log2 l) ln 2.
// Blocks  grid.x = chunks of head_dim_v (at least one) * m_blocks * num_heads * batch, chunks innermost. A chunk
//         computes the scores again: O stays in registers, whatever head_dim_v, and no partial result goes
//         through memory. Up to `columns` nothing is repeated; 512 with columns = 256 costs half as much again.
// Who     16 threads share a row of both products (tile/block_gemm.cuh): softmax needs four shuffles.
// Source  Dao 2023 (FlashAttention-2), algorithm 1.
#pragma once
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "attention/score.cuh"
#include "tile/block_gemm.cuh"

template <ForwardSimtConfig cfg>
CUFLASH_DEVICE void forward_simt(ParamsOf<cfg.score, ForwardParams> const& params, u32 smem) {
    using Gemm = BlockGemm<cfg.dtype, cfg.block_m, cfg.block_n, cfg.columns, cfg.threads()>;
    using Acc = typename Gemm::Acc;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_chunks = max(1, (shape.head_dim_v + cfg.columns - 1) / cfg.columns);
    int const num_m_blocks = (shape.seqlen_q + cfg.block_m - 1) / cfg.block_m;
    int const first_column = blockIdx.x % num_chunks * cfg.columns;
    int const m_block = num_m_blocks - 1 - static_cast<int>(blockIdx.x / num_chunks % num_m_blocks);
    int const head = blockIdx.x / num_chunks / num_m_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_chunks / num_m_blocks / shape.num_heads;
    int const q_begin = m_block * cfg.block_m;
    int const q_end = min(shape.seqlen_q, q_begin + cfg.block_m);
    int const head_kv = head / shape.group_size;
    BlockRange const range = key_blocks(shape, q_begin, q_end, cfg.block_n);
    Gemm const gemm(smem, threadIdx.x);

    // ---- load: keys that no query of the block sees are not read ----
    RowTile const q{params.q.at(batch, head, q_begin), params.q.row_stride, 0, q_end - q_begin};
    auto keys = [&](Operand const& operand, int k_begin) {
        return RowTile{operand.at(batch, head_kv, k_begin), operand.row_stride, range.k_begin - k_begin,
                       range.k_end - k_begin};
    };

    // ---- state of the thread's rows ----
    typename Gemm::TileO o = {};
    Acc row_max[Gemm::kM];
    Acc row_sum[Gemm::kM];  // this thread's part only, until the epilogue
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i) {
        row_max[i] = -infinity();
        row_sum[i] = 0;
    }
    Acc const scale_log2 = static_cast<Acc>(params.scale * Log2<double>::kE);
    HeadScores<cfg.score, Acc> const head_scores(params, batch, head);
    if constexpr (cfg.score.sinks) {
        // As if every row had seen a key of this score already, whose value is 0.
        Acc const sink = *reinterpret_cast<Acc const*>(params.score.sinks.at(0, head)) * Log2<Acc>::kE;
#pragma unroll
        for (int i = 0; i < Gemm::kM; ++i) {
            row_max[i] = sink;
            row_sum[i] = gemm.col(0) == 0 && sink != -infinity() ? 1 : 0;
        }
    }

    // ---- mainloop ----
#pragma unroll 1
    for (int n = range.last - 1; n >= range.first; --n) {
        int const k_begin = n * cfg.block_n;
        typename Gemm::TileS s = {};
        gemm.multiply_nt(s, q, keys(params.k, k_begin), shape.head_dim);
        bool const masked = range.needs_mask(n);
#pragma unroll
        for (int i = 0; i < Gemm::kM; ++i) {
            Acc tile_max = -infinity();
#pragma unroll
            for (int j = 0; j < Gemm::kN; ++j) {
                int const q_idx = q_begin + gemm.row(i), k_idx = k_begin + gemm.col(j);
                if constexpr (cfg.score.changes()) {
                    s[i][j] = head_scores(s[i][j] * static_cast<Acc>(params.scale), min(q_idx, shape.seqlen_q - 1),
                                          min(k_idx, shape.seqlen_k - 1));
                } else {
                    s[i][j] *= scale_log2;
                }
                if (masked && !is_visible(shape, q_idx, k_idx)) s[i][j] = -infinity();
                tile_max = max(tile_max, s[i][j]);
            }
            Acc const next = max(row_max[i], Gemm::max_of_row(tile_max));
            Acc const shift = next == -infinity() ? Acc(0) : next;  // while a row has seen nothing
            Acc const alpha = exp2_acc(row_max[i] - shift);
            row_max[i] = next;
            row_sum[i] *= alpha;
#pragma unroll
            for (int j = 0; j < Gemm::kN; ++j) {
                Acc const p = exp2_acc(s[i][j] - shift);
                row_sum[i] += p;
                bool const kept = is_kept(params.score, cfg.score.dropout, batch, head, q_begin + gemm.row(i),
                                          k_begin + gemm.col(j));
                gemm.p_at(i, j) = kept ? p : Acc(0);
            }
#pragma unroll
            for (int g = 0; g < Gemm::kGroups; ++g)
#pragma unroll
                for (int e = 0; e < Gemm::kVec; ++e) o[i][g][e] *= alpha;
        }
        gemm.multiply_nn(o, keys(params.v, k_begin), first_column, shape.head_dim_v);
    }

    // ---- epilogue ----
    Acc inverse[Gemm::kM];
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i) {
        Acc const sum = Gemm::sum_of_row(row_sum[i]);
        int const q_idx = q_begin + gemm.row(i);
        inverse[i] = sum == 0 ? Acc(0) : (cfg.score.dropout ? static_cast<Acc>(params.score.kept_scale) : Acc(1)) / sum;
        if (params.lse != nullptr && first_column == 0 && gemm.col(0) == 0 && q_idx < q_end) {
            i64 const index = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q + q_idx;
            Acc const lse = (row_max[i] + log2_acc(sum)) * Log2<Acc>::kLn2;
            reinterpret_cast<Acc*>(params.lse)[index] = sum == 0 ? -infinity() : lse;
        }
    }
    gemm.store(params.out.at(batch, head, q_begin), params.out.row_stride, o, inverse, q_end - q_begin, first_column,
               shape.head_dim_v);
}
