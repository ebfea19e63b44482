// Attention backward, first step: the two numbers per query row that the main kernel reads, and an empty
// workspace for it.
//
// What    delta = rowsum(d_out o out) - d_lse and lse_log2 = lse log2(e) in float32; zeros in the semaphores, in the
//         counters, and in dq_accum or, where the main kernel goes on with that, in its first tiles.
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
    constexpr int kChunks = (kRowChunks + kLanes - 1) / kLanes;                                  // of each lane
    constexpr int kRows = kThreads / kLanes;                                                     // at a time
    constexpr int kParts = (cfg.block_m + kRows - 1) / kRows;

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

    // ---- load: all of it is under way before anything is waited for ----
    uint4 d_out[kParts][kChunks], out[kParts][kChunks];
    float lse[kParts], d_lse[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        int const row = part * kRows + thread / kLanes;
        int const q_idx = q_begin + row;
        bool const exists = row < cfg.block_m && q_idx < shape.seqlen_q;
        int const bytes = exists ? v_bytes : 0;
        char const* const d_out_row = params.d_out.at(batch, head, q_idx);
        char const* const out_row = params.out.at(batch, head, q_idx);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            int const chunk = thread % kLanes + i * kLanes;
            d_out[part][i] = load_chunk<kElemBytes, cfg.copy>(d_out_row, chunk, bytes);
            out[part][i] = load_chunk<kElemBytes, cfg.copy>(out_row, chunk, bytes);
        }
        i64 const index = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q + q_idx;
        lse[part] = exists ? __ldg(reinterpret_cast<float const*>(params.lse) + index) : -infinity();
        d_lse[part] = exists && params.d_lse != nullptr ? __ldg(reinterpret_cast<float const*>(params.d_lse) + index) : 0.f;
    }

    // ---- zeros ----
    constexpr int kAccumChunks = cfg.block_m * cfg.dq_columns / 4;
    uint4* const dq_accum = reinterpret_cast<uint4*>(params.dq_accum) + tile * kAccumChunks;
    if (tile < params.num_emptied)
        for (int i = thread; i < kAccumChunks; i += kThreads) dq_accum[i] = uint4{0, 0, 0, 0};
    i64 const counter = tile * kThreads + thread;
    if (counter < params.num_counters) reinterpret_cast<int*>(params.counters)[counter] = 0;
    if (thread < cfg.semaphores) reinterpret_cast<int*>(params.semaphore)[tile * cfg.semaphores + thread] = 0;

    // ---- rows ----
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            uint4 const x = d_out[part][i], y = out[part][i];
            sum += dot_word<cfg.mma>(x.x, y.x) + dot_word<cfg.mma>(x.y, y.y) + dot_word<cfg.mma>(x.z, y.z) +
                   dot_word<cfg.mma>(x.w, y.w);
        }
#pragma unroll
        for (int distance = 1; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        int const row = part * kRows + thread / kLanes;
        if (thread % kLanes == 0 && row < cfg.block_m) {
            bool const sees = lse[part] != -infinity();
            reinterpret_cast<float*>(params.lse_log2)[tile * cfg.block_m + row] = sees ? lse[part] * kLog2E : infinity();
            reinterpret_cast<float*>(params.delta)[tile * cfg.block_m + row] = sees ? sum - d_lse[part] : 0.f;
        }
    }
}
