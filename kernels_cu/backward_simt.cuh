// Attention backward on ordinary FMA instructions: float64, float32 before sm_80, and head dims above 256.
// Three steps, each a kernel of its own, without atomics: sums always run in the same order.
//
// Maths   delta = rowsum(d_out o out) - d_lse
//         P = exp2(scale_log2 Q K^T - lse log2(e)), 0 where hidden;  dS = P o (d_out V^T - delta)
//         dV = P^T d_out,  dK = scale dS^T Q,  dQ = scale dS K
// Steps   kDelta  a warp per query row; grid.x = ceil(seqlen_q / num_warps) * num_heads * batch.
//         kDKDV   block_n keys stay, the query tiles of every head of their group pass by: GQA sums in registers.
//                 Everything is transposed: S^T = K Q^T and so on, [block_n, block_m].
//                 grid.x = chunks of max(head_dim, head_dim_v) * n_blocks * num_heads_kv * batch
//         kDQ     block_m queries stay, key tiles pass by. [block_m, block_n]
//                 grid.x = chunks of head_dim * m_blocks * num_heads * batch
//         A chunk is `columns` elements of the gradients' rows, the innermost index of the grid; each computes P
//         and dS again, so that the gradients of any head_dim are summed in registers.
// Memory  delta is the only workspace: (batch, num_heads, seqlen_q) of the accumulator type.
// Source  Dao et al. 2022 (FlashAttention), algorithm 4, with d_q in a kernel of its own instead of atomics.
#pragma once
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/mask.cuh"
#include "tile/block_gemm.cuh"

// lse log2(e) of a row, +inf where P must be 0: for a row that sees nothing.
template <class Acc>
CUFLASH_DEVICE Acc load_lse_log2(char const* lse, i64 index) {
    Acc const value = __ldg(reinterpret_cast<Acc const*>(lse) + index);
    return value == -infinity() ? Acc(infinity()) : value * Log2<Acc>::kE;
}

template <BackwardSimtConfig cfg>
CUFLASH_DEVICE void backward_simt_delta(BackwardParams const& params) {
    using E = Element<cfg.dtype>;
    using Stored = typename E::Stored;
    using Acc = typename E::Acc;
    Shape const& shape = params.shape;
    int const num_blocks = (shape.seqlen_q + cfg.num_warps - 1) / cfg.num_warps;
    int const q_idx = static_cast<int>(blockIdx.x % num_blocks) * cfg.num_warps + threadIdx.x / 32;
    int const head = blockIdx.x / num_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_blocks / shape.num_heads;
    int const lane = threadIdx.x % 32;
    bool const exists = q_idx < shape.seqlen_q;

    Acc sum = 0;
    if (exists) {
        Stored const* const out = reinterpret_cast<Stored const*>(params.out.at(batch, head, q_idx));
        Stored const* const d_out = reinterpret_cast<Stored const*>(params.d_out.at(batch, head, q_idx));
        for (int column = lane; column < shape.head_dim_v; column += 32)
            sum += E::widen(__ldg(out + column)) * E::widen(__ldg(d_out + column));
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (exists && lane == 0) {
        i64 const index = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q + q_idx;
        if (params.d_lse != nullptr) sum -= reinterpret_cast<Acc const*>(params.d_lse)[index];
        reinterpret_cast<Acc*>(params.delta)[index] = sum;
    }
}

template <BackwardSimtConfig cfg>
CUFLASH_DEVICE void backward_simt_dkdv(BackwardParams const& params, u32 smem) {
    using Gemm = BlockGemm<cfg.dtype, cfg.block_n, cfg.block_m, cfg.columns, cfg.threads()>;
    using Acc = typename Gemm::Acc;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_chunks = max(1, (max(shape.head_dim, shape.head_dim_v) + cfg.columns - 1) / cfg.columns);
    int const num_n_blocks = (shape.seqlen_k + cfg.block_n - 1) / cfg.block_n;
    int const num_heads_kv = shape.num_heads / shape.group_size;
    int const first_column = blockIdx.x % num_chunks * cfg.columns;
    int const n_block = blockIdx.x / num_chunks % num_n_blocks;
    int const head_kv = blockIdx.x / num_chunks / num_n_blocks % num_heads_kv;
    int const batch = blockIdx.x / num_chunks / num_n_blocks / num_heads_kv;
    int const k_begin = n_block * cfg.block_n;
    int const k_end = min(shape.seqlen_k, k_begin + cfg.block_n);
    BlockRange const range = query_blocks(shape, k_begin, k_end, cfg.block_m);
    Gemm const gemm(smem, threadIdx.x);
    Acc const scale_log2 = static_cast<Acc>(params.scale * Log2<double>::kE);

    // ---- load: queries that see no key of the block are not read ----
    RowTile const k{params.k.at(batch, head_kv, k_begin), params.k.row_stride, 0, k_end - k_begin};
    RowTile const v{params.v.at(batch, head_kv, k_begin), params.v.row_stride, 0, k_end - k_begin};

    // ---- mainloop ----
    typename Gemm::TileO d_k = {}, d_v = {};
#pragma unroll 1
    for (int head = head_kv * shape.group_size; head < (head_kv + 1) * shape.group_size; ++head) {
        i64 const first_row = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q;
#pragma unroll 1
        for (int m = range.first; m < range.last; ++m) {
            int const q_begin = m * cfg.block_m;
            auto queries = [&](Operand const& operand) {
                return RowTile{operand.at(batch, head, q_begin), operand.row_stride, range.k_begin - q_begin,
                               range.k_end - q_begin};
            };
            RowTile const q = queries(params.q);
            RowTile const d_out = queries(params.d_out);
            bool const masked = range.needs_mask(m);
            {
                typename Gemm::TileS s = {};
                gemm.multiply_nt(s, k, q, shape.head_dim);
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j) {
                    int const q_idx = q_begin + gemm.col(j);
                    Acc const lse_log2 =
                        q_idx < shape.seqlen_q ? load_lse_log2<Acc>(params.lse, first_row + q_idx) : Acc(infinity());
#pragma unroll
                    for (int i = 0; i < Gemm::kM; ++i) {
                        bool const visible = !masked || is_visible(shape, q_idx, k_begin + gemm.row(i));
                        gemm.p_at(i, j) = visible ? exp2_acc(s[i][j] * scale_log2 - lse_log2) : Acc(0);
                    }
                }
            }
            gemm.multiply_nn(d_v, d_out, first_column, shape.head_dim_v);
            {
                typename Gemm::TileS d_p = {};
                gemm.multiply_nt(d_p, v, d_out, shape.head_dim_v);
                // dS takes the place of P. Every thread reads what it wrote itself.
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j) {
                    int const q_idx = q_begin + gemm.col(j);
                    Acc const delta = q_idx < shape.seqlen_q
                                          ? __ldg(reinterpret_cast<Acc const*>(params.delta) + first_row + q_idx)
                                          : Acc(0);
#pragma unroll
                    for (int i = 0; i < Gemm::kM; ++i) {
                        bool const visible = !masked || is_visible(shape, q_idx, k_begin + gemm.row(i));
                        gemm.p_at(i, j) = visible ? gemm.p_at(i, j) * (d_p[i][j] - delta) : Acc(0);
                    }
                }
            }
            gemm.multiply_nn(d_k, q, first_column, shape.head_dim);
        }
    }

    // ---- epilogue ----
    Acc one[Gemm::kM], scale[Gemm::kM];
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i) {
        one[i] = 1;
        scale[i] = static_cast<Acc>(params.scale);
    }
    gemm.store(params.d_k.at(batch, head_kv, k_begin), params.d_k.row_stride, d_k, scale, k_end - k_begin,
               first_column, shape.head_dim);
    gemm.store(params.d_v.at(batch, head_kv, k_begin), params.d_v.row_stride, d_v, one, k_end - k_begin, first_column,
               shape.head_dim_v);
}

template <BackwardSimtConfig cfg>
CUFLASH_DEVICE void backward_simt_dq(BackwardParams const& params, u32 smem) {
    using Gemm = BlockGemm<cfg.dtype, cfg.block_m, cfg.block_n, cfg.columns, cfg.threads()>;
    using Acc = typename Gemm::Acc;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_chunks = max(1, (shape.head_dim + cfg.columns - 1) / cfg.columns);
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
    Acc const scale_log2 = static_cast<Acc>(params.scale * Log2<double>::kE);

    // ---- load: keys that no query of the block sees are not read ----
    RowTile const q{params.q.at(batch, head, q_begin), params.q.row_stride, 0, q_end - q_begin};
    RowTile const d_out{params.d_out.at(batch, head, q_begin), params.d_out.row_stride, 0, q_end - q_begin};
    Acc lse_log2[Gemm::kM], delta[Gemm::kM];
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i) {
        int const q_idx = min(q_begin + gemm.row(i), shape.seqlen_q - 1);  // past the end: computed, not stored
        i64 const index = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q + q_idx;
        lse_log2[i] = load_lse_log2<Acc>(params.lse, index);
        delta[i] = __ldg(reinterpret_cast<Acc const*>(params.delta) + index);
    }

    // ---- mainloop ----
    typename Gemm::TileO d_q = {};
#pragma unroll 1
    for (int n = range.last - 1; n >= range.first; --n) {
        int const k_begin = n * cfg.block_n;
        auto keys = [&](Operand const& operand) {
            return RowTile{operand.at(batch, head_kv, k_begin), operand.row_stride, range.k_begin - k_begin,
                           range.k_end - k_begin};
        };
        RowTile const k = keys(params.k);
        {
            typename Gemm::TileS s = {};
            gemm.multiply_nt(s, q, k, shape.head_dim);
#pragma unroll
            for (int i = 0; i < Gemm::kM; ++i)
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j)
                    gemm.p_at(i, j) = exp2_acc(s[i][j] * scale_log2 - lse_log2[i]);
        }
        {
            typename Gemm::TileS d_p = {};
            gemm.multiply_nt(d_p, d_out, keys(params.v), shape.head_dim_v);
            // dS takes the place of P. Every thread reads what it wrote itself.
            bool const masked = range.needs_mask(n);
#pragma unroll
            for (int i = 0; i < Gemm::kM; ++i)
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j) {
                    bool const visible = !masked || is_visible(shape, q_begin + gemm.row(i), k_begin + gemm.col(j));
                    gemm.p_at(i, j) = visible ? gemm.p_at(i, j) * (d_p[i][j] - delta[i]) : Acc(0);
                }
        }
        gemm.multiply_nn(d_q, k, first_column, shape.head_dim);
    }

    // ---- epilogue ----
    Acc scale[Gemm::kM];
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i)
        scale[i] = lse_log2[i] == infinity() ? Acc(0) : static_cast<Acc>(params.scale);  // sees nothing: exactly 0
    gemm.store(params.d_q.at(batch, head, q_begin), params.d_q.row_stride, d_q, scale, q_end - q_begin, first_column,
               shape.head_dim);
}

template <BackwardSimtConfig cfg>
CUFLASH_DEVICE void backward_simt(BackwardParams const& params, u32 smem) {
    if constexpr (cfg.step == BackwardStep::kDelta) {
        backward_simt_delta<cfg>(params);
    } else if constexpr (cfg.step == BackwardStep::kDKDV) {
        backward_simt_dkdv<cfg>(params, smem);
    } else {
        backward_simt_dq<cfg>(params, smem);
    }
}
