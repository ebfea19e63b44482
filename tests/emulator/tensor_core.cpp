#include "tensor_core.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"

namespace emulator {

namespace {

constexpr u32 kInFlight = 0x7f817fc3u;  // in registers that a product will write; a NaN that arithmetic changes

// A descriptor (tile/warpgroup.cuh) in bytes.
struct Operand {
    u32 start, slab_stride, eight_rows;
    bool is_transposed;
    int rows;  // along the axis that is not reduced: 64 of A, N of B

    Operand(u64 descriptor, bool is_transposed, int rows)
        : start((descriptor & 0x3fff) << 4), slab_stride((descriptor >> 16 & 0x3fff) << 4),
          eight_rows((descriptor >> 32 & 0x3fff) << 4), is_transposed(is_transposed), rows(rows) {}

    // Calls `visit(address, row, k)` for the 16-byte chunks of 16 steps of the reduction. A chunk holds 8 steps of one
    // row or, transposed, 8 rows of one step.
    template <class Visit>
    void for_each_chunk(Visit visit) const {
        if (is_transposed) {
            for (int k = 0; k < 16; ++k)
                for (int row = 0; row < rows; row += 8)
                    visit(swizzled(start + row / 64 * slab_stride + k / 8 * eight_rows + k % 8 * 128 + row % 64 * 2),
                          row, k);
        } else {
            for (int row = 0; row < rows; ++row)
                for (int k = 0; k < 16; k += 8)
                    visit(swizzled(start + row / 8 * eight_rows + row % 8 * 128 + k * 2), row, k);
        }
    }
};

Operand operand_a(ProductKind const& kind) { return Operand(kind.a, kind.transposes_a, 64); }
Operand operand_b(ProductKind const& kind) { return Operand(kind.b, kind.transposes_b, 8 * kind.tiles); }

void check_descriptor(u64 descriptor, Operand const& operand) {
    if (descriptor >> 62 != 1) error("wgmma: swizzle mode %llu, where 1 (128 bytes) is emulated", descriptor >> 62);
    if ((descriptor >> 49 & 7) != 0 || operand.start % 1024 >= 128)
        error("wgmma: an operand at 0x%x, inside of a swizzle pattern", operand.start);
    int const bytes = operand.is_transposed ? std::min(operand.rows, 64) * 2 : 32;
    if (operand.start % 128 + bytes > 128) error("wgmma: an operand at 0x%x leaves its 128 bytes", operand.start);
}

float widen(u16 bits, Element element) { return element == Element::kBF16 ? from_bf16(bits) : from_f16(bits); }

// Rows and columns of a 16-row fragment: registers of A hold two neighbouring elements, those of C one.
int fragment_row(int lane, int i) { return lane / 4 + 8 * i; }
int fragment_column(int lane, int i) { return lane % 4 * 2 + 8 * i; }

// Where element i of tile n of a thread of the warpgroup lies in the sums.
float& element(Sums& sums, int tiles, int thread, int n, int i) {
    int const row = thread / 32 * 16 + fragment_row(thread % 32, i / 2);
    return sums[row * 8 * tiles + 8 * n + fragment_column(thread % 32, 0) + i % 2];
}

bool are_untouched(IssuedProducts::Accumulator const& accumulator) {
    return std::all_of(accumulator.registers, accumulator.registers + 4 * accumulator.tiles,
                       [](float const& x) { return std::bit_cast<u32>(x) == kInFlight; });
}

// sums (64 x n) += a (64 x 16) b (16 x n), four steps of the reduction at a time.
void multiply(float* __restrict sums, float const* __restrict a, float const* __restrict b, int n) {
    for (int row = 0; row < 64; ++row, sums += n)
        for (int k = 0; k < 16; k += 4) {
            float const* const x = a + 16 * row + k;
            float const* const y = b + n * k;
            for (int j = 0; j < n; ++j)
                sums[j] += (x[0] * y[j] + x[1] * y[n + j]) + (x[2] * y[2 * n + j] + x[3] * y[3 * n + j]);
        }
}

}  // namespace

bool TensorCore::ready() const {
    u64 const place = executed - first;
    return place < products.size() && products[place].issued == 128;
}

// What a product reads from shared memory, while it is in flight.
void TensorCore::mark_reads(Product const& product, int by) {
    std::vector<u16>& readers = block.shared.readers;
    auto mark = [&](u32 address, int, int) {
        block.shared.check_bounds(address, SharedMemory::kChunk, SharedMemory::kChunk, "operand of a product");
        readers[address / SharedMemory::kChunk] += by;
    };
    if (!product.kind.a_in_registers) operand_a(product.kind).for_each_chunk(mark);
    operand_b(product.kind).for_each_chunk(mark);
}

// The next product is computed.
void TensorCore::step() {
    static float a[64 * 16], b[16 * 256];
    Product& product = this->product(executed);
    ProductKind const& kind = product.kind;
    int const columns = 8 * kind.tiles;
    trace("tensor core of block %d warpgroup %d: product %llu", block.index, warpgroup, executed);
    u16 chunk[8];
    if (kind.a_in_registers) {
        for (int thread = 0; thread < 128; ++thread)
            for (int i = 0; i < 4; ++i) {
                u32 const word = product.a_registers[thread][i];
                if (word != product.a_words[thread][i])
                    error("thread %d has overwritten a register that the product of %s has yet to read",
                          128 * warpgroup + thread, line_of(product.by).c_str());
                int const row = thread / 32 * 16 + fragment_row(thread % 32, i % 2);
                float* const place = a + 16 * row + fragment_column(thread % 32, i / 2);
                place[0] = widen(static_cast<u16>(word), kind.element);
                place[1] = widen(static_cast<u16>(word >> 16), kind.element);
            }
    } else {
        operand_a(kind).for_each_chunk([&](u32 address, int row, int k) {
            block.shared.read_chunk(address, chunk, product.by, block);
            for (int i = 0; i < 8; ++i)
                (kind.transposes_a ? a[16 * (row + i) + k] : a[16 * row + k + i]) = widen(chunk[i], kind.element);
        });
    }
    operand_b(kind).for_each_chunk([&](u32 address, int column, int k) {
        block.shared.read_chunk(address, chunk, product.by, block);
        for (int i = 0; i < 8; ++i)
            (kind.transposes_b ? b[columns * k + column + i] : b[columns * (k + i) + column]) =
                widen(chunk[i], kind.element);
    });
    if (!kind.adds) std::fill(product.sums->begin(), product.sums->end(), 0.f);
    multiply(product.sums->data(), a, b, columns);
    ++executed;
    wake(waiters);
}

void wgmma(ProductKind const& kind, float* d, u32 const* a_registers) {
    Place const by = EMULATOR_CALLER;
    pause(64);
    TensorCore& core = current->tensor_core();
    IssuedProducts& mine = current->products;
    int const thread = current->index % 128;
    if (!mine.has_arrived) error("wgmma without warpgroup_arrive after its registers were touched");

    auto same = std::find_if(mine.accumulators.begin(), mine.accumulators.end(),
                             [&](auto const& x) { return x.registers == d && x.tiles == kind.tiles; });
    u64 const number = mine.issued++;
    if (number == core.first + core.products.size()) {
        Product& product = core.products.emplace_back();
        product.kind = kind;
        product.by = by;
        product.sums = same != mine.accumulators.end() ? same->sums : std::make_shared<Sums>(64 * 8 * kind.tiles);
        if (!kind.a_in_registers) check_descriptor(kind.a, operand_a(kind));
        check_descriptor(kind.b, operand_b(kind));
    }
    Product& product = core.product(number);
    if (product.kind != kind)
        error("threads of a warpgroup disagree: this one issues another product than one at %s",
              line_of(product.by).c_str());

    if (same == mine.accumulators.end()) {
        for (auto const& other : mine.accumulators)
            if (d < other.registers + 4 * other.tiles && other.registers < d + 4 * kind.tiles)
                error("wgmma into registers that partly belong to another product in flight");
        for (int i = 0; i < 4 * kind.tiles; ++i) {
            if (kind.adds) element(*product.sums, kind.tiles, thread, i / 4, i % 4) = d[i];
            std::memcpy(d + i, &kInFlight, 4);
        }
        mine.accumulators.push_back({product.sums, d, kind.tiles, number});
    } else {
        if (!are_untouched(*same)) error("accumulators were written while a product on them was in flight");
        if (same->sums != product.sums) error("threads of a warpgroup disagree on accumulators");
        same->last = number;
    }
    if (kind.a_in_registers) {
        product.a_registers[thread] = a_registers;
        std::copy_n(a_registers, 4, product.a_words[thread]);
    }
    if (++product.issued == 128) {
        trace("product %llu of warpgroup %d is issued", number, core.warpgroup);
        core.mark_reads(product, 1);
        pause(2);
    }
}

void wgmma_arrive() {
    meet_warp();
    current->products.has_arrived = true;
    pause(64);
}

void wgmma_commit() {
    current->products.commits.push_back(current->products.issued);
    pause(64);
}

void wgmma_wait(int pending) {
    TensorCore& core = current->tensor_core();
    IssuedProducts& mine = current->products;
    int const thread = current->index % 128;
    meet_warp();
    pause();
    u64 end = mine.settled;
    for (; static_cast<int>(mine.commits.size()) > pending; mine.commits.pop_front()) end = mine.commits.front();
    while (core.executed < end) wait(core.waiters, "product", end - 1);

    // Accumulators on which nothing is in flight any more.
    std::erase_if(mine.accumulators, [&](IssuedProducts::Accumulator const& x) {
        if (x.last >= end) return false;
        if (!are_untouched(x)) error("accumulators were written while a product on them was in flight");
        for (int i = 0; i < 4 * x.tiles; ++i) x.registers[i] = element(*x.sums, x.tiles, thread, i / 4, i % 4);
        mine.has_arrived = false;
        return true;
    });
    for (; mine.settled < end; ++mine.settled) {
        Product& product = core.product(mine.settled);
        if (product.kind.a_in_registers && !std::equal(product.a_words[thread], product.a_words[thread] + 4,
                                                       product.a_registers[thread]))
            error("a register was overwritten before the product of %s was waited for", line_of(product.by).c_str());
        if (product.settled++ == 0) core.mark_reads(product, -1);
    }
    for (; !core.products.empty() && core.products.front().settled == 128; ++core.first) core.products.pop_front();
}

void set_registers(int number, bool takes) {
    TensorCore& core = current->tensor_core();
    if (current->index % 128 != 0) return;
    if (takes ? number < core.registers : number > core.registers)
        error("setmaxnreg from %d to %d registers", core.registers, number);
    core.registers = number;
}

void mma(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1, Element element) {
    struct Words {
        u32 a[4], b[2];
    };
    auto const all = exchange(Words{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    // A register holds two elements of 16 bits, or a tf32 number, of which the low 13 bits are ignored.
    auto product = [&](u32 x, u32 y) {
        if (element == Element::kTF32)
            return std::bit_cast<float>(x & 0xffffe000u) * double{std::bit_cast<float>(y & 0xffffe000u)};
        auto half = [&](u32 word, int i) { return double{widen(static_cast<u16>(word >> 16 * i), element)}; };
        return half(x, 0) * half(y, 0) + half(x, 1) * half(y, 1);
    };
    for (int i = 0; i < 4; ++i) {
        int const row = fragment_row(lane_id(), i / 2);
        int const column = fragment_column(lane_id(), 0) + i % 2;
        double sum = c[i];
        for (int k = 0; k < 8; ++k)  // four lanes hold two registers each of a row or column
            sum += product(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)], all[column * 4 + k % 4].b[k / 4]);
        c[i] = static_cast<float>(sum);
    }
}

}  // namespace emulator
