// Gradients by the bias in a fixed order: which pairs a thread block sums up, and where it leaves the sums.
#pragma once
#include "params.cuh"

struct Span {
    int begin, end;
};

// What a block has of its own along the axes that the bias has; along those that it is broadcast over, everything.
struct BiasPart {
    Span n_blocks, m_blocks, heads, batches;

    CUFLASH_DEVICE BiasPart(Shape const& shape, Pairs const& sums, int num_batches, int block_m, int block_n) {
        int rest = blockIdx.x;
        auto take = [&](i64 stride, int count) {
            if (stride == 0) return Span{0, count};
            int const index = rest % count;
            rest /= count;
            return Span{index, index + 1};
        };
        n_blocks = take(sums.key_stride, (shape.seqlen_k + block_n - 1) / block_n);
        m_blocks = take(sums.query_stride, (shape.seqlen_q + block_m - 1) / block_m);
        heads = take(sums.head_stride, shape.num_heads);
        batches = take(sums.batch_stride, num_batches);
    }
};

// Adds a tile to where the gradient is summed up, which no other block does; along axes that the bias is broadcast over the
// tile is summed first. `load(row, col)` and `store(row, col, x)` are of the tile, in shared memory and complete.
template <int kRows, int kCols, int kThreads, class Acc, class Load, class Store>
CUFLASH_DEVICE void add_tile(Pairs const& sums, char* origin, Shape const& shape, int q_first, int k_first, Load load,
                             Store store) {
    int const thread = threadIdx.x;
    int rows = kRows, cols = kCols;
    if (sums.key_stride == 0) {
        for (int row = thread; row < rows; row += kThreads) {
            Acc sum = 0;
            for (int col = 0; col < kCols; ++col) sum += load(row, col);
            store(row, 0, sum);
        }
        cols = 1;
        __syncthreads();
    }
    if (sums.query_stride == 0) {
        for (int col = thread; col < cols; col += kThreads) {
            Acc sum = 0;
            for (int row = 0; row < kRows; ++row) sum += load(row, col);
            store(0, col, sum);
        }
        rows = 1;
        __syncthreads();
    }
    for (int i = thread; i < rows * cols; i += kThreads) {
        int const row = i / cols, col = i % cols;
        if (q_first + row >= shape.seqlen_q || k_first + col >= shape.seqlen_k) continue;
        *reinterpret_cast<Acc*>(origin + (q_first + row) * sums.query_stride + (k_first + col) * sums.key_stride) +=
            load(row, col);
    }
}
