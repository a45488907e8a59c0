// Matrix products of a warpgroup (PTX ISA, "wgmma.mma_async"): acc[64 x N] (+)= a[64 x 16] · b[16 x
// N], f32 accumulation.
//
// The products run asynchronously: between the fence and the wait, the accumulators and the
// registers of `a` must not be touched. Accumulators and `a` in registers are laid out like those
// of mma.m16n8k16, warp w of the group holding rows 16w to 16w + 15.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ptx {

// Orders earlier writes of registers before the products that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `PENDING` committed groups are under way.
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Registers that hold anything. To the compiler they have a value, which it takes no instruction for.
template <int TILES>
__device__ inline void leave_undefined(float (&values)[TILES][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "=f"(values[tile][i]));
    }
}

// Keeps the compiler from moving uses of these registers across this point.
template <int TILES>
__device__ inline void pin_registers(float (&values)[TILES][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(values[tile][i])::"memory");
    }
}

template <int STEPS>
__device__ inline void pin_registers(uint32_t (&values)[STEPS][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(values[step][i])::"memory");
    }
}

// Where a matrix lies in shared memory, in panels of 128 (or 64) bytes a row whose 16-byte chunks
// are permuted by the row number: panels `panel_bytes` apart, eight rows of a panel after the
// other. The upper half of the descriptor is the same for all of them.
template <int ROW_BYTES>
struct SharedMatrix {
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64);
    static constexpr uint32_t SWIZZLE = ROW_BYTES == 128 ? 1 : 2;
    static constexpr uint32_t UPPER = SWIZZLE << 30 | 8 * ROW_BYTES / 16;
    uint32_t lower;

    __device__ SharedMatrix(uint32_t shared, int panel_bytes) : lower(static_cast<uint32_t>(panel_bytes / 16) << 16 | shared / 16) {}

    // The descriptor of what lies `bytes` further on.
    __device__ uint64_t at(int bytes) const { return static_cast<uint64_t>(UPPER) << 32 | (lower + bytes / 16); }
};

// ss: `a` and `b` in shared memory, both with the 16 summed elements contiguous in a row.
// rs: `a` in registers; `b` in shared memory with the N columns contiguous in a row.
template <int N, typename T>
struct Wgmma;

#define VARLEN_FA_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VARLEN_FA_NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define VARLEN_FA_NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define VARLEN_FA_NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define VARLEN_FA_NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define VARLEN_FA_NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define VARLEN_FA_NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define VARLEN_FA_NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define VARLEN_FA_NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define VARLEN_FA_NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define VARLEN_FA_NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define VARLEN_FA_NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define VARLEN_FA_NAMES_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define VARLEN_FA_NAMES_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define VARLEN_FA_NAMES_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define VARLEN_FA_NAMES_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define VARLEN_FA_ACC(i)                                                                                                              \
    "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3]), "+f"(acc[i + 1][0]), "+f"(acc[i + 1][1]), "+f"(acc[i + 1][2]), \
        "+f"(acc[i + 1][3])

#define VARLEN_FA_NAMES_N48 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2
#define VARLEN_FA_ACC_N48 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4)
#define VARLEN_FA_NAMES_N64 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3
#define VARLEN_FA_ACC_N64 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6)
#define VARLEN_FA_NAMES_N80 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3 ", " VARLEN_FA_NAMES_4
#define VARLEN_FA_ACC_N80 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6), VARLEN_FA_ACC(8)
#define VARLEN_FA_NAMES_N96 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3 ", " VARLEN_FA_NAMES_4 ", " VARLEN_FA_NAMES_5
#define VARLEN_FA_ACC_N96 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6), VARLEN_FA_ACC(8), VARLEN_FA_ACC(10)
#define VARLEN_FA_NAMES_N112 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3 ", " VARLEN_FA_NAMES_4 ", " VARLEN_FA_NAMES_5 ", " VARLEN_FA_NAMES_6
#define VARLEN_FA_ACC_N112 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6), VARLEN_FA_ACC(8), VARLEN_FA_ACC(10), VARLEN_FA_ACC(12)
#define VARLEN_FA_NAMES_N128 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3 ", " VARLEN_FA_NAMES_4 ", " VARLEN_FA_NAMES_5 ", " VARLEN_FA_NAMES_6 ", " VARLEN_FA_NAMES_7
#define VARLEN_FA_ACC_N128 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6), VARLEN_FA_ACC(8), VARLEN_FA_ACC(10), VARLEN_FA_ACC(12), VARLEN_FA_ACC(14)
#define VARLEN_FA_NAMES_N160 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3 ", " VARLEN_FA_NAMES_4 ", " VARLEN_FA_NAMES_5 ", " VARLEN_FA_NAMES_6 ", " VARLEN_FA_NAMES_7 ", " VARLEN_FA_NAMES_8 ", " VARLEN_FA_NAMES_9
#define VARLEN_FA_ACC_N160 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6), VARLEN_FA_ACC(8), VARLEN_FA_ACC(10), VARLEN_FA_ACC(12), VARLEN_FA_ACC(14), VARLEN_FA_ACC(16), VARLEN_FA_ACC(18)
#define VARLEN_FA_NAMES_N192 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3 ", " VARLEN_FA_NAMES_4 ", " VARLEN_FA_NAMES_5 ", " VARLEN_FA_NAMES_6 ", " VARLEN_FA_NAMES_7 ", " VARLEN_FA_NAMES_8 ", " VARLEN_FA_NAMES_9 ", " VARLEN_FA_NAMES_10 ", " VARLEN_FA_NAMES_11
#define VARLEN_FA_ACC_N192 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6), VARLEN_FA_ACC(8), VARLEN_FA_ACC(10), VARLEN_FA_ACC(12), VARLEN_FA_ACC(14), VARLEN_FA_ACC(16), VARLEN_FA_ACC(18), VARLEN_FA_ACC(20), VARLEN_FA_ACC(22)
#define VARLEN_FA_NAMES_N256 VARLEN_FA_NAMES_0 ", " VARLEN_FA_NAMES_1 ", " VARLEN_FA_NAMES_2 ", " VARLEN_FA_NAMES_3 ", " VARLEN_FA_NAMES_4 ", " VARLEN_FA_NAMES_5 ", " VARLEN_FA_NAMES_6 ", " VARLEN_FA_NAMES_7 ", " VARLEN_FA_NAMES_8 ", " VARLEN_FA_NAMES_9 ", " VARLEN_FA_NAMES_10 ", " VARLEN_FA_NAMES_11 ", " VARLEN_FA_NAMES_12 ", " VARLEN_FA_NAMES_13 ", " VARLEN_FA_NAMES_14 ", " VARLEN_FA_NAMES_15
#define VARLEN_FA_ACC_N256 VARLEN_FA_ACC(0), VARLEN_FA_ACC(2), VARLEN_FA_ACC(4), VARLEN_FA_ACC(6), VARLEN_FA_ACC(8), VARLEN_FA_ACC(10), VARLEN_FA_ACC(12), VARLEN_FA_ACC(14), VARLEN_FA_ACC(16), VARLEN_FA_ACC(18), VARLEN_FA_ACC(20), VARLEN_FA_ACC(22), VARLEN_FA_ACC(24), VARLEN_FA_ACC(26), VARLEN_FA_ACC(28), VARLEN_FA_ACC(30)

// The numbers of the operands after the accumulators: R0 to R4 are %(N / 2) to %(N / 2 + 4), R5 the
// one after.
#define VARLEN_FA_WGMMA(N, T, TYPE, R0, R1, R2, R3, R4, R5)                                                                              \
    template <>                                                                                                                          \
    struct Wgmma<N, T> {                                                                                                                 \
        __device__ static void ss(float (&acc)[N / 8][4], uint64_t a, uint64_t b, int accumulate) {                                      \
            asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " R2 ", 0;\n"                                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VARLEN_FA_NAMES_N##N "}, " R0 ", " R1     \
                         ", accumulate, 1, 1, 0, 0;\n}"                                                                                  \
                         : VARLEN_FA_ACC_N##N                                                                                            \
                         : "l"(a), "l"(b), "r"(accumulate));                                                                             \
        }                                                                                                                                \
        __device__ static void rs(float (&acc)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {                          \
            asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " R5 ", 0;\n"                                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VARLEN_FA_NAMES_N##N "}, {" R0 ", " R1    \
                         ", " R2 ", " R3 "}, " R4 ", accumulate, 1, 1, 1;\n}"                                                            \
                         : VARLEN_FA_ACC_N##N                                                                                            \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                         \
        }                                                                                                                                \
    };
#define VARLEN_FA_WGMMA_TYPES(N, ...)                    \
    VARLEN_FA_WGMMA(N, __half, "f16", __VA_ARGS__)       \
    VARLEN_FA_WGMMA(N, __nv_bfloat16, "bf16", __VA_ARGS__)

VARLEN_FA_WGMMA_TYPES(48, "%24", "%25", "%26", "%27", "%28", "%29")
VARLEN_FA_WGMMA_TYPES(64, "%32", "%33", "%34", "%35", "%36", "%37")
VARLEN_FA_WGMMA_TYPES(80, "%40", "%41", "%42", "%43", "%44", "%45")
VARLEN_FA_WGMMA_TYPES(96, "%48", "%49", "%50", "%51", "%52", "%53")
VARLEN_FA_WGMMA_TYPES(112, "%56", "%57", "%58", "%59", "%60", "%61")
VARLEN_FA_WGMMA_TYPES(128, "%64", "%65", "%66", "%67", "%68", "%69")
VARLEN_FA_WGMMA_TYPES(160, "%80", "%81", "%82", "%83", "%84", "%85")
VARLEN_FA_WGMMA_TYPES(192, "%96", "%97", "%98", "%99", "%100", "%101")
VARLEN_FA_WGMMA_TYPES(256, "%128", "%129", "%130", "%131", "%132", "%133")

#undef VARLEN_FA_WGMMA_TYPES
#undef VARLEN_FA_WGMMA

}  // namespace ptx
