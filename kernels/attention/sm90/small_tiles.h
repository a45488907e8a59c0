// Smaller query tiles of the sm90 kernel for calls without a mask that have few: more multiprocessors then
// have work, and several blocks share one, so that one has products while another starts or ends. Keys are
// those of the longest tiles, so that results have the same bits. The host reads this table too.
//
//   X(head_dim, warpgroups of 64 query rows, keys, query tiles, stages, blocks), as in tiles.h
#pragma once
#define VARLEN_FA_SM90_SMALL_TILES(X) X(64, 1, 128, 2, 2, 2)
