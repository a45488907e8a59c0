// An output in segments along S, each where it lies: segment i has the tokens from outI_first on.
//
//   tokens   [ 0 1 2 3 | 4 5 6 7 8 9 ]       out1_first = 4
//              segment 0  segment 1
//
// Segments that share a buffer share its binding. A binding has fewer than 2^27 words, so the number
// of the binding stands above a position in it.

const POSITION: u32 = 0x0fffffffu;

// Where a row of the tile begins.
fn out_row(tile: Tile, row: u32) -> u32 {
    let token = lse_row(tile, row);
    if token >= params.out3_first {
        return params.out3_offset + tile.batch * params.out3_stride_b + tile.head * params.out3_stride_h
            + (token - params.out3_first) * params.out3_stride_s;
    }
    if token >= params.out2_first {
        return params.out2_offset + tile.batch * params.out2_stride_b + tile.head * params.out2_stride_h
            + (token - params.out2_first) * params.out2_stride_s;
    }
    if token >= params.out1_first {
        return params.out1_offset + tile.batch * params.out1_stride_b + tile.head * params.out1_stride_h
            + (token - params.out1_first) * params.out1_stride_s;
    }
    return params.out_offset + tile.batch * params.out_stride_b + tile.head * params.out_stride_h
        + token * params.out_stride_s;
}

fn store_out(row_at: u32, word: u32, value: vec4<u32>) {
    let at = (row_at & POSITION) + word;
    switch row_at >> 28u {
        case 1u: { out1[at] = value; } // with 2 buffers
        case 2u: { out2[at] = value; } // with 3 buffers
        case 3u: { out3[at] = value; } // with 4 buffers
        default: { out[at] = value; }
    }
}
