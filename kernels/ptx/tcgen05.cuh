// Tensor memory and matrix products of SM100 (PTX ISA, "TensorCore 5th Generation Family
// Instructions").
//
// Tensor memory belongs to a multiprocessor: 128 lanes of 512 columns of 32 bits. An address is
// lane << 16 | column. The four warps of a warpgroup reach 32 lanes each, warp w those from 32 · (w
// % 4) on.
//
//   products      d[128 x N] (+)= a[128 x 16] · b[16 x N], issued by one thread of a warp; they run asynchronously, in order
//                   d   tensor memory: row r in lane r, column n of the product in column n, f32
//                   a   shared memory, or tensor memory: row r in lane r, two elements of 16 bits a column
//                   b   shared memory
//   loads, stores of a warp between its 32 lanes and registers: lane r to thread r, neighbouring columns to neighbouring registers; they
//                 are done after the wait alone
//
// Whoever synchronises threads about tensor memory puts fences around it: `tensor_fence_before`
// after its own accesses, then the barrier, then `tensor_fence_after` before the other's accesses.
// A commit fences by itself.
//
// VARLEN_FA_EMULATE_TCGEN05 puts a plain implementation of the same functions in their place, which
// chips without them run.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ptx {

constexpr int TENSOR_LANES = 128;
constexpr int TENSOR_COLUMNS = 512;

// Where an operand lies in shared memory ("Shared memory descriptor", "Canonical layouts"): in
// panels of 128 (or 64) bytes a row whose 16-byte chunks are permuted by the row number, eight rows
// of a panel after the other. The tile starts where the permutation does.
//
//   bits  0-13  start address / 16
//        16-29  leading dimension byte offset / 16: from panel to panel, where the summed elements are not the contiguous ones
//        32-45  stride dimension byte offset / 16: from eight rows to the next eight
//        46-48  0b001
//        49-51  base offset: 0
//           52  mode of the leading dimension: 0, an offset
//        61-63  2: permuted over 128 bytes; 4: over 64 bytes
template <int ROW_BYTES>
struct OperandMatrix {
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64);
    static constexpr uint32_t SWIZZLE = ROW_BYTES == 128 ? 2 : 4;
    static constexpr uint32_t UPPER = SWIZZLE << 29 | 1u << 14 | 8 * ROW_BYTES / 16;
    uint32_t lower;

    __device__ OperandMatrix(uint32_t shared, int panel_bytes) : lower(static_cast<uint32_t>(panel_bytes / 16) << 16 | shared / 16) {}

    // The descriptor of what lies `bytes` further on.
    __device__ uint64_t at(int bytes) const { return static_cast<uint64_t>(UPPER) << 32 | (lower + bytes / 16); }
};

// Which of an operand's dimensions is contiguous in shared memory.
enum class Contiguous : uint32_t {
    // The 16 summed elements.
    SUMMED = 0,
    // The rows of a, the columns of b.
    OTHER = 1,
};

template <typename T>
constexpr uint32_t ELEMENT_FORMAT = 0;
template <>
constexpr uint32_t ELEMENT_FORMAT<__nv_bfloat16> = 1;

// What a product is ("Instruction descriptor", kind::f16): 128 rows, elements T, accumulated in
// f32.
//
//   bits  4-5   format of d: 1, f32
//         7-9   format of a: 0 f16, 1 bf16
//        10-12  format of b
//           15  a's contiguous dimension
//           16  b's
//        17-22  columns / 8
//        24-28  rows / 16
template <typename T, int COLUMNS, Contiguous OF_B>
struct Product {
    static_assert(COLUMNS % 16 == 0 && COLUMNS >= 16 && COLUMNS <= 256);
    static constexpr uint32_t DESCRIPTOR = 1u << 4 | ELEMENT_FORMAT<T> << 7 | ELEMENT_FORMAT<T> << 10 |
                                           static_cast<uint32_t>(OF_B) << 16 | static_cast<uint32_t>(COLUMNS / 8) << 17 |
                                           static_cast<uint32_t>(TENSOR_LANES / 16) << 24;
};

}  // namespace ptx

#ifdef VARLEN_FA_EMULATE_TCGEN05
#include "tcgen05_emulated.cuh"
#else

namespace ptx {

// Called by a whole warp: takes columns, a power of 2 from 32 on, and writes the first one's
// address to shared memory ("tcgen05.alloc").
__device__ inline void tensor_alloc(uint32_t shared, int columns) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(shared), "r"(columns) : "memory");
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}

// Called by the warp that took them, when no thread uses them any more.
__device__ inline void tensor_free(uint32_t tensor, int columns) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(tensor), "r"(columns) : "memory");
}

__device__ inline void tensor_fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ inline void tensor_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// Called by a whole warp, of which the same thread issues each time ("tcgen05.mma"). Without
// `accumulate`, d is overwritten.
__device__ inline void multiply(uint32_t d, uint64_t a, uint64_t b, uint32_t product, bool accumulate) {
    asm volatile(
        "{\n.reg .pred issues, accumulate;\n"
        "elect.sync _|issues, 0xffffffff;\n"
        "setp.ne.b32 accumulate, %4, 0;\n"
        "@issues tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, accumulate;\n}" ::"r"(d),
        "l"(a), "l"(b), "r"(product), "r"(static_cast<uint32_t>(accumulate))
        : "memory");
}

// The same with a in tensor memory.
__device__ inline void multiply(uint32_t d, uint32_t a, uint64_t b, uint32_t product, bool accumulate) {
    asm volatile(
        "{\n.reg .pred issues, accumulate;\n"
        "elect.sync _|issues, 0xffffffff;\n"
        "setp.ne.b32 accumulate, %4, 0;\n"
        "@issues tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], %2, %3, accumulate;\n}" ::"r"(d),
        "r"(a), "l"(b), "r"(product), "r"(static_cast<uint32_t>(accumulate))
        : "memory");
}

// Called by the same warp: the barrier gets an arrival when all products issued so far are done
// ("tcgen05.commit").
__device__ inline void commit_products(uint32_t barrier) {
    asm volatile(
        "{\n.reg .pred issues;\n"
        "elect.sync _|issues, 0xffffffff;\n"
        "@issues tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];\n}" ::"r"(barrier)
        : "memory");
}

// Starts to load 32 columns ("tcgen05.ld", shape 32x32b). The address has the first lane that the
// warp reaches.
__device__ inline void tensor_load(uint32_t (&v)[32], uint32_t tensor) {
    asm volatile(
        "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];"
        : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]), "=r"(v[4]), "=r"(v[5]), "=r"(v[6]), "=r"(v[7]), "=r"(v[8]), "=r"(v[9]),
          "=r"(v[10]), "=r"(v[11]), "=r"(v[12]), "=r"(v[13]), "=r"(v[14]), "=r"(v[15]), "=r"(v[16]), "=r"(v[17]), "=r"(v[18]),
          "=r"(v[19]), "=r"(v[20]), "=r"(v[21]), "=r"(v[22]), "=r"(v[23]), "=r"(v[24]), "=r"(v[25]), "=r"(v[26]), "=r"(v[27]),
          "=r"(v[28]), "=r"(v[29]), "=r"(v[30]), "=r"(v[31])
        : "r"(tensor)
        : "memory");
}

// Waits for this thread's loads, whose registers are named so that no use of them is moved before
// this.
template <int N, typename... More>
__device__ inline void tensor_wait_load(uint32_t (&v)[N], More&... more) {
    if constexpr (sizeof...(More) > 0) {
        tensor_wait_load(more...);
    } else {
        asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    }
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(v[i])::"memory");
}

// Starts to store to 32 or 16 columns ("tcgen05.st", shape 32x32b).
__device__ inline void tensor_store(uint32_t tensor, const uint32_t (&v)[32]) {
    asm volatile(
        "tcgen05.st.sync.aligned.32x32b.x32.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32};" ::"r"(tensor),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(v[4]), "r"(v[5]), "r"(v[6]), "r"(v[7]), "r"(v[8]), "r"(v[9]), "r"(v[10]),
        "r"(v[11]), "r"(v[12]), "r"(v[13]), "r"(v[14]), "r"(v[15]), "r"(v[16]), "r"(v[17]), "r"(v[18]), "r"(v[19]), "r"(v[20]),
        "r"(v[21]), "r"(v[22]), "r"(v[23]), "r"(v[24]), "r"(v[25]), "r"(v[26]), "r"(v[27]), "r"(v[28]), "r"(v[29]), "r"(v[30]),
        "r"(v[31])
        : "memory");
}

__device__ inline void tensor_store(uint32_t tensor, const uint32_t (&v)[16]) {
    asm volatile(
        "tcgen05.st.sync.aligned.32x32b.x16.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16};" ::"r"(tensor),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(v[4]), "r"(v[5]), "r"(v[6]), "r"(v[7]), "r"(v[8]), "r"(v[9]), "r"(v[10]),
        "r"(v[11]), "r"(v[12]), "r"(v[13]), "r"(v[14]), "r"(v[15])
        : "memory");
}

// Waits for this thread's stores.
__device__ inline void tensor_wait_store() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }

}  // namespace ptx

#endif
