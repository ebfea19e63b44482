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
//         kBias   for the gradient by the bias in a fixed order: backward_bias.cuh says what a block does.
//         A chunk is `columns` elements of the gradients' rows, the innermost index of the grid; each computes P
//         and dS again, so that the gradients of any head_dim are summed in registers.
// Memory  delta is the only workspace: (batch, num_heads, seqlen_q) of the accumulator type.
// Source  Dao et al. 2022 (FlashAttention), algorithm 4, with d_q in a kernel of its own instead of atomics.
#pragma once
#include "attention/bias_sums.cuh"
#include "attention/block_range.cuh"
#include "attention/captured.cuh"
#include "attention/config.cuh"
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "attention/score.cuh"
#include "tile/block_gemm.cuh"

// lse log2(e) of a row, +inf where P must be 0: for a row that sees nothing.
template <class Acc>
CUFLASH_DEVICE Acc load_lse_log2(char const* lse, i64 index) {
    Acc const value = __ldg(reinterpret_cast<Acc const*>(lse) + index);
    return value == -infinity() ? Acc(infinity()) : value * Log2<Acc>::kE;
}

// Weights and gradients of the scores of one query head, pair by pair, each of which exists.
template <BackwardSimtConfig cfg, class Acc>
struct PairGradients {
    ParamsOf<cfg.score, BackwardParams> const& params;
    HeadScores<cfg.score, Acc> scores;
    int const batch;
    int const head;

    CUFLASH_DEVICE PairGradients(ParamsOf<cfg.score, BackwardParams> const& params, int batch, int head)
        : params(params), scores(params, batch, head), batch(batch), head(head) {}

    // P before dropout, and the derivative of the score by q.k times scale.
    CUFLASH_DEVICE Acc weight(Acc product, Acc lse_log2, int q_idx, int k_idx, Acc& derivative) const {
        derivative = 1;
        Acc const scale = static_cast<Acc>(params.scale);
        Acc const score = cfg.score.changes() ? scores(product * scale, q_idx, k_idx, derivative)
                                              : product * static_cast<Acc>(params.scale * Log2<double>::kE);
        return exp2_acc(score - lse_log2);
    }
    // What dropout multiplies a weight by.
    CUFLASH_DEVICE Acc kept(int q_idx, int k_idx) const {
        if constexpr (!cfg.score.dropout) return 1;
        return is_kept(params.score, true, batch, head, q_idx, k_idx) ? static_cast<Acc>(params.score.kept_scale) : Acc(0);
    }
};

// Adds gradients by what was added to scores to where they are summed up. Along axes of stride 0 the warp's own are summed
// first: additions to one place come one after the other.
template <class Gemm>
CUFLASH_DEVICE void add_by_pairs(Pairs const& sums, char* origin, Gemm const& gemm, typename Gemm::TileS const& x,
                                 int q_begin, int k_begin) {
    using Acc = typename Gemm::Acc;
    int const lane = threadIdx.x % 32;  // 16 columns of two groups of rows
    bool const over_queries = sums.query_stride == 0, over_keys = sums.key_stride == 0;
    auto add = [&](Acc value, int q_idx, int k_idx) {
        // Where P is 0, hidden or past the ends, there is nothing to add.
        if (value != 0)
            add_to(reinterpret_cast<Acc*>(origin + q_idx * sums.query_stride + k_idx * sums.key_stride), value);
    };
    auto sum_over_columns = [](Acc sum) {
#pragma unroll
        for (int distance = 1; distance < 16; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        return sum;
    };
    if (over_keys) {
        Acc total = 0;
#pragma unroll
        for (int j = 0; j < Gemm::kN; ++j) {
            Acc sum = 0;
#pragma unroll
            for (int i = 0; i < Gemm::kM; ++i) sum += x[i][j];
            sum += __shfl_xor_sync(0xffffffffu, sum, 16);
            total += sum;
            if (!over_queries && lane < 16) add(sum, q_begin + gemm.col(j), 0);
        }
        total = sum_over_columns(total);
        if (over_queries && lane == 0) add(total, 0, 0);
        return;
    }
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i) {
        Acc sum = 0;
#pragma unroll
        for (int j = 0; j < Gemm::kN; ++j) {
            sum += x[i][j];
            if (!over_queries) add(x[i][j], q_begin + gemm.col(j), k_begin + gemm.row(i));
        }
        sum = sum_over_columns(sum);
        if (over_queries && lane % 16 == 0) add(sum, 0, k_begin + gemm.row(i));
    }
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
CUFLASH_DEVICE void backward_simt_dkdv(ParamsOf<cfg.score, BackwardParams> const& params, u32 smem) {
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
    BlockRange range = query_blocks(shape, k_begin, k_end, cfg.block_m);
    // Rows of keys that do not exist are not stored, but would count in sums over keys.
    if (cfg.score.changes() && k_begin + cfg.block_n > shape.seqlen_k) range.full_last = 0;
    Gemm const gemm(smem, threadIdx.x);

    // ---- load: queries that see no key of the block are not read ----
    RowTile const k{params.k.at(batch, head_kv, k_begin), params.k.row_stride, 0, k_end - k_begin};
    RowTile const v{params.v.at(batch, head_kv, k_begin), params.v.row_stride, 0, k_end - k_begin};

    // ---- mainloop ----
    typename Gemm::TileO d_k = {}, d_v = {};
#pragma unroll 1
    for (int head = head_kv * shape.group_size; head < (head_kv + 1) * shape.group_size; ++head) {
        i64 const first_row = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q;
        PairGradients<cfg, Acc> const pairs(params, batch, head);
        Acc slope_sum = 0;  // of the gradient of ALiBi's slope
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
            typename Gemm::TileS weights, derivatives;
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
                        int const k_idx = k_begin + gemm.row(i);
                        bool const visible = !masked || is_visible(shape, q_idx, k_idx);
                        int const q_near = min(q_idx, shape.seqlen_q - 1), k_near = min(k_idx, shape.seqlen_k - 1);
                        Acc const weight = pairs.weight(s[i][j], lse_log2, q_near, k_near, derivatives[i][j]);
                        weights[i][j] = visible ? weight : Acc(0);
                        gemm.p_at(i, j) = weights[i][j] * pairs.kept(q_near, k_near);
                    }
                }
            }
            gemm.multiply_nn(d_v, d_out, first_column, shape.head_dim_v);
            {
                typename Gemm::TileS d_p = {};
                gemm.multiply_nt(d_p, v, d_out, shape.head_dim_v);
                // dS takes the place of P.
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j) {
                    int const q_idx = q_begin + gemm.col(j);
                    Acc const delta = q_idx < shape.seqlen_q
                                          ? __ldg(reinterpret_cast<Acc const*>(params.delta) + first_row + q_idx)
                                          : Acc(0);
#pragma unroll
                    for (int i = 0; i < Gemm::kM; ++i) {
                        int const k_idx = k_begin + gemm.row(i);
                        bool const visible = !masked || is_visible(shape, q_idx, k_idx);
                        Acc x = 0;
                        // Where nothing is dropped, P is where this thread has put it.
                        Acc const weight = cfg.score.dropout ? weights[i][j] : gemm.p_at(i, j);
                        if (visible) x = weight * (d_p[i][j] * pairs.kept(q_idx, k_idx) - delta);
                        if constexpr (cfg.score.alibi)
                            if (visible) slope_sum -= x * pairs.scores.distance(q_idx, k_idx);
                        d_p[i][j] = x;
                        gemm.p_at(i, j) = by_derivative<cfg.score>(x, derivatives[i][j]);
                    }
                }
                if constexpr (cfg.score.bias != Bias::kNone)
                    if (params.d_bias.pointer != nullptr && first_column == 0)
                        add_by_pairs(params.d_bias, params.d_bias.at(batch, head), gemm, d_p, q_begin, k_begin);
            }
            gemm.multiply_nn(d_k, q, first_column, shape.head_dim);
        }
        if constexpr (cfg.score.alibi) {
            if (params.slope_sums != nullptr && first_column == 0) {
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2)
                    slope_sum += __shfl_xor_sync(0xffffffffu, slope_sum, distance);
                i64 const index = ((static_cast<i64>(batch) * shape.num_heads + head) * num_n_blocks + n_block) *
                                      cfg.num_warps +
                                  threadIdx.x / 32;
                if (threadIdx.x % 32 == 0) reinterpret_cast<Acc*>(params.slope_sums)[index] = slope_sum;
            }
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
CUFLASH_DEVICE void backward_simt_dq(ParamsOf<cfg.score, BackwardParams> const& params, u32 smem) {
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
    PairGradients<cfg, Acc> const pairs(params, batch, head);

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
        auto near_query = [&](int i) { return min(q_begin + gemm.row(i), shape.seqlen_q - 1); };
        auto near_key = [&](int j) { return min(k_begin + gemm.col(j), shape.seqlen_k - 1); };
        typename Gemm::TileS derivatives;
        {
            typename Gemm::TileS s = {};
            gemm.multiply_nt(s, q, k, shape.head_dim);
#pragma unroll
            for (int i = 0; i < Gemm::kM; ++i)
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j)
                    gemm.p_at(i, j) =
                        pairs.weight(s[i][j], lse_log2[i], near_query(i), near_key(j), derivatives[i][j]);
        }
        {
            typename Gemm::TileS d_p = {};
            gemm.multiply_nt(d_p, d_out, keys(params.v), shape.head_dim_v);
            bool const masked = range.needs_mask(n);
#pragma unroll
            for (int i = 0; i < Gemm::kM; ++i)
#pragma unroll
                for (int j = 0; j < Gemm::kN; ++j) {
                    bool const visible = !masked || is_visible(shape, q_begin + gemm.row(i), k_begin + gemm.col(j));
                    Acc const kept = pairs.kept(near_query(i), near_key(j));
                    Acc const weight = gemm.p_at(i, j);  // as this thread has put it there
                    Acc const x = visible ? weight * (d_p[i][j] * kept - delta[i]) : Acc(0);
                    gemm.p_at(i, j) = by_derivative<cfg.score>(x, derivatives[i][j]);
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

// dS of a tile, for gradients that have a kernel of their own; of the keys those in `range` are read. Of every pair
// `use(i, j, q.k times scale, dS, query, key)`; past the ends dS is 0, and query and key are the last ones.
template <class Gemm, BackwardSimtConfig cfg, class Use>
CUFLASH_DEVICE void for_each_pair(Gemm const& gemm, PairGradients<cfg, typename Gemm::Acc> const& pairs, int m_block,
                                  int n_block, BlockRange const& range, Use use) {
    using Acc = typename Gemm::Acc;
    auto const& params = pairs.params;
    Shape const& shape = params.shape;
    int const q_begin = m_block * cfg.block_m, k_begin = n_block * cfg.block_n;
    i64 const first_row = (static_cast<i64>(pairs.batch) * shape.num_heads + pairs.head) * shape.seqlen_q;
    auto queries = [&](Operand const& operand) {
        return RowTile{operand.at(pairs.batch, pairs.head, q_begin), operand.row_stride, 0,
                       min(shape.seqlen_q - q_begin, cfg.block_m)};
    };
    auto keys = [&](Operand const& operand) {
        return RowTile{operand.at(pairs.batch, pairs.head / shape.group_size, k_begin), operand.row_stride,
                       range.k_begin - k_begin, range.k_end - k_begin};
    };
    typename Gemm::TileS s = {}, d_p = {};
    gemm.multiply_nt(s, queries(params.q), keys(params.k), shape.head_dim);
    gemm.multiply_nt(d_p, queries(params.d_out), keys(params.v), shape.head_dim_v);
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i) {
        int const q_idx = q_begin + gemm.row(i), q_near = min(q_idx, shape.seqlen_q - 1);
        Acc const lse_log2 = load_lse_log2<Acc>(params.lse, first_row + q_near);
        Acc const delta = __ldg(reinterpret_cast<Acc const*>(params.delta) + first_row + q_near);
#pragma unroll
        for (int j = 0; j < Gemm::kN; ++j) {
            int const k_idx = k_begin + gemm.col(j), k_near = min(k_idx, shape.seqlen_k - 1);
            Acc derivative;
            Acc weight = pairs.weight(s[i][j], lse_log2, q_near, k_near, derivative);
            if (!is_visible(shape, q_idx, k_idx)) weight = 0;
            Acc const x = weight == 0 ? Acc(0) : weight * (d_p[i][j] * pairs.kept(q_near, k_near) - delta);
            use(i, j, s[i][j] * static_cast<Acc>(params.scale), x, q_near, k_near);
        }
    }
}

// Gradients by the arrays that an expression captures, by tiles of queries as for d_q.
template <BackwardSimtConfig cfg>
CUFLASH_DEVICE void backward_simt_captured(ParamsOf<cfg.score, BackwardParams> const& params, u32 smem) {
    using Gemm = BlockGemm<cfg.dtype, cfg.block_m, cfg.block_n, cfg.columns, cfg.threads()>;
    using Acc = typename Gemm::Acc;
    Shape const& shape = params.shape;
    int const num_m_blocks = (shape.seqlen_q + cfg.block_m - 1) / cfg.block_m;
    int const m_block = num_m_blocks - 1 - static_cast<int>(blockIdx.x % num_m_blocks);
    int const head = blockIdx.x / num_m_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_m_blocks / shape.num_heads;
    int const q_begin = m_block * cfg.block_m;
    BlockRange const range = key_blocks(shape, q_begin, min(shape.seqlen_q, q_begin + cfg.block_m), cfg.block_n);
    Gemm const gemm(smem, threadIdx.x);
    PairGradients<cfg, Acc> const pairs(params, batch, head);
    CapturedSums<HeadScores<cfg.score, Acc>, Acc> sums(pairs.scores);
#pragma unroll 1
    for (int n_block = range.first; n_block < range.last; ++n_block)
        for_each_pair(gemm, pairs, m_block, n_block, range,
                      [&](int, int, Acc s, Acc x, int q_idx, int k_idx) { sums.add(s, x, q_idx, k_idx); });
    sums.finish();
}

// The gradient by the bias in a fixed order; backward_bias.cuh is the same on tensor cores.
template <BackwardSimtConfig cfg>
CUFLASH_DEVICE void backward_simt_bias(ParamsOf<cfg.score, BackwardParams> const& params, u32 smem) {
    using Gemm = BlockGemm<cfg.dtype, cfg.block_m, cfg.block_n, cfg.columns, cfg.threads()>;
    using Acc = typename Gemm::Acc;
    Shape const& shape = params.shape;
    Pairs const& sums = params.bias_sums;
    BiasPart const part(shape, sums, params.num_batches, cfg.block_m, cfg.block_n);
    Gemm const gemm(smem, threadIdx.x);
    typename Gemm::TileS acc = {};
#pragma unroll 1
    for (int batch = part.batches.begin; batch < part.batches.end; ++batch)
#pragma unroll 1
        for (int head = part.heads.begin; head < part.heads.end; ++head) {
            PairGradients<cfg, Acc> const pairs(params, batch, head);
#pragma unroll 1
            for (int m_block = part.m_blocks.begin; m_block < part.m_blocks.end; ++m_block) {
                int const q_begin = m_block * cfg.block_m;
                BlockRange const range = key_blocks(shape, q_begin, min(shape.seqlen_q, q_begin + cfg.block_m), cfg.block_n);
                int const first = max(part.n_blocks.begin, range.first), last = min(part.n_blocks.end, range.last);
#pragma unroll 1
                for (int n_block = first; n_block < last; ++n_block)
                    for_each_pair(gemm, pairs, m_block, n_block, range,
                                  [&](int i, int j, Acc, Acc x, int, int) { acc[i][j] += x; });
            }
        }
#pragma unroll
    for (int i = 0; i < Gemm::kM; ++i)
#pragma unroll
        for (int j = 0; j < Gemm::kN; ++j) gemm.p_at(i, j) = acc[i][j];
    __syncthreads();
    add_tile<cfg.block_m, cfg.block_n, cfg.threads(), Acc>(
        sums, sums.at(part.batches.begin, part.heads.begin), shape, part.m_blocks.begin * cfg.block_m,
        part.n_blocks.begin * cfg.block_n, [&](int row, int col) { return gemm.p[row * Gemm::kPitchP + col]; },
        [&](int row, int col, Acc x) { gemm.p[row * Gemm::kPitchP + col] = x; });
}

template <BackwardSimtConfig cfg>
CUFLASH_DEVICE void backward_simt(ParamsOf<cfg.score, BackwardParams> const& params, u32 smem) {
    if constexpr (cfg.step == BackwardStep::kDelta) {
        backward_simt_delta<cfg>(params);
    } else if constexpr (cfg.step == BackwardStep::kDKDV) {
        backward_simt_dkdv<cfg>(params, smem);
    } else if constexpr (cfg.step == BackwardStep::kDQ) {
        backward_simt_dq<cfg>(params, smem);
    } else if constexpr (cfg.step == BackwardStep::kCaptured) {
        backward_simt_captured<cfg>(params, smem);
    } else {
        backward_simt_bias<cfg>(params, smem);
    }
}
