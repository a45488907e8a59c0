// Tiles of rows in shared memory, and the copies that fill and empty them.
//
// A tile of ROWS x D elements lies in panels of 64 columns (32 where D is no multiple of 64).
// Within a panel the 16-byte chunks of a row are permuted by the row number, so that the eight rows
// of one ldmatrix lie in distinct banks:
//
//   panel of 64 columns, 128 bytes a row          chunk c of row r is stored at chunk c ^ (r & 7)
//   panel of 32 columns,  64 bytes a row          chunk c of row r is stored at chunk c ^ (r >> 1 & 3)
#pragma once
#include <cstdint>

#include "../ptx/cp_async.cuh"
#include "params.cuh"

template <int ROWS_, int D_>
struct SharedTile {
    static constexpr int ROWS = ROWS_;
    static constexpr int D = D_;
    static constexpr int PANEL = D % 64 == 0 ? 64 : 32;
    static constexpr int PANEL_CHUNKS = PANEL / 8;
    static constexpr int PANELS = D / PANEL;
    // Bytes of a row in a panel.
    static constexpr int ROW_BYTES = PANEL * ELEMENT_BYTES;
    static constexpr int ROW_CHUNKS = D / 8;
    static constexpr int BYTES = ROWS * D * ELEMENT_BYTES;
    static_assert(D % 32 == 0 && ROWS % 16 == 0);

    // Byte offset of a 16-byte chunk.
    __device__ static uint32_t offset(int row, int chunk) {
        const int panel = chunk / PANEL_CHUNKS;
        const int column = chunk % PANEL_CHUNKS;
        const int swizzled = PANEL == 64 ? column ^ (row & 7) : column ^ ((row >> 1) & 3);
        return (panel * ROWS + row) * ROW_BYTES + swizzled * 16;
    }

    // Where a lane finds its row of each 8x8 matrix. The swizzle depends on the lane alone, so a
    // step of whole chunks and of eight rows costs one exclusive or and a constant.
    struct LaneAddress {
        uint32_t row;
        uint32_t column;
    };

    // The lane's row among 16 from `first_row`, a multiple of 16, on, and which of two neighbouring
    // chunks it reads.
    __device__ static LaneAddress lane_address(uint32_t shared, int first_row, int row, int odd_chunk) {
        const int swizzle = PANEL == 64 ? row & 7 : (row >> 1) & 3;
        return {shared + (first_row + row) * ROW_BYTES, static_cast<uint32_t>((odd_chunk ^ swizzle) * 16)};
    }

    // The address `row_step` rows (a multiple of 8) further, at an even chunk.
    __device__ static uint32_t at(LaneAddress lane, int row_step, int even_chunk) {
        const int panel = even_chunk / PANEL_CHUNKS;
        return lane.row + (lane.column ^ (even_chunk % PANEL_CHUNKS * 16)) + (panel * ROWS + row_step) * ROW_BYTES;
    }

    // Starts to copy rows [0, ROWS) of a strided tensor; rows from `valid_rows` on, rows that
    // `keeps` refuses, and chunks from `valid_chunks` on become zeros. A pass of the block covers
    // one panel of THREADS / PANEL_CHUNKS rows.
    template <int THREADS, typename T, typename Keeps>
    __device__ static void load(uint32_t shared, const T* global, int64_t row_stride, int valid_rows, int valid_chunks, Keeps keeps) {
        constexpr int PASS_ROWS = THREADS / PANEL_CHUNKS;
        static_assert(ROWS % PASS_ROWS == 0 && PASS_ROWS % 8 == 0);
        const int first_row = threadIdx.x / PANEL_CHUNKS;
        const int column = threadIdx.x % PANEL_CHUNKS;
        const uint32_t to = shared + offset(first_row, column);
        const T* from = global + first_row * row_stride + column * 8;
#pragma unroll
        for (int pass = 0; pass < ROWS / PASS_ROWS; ++pass) {
            const int row = pass * PASS_ROWS + first_row;
            const bool valid_row = row < valid_rows && keeps(row);
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
                const bool valid = valid_row && panel * PANEL_CHUNKS + column < valid_chunks;
                // The address of a copy that reads nothing must still be valid.
                const T* source = valid ? from + panel * PANEL : global;
                ptx::cp_async_16(to + (panel * ROWS + pass * PASS_ROWS) * ROW_BYTES, source, valid);
            }
            from += PASS_ROWS * row_stride;
        }
    }

    // The same for a whole tile, which is the usual case: a decision for each copy would cost time
    // in every step.
    template <int THREADS, typename T>
    __device__ static void load_whole(uint32_t shared, const T* global, int64_t row_stride) {
        constexpr int PASS_ROWS = THREADS / PANEL_CHUNKS;
        const int first_row = threadIdx.x / PANEL_CHUNKS;
        const int column = threadIdx.x % PANEL_CHUNKS;
        const uint32_t to = shared + offset(first_row, column);
        const T* from = global + first_row * row_stride + column * 8;
#pragma unroll
        for (int pass = 0; pass < ROWS / PASS_ROWS; ++pass) {
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
                ptx::cp_async_16(to + (panel * ROWS + pass * PASS_ROWS) * ROW_BYTES, from + panel * PANEL);
            }
            from += PASS_ROWS * row_stride;
        }
    }

    // The rows that this thread copies of a tile whose rows lie anywhere. The list holds the
    // numbers of ROWS rows, in shared memory.
    template <int THREADS>
    struct Listed {
        static constexpr int PASS_ROWS = THREADS / PANEL_CHUNKS;
        static constexpr int PASSES = ROWS / PASS_ROWS;
        uint32_t rows[PASSES];

        __device__ explicit Listed(const uint32_t* list) {
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) rows[pass] = list[pass * PASS_ROWS + threadIdx.x / PANEL_CHUNKS];
        }
    };

    // `load`, or `load_whole` where WHOLE, for listed rows, all of which exist.
    template <bool WHOLE, int THREADS, typename T>
    __device__ static void gather(uint32_t shared, const T* global, int64_t row_stride, const Listed<THREADS>& listed, int valid_rows,
                                  int valid_chunks) {
        constexpr int PASS_ROWS = Listed<THREADS>::PASS_ROWS;
        static_assert(ROWS % PASS_ROWS == 0 && PASS_ROWS % 8 == 0);
        const int first_row = threadIdx.x / PANEL_CHUNKS;
        const int column = threadIdx.x % PANEL_CHUNKS;
        const uint32_t to = shared + offset(first_row, column);
#pragma unroll
        for (int pass = 0; pass < Listed<THREADS>::PASSES; ++pass) {
            const T* from = global + listed.rows[pass] * row_stride + column * 8;
            const bool valid_row = pass * PASS_ROWS + first_row < valid_rows;
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel) {
                const uint32_t chunk = to + (panel * ROWS + pass * PASS_ROWS) * ROW_BYTES;
                if constexpr (WHOLE) {
                    ptx::cp_async_16(chunk, from + panel * PANEL);
                } else {
                    const bool valid = valid_row && panel * PANEL_CHUNKS + column < valid_chunks;
                    // The address of a copy that reads nothing must still be valid: that of the
                    // row's first chunk is.
                    ptx::cp_async_16(chunk, valid ? from + panel * PANEL : from - column * 8, valid);
                }
            }
        }
    }
};
