// A block of the sm100 kernel: its tiles, its shared and tensor memory, and what its loading warp
// tells the others.
#pragma once
#include <type_traits>

#include "../../common/params.cuh"
#include "../../common/shared_tile.cuh"
#include "../../ptx/mbarrier.cuh"
#include "../tile_lists.cuh"
#include "tiles.h"

namespace sm100 {

constexpr int WARPGROUP = WARPGROUP_THREADS;
constexpr int THREADS = SM100_THREADS;
// Query tiles of a block, their rows, and keys of a step.
constexpr int TILES = SM100_QUERY_TILES;
constexpr int TILE_M = SM100_TILE_ROWS;
constexpr int TILE_N = SM100_TILE_ROWS;
constexpr int TILE_GROUPS = TILE_M / GROUP_ROWS;
// Query tiles and key tiles that the loading warp may describe ahead.
constexpr int ROWS_SLOTS = 2;
constexpr int KEYS_SLOTS = 4;
// Registers of a thread in each warpgroup. Together they are all registers of a multiprocessor.
constexpr int SOFTMAX_REGISTERS = 184;
constexpr int CORRECTION_REGISTERS = 96;
constexpr int OTHER_REGISTERS = 48;
static_assert((2 * SOFTMAX_REGISTERS + CORRECTION_REGISTERS + OTHER_REGISTERS) * WARPGROUP <= 65536);

// What the other warps know of the query tiles of a block.
struct TileRows {
    // Key tiles; negative where nothing is left to do.
    int32_t key_tiles;
    // Query tiles that have rows and keys, so that there are products.
    int32_t tiles;
    int32_t batch;
    int32_t head;
    // Padded tensors: rows past the end are clipped by the copy engine.
    int32_t clips;
    RowGroup groups[TILES * TILE_GROUPS];
};

// What the other warps know of a key tile.
struct TileKeys {
    // Whether scores need any change: for keys that are not kept, or for a negative scale.
    uint32_t masked;
    // Whether there are rows of V that must be zeroed.
    uint32_t has_masked_values;
    uint32_t kept[TILE_N / 32];
};

// The same where queries see ranges of keys.
struct RangedTileRows : TileRows {
    // Where ranges begin to count: the first key of the sequence in the tensor.
    int32_t first_key;
    // Whether a value of a masked tile was NaN or infinite. Known when `Shape::CHECKED` is full.
    int32_t has_nonfinite;
};

struct RangedTileKeys : TileKeys {
    // The tile's first key, counted as ranges count keys; or ~ its number among the masked tiles of the
    // lists.
    int32_t tile;
};

template <typename T_, int D_, int STAGES_, bool RANGED_ = false>
struct Shape {
    using T = T_;
    // Whether each query sees a range of keys.
    static constexpr bool RANGED = RANGED_;
    using Rows = std::conditional_t<RANGED, RangedTileRows, TileRows>;
    using Keys = std::conditional_t<RANGED, RangedTileKeys, TileKeys>;
    using Params = std::conditional_t<RANGED, RangedTileListParams, TileListParams>;
    static constexpr int D = D_;
    static constexpr int STAGES = STAGES_;
    static_assert(D % 32 == 0 && D <= 128);

    // For queries, keys, values and outputs.
    using Tile = SharedTile<TILE_M, D>;
    static_assert(TILE_M == TILE_N);
    static constexpr int PANEL = Tile::PANEL;
    static constexpr int PANELS = Tile::PANELS;
    static constexpr int ROW_BYTES = Tile::ROW_BYTES;
    static constexpr int Q = 0;
    static constexpr int K = Q + TILES * Tile::BYTES;
    static constexpr int V = K + STAGES * Tile::BYTES;
    static constexpr int OUT = V + STAGES * Tile::BYTES;
    // What each row's output must be multiplied by: at a step, and at the end.
    static constexpr int FACTORS = OUT + Tile::BYTES;
    static constexpr int INVERSES = FACTORS + TILES * TILE_M * 4;
    static constexpr int ROWS_INFO = INVERSES + TILES * TILE_M * 4;
    static constexpr int KEYS_INFO = ROWS_INFO + ROWS_SLOTS * sizeof(Rows);
    static constexpr int TENSOR = KEYS_INFO + KEYS_SLOTS * sizeof(Keys);
    static constexpr int BARRIERS = (TENSOR + 4 + 7) / 8 * 8;
    // Barriers of `TileRows` and `TileKeys`.
    static constexpr int FULL_ROWS = BARRIERS;
    static constexpr int FREE_ROWS = FULL_ROWS + 8 * ROWS_SLOTS;
    static constexpr int FULL_KEYS = FREE_ROWS + 8 * ROWS_SLOTS;
    static constexpr int FREE_KEYS = FULL_KEYS + 8 * KEYS_SLOTS;
    // Barriers of copied data.
    static constexpr int FULL_Q = FREE_KEYS + 8 * KEYS_SLOTS;
    static constexpr int FREE_Q = FULL_Q + 8 * TILES;
    static constexpr int FULL_K = FREE_Q + 8 * TILES;
    static constexpr int FREE_K = FULL_K + 8 * STAGES;
    static constexpr int FULL_V = FREE_K + 8 * STAGES;
    static constexpr int FREE_V = FULL_V + 8 * STAGES;
    // Values are copied, but masked rows are not zeroed yet.
    static constexpr int RAW_V = FREE_V + 8 * STAGES;
    // Barriers of each query tile.
    static constexpr int SCORES = RAW_V + 8 * STAGES;
    static constexpr int PROBS = SCORES + 8 * TILES;
    static constexpr int FACTORS_FULL = PROBS + 8 * TILES;
    static constexpr int RESCALED = FACTORS_FULL + 8 * TILES;
    static constexpr int SUMS = RESCALED + 8 * TILES;
    static constexpr int FREE_SUMS = SUMS + 8 * TILES;
    static constexpr int OUTPUT = FREE_SUMS + 8 * TILES;
    static constexpr int FREE_OUTPUT = OUTPUT + 8 * TILES;
    // With key ranges: the values of the masked tiles of a query tile are searched.
    static constexpr int CHECKED = FREE_OUTPUT + 8 * TILES;
    static constexpr int BYTES = CHECKED + (RANGED ? 8 * ROWS_SLOTS : 0);
    // The host asks for the tiles and SM100_EXTRA_SHARED_BYTES.
    static_assert(BYTES <= FACTORS + SM100_EXTRA_SHARED_BYTES && FACTORS + SM100_EXTRA_SHARED_BYTES <= SM90_MAX_SHARED_BYTES);

    // Columns of tensor memory.
    static constexpr int SCORES_COLUMN = 0;
    static constexpr int OUTPUT_COLUMN = TILES * TILE_N;
    static constexpr int OUTPUT_STEP = 128;
};

// What every warp of a block works with.
template <typename S>
struct Block {
    const typename S::Params& all_params;
    const TileListParams& params;
    unsigned char* shared;
    uint32_t base;

    using Rows = typename S::Rows;
    using Keys = typename S::Keys;

    __device__ volatile Rows& rows_info(uint32_t work_index) const {
        return reinterpret_cast<volatile Rows*>(shared + S::ROWS_INFO)[work_index % ROWS_SLOTS];
    }
    __device__ volatile Keys& keys_info(uint32_t count) const {
        return reinterpret_cast<volatile Keys*>(shared + S::KEYS_INFO)[count % KEYS_SLOTS];
    }

    // Waits until use number `use` of a barrier, counted from 0, is full; or until the use before
    // it is over.
    __device__ void wait_full(int barrier, uint32_t use) const { ptx::mbarrier_wait(base + barrier, use % 2); }
    __device__ void wait_free(int barrier, uint32_t use) const { ptx::mbarrier_wait(base + barrier, (use + 1) % 2); }

    // One arrival for a warp, once all of its lanes are here.
    __device__ void arrive(int barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(base + barrier);
    }

    __device__ const volatile Rows& wait_rows(uint32_t work_index) const {
        wait_full(S::FULL_ROWS + 8 * (work_index % ROWS_SLOTS), work_index / ROWS_SLOTS);
        return rows_info(work_index);
    }
    __device__ void leave_rows(uint32_t work_index) const { arrive(S::FREE_ROWS + 8 * (work_index % ROWS_SLOTS)); }

    __device__ const volatile Keys& wait_keys(uint32_t count) const {
        wait_full(S::FULL_KEYS + 8 * (count % KEYS_SLOTS), count / KEYS_SLOTS);
        return keys_info(count);
    }
    __device__ void leave_keys(uint32_t count) const { arrive(S::FREE_KEYS + 8 * (count % KEYS_SLOTS)); }

    // With key ranges: that the values of a query tile's masked tiles are searched.
    __device__ void tell_checked(uint32_t work_index, bool has_nonfinite) const {
        if (threadIdx.x % 32 == 0) rows_info(work_index).has_nonfinite = has_nonfinite;
        arrive(S::CHECKED + 8 * (work_index % ROWS_SLOTS));
    }
    __device__ void wait_checked(uint32_t work_index) const { wait_full(S::CHECKED + 8 * (work_index % ROWS_SLOTS), work_index / ROWS_SLOTS); }
};

}  // namespace sm100
