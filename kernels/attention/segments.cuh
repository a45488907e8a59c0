// Tensors in segments along S, each in memory of its own: the lists and masks count rows over all
// segments, tensor maps the rows of one.
//
//   rows of all   0 .................. 511 | 512 ................................ 4607
//   segments      text, maps[0]            | image, maps[1]
//   ends          512                      | the largest number
//
// No group and no full tile of the lists crosses the end of a segment (the host cuts runs there). A
// group that starts shortly before one has fewer rows: what is past the end is read as zeros, and
// belongs to the next group.
#pragma once
#include "../common/params.cuh"

// A row of all segments.
struct SegmentRow {
    int segment;
    // In the segment.
    int row;
};

__device__ inline SegmentRow segment_row(const int32_t (&ends)[MAX_SEGMENTS], int row) {
    SegmentRow found = {0, row};
#pragma unroll
    for (int i = 0; i + 1 < MAX_SEGMENTS; ++i) {
        if (ends[i] <= row) found = {i + 1, row - ends[i]};
    }
    return found;
}

// The ends of `count` segments, one in each lane of a warp: a loading warp has few registers, and the
// tensor cores wait for what it does between two tiles. Whole warps call it.
struct SegmentEnds {
    int own;
    int count;

    __device__ SegmentEnds(const int32_t (&ends)[MAX_SEGMENTS], int count)
        : own(ends[min(threadIdx.x % 32, MAX_SEGMENTS - 1)]), count(count) {}

    // A row that is the same in all lanes.
    __device__ SegmentRow find_uniform(int row) const {
        const int segment = __popc(__ballot_sync(0xffffffff, own <= row) & ((1 << MAX_SEGMENTS) - 1));
        const int start = __shfl_sync(0xffffffff, own, max(segment - 1, 0));
        return {segment, segment == 0 ? row : row - start};
    }

    // Each lane's own row; and how many rows its segment has from there on.
    __device__ SegmentRow find(int row, int& left) const {
        SegmentRow found = {0, row};
        int end = __shfl_sync(0xffffffff, own, 0);
        left = end - row;
#pragma unroll 1
        for (int i = 1; i < count; ++i) {
            const int next = __shfl_sync(0xffffffff, own, i);
            if (end <= row) {
                found = {i, row - end};
                left = next - row;
            }
            end = next;
        }
        return found;
    }
};
