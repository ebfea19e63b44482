// Attention backward, first step: the two numbers per query row that the main kernel reads, and an empty
// workspace for it.
//
// What    delta = rowsum(d_out o out) - d_lse and lse_log2 = lse log2(e) in float32; zeros in dq_accum, in the
//         semaphores and in the counters.
//         d_lse enters here because d lse / d S = P: dS = P o (dP - rowsum(d_out o out)) + P d_lse.
// Blocks  grid.x = m_blocks * num_heads * batch: one query tile of the main kernel each. Rows of the last tile
//         that are past the end, and rows that see no key, get lse_log2 = +inf and delta = 0, hence P = dS = 0.
// Who     a few neighbouring lanes per row, 16 bytes of it at a time each.
#pragma once
#include "attention/config.cuh"
#include "attention/params.cuh"
#include "ptx/math.cuh"
#include "tile/fragment.cuh"

// 16 bytes of a row of which `row_bytes` exist; what does not exist is 0.
template <int kElemBytes, Copy kCopy>
CUFLASH_DEVICE uint4 load_chunk(char const* row, int chunk, int row_bytes) {
    char const* const source = row + chunk * 16;
    if constexpr (kCopy != Copy::kElement) {
        return chunk * 16 < row_bytes ? __ldg(reinterpret_cast<uint4 const*>(source)) : uint4{0, 0, 0, 0};
    } else {
        u32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < 16 / kElemBytes; ++i) {
            if (chunk * 16 + i * kElemBytes >= row_bytes) break;
            if constexpr (kElemBytes == 2) {
                words[i / 2] |= static_cast<u32>(__ldg(reinterpret_cast<u16 const*>(source) + i)) << (16 * (i % 2));
            } else {
                words[i] = __ldg(reinterpret_cast<u32 const*>(source) + i);
            }
        }
        return uint4{words[0], words[1], words[2], words[3]};
    }
}

// Sum of the products of the elements of two registers.
template <Mma kMma>
CUFLASH_DEVICE float dot_word(u32 x, u32 y) {
    if constexpr (is_16bit(kMma)) {
        return unpack_low<kMma>(x) * unpack_low<kMma>(y) + unpack_high<kMma>(x) * unpack_high<kMma>(y);
    } else {
        return __uint_as_float(x) * __uint_as_float(y);
    }
}

template <BackwardPreprocessConfig cfg>
CUFLASH_DEVICE void backward_preprocess(BackwardParams const& params, u32 /*smem*/) {
    constexpr int kElemBytes = elem_bytes(cfg.mma);
    constexpr int kThreads = cfg.threads();
    constexpr int kRowChunks = cfg.head_dim_v * kElemBytes / 16;
    constexpr int kLanes = kRowChunks > 16 ? 32 : kRowChunks > 8 ? 16 : kRowChunks > 4 ? 8 : 4;  // per row
    constexpr int kRows = kThreads / kLanes;                                                     // at a time

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_m_blocks = params.rows / cfg.block_m;
    // From the last tile to the first: the main kernel begins with the first ones, which are then in the cache.
    int const tile_index = gridDim.x - 1 - blockIdx.x;
    int const m_block = tile_index % num_m_blocks;
    int const head = tile_index / num_m_blocks % shape.num_heads;
    int const batch = tile_index / num_m_blocks / shape.num_heads;
    int const thread = threadIdx.x;
    int const q_begin = m_block * cfg.block_m;
    int const v_bytes = shape.head_dim_v * kElemBytes;
    i64 const tile = tile_index;

    // ---- rows ----
#pragma unroll
    for (int first = 0; first < cfg.block_m; first += kRows) {
        int const row = first + thread / kLanes;
        int const q_idx = q_begin + row;
        bool const exists = row < cfg.block_m && q_idx < shape.seqlen_q;
        float sum = 0.f;
        if (exists) {
            char const* const d_out = params.d_out.at(batch, head, q_idx);
            char const* const out = params.out.at(batch, head, q_idx);
#pragma unroll
            for (int chunk = thread % kLanes; chunk < kRowChunks; chunk += kLanes) {
                uint4 const x = load_chunk<kElemBytes, cfg.copy>(d_out, chunk, v_bytes);
                uint4 const y = load_chunk<kElemBytes, cfg.copy>(out, chunk, v_bytes);
                sum += dot_word<cfg.mma>(x.x, y.x) + dot_word<cfg.mma>(x.y, y.y) + dot_word<cfg.mma>(x.z, y.z) +
                       dot_word<cfg.mma>(x.w, y.w);
            }
        }
#pragma unroll
        for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (thread % kLanes == 0 && row < cfg.block_m) {
            float lse_log2 = infinity(), delta = 0.f;
            if (exists) {
                i64 const index = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q + q_idx;
                float const lse = reinterpret_cast<float const*>(params.lse)[index];
                if (lse != -infinity()) {
                    lse_log2 = lse * kLog2E;
                    delta = sum;
                    if (params.d_lse != nullptr) delta -= reinterpret_cast<float const*>(params.d_lse)[index];
                }
            }
            reinterpret_cast<float*>(params.lse_log2)[tile * cfg.block_m + row] = lse_log2;
            reinterpret_cast<float*>(params.delta)[tile * cfg.block_m + row] = delta;
        }
    }

    // ---- zeros ----
    constexpr int kAccumChunks = cfg.block_m * cfg.dq_columns / 4;
    uint4* const dq_accum = reinterpret_cast<uint4*>(params.dq_accum) + tile * kAccumChunks;
    for (int i = thread; i < kAccumChunks; i += kThreads) dq_accum[i] = uint4{0, 0, 0, 0};
    if (tile == 0)
        for (int i = thread; i < params.num_counters; i += kThreads) reinterpret_cast<int*>(params.counters)[i] = 0;
    if (thread < cfg.semaphores) reinterpret_cast<int*>(params.semaphore)[tile * cfg.semaphores + thread] = 0;
}
