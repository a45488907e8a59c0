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

// Of the 16 rows from one on, those before the end of its segment.
__device__ inline int rows_in_segment(const int32_t (&ends)[MAX_SEGMENTS], int row) {
    int rows = GROUP_ROWS;
#pragma unroll
    for (int i = 0; i < MAX_SEGMENTS; ++i) {
        if (ends[i] > row) rows = min(rows, ends[i] - row);
    }
    return rows;
}
