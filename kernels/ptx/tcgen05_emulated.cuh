// What tcgen05.cuh declares, in plain CUDA C++: for tests on chips without tensor memory, which is
// kept in global memory here, for each multiprocessor as in hardware. Only one block at a time may
// run on a multiprocessor, as is the case with blocks that take more than half of its shared
// memory.
//
// What the manual leaves open is done as late as it may be, and what it forbids gives NaN:
//   - products are computed by the commit that follows them, stores by the wait for stores, loads by the wait for loads;
//   - fresh tensor memory is NaN, and so are registers before the wait;
//   - products of descriptors that are not valid, or not among those that are emulated, are NaN.
#pragma once
#include "jitter.cuh"
#include "mbarrier.cuh"

namespace ptx {

constexpr int EMULATED_MULTIPROCESSORS = 160;
constexpr int EMULATED_THREADS = 512;
constexpr int MAX_QUEUED = 64;
constexpr int MAX_PENDING_STORES = 4;
constexpr uint32_t POISON = 0x7fffdead;

struct QueuedProduct {
    uint64_t a;
    uint64_t b;
    uint32_t d;
    uint32_t product;
    uint32_t a_is_in_tensor_memory;
    uint32_t accumulate;
};

struct PendingStore {
    uint32_t tensor[EMULATED_THREADS];
    uint32_t columns[EMULATED_THREADS];
    uint32_t values[32][EMULATED_THREADS];
};

struct EmulatedMultiprocessor {
    uint32_t cells[TENSOR_LANES][TENSOR_COLUMNS];
    QueuedProduct products[MAX_QUEUED];
    int queued;
    PendingStore stores[MAX_PENDING_STORES];
    int pending[EMULATED_THREADS];
};

__device__ EmulatedMultiprocessor emulated_multiprocessors[EMULATED_MULTIPROCESSORS];

__device__ inline EmulatedMultiprocessor& emulated() {
    uint32_t id;
    asm("mov.u32 %0, %%smid;" : "=r"(id));
    if (id >= EMULATED_MULTIPROCESSORS) __trap();
    return emulated_multiprocessors[id];
}

// "tcgen05.alloc". All columns, or the lowest: where they start is up to the hardware.
__device__ __noinline__ void tensor_alloc(uint32_t shared, int columns) {
    EmulatedMultiprocessor& chip = emulated();
    const bool is_valid = columns >= 32 && columns <= TENSOR_COLUMNS && (columns & (columns - 1)) == 0;
    if (!is_valid) __trap();
    const int lane = threadIdx.x % 32;
    for (int cell = lane; cell < TENSOR_LANES * TENSOR_COLUMNS; cell += 32) chip.cells[cell / TENSOR_COLUMNS][cell % TENSOR_COLUMNS] = POISON;
    for (int thread = lane; thread < EMULATED_THREADS; thread += 32) chip.pending[thread] = 0;
    if (lane == 0) {
        chip.queued = 0;
        *static_cast<uint32_t*>(__cvta_shared_to_generic(shared)) = 0;
    }
    __syncwarp();
}

// "tcgen05.dealloc". What is read after it is NaN.
__device__ __noinline__ void tensor_free(uint32_t tensor, int columns) {
    EmulatedMultiprocessor& chip = emulated();
    for (int cell = threadIdx.x % 32; cell < TENSOR_LANES * columns; cell += 32) chip.cells[cell / columns][(tensor & 0xffff) + cell % columns] = POISON;
    __syncwarp();
}

// "tcgen05.fence": barriers alone order the accesses here.
__device__ inline void tensor_fence_before() { __threadfence_block(); }
__device__ inline void tensor_fence_after() { __threadfence_block(); }

// What a shared-memory descriptor says ("Shared memory descriptor").
struct DecodedOperand {
    uint32_t start;
    uint32_t leading_bytes;
    uint32_t stride_bytes;
    // Bytes over which 16-byte chunks are permuted; 0 if the descriptor is not valid or not
    // emulated.
    uint32_t swizzle;

    __device__ explicit DecodedOperand(uint64_t descriptor) {
        start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
        leading_bytes = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
        stride_bytes = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
#ifdef VARLEN_FA_EMULATE_WRONG
        // For tests of what notices a wrong kernel.
        stride_bytes += 16;
#endif
        const uint32_t layout = descriptor >> 61;
        swizzle = layout == 2 ? 128 : layout == 4 ? 64 : 0;
        const uint32_t constant = descriptor >> 46 & 7;
        const uint32_t base_offset = descriptor >> 49 & 7;
        const uint32_t leading_mode_and_zeros = descriptor >> 52 & 0x1ff;
        const uint32_t unused = (descriptor >> 14 & 3) | (descriptor >> 30 & 3);
        if (constant != 1 || base_offset != 0 || leading_mode_and_zeros != 0 || unused != 0) swizzle = 0;
    }

    // The address of an element: `summed` of the 16 that are added up, `other` of the rows of a or
    // the columns of b ("Canonical layouts", in elements of T = 8 to 16 bytes; W is swizzle / 16):
    //   summed contiguous   ((8, m), (T, 2)) : ((W·T, SBO), (1, T))
    //   other contiguous    ((T, W, m), (8, k)) : ((1, T, LBO), (W·T, SBO))
    __device__ uint32_t address(int other, int summed, Contiguous contiguous) const {
        uint32_t at = start;
        if (contiguous == Contiguous::SUMMED) {
            at += other % 8 * swizzle + other / 8 * stride_bytes + summed * 2;
        } else {
            const int panel = static_cast<int>(swizzle / 2);
            at += other % panel * 2 + other / panel * leading_bytes + summed % 8 * swizzle + summed / 8 * stride_bytes;
        }
        // Swizzle<3, 4, 3> and Swizzle<2, 4, 3> of the address itself.
        return at ^ ((at >> 7 & (swizzle / 16 - 1)) << 4);
    }
};

__device__ inline float widened(uint16_t bits, uint32_t format) {
    return format == 0 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ inline void compute(EmulatedMultiprocessor& chip, const QueuedProduct& queued) {
    const uint32_t product = queued.product;
    const uint32_t format_a = product >> 7 & 7;
    const uint32_t format_b = product >> 10 & 7;
    const auto contiguous_a = static_cast<Contiguous>(product >> 15 & 1);
    const auto contiguous_b = static_cast<Contiguous>(product >> 16 & 1);
    const int columns = (product >> 17 & 0x3f) * 8;
    const int rows = (product >> 24 & 0x1f) * 16;
    const DecodedOperand a(queued.a);
    const DecodedOperand b(queued.b);
    const uint32_t unused = 0xfu | 1u << 6 | 3u << 13 | 1u << 23 | 7u << 29;
    bool is_valid = (product & unused) == 0 && (product >> 4 & 3) == 1 && format_a <= 1 && format_b == format_a && rows == TENSOR_LANES &&
                    columns >= 16 && columns % 16 == 0 && columns <= 256 && contiguous_a == Contiguous::SUMMED && b.swizzle != 0;
    const uint32_t column_d = queued.d & 0xffff;
    const uint32_t column_a = queued.a & 0xffff;
    is_valid = is_valid && queued.d >> 16 == 0 && column_d + columns <= TENSOR_COLUMNS;
    is_valid = is_valid && (queued.a_is_in_tensor_memory ? queued.a >> 16 == 0 && column_a + 8 <= TENSOR_COLUMNS : a.swizzle != 0);
    const int lane = threadIdx.x % 32;
    for (int column = lane; column < columns && column_d + column < TENSOR_COLUMNS; column += 32) {
        float b_column[16];
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            const void* from = is_valid ? __cvta_shared_to_generic(b.address(column, k, contiguous_b)) : nullptr;
            b_column[k] = is_valid ? widened(*static_cast<const uint16_t*>(from), format_b) : 0.0f;
        }
#pragma unroll 4
        for (int row = 0; row < TENSOR_LANES; ++row) {
            uint32_t& cell = chip.cells[row][column_d + column];
            if (!is_valid) {
                cell = POISON;
                continue;
            }
            uint32_t a_row[8];
            if (queued.a_is_in_tensor_memory) {
#pragma unroll
                for (int pair = 0; pair < 8; ++pair) a_row[pair] = chip.cells[row][column_a + pair];
            } else {
                // Chunks of 16 bytes are not torn by the permutation.
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 chunk = *static_cast<const uint4*>(__cvta_shared_to_generic(a.address(row, half * 8, Contiguous::SUMMED)));
                    a_row[half * 4] = chunk.x;
                    a_row[half * 4 + 1] = chunk.y;
                    a_row[half * 4 + 2] = chunk.z;
                    a_row[half * 4 + 3] = chunk.w;
                }
            }
            float sum = 0.0f;
#pragma unroll
            for (int pair = 0; pair < 8; ++pair) {
                sum = __fmaf_rn(widened(a_row[pair] & 0xffff, format_a), b_column[2 * pair], sum);
                sum = __fmaf_rn(widened(a_row[pair] >> 16, format_a), b_column[2 * pair + 1], sum);
            }
            cell = __float_as_uint(queued.accumulate ? __uint_as_float(cell) + sum : sum);
        }
    }
    __syncwarp();
}

__device__ __noinline__ void queue_product(const QueuedProduct& product) {
    EmulatedMultiprocessor& chip = emulated();
    if (threadIdx.x % 32 == 0) {
        if (chip.queued == MAX_QUEUED) __trap();
        chip.products[chip.queued] = product;
        ++chip.queued;
    }
    __syncwarp();
}

// "tcgen05.mma".
__device__ inline void multiply(uint32_t d, uint64_t a, uint64_t b, uint32_t product, bool accumulate) {
    queue_product({a, b, d, product, 0, accumulate});
}

__device__ inline void multiply(uint32_t d, uint32_t a, uint64_t b, uint32_t product, bool accumulate) {
    queue_product({a, b, d, product, 1, accumulate});
}

// "tcgen05.commit".
__device__ __noinline__ void commit_products(uint32_t barrier) {
    EmulatedMultiprocessor& chip = emulated();
    jitter();
    __syncwarp();
    const int queued = *static_cast<volatile int*>(&chip.queued);
    for (int i = 0; i < queued; ++i) compute(chip, chip.products[i]);
    __syncwarp();
    jitter();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        chip.queued = 0;
        mbarrier_arrive(barrier);
    }
    __syncwarp();
}

// The lane of tensor memory that this thread reaches ("Access restrictions"): negative where the
// address is not its warp's.
__device__ inline int own_lane(uint32_t tensor) {
    const uint32_t first = threadIdx.x / 32 % 4 * 32;
    return tensor >> 16 == first ? static_cast<int>(first + threadIdx.x % 32) : -1;
}

// "tcgen05.ld". The first register keeps the address until the wait.
__device__ inline void tensor_load(uint32_t (&v)[32], uint32_t tensor) {
#pragma unroll
    for (int i = 1; i < 32; ++i) v[i] = POISON;
    v[0] = tensor;
    jitter();
}

// "tcgen05.wait::ld".
template <int N, typename... More>
__device__ inline void tensor_wait_load(uint32_t (&v)[N], More&... more) {
    EmulatedMultiprocessor& chip = emulated();
    const int lane = own_lane(v[0]);
    const uint32_t column = v[0] & 0xffff;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = lane >= 0 && column + i < TENSOR_COLUMNS ? chip.cells[lane][column + i] : POISON;
    if constexpr (sizeof...(More) > 0) tensor_wait_load(more...);
}

// "tcgen05.st".
template <int N>
__device__ inline void tensor_store(uint32_t tensor, const uint32_t (&v)[N]) {
    EmulatedMultiprocessor& chip = emulated();
    const int thread = threadIdx.x;
    const int slot = chip.pending[thread];
    if (slot == MAX_PENDING_STORES) __trap();
    chip.stores[slot].tensor[thread] = tensor;
    chip.stores[slot].columns[thread] = N;
#pragma unroll
    for (int i = 0; i < N; ++i) chip.stores[slot].values[i][thread] = v[i];
    chip.pending[thread] = slot + 1;
}

// "tcgen05.wait::st".
__device__ __noinline__ void tensor_wait_store() {
    EmulatedMultiprocessor& chip = emulated();
    const int thread = threadIdx.x;
    jitter();
    for (int slot = 0; slot < chip.pending[thread]; ++slot) {
        const uint32_t tensor = chip.stores[slot].tensor[thread];
        const int lane = own_lane(tensor);
        const uint32_t column = tensor & 0xffff;
        for (uint32_t i = 0; i < chip.stores[slot].columns[thread] && lane >= 0 && column + i < TENSOR_COLUMNS; ++i) {
            chip.cells[lane][column + i] = chip.stores[slot].values[i][thread];
        }
    }
    chip.pending[thread] = 0;
}

}  // namespace ptx
