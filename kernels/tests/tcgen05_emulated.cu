// Tests of ptx/tcgen05_emulated.cuh, function by function, on compute capability 9.0. Products are
// compared, bit for bit, with those of wgmma for the same operands in the same shared memory, whose
// descriptors say the same in other bits; all numbers are small integers, so that the order of sums
// does not matter. Descriptors with anything wrong must give something else.
//
// `cargo xtask kernels --emulated` builds it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../ptx/cp_async.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/tcgen05.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int SUMMED = 64;
constexpr int OPERAND_BYTES = 32768;
constexpr int SHARED_BYTES = 2 * OPERAND_BYTES + 1024;

#define CHECK_CUDA(CALL)                                                                                       \
    do {                                                                                                       \
        const cudaError_t error = (CALL);                                                                      \
        if (error != cudaSuccess) {                                                                            \
            std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #CALL, cudaGetErrorString(error));              \
            std::exit(2);                                                                                      \
        }                                                                                                      \
    } while (false)

// Memory that both sides see.
template <typename T>
struct Managed {
    T* data;
    size_t count;
    explicit Managed(size_t count) : count(count) {
        CHECK_CUDA(cudaMallocManaged(&data, count * sizeof(T)));
        std::memset(data, 0, count * sizeof(T));
    }
    ~Managed() { cudaFree(data); }
};

int failures = 0;

void expect(bool holds, const char* what) {
    std::printf("%-6s %s\n", holds ? "ok" : "FAILED", what);
    if (!holds) ++failures;
}

// Loads and stores
// -----------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr uint32_t code(uint32_t lane, uint32_t column) { return 0x10000000 + (lane << 12) + column; }

// out: cells after the stores [128][64]; registers loaded [128][32]; registers before the wait;
// cells before the wait; a foreign lane's.
__global__ void move_data(uint32_t* cells, uint32_t* loaded, uint32_t* early_register, uint32_t* early_cell, uint32_t* foreign, uint32_t* tensor_out) {
    __shared__ uint32_t tensor_shared;
    const int thread = threadIdx.x;
    if (thread < 32) ptx::tensor_alloc(ptx::shared_address(&tensor_shared), 512);
    __syncthreads();
    const uint32_t tensor = tensor_shared;
    const uint32_t own = tensor + (thread / 32 * 32 << 16);
    ptx::EmulatedMultiprocessor& chip = ptx::emulated();

    uint32_t wide[32];
    uint32_t narrow[16];
    for (int i = 0; i < 32; ++i) wide[i] = code(thread, 64 + i);
    for (int i = 0; i < 16; ++i) narrow[i] = code(thread, 96 + i);
    ptx::tensor_store(own + 64, wide);
    ptx::tensor_store(own + 96, narrow);
    early_cell[thread] = chip.cells[thread][64];
    ptx::tensor_wait_store();
    __syncthreads();
    for (int column = 0; column < 64; ++column) cells[thread * 64 + column] = chip.cells[thread][64 + column];
    __syncthreads();
    for (int column = 0; column < 512; ++column) chip.cells[thread][column] = code(thread, column);
    __syncthreads();
    uint32_t values[32];
    ptx::tensor_load(values, own + 200);
    early_register[thread] = values[1];
    ptx::tensor_wait_load(values);
    for (int i = 0; i < 32; ++i) loaded[thread * 32 + i] = values[i];
    ptx::tensor_load(values, tensor + ((thread / 32 + 1) % 4 * 32 << 16));
    ptx::tensor_wait_load(values);
    foreign[thread] = values[3];
    __syncthreads();
    if (thread < 32) ptx::tensor_free(tensor, 512);
    tensor_out[0] = chip.cells[5][5];
}

void test_moves() {
    Managed<uint32_t> cells(128 * 64), loaded(128 * 32), early_register(128), early_cell(128), foreign(128), after(1);
    move_data<<<1, THREADS>>>(cells.data, loaded.data, early_register.data, early_cell.data, foreign.data, after.data);
    CHECK_CUDA(cudaDeviceSynchronize());
    bool stored = true, untouched = true, read = true, poisoned = true, hidden = true, refused = true;
    for (uint32_t lane = 0; lane < 128; ++lane) {
        for (uint32_t i = 0; i < 48; ++i) stored &= cells.data[lane * 64 + i] == code(lane, 64 + i);
        for (uint32_t i = 48; i < 64; ++i) untouched &= cells.data[lane * 64 + i] == ptx::POISON;
        for (uint32_t i = 0; i < 32; ++i) read &= loaded.data[lane * 32 + i] == code(lane, 200 + i);
        poisoned &= early_register.data[lane] == ptx::POISON;
        hidden &= early_cell.data[lane] == ptx::POISON;
        refused &= foreign.data[lane] == ptx::POISON;
    }
    expect(stored, "st 32x32b: register i of thread t goes to column i of lane t");
    expect(untouched, "st 32x32b: no other columns");
    expect(read, "ld 32x32b: column i of lane t comes to register i of thread t");
    expect(hidden, "wait::st: nothing is stored before");
    expect(poisoned, "wait::ld: nothing is loaded before");
    expect(refused, "ld: a warp does not reach the lanes of another");
    expect(after.data[0] == ptx::POISON, "dealloc: nothing is left");
}

// Products
// -------------------------------------------------------------------------------------------------------------------

struct Descriptors {
    uint64_t a;
    uint64_t b;
    uint32_t product;
    uint32_t flips_d;
};

// The product of the whole of SUMMED, in steps of 16, as emulated [128][N]; each descriptor is
// exclusive-ored with its flips.
template <typename T, int N, int ROW_BYTES, bool FROM_TENSOR>
__device__ void emulated_product(const uint16_t* probs, Descriptors flips, uint32_t* result, unsigned char* shared) {
    using namespace ptx;
    __shared__ uint32_t tensor_shared;
    __shared__ uint64_t barrier;
    const int thread = threadIdx.x;
    if (thread < 32) tensor_alloc(shared_address(&tensor_shared), 512);
    if (thread == 0) mbarrier_init(shared_address(&barrier), 1);
    __syncthreads();
    const uint32_t tensor = tensor_shared;
    const uint32_t own = tensor + (thread / 32 * 32 << 16);
    const uint32_t d = tensor + 256;
    if (FROM_TENSOR) {
        uint32_t words[32];
        for (int i = 0; i < 32; ++i) words[i] = probs[thread * SUMMED + 2 * i] | static_cast<uint32_t>(probs[thread * SUMMED + 2 * i + 1]) << 16;
        tensor_store(own, words);
        tensor_wait_store();
        tensor_fence_before();
    }
    __syncthreads();
    tensor_fence_after();
    constexpr int PANEL = ROW_BYTES / 2;
    const uint32_t base = shared_address(shared);
    if (thread < 32) {
        const OperandMatrix<ROW_BYTES> a(base, 16);
        // Keys: N rows of SUMMED columns. Values: SUMMED rows of N columns.
        const OperandMatrix<ROW_BYTES> b(base + OPERAND_BYTES, FROM_TENSOR ? SUMMED * ROW_BYTES : 16);
        constexpr uint32_t PRODUCT = Product<T, N, FROM_TENSOR ? Contiguous::OTHER : Contiguous::SUMMED>::DESCRIPTOR;
        for (int step = 0; step < SUMMED / 16; ++step) {
            const int column = step * 16 % PANEL * 2;
            const int panel = step * 16 / PANEL;
            if (FROM_TENSOR) {
                multiply((d + 0) ^ flips.flips_d, tensor + step * 8, b.at(step * 16 * ROW_BYTES) ^ flips.b, PRODUCT ^ flips.product, step > 0);
            } else {
                multiply(d ^ flips.flips_d, a.at(panel * 128 * ROW_BYTES + column) ^ flips.a, b.at(panel * N * ROW_BYTES + column) ^ flips.b,
                         PRODUCT ^ flips.product, step > 0);
            }
        }
        commit_products(shared_address(&barrier));
    }
    mbarrier_wait(shared_address(&barrier), 0);
    tensor_fence_after();
    for (int part = 0; part < N / 32; ++part) {
        uint32_t values[32];
        tensor_load(values, own + 256 + part * 32);
        tensor_wait_load(values);
        for (int i = 0; i < 32; ++i) result[thread * N + part * 32 + i] = values[i];
    }
    __syncthreads();
    if (thread < 32) tensor_free(tensor, 512);
    __syncthreads();
}

// The same by wgmma.
template <typename T, int N, int ROW_BYTES, bool FROM_TENSOR>
__device__ void wgmma_product(const uint16_t* probs, uint32_t* result, unsigned char* shared) {
    using namespace ptx;
    constexpr int PANEL = ROW_BYTES / 2;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const uint32_t base = shared_address(shared);
    for (int half = 0; half < 2; ++half) {
        float acc[N / 8][4] = {};
        uint32_t fragments[SUMMED / 16][4];
        for (int step = 0; step < SUMMED / 16; ++step) {
            for (int i = 0; i < 4; ++i) {
                const int row = half * 64 + warp * 16 + lane / 4 + i % 2 * 8;
                const int column = step * 16 + lane % 4 * 2 + i / 2 * 8;
                fragments[step][i] = probs[row * SUMMED + column] | static_cast<uint32_t>(probs[row * SUMMED + column + 1]) << 16;
            }
        }
        wgmma_fence();
        for (int step = 0; step < SUMMED / 16; ++step) {
            const int column = step * 16 % PANEL * 2;
            const int panel = step * 16 / PANEL;
            if constexpr (FROM_TENSOR) {
                const SharedMatrix<ROW_BYTES> b(base + OPERAND_BYTES, SUMMED * ROW_BYTES);
                Wgmma<N, T>::rs(acc, fragments[step], b.at(step * 16 * ROW_BYTES), 1);
            } else {
                const SharedMatrix<ROW_BYTES> a(base + half * 64 * ROW_BYTES, 16);
                const SharedMatrix<ROW_BYTES> b(base + OPERAND_BYTES, 16);
                Wgmma<N, T>::ss(acc, a.at(panel * 128 * ROW_BYTES + column), b.at(panel * N * ROW_BYTES + column), 1);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(acc);
        for (int tile = 0; tile < N / 8; ++tile) {
            for (int i = 0; i < 4; ++i) {
                const int row = half * 64 + warp * 16 + lane / 4 + i / 2 * 8;
                result[row * N + tile * 8 + lane % 4 * 2 + i % 2] = __float_as_uint(acc[tile][i]);
            }
        }
    }
    __syncthreads();
}

template <typename T, int N, int ROW_BYTES, bool FROM_TENSOR>
__global__ void __launch_bounds__(THREADS) products(const uint4* operands, const uint16_t* probs, Descriptors flips, uint32_t* emulated, uint32_t* wgmma) {
    extern __shared__ __align__(1024) unsigned char shared[];
    if (ptx::shared_address(shared) % 1024 != 0) __trap();
    for (int i = threadIdx.x; i < 2 * OPERAND_BYTES / 16; i += THREADS) reinterpret_cast<uint4*>(shared)[i] = operands[i];
    ptx::fence_async_proxy();
    __syncthreads();
    emulated_product<T, N, ROW_BYTES, FROM_TENSOR>(probs, flips, emulated, shared);
    wgmma_product<T, N, ROW_BYTES, FROM_TENSOR>(probs, wgmma, shared);
}

template <typename T>
uint16_t narrowed(int value) {
    const float wide = static_cast<float>(value);
    uint16_t bits;
    if constexpr (sizeof(T) == 2 && ptx::ELEMENT_FORMAT<T> == 0) {
        const __half narrow = __float2half(wide);
        std::memcpy(&bits, &narrow, 2);
    } else {
        uint32_t word;
        std::memcpy(&word, &wide, 4);
        bits = static_cast<uint16_t>(word >> 16);
    }
    return bits;
}

// Small integers from a linear congruential generator.
template <typename T>
void fill(uint16_t* to, size_t count, uint32_t seed) {
    for (size_t i = 0; i < count; ++i) {
        seed = seed * 1664525u + 1013904223u;
        to[i] = narrowed<T>(static_cast<int>(seed >> 20) % 17 - 8);
    }
}

struct Flip {
    const char* what;
    Descriptors flips;
};

template <typename T, int N, int ROW_BYTES, bool FROM_TENSOR>
void test_product(const char* name) {
    Managed<uint16_t> operands(OPERAND_BYTES), probs(128 * SUMMED);
    Managed<uint32_t> emulated(128 * N), wgmma(128 * N);
    fill<T>(operands.data, operands.count, 1);
    fill<T>(probs.data, probs.count, 2);
    const auto kernel = products<T, N, ROW_BYTES, FROM_TENSOR>;
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    const auto differ = [&](Descriptors flips) {
        std::memset(emulated.data, 0, emulated.count * 4);
        std::memset(wgmma.data, 0xff, wgmma.count * 4);
        kernel<<<1, THREADS, SHARED_BYTES>>>(reinterpret_cast<const uint4*>(operands.data), probs.data, flips, emulated.data, wgmma.data);
        CHECK_CUDA(cudaDeviceSynchronize());
        int different = 0;
        for (size_t i = 0; i < emulated.count; ++i) different += emulated.data[i] != wgmma.data[i];
        return different;
    };
    char line[160];
    const int wrong = differ({});
    int nonzero = 0;
    for (size_t i = 0; i < wgmma.count; ++i) nonzero += (wgmma.data[i] << 1) != 0;
    std::snprintf(line, sizeof line, "%s is wgmma's (%d of %d differ)", name, wrong, 128 * N);
    expect(wrong == 0 && nonzero > 64 * N, line);

    std::vector<Flip> flips = {
        {"b starts 16 bytes off", {0, 1, 0, 0}},
        {"b's groups of eight rows are elsewhere", {0, 1ull << 36, 0, 0}},
        {"b's constant bits are those of wgmma", {0, 1ull << 46, 0, 0}},
        {"b has a base offset", {0, 1ull << 49, 0, 0}},
        {"b's leading dimension is absolute", {0, 1ull << 52, 0, 0}},
        {"b is permuted over other widths", {0, 6ull << 61, 0, 0}},
        {"b is not permuted", {0, (ROW_BYTES == 128 ? 2ull : 4ull) << 61, 0, 0}},
        {"d is f16", {0, 0, 1u << 4, 0}},
        {"both are of the other type", {0, 0, 1u << 7 | 1u << 10, 0}},
        {"a and b are of different types", {0, 0, 1u << 7, 0}},
        {"a is negated", {0, 0, 1u << 13, 0}},
        {"a's other dimension is contiguous", {0, 0, 1u << 15, 0}},
        {"b's other dimension is contiguous", {0, 0, 1u << 16, 0}},
        {"half as many columns", {0, 0, static_cast<uint32_t>(N / 8 ^ N / 16) << 17, 0}},
        {"half as many rows", {0, 0, 12u << 24, 0}},
        {"d is 32 columns off", {0, 0, 0, 32}},
        {"d is 32 lanes off", {0, 0, 0, 32u << 16}},
    };
    if (FROM_TENSOR) {
        if (N > ROW_BYTES / 2) flips.push_back({"b's panels are elsewhere", {0, 1ull << 22, 0, 0}});
    } else {
        flips.push_back({"a starts 16 bytes off", {1, 0, 0, 0}});
        flips.push_back({"a's groups of eight rows are elsewhere", {1ull << 36, 0, 0, 0}});
        flips.push_back({"a's constant bits are those of wgmma", {1ull << 46, 0, 0, 0}});
        flips.push_back({"a is permuted over other widths", {6ull << 61, 0, 0, 0}});
    }
    int unnoticed = 0;
    for (const Flip& flip : flips) {
        if (differ(flip.flips) == 0) {
            std::printf("FAILED %s: the same although %s\n", name, flip.what);
            ++unnoticed;
        }
    }
    std::snprintf(line, sizeof line, "%s: %zu wrong descriptors are noticed", name, flips.size());
    expect(unnoticed == 0, line);
}

}  // namespace

int main() {
    test_moves();
    test_product<__half, 128, 128, false>("f16, 128 keys, panels of 128 bytes");
    test_product<__nv_bfloat16, 128, 128, false>("bf16, 128 keys, panels of 128 bytes");
    test_product<__half, 128, 64, false>("f16, 128 keys, panels of 64 bytes");
    test_product<__half, 64, 128, true>("f16, values of 64 columns, panels of 128 bytes");
    test_product<__nv_bfloat16, 96, 64, true>("bf16, values of 96 columns, panels of 64 bytes");
    test_product<__nv_bfloat16, 128, 128, true>("bf16, values of 128 columns, panels of 128 bytes");
    test_product<__half, 128, 128, true>("f16, values of 128 columns, panels of 128 bytes");
    if (failures != 0) std::printf("%d failed\n", failures);
    return failures == 0 ? 0 : 1;
}
