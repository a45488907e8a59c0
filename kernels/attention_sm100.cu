// Attention forward for SM100 (Blackwell): tcgen05 products with accumulators in tensor memory, the copy engine (TMA), a warp or
// warpgroup for each task, as in FlashAttention-4 (Zadouri et al., 2026). Persistent blocks of 16 warps, which take two tiles of 128
// query rows of a head at a time.
//
//   warps 0-3, 4-7   softmax of tile 0, 1    a thread owns a row: scores from tensor memory, probabilities back into it
//   warps 8-11       correction              rescales outputs where a maximum has grown; in the end divides and stores them
//   warp 12          products                S = Q·Kᵀ and O += P·V of both tiles
//   warp 13          loads                   what the next tiles are; copies Q, K, V
//   warp 14          mending                 zeroes dropped rows of V in masked tiles
//   warp 15          zeros                   rows that no query tile has
//
//   tensor memory, columns          one step of keys, seen by the tensor cores
//     0   S₀, then P₀ in its place    S₀│ O₀+=P₀·V │ S₀'│ O₁+=P₁·V │ S₁'│
//     128 S₁, then P₁                        tile 1's softmax  │ tile 0's softmax │ ...
//     256 O₀
//     384 O₁
//
// Two tiles keep the tensor cores busy: while one's products run, the other's softmax does. The tensor cores work in the order of issue,
// so that the scores of a step may take the place of the probabilities of the step before as soon as that product is issued.
//
// Barriers say that something is full or free. Each is waited for by phase, and none of them can get two phases ahead of whoever waits:
//
//   loads ──FULL_Q, FULL_K, FULL_V──▶ products ──SCORES──▶ softmax ──FACTORS──▶ correction ──RESCALED──▶ products
//         ◀─FREE_Q, FREE_K, FREE_V──           ◀──PROBS───         ───SUMS────▶            ◀──OUTPUT────
//                                                                                           ──FREE_OUTPUT▶
//
// Masks are those of attention_sm90.cu: `TileRows` and `TileKeys` tell of each query and key tile what the other warps have to know.
#include "include/listed_rows.cuh"
#include "include/ptx/mbarrier.cuh"
#include "include/ptx/tcgen05.cuh"
#include "include/ptx/tma.cuh"
#include "include/ptx/warpgroup.cuh"
#include "include/row_softmax.cuh"
#include "include/schedule_sm90.cuh"
#include "include/shared_tile.cuh"
#include "include/tile_shape_sm100.cuh"

namespace sm100 {

constexpr float LN_2 = 0.6931471805599453f;
constexpr int WARPGROUP = 128;
constexpr int THREADS = 512;
// Query tiles of a block, their rows, and keys of a step.
constexpr int TILES = 2;
constexpr int TILE_M = 128;
constexpr int TILE_N = 128;
constexpr int TILE_GROUPS = TILE_M / GROUP_ROWS;
// Query tiles and key tiles that may be described ahead.
constexpr int ROWS_SLOTS = 2;
constexpr int KEYS_SLOTS = 4;
// All registers of a multiprocessor: 2 · 184 + 96 + 48 a thread of four warpgroups.
constexpr int SOFTMAX_REGISTERS = 184;
constexpr int CORRECTION_REGISTERS = 96;
constexpr int OTHER_REGISTERS = 48;
static_assert((2 * SOFTMAX_REGISTERS + CORRECTION_REGISTERS + OTHER_REGISTERS) * WARPGROUP <= 65536);

// What the other warps know of the query tiles of a block.
struct TileRows {
    // Negative where nothing is left to do.
    int32_t key_tiles;
    // Tiles that have rows and keys, so that there are products.
    int32_t tiles;
    int32_t batch;
    int32_t head;
    // Padded tensors: rows past the end are clipped by the copy engine.
    int32_t clips;
    // Of each 16 rows: the first, how many are the tile's, and which of them are kept.
    struct Group {
        int32_t first_row;
        int32_t rows;
        uint32_t kept;
    } groups[TILES * TILE_GROUPS];
};

// What the other warps know of a key tile.
struct TileKeys {
    // Whether the scores need any change: for keys that are not kept, or for a negative scale.
    uint32_t masked;
    // Rows of V that are not kept have to be zeroed.
    uint32_t mended;
    uint32_t kept[TILE_N / 32];
};

template <typename T_, int D_, int STAGES_>
struct Shape {
    using T = T_;
    static constexpr int D = D_;
    static constexpr int STAGES = STAGES_;
    static_assert(D % 32 == 0 && D <= 128);

    // Of queries, keys, values and outputs alike.
    using Tile = SharedTile<TILE_M, D>;
    static_assert(TILE_M == TILE_N);
    static constexpr int PANEL = Tile::PANEL;
    static constexpr int PANELS = D / PANEL;
    static constexpr int ROW_BYTES = PANEL * 2;
    static constexpr int Q = 0;
    static constexpr int K = Q + TILES * Tile::BYTES;
    static constexpr int V = K + STAGES * Tile::BYTES;
    static constexpr int OUT = V + STAGES * Tile::BYTES;
    // By which each row's output has to be multiplied: at a step, and in the end.
    static constexpr int FACTORS = OUT + Tile::BYTES;
    static constexpr int INVERSES = FACTORS + TILES * TILE_M * 4;
    static constexpr int ROWS_INFO = INVERSES + TILES * TILE_M * 4;
    static constexpr int KEYS_INFO = ROWS_INFO + ROWS_SLOTS * sizeof(TileRows);
    static constexpr int TENSOR = KEYS_INFO + KEYS_SLOTS * sizeof(TileKeys);
    static constexpr int BARRIERS = (TENSOR + 4 + 7) / 8 * 8;
    // The lists of warps that tell and that are told.
    static constexpr int FULL_ROWS = BARRIERS;
    static constexpr int FREE_ROWS = FULL_ROWS + 8 * ROWS_SLOTS;
    static constexpr int FULL_KEYS = FREE_ROWS + 8 * ROWS_SLOTS;
    static constexpr int FREE_KEYS = FULL_KEYS + 8 * KEYS_SLOTS;
    // Data that is copied.
    static constexpr int FULL_Q = FREE_KEYS + 8 * KEYS_SLOTS;
    static constexpr int FREE_Q = FULL_Q + 8 * TILES;
    static constexpr int FULL_K = FREE_Q + 8 * TILES;
    static constexpr int FREE_K = FULL_K + 8 * STAGES;
    static constexpr int FULL_V = FREE_K + 8 * STAGES;
    static constexpr int FREE_V = FULL_V + 8 * STAGES;
    // Copied but not yet zeroed where it has to be.
    static constexpr int RAW_V = FREE_V + 8 * STAGES;
    // Of each query tile.
    static constexpr int SCORES = RAW_V + 8 * STAGES;
    static constexpr int PROBS = SCORES + 8 * TILES;
    static constexpr int FACTORS_FULL = PROBS + 8 * TILES;
    static constexpr int RESCALED = FACTORS_FULL + 8 * TILES;
    static constexpr int SUMS = RESCALED + 8 * TILES;
    static constexpr int FREE_SUMS = SUMS + 8 * TILES;
    static constexpr int OUTPUT = FREE_SUMS + 8 * TILES;
    static constexpr int FREE_OUTPUT = OUTPUT + 8 * TILES;
    static constexpr int BYTES = FREE_OUTPUT + 8 * TILES;
    // What the host asks for: the tiles and 3 KiB.
    static_assert(BYTES <= FACTORS + 3072 && FACTORS + 3072 <= 227 * 1024);

    // Columns of tensor memory.
    static constexpr int SCORES_COLUMN = 0;
    static constexpr int OUTPUT_COLUMN = TILES * TILE_N;
    static constexpr int OUTPUT_STEP = 128;
};

// The position of a tile in the ring of stages.
template <int STAGES>
struct Turn {
    uint32_t count = 0;
    __device__ int stage() const { return count % STAGES; }
    __device__ uint32_t parity() const { return count / STAGES % 2; }
};

// What every warp has at hand.
template <typename S>
struct Block {
    const AttentionParamsSm90& params;
    unsigned char* shared;
    uint32_t base;

    __device__ volatile TileRows& rows_info(uint32_t works) const {
        return reinterpret_cast<volatile TileRows*>(shared + S::ROWS_INFO)[works % ROWS_SLOTS];
    }
    __device__ volatile TileKeys& keys_info(uint32_t count) const {
        return reinterpret_cast<volatile TileKeys*>(shared + S::KEYS_INFO)[count % KEYS_SLOTS];
    }

    // Waits for the use of a barrier with a number, counted from 0; or for the end of the use before it.
    __device__ void wait_full(int barrier, uint32_t use) const { ptx::mbarrier_wait(base + barrier, use % 2); }
    __device__ void wait_free(int barrier, uint32_t use) const { ptx::mbarrier_wait(base + barrier, (use + 1) % 2); }

    // Of a warp, once all of its lanes are here.
    __device__ void arrive(int barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(base + barrier);
    }

    __device__ const volatile TileRows& wait_rows(uint32_t works) const {
        wait_full(S::FULL_ROWS + 8 * (works % ROWS_SLOTS), works / ROWS_SLOTS);
        return rows_info(works);
    }
    __device__ void leave_rows(uint32_t works) const { arrive(S::FREE_ROWS + 8 * (works % ROWS_SLOTS)); }

    __device__ const volatile TileKeys& wait_keys(uint32_t count) const {
        wait_full(S::FULL_KEYS + 8 * (count % KEYS_SLOTS), count / KEYS_SLOTS);
        return keys_info(count);
    }
    __device__ void leave_keys(uint32_t count) const { arrive(S::FREE_KEYS + 8 * (count % KEYS_SLOTS)); }
};

// Finds what the block has to do, tells the other warps, and copies it.
template <typename S>
struct Loader {
    Block<S> block;
    const AttentionParamsSm90& params;
    int lane;
    // Which keys the tiles of this work come from.
    int batch;
    int kv_head;
    int first_key;
    int keys;
    int key_tiles;
    const int32_t* tile_list;

    using Tile = typename S::Tile;
    using KeysTurn = Turn<S::STAGES>;

    __device__ explicit Loader(const Block<S>& block) : block(block), params(block.params), lane(threadIdx.x % 32) {}

    __device__ void run() {
        Schedule<TILES * TILE_M> schedule(params);
        KeysTurn turn;
        Work work;
        uint32_t works = 0;
        uint32_t uses[TILES] = {};
        for (; schedule.next(work); ++works) {
            const TileRows::Group group = find(work);
            const bool has_second = __shfl_sync(0xffffffff, group.rows, TILE_GROUPS) > 0;
            const int tiles = key_tiles == 0 ? 0 : has_second ? TILES : 1;
            describe_rows(work, works, tiles, group);
            if (tiles == 0) continue;
            int tile = tile_at(0);
            load_keys(0, tile, turn);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t < tiles) load_queries(t, uses[t]++, work, group);
            }
            for (int i = 0; i < key_tiles; ++i) {
                int next = 0;
                if (i + 1 < key_tiles) {
                    next = tile_at(i + 1);
                    load_keys(i + 1, next, {turn.count + 1});
                }
                load_values(i, tile, turn);
                tile = next;
                ++turn.count;
            }
        }
        block.wait_free(S::FREE_ROWS + 8 * (works % ROWS_SLOTS), works / ROWS_SLOTS);
        if (lane == 0) block.rows_info(works).key_tiles = -1;
        block.arrive(S::FULL_ROWS + 8 * (works % ROWS_SLOTS));
    }

private:
    // Where the work's keys are, and this lane's 16 query rows.
    __device__ TileRows::Group find(const Work& work) {
        batch = work.group;
        first_key = 0;
        keys = params.seq_k;
        kv_head = work.head / params.group_size;
        int first_row = work.tile * TILES * TILE_M + lane * GROUP_ROWS;
        int queries = params.seq_q;
        uint32_t kept = 0xffff;
        if (params.form == FORM_FUSED) {
            const BatchTiles tiles = params.batches[work.group];
            batch = tiles.batch;
            key_tiles = tiles.key_tiles;
            tile_list = params.key_tiles + tiles.first_key_tile;
            const int tile = tiles.first_query_tile + work.tile;
            if (lane < TILES * TILE_GROUPS) {
                first_row = params.query_groups[tile * TILES * TILE_GROUPS + lane];
                kept = group_bits(params.row_bits, params.row_words, batch, first_row);
            }
        } else {
            if (params.form == FORM_PACKED) {
                first_row += params.cu_seqlens_q[work.group];
                queries = params.cu_seqlens_q[work.group + 1];
                first_key = params.cu_seqlens_k[work.group];
                keys = params.cu_seqlens_k[work.group + 1] - first_key;
                batch = 0;
            }
            key_tiles = (keys + TILE_N - 1) / TILE_N;
        }
        return {first_row, min(max(queries - first_row, 0), GROUP_ROWS), kept};
    }

    __device__ void describe_rows(const Work& work, uint32_t works, int tiles, const TileRows::Group& group) const {
        block.wait_free(S::FREE_ROWS + 8 * (works % ROWS_SLOTS), works / ROWS_SLOTS);
        volatile TileRows& rows = block.rows_info(works);
        if (lane < TILES * TILE_GROUPS) {
            rows.groups[lane].first_row = group.first_row;
            rows.groups[lane].rows = group.rows;
            rows.groups[lane].kept = group.kept;
        }
        if (lane == 0) {
            rows.key_tiles = key_tiles;
            rows.tiles = tiles;
            rows.batch = batch;
            rows.head = work.head;
            rows.clips = params.form != FORM_PACKED;
        }
        block.arrive(S::FULL_ROWS + 8 * (works % ROWS_SLOTS));
    }

    __device__ void expect(int barrier) const {
        if (lane == 0) ptx::mbarrier_arrive_expect(block.base + barrier, Tile::BYTES);
        __syncwarp();
    }

    // A query tile, as soon as the products with the one before are done.
    __device__ void load_queries(int t, uint32_t use, const Work& work, const TileRows::Group& group) const {
        block.wait_free(S::FREE_Q + 8 * t, use);
        expect(S::FULL_Q + 8 * t);
        if (lane / TILE_GROUPS == t) {
            load_group(params.q_map, S::Q + t * Tile::BYTES, S::FULL_Q + 8 * t, ptx::policy_evict_first(), group.first_row, work.head);
        }
    }

    // A key tile's first key in the tensor, or, negative, ~ its number among the masked ones of the lists.
    __device__ int tile_at(int i) const { return params.form == FORM_FUSED ? tile_list[i] : first_key + i * TILE_N; }

    // This lane's group of a tile.
    __device__ void load_group(const ptx::TensorMap& map, int to, int barrier, uint64_t policy, int row, int head) const {
        const uint32_t rows = block.base + to + lane % TILE_GROUPS * GROUP_ROWS * S::ROW_BYTES;
#pragma unroll
        for (int panel = 0; panel < S::PANELS; ++panel) {
            ptx::tma_load(rows + panel * TILE_M * S::ROW_BYTES, &map, block.base + barrier, policy, panel * S::PANEL, row, head, batch);
        }
    }

    __device__ void load_tile(const ptx::TensorMap& map, const ptx::TensorMap& group_map, int to, int barrier, int tile) const {
        const uint64_t policy = ptx::policy_evict_last();
        expect(barrier);
        if (tile >= 0) {
            if (lane < S::PANELS) {
                ptx::tma_load(block.base + to + lane * TILE_N * S::ROW_BYTES, &map, block.base + barrier, policy, lane * S::PANEL, tile, kv_head,
                              batch);
            }
        } else if (lane < TILE_GROUPS) {
            load_group(group_map, to, barrier, policy, params.key_groups[~tile * TILE_GROUPS + lane], kv_head);
        }
    }

    __device__ bool is_masked(int i, int tile) const { return params.form == FORM_FUSED ? tile < 0 : (i + 1) * TILE_N > keys; }

    __device__ bool is_mended(int i, int tile) const { return params.form != FORM_DENSE && is_masked(i, tile); }

    __device__ void load_keys(int i, int tile, KeysTurn turn) const {
        block.wait_free(S::FREE_KEYS + 8 * (turn.count % KEYS_SLOTS), turn.count / KEYS_SLOTS);
        volatile TileKeys& info = block.keys_info(turn.count);
        const bool is_changed = is_masked(i, tile) || params.score_scale < 0.0f;
        if (is_changed) describe_keys(i, tile, info);
        if (lane == 0) {
            info.masked = is_changed;
            info.mended = is_mended(i, tile);
        }
        block.arrive(S::FULL_KEYS + 8 * (turn.count % KEYS_SLOTS));
        ptx::mbarrier_wait(block.base + S::FREE_K + 8 * turn.stage(), turn.parity() ^ 1);
        load_tile(params.k_map, params.k_group_map, S::K + turn.stage() * Tile::BYTES, S::FULL_K + 8 * turn.stage(), tile);
    }

    // Which keys of a masked tile are kept.
    __device__ void describe_keys(int i, int tile, volatile TileKeys& info) const {
        uint32_t kept = 0xffffffff;
        if (params.form == FORM_FUSED && tile < 0) {
            kept = 0;
            if (lane < TILE_GROUPS) {
                kept = group_bits(params.key_bits, params.key_words, batch, params.key_groups[~tile * TILE_GROUPS + lane]);
            }
            const uint32_t even = __shfl_sync(0xffffffff, kept, 2 * lane % 32);
            const uint32_t odd = __shfl_sync(0xffffffff, kept, (2 * lane + 1) % 32);
            kept = even | odd << 16;
        } else if (params.form != FORM_FUSED) {
            const int left = keys - i * TILE_N - lane * 32;
            kept = left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
        }
        if (lane < TILE_N / 32) info.kept[lane] = kept;
    }

    __device__ void load_values(int i, int tile, KeysTurn turn) const {
        ptx::mbarrier_wait(block.base + S::FREE_V + 8 * turn.stage(), turn.parity() ^ 1);
        const int full = (is_mended(i, tile) ? S::RAW_V : S::FULL_V) + 8 * turn.stage();
        load_tile(params.v_map, params.v_group_map, S::V + turn.stage() * Tile::BYTES, full, tile);
    }
};

// Zeroes rows of V which are not kept: P·V multiplies them by zero, and they may hold NaN. Opens the products' barrier for such a tile.
template <typename S>
__device__ inline void mend_values(const Block<S>& block) {
    const int lane = threadIdx.x % 32;
    Turn<S::STAGES> turn;
    // One bit a stage.
    uint32_t raw_parities = 0;
    for (uint32_t works = 0;; ++works) {
        const volatile TileRows& rows = block.wait_rows(works);
        const int key_tiles = rows.key_tiles;
        const int tiles = rows.tiles;
        block.leave_rows(works);
        if (key_tiles < 0) return;
        for (int i = 0; i < key_tiles && tiles > 0; ++i, ++turn.count) {
            const volatile TileKeys& info = block.wait_keys(turn.count);
            const bool is_mended = info.mended;
            const uint32_t kept = lane < TILE_N / 32 && is_mended ? info.kept[lane] : 0;
            block.leave_keys(turn.count);
            if (!is_mended) continue;
            ptx::mbarrier_wait(block.base + S::RAW_V + 8 * turn.stage(), raw_parities >> turn.stage() & 1);
            raw_parities ^= 1u << turn.stage();
            unsigned char* const tile = block.shared + S::V + turn.stage() * S::Tile::BYTES;
            // A panel's row is as many chunks of 16 bytes; the warp zeroes them for several rows at a time.
            constexpr int CHUNKS = S::ROW_BYTES / 16;
            for (int first = 0; first < TILE_N; first += 32 / CHUNKS) {
                const int row = first + lane / CHUNKS;
                const uint32_t word = __shfl_sync(0xffffffff, kept, first / 32);
                if ((word >> (row % 32) & 1) == 0) {
#pragma unroll
                    for (int panel = 0; panel < S::PANELS; ++panel) {
                        *reinterpret_cast<uint4*>(tile + (panel * TILE_N + row) * S::ROW_BYTES + lane % CHUNKS * 16) = uint4{0, 0, 0, 0};
                    }
                }
            }
            ptx::fence_async_proxy();
            block.arrive(S::FULL_V + 8 * turn.stage());
        }
    }
}

// Issues the products of both tiles.
template <typename S>
struct Multiplier {
    Block<S> block;
    uint32_t tensor;

    using T = typename S::T;
    using Matrix = ptx::OperandMatrix<S::ROW_BYTES>;
    // Uses of each tile so far: by works, by steps, and by steps that come after another.
    uint32_t works_of[TILES] = {};
    uint32_t steps_of[TILES] = {};
    uint32_t rescales_of[TILES] = {};

    __device__ Multiplier(const Block<S>& block, uint32_t tensor) : block(block), tensor(tensor) {}

    // S = Q·Kᵀ
    __device__ void issue_scores(int t, int stage) const {
        constexpr uint32_t PRODUCT = ptx::Product<T, TILE_N, ptx::Contiguous::SUMMED>::DESCRIPTOR;
        const Matrix q(block.base + S::Q + t * S::Tile::BYTES, 16);
        const Matrix k(block.base + S::K + stage * S::Tile::BYTES, 16);
#pragma unroll
        for (int step = 0; step < S::D / 16; ++step) {
            const int from = step * 16 / S::PANEL * TILE_M * S::ROW_BYTES + step * 16 % S::PANEL * 2;
            ptx::multiply(tensor + S::SCORES_COLUMN + t * TILE_N, q.at(from), k.at(from), PRODUCT, step > 0);
        }
    }

    // O += P·V
    __device__ void issue_output(int t, int stage, bool accumulate) const {
        constexpr uint32_t PRODUCT = ptx::Product<T, S::D, ptx::Contiguous::OTHER>::DESCRIPTOR;
        const Matrix v(block.base + S::V + stage * S::Tile::BYTES, TILE_N * S::ROW_BYTES);
#pragma unroll
        for (int step = 0; step < TILE_N / 16; ++step) {
            // Two probabilities a column.
            const uint32_t probs = tensor + S::SCORES_COLUMN + t * TILE_N + step * 8;
            ptx::multiply(tensor + S::OUTPUT_COLUMN + t * S::OUTPUT_STEP, probs, v.at(step * 16 * S::ROW_BYTES), PRODUCT, accumulate || step > 0);
        }
    }

    __device__ void commit(int barrier) const { ptx::commit_products(block.base + barrier); }

    // The scores of a tile's step; with the last ones, its queries are free.
    __device__ void start_step(int t, int stage, bool is_last) const {
        issue_scores(t, stage);
        commit(S::SCORES + 8 * t);
        if (is_last) commit(S::FREE_Q + 8 * t);
    }

    __device__ void wait_keys(Turn<S::STAGES> turn) const { ptx::mbarrier_wait(block.base + S::FULL_K + 8 * turn.stage(), turn.parity()); }

    __device__ void run() {
        Turn<S::STAGES> turn;
        for (uint32_t works = 0;; ++works) {
            const volatile TileRows& rows = block.wait_rows(works);
            const int key_tiles = rows.key_tiles;
            const int tiles = rows.tiles;
            block.leave_rows(works);
            if (key_tiles < 0) return;
            if (tiles == 0) continue;
            wait_keys(turn);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t >= tiles) break;
                block.wait_full(S::FULL_Q + 8 * t, works_of[t]);
                ptx::tensor_fence_after();
                start_step(t, turn.stage(), key_tiles == 1);
            }
            commit(S::FREE_K + 8 * turn.stage());
            for (int i = 0; i < key_tiles; ++i) {
                const Turn<S::STAGES> next = {turn.count + 1};
                const bool is_last = i + 1 == key_tiles;
                ptx::mbarrier_wait(block.base + S::FULL_V + 8 * turn.stage(), turn.parity());
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    if (t >= tiles) break;
                    block.wait_full(S::PROBS + 8 * t, steps_of[t]++);
                    if (i == 0) {
                        block.wait_free(S::FREE_OUTPUT + 8 * t, works_of[t]);
                    } else {
                        block.wait_full(S::RESCALED + 8 * t, rescales_of[t]++);
                    }
                    ptx::tensor_fence_after();
                    issue_output(t, turn.stage(), i > 0);
                    if (is_last) {
                        commit(S::OUTPUT + 8 * t);
                    } else {
                        if (t == 0) wait_keys(next);
                        start_step(t, next.stage(), i + 2 == key_tiles);
                    }
                }
                commit(S::FREE_V + 8 * turn.stage());
                if (!is_last) commit(S::FREE_K + 8 * next.stage());
                turn = next;
            }
#pragma unroll
            for (int t = 0; t < TILES; ++t) works_of[t] += t < tiles;
        }
    }
};

// The softmax of one tile, a row for each thread of a warpgroup.
template <typename S>
struct Softmaxer {
    Block<S> block;
    // Where the scores of this thread's warp are.
    uint32_t tensor;
    int tile;
    int row;
    float scale;
    // Key tiles, steps with products and works with products so far.
    uint32_t count = 0;
    uint32_t steps = 0;
    uint32_t uses = 0;

    using T = typename S::T;

    __device__ Softmaxer(const Block<S>& block, uint32_t tensor, int tile)
        : block(block), tile(tile), row(threadIdx.x % WARPGROUP), scale(fabsf(block.params.score_scale)) {
        this->tensor = tensor + (static_cast<uint32_t>(row / 32 * 32) << 16) + S::SCORES_COLUMN + tile * TILE_N;
    }

    __device__ void run() {
        for (uint32_t works = 0;; ++works) {
            const volatile TileRows& rows = block.wait_rows(works);
            const int key_tiles = rows.key_tiles;
            if (key_tiles < 0) return;
            const int tiles = rows.tiles;
            RowSoftmax softmax;
            if (tile < tiles) {
                attend(softmax, key_tiles, rows);
            } else {
                // A tile without rows keeps pace with the other.
                for (int i = 0; i < key_tiles && tiles > 0; ++i, ++count) {
                    block.wait_keys(count);
                    block.leave_keys(count);
                }
            }
            if (block.params.lse != nullptr) write_lse(softmax, rows);
            block.leave_rows(works);
        }
    }

    __device__ void attend(RowSoftmax& softmax, int key_tiles, const volatile TileRows& rows) {
        float* const factors = reinterpret_cast<float*>(block.shared + S::FACTORS) + tile * TILE_M;
        float* const inverses = reinterpret_cast<float*>(block.shared + S::INVERSES) + tile * TILE_M;
        for (int i = 0; i < key_tiles; ++i, ++count, ++steps) {
            uint32_t scores[4][32];
            const volatile TileKeys& info = block.wait_keys(count);
            const bool masked = info.masked;
            block.wait_full(S::SCORES + 8 * tile, steps);
            ptx::tensor_fence_after();
#pragma unroll
            for (int part = 0; part < 4; ++part) ptx::tensor_load(scores[part], tensor + part * 32);
            ptx::tensor_wait_load(scores[0], scores[1], scores[2], scores[3]);
            if (masked) mask(scores, info);
            block.leave_keys(count);
            softmax.raise(scores, scale);
            if (i > 0) {
                // The correction relies on the product before these scores being done, too.
                factors[row] = softmax.factor;
                ptx::tensor_fence_before();
                block.arrive(S::FACTORS_FULL + 8 * tile);
            }
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                uint32_t probs[16];
                softmax.template exponentiate<T>(probs, scores[part], scale);
                ptx::tensor_store(tensor + part * 16, probs);
            }
            ptx::tensor_wait_store();
            ptx::tensor_fence_before();
            block.arrive(S::PROBS + 8 * tile);
        }
        // Read this late, since registers are short before.
        const uint32_t kept = rows.groups[tile * TILE_GROUPS + row / GROUP_ROWS].kept;
        const bool zero = softmax.sum == 0.0f || (kept >> (row % GROUP_ROWS) & 1) == 0;
        block.wait_free(S::FREE_SUMS + 8 * tile, uses);
        inverses[row] = zero ? 0.0f : 1.0f / softmax.sum;
        block.arrive(S::SUMS + 8 * tile);
        ++uses;
    }

    __device__ void mask(uint32_t (&scores)[4][32], const volatile TileKeys& info) const {
        // The maximum is taken before scaling, so the sign of the scale goes to the scores.
        if (block.params.score_scale < 0.0f) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
#pragma unroll
                for (int i = 0; i < 32; ++i) scores[part][i] ^= 0x80000000;
            }
        }
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const uint32_t kept = info.kept[part];
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                if ((kept >> i & 1) == 0) scores[part][i] = __float_as_uint(-INFINITY);
            }
        }
    }

    __device__ void write_lse(const RowSoftmax& softmax, const volatile TileRows& rows) const {
        const volatile auto& group = rows.groups[tile * TILE_GROUPS + row / GROUP_ROWS];
        if (row % GROUP_ROWS >= group.rows) return;
        const bool zero = softmax.sum == 0.0f || (group.kept >> (row % GROUP_ROWS) & 1) == 0;
        const float lse = zero ? -INFINITY : (softmax.finite_reference() * scale + log2f(softmax.sum)) * LN_2;
        block.params.lse[rows.head * block.params.lse_head_stride + static_cast<int64_t>(rows.batch) * block.params.seq_q + group.first_row +
                         row % GROUP_ROWS] = lse;
    }
};

// Rescales outputs in tensor memory where softmax says so, and stores them in the end.
template <typename S>
struct Corrector {
    Block<S> block;
    // Where the outputs of this thread's warp are.
    uint32_t tensor;
    int warp;
    int lane;
    // Rescales and works of each tile so far.
    uint32_t rescales_of[TILES] = {};
    uint32_t works_of[TILES] = {};

    using T = typename S::T;

    __device__ Corrector(const Block<S>& block, uint32_t tensor)
        : block(block), tensor(tensor + (threadIdx.x / 32 % 4 * 32 << 16) + S::OUTPUT_COLUMN), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

    __device__ void run() {
        for (uint32_t works = 0;; ++works) {
            const volatile TileRows& rows = block.wait_rows(works);
            const int key_tiles = rows.key_tiles;
            if (key_tiles < 0) break;
            const int tiles = rows.tiles;
            for (int i = 1; i < key_tiles && tiles > 0; ++i) {
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    if (t < tiles) rescale(t);
                }
            }
#pragma unroll
            for (int t = 0; t < TILES; ++t) store(t, rows, t < tiles);
            block.leave_rows(works);
        }
        // Shared memory must outlive what reads it.
        if (lane == 0) ptx::tma_store_wait_read();
    }

    __device__ void rescale(int t) {
        block.wait_full(S::FACTORS_FULL + 8 * t, rescales_of[t]++);
        const float factor = reinterpret_cast<const volatile float*>(block.shared + S::FACTORS)[t * TILE_M + warp * 32 + lane];
        // NaN, too, is not 1.
        if (__any_sync(0xffffffff, factor != 1.0f)) {
            ptx::tensor_fence_after();
#pragma unroll
            for (int part = 0; part < S::D / 32; ++part) {
                uint32_t values[32];
                ptx::tensor_load(values, tensor + t * S::OUTPUT_STEP + part * 32);
                ptx::tensor_wait_load(values);
#pragma unroll
                for (int i = 0; i < 32; i += 2) {
                    const float2 scaled = ptx::multiply_pair({__uint_as_float(values[i]), __uint_as_float(values[i + 1])}, {factor, factor});
                    values[i] = __float_as_uint(scaled.x);
                    values[i + 1] = __float_as_uint(scaled.y);
                }
                ptx::tensor_store(tensor + t * S::OUTPUT_STEP + part * 32, values);
            }
            ptx::tensor_wait_store();
            ptx::tensor_fence_before();
        }
        block.arrive(S::RESCALED + 8 * t);
    }

    // A tile's output, or zeros if there were no keys: through shared memory to the copy engine; or to 16-byte stores, where it would
    // write rows of the next sequence. A warp stores the 32 rows that it reaches.
    __device__ void store(int t, const volatile TileRows& rows, bool is_computed) {
        if (!is_computed && rows.groups[t * TILE_GROUPS].rows == 0) return;
        float inverse = 0.0f;
        if (is_computed) {
            block.wait_full(S::SUMS + 8 * t, works_of[t]);
            inverse = reinterpret_cast<const volatile float*>(block.shared + S::INVERSES)[t * TILE_M + warp * 32 + lane];
            block.arrive(S::FREE_SUMS + 8 * t);
            block.wait_full(S::OUTPUT + 8 * t, works_of[t]++);
            ptx::tensor_fence_after();
        }
        // This warp's last output has left.
        if (lane == 0) ptx::tma_store_wait_read();
        __syncwarp();
#pragma unroll
        for (int part = 0; part < S::D / 32; ++part) {
            uint32_t values[32] = {};
            if (is_computed) {
                ptx::tensor_load(values, tensor + t * S::OUTPUT_STEP + part * 32);
                ptx::tensor_wait_load(values);
            }
#pragma unroll
            for (int chunk = 0; chunk < 4; ++chunk) {
                uint32_t words[4];
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    const int at = chunk * 8 + word * 2;
                    // Selected, not multiplied: a dropped row may hold NaN.
                    const float low = inverse == 0.0f ? 0.0f : __uint_as_float(values[at]) * inverse;
                    const float high = inverse == 0.0f ? 0.0f : __uint_as_float(values[at + 1]) * inverse;
                    words[word] = ptx::pack_pair<T>(low, high);
                }
                *reinterpret_cast<uint4*>(block.shared + S::OUT + S::Tile::offset(warp * 32 + lane, part * 4 + chunk)) =
                    uint4{words[0], words[1], words[2], words[3]};
            }
        }
        if (is_computed) {
            ptx::tensor_fence_before();
            block.arrive(S::FREE_OUTPUT + 8 * t);
        }
        ptx::fence_async_proxy();
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) store_group(rows, rows.groups[t * TILE_GROUPS + warp * 2 + half], warp * 32 + half * GROUP_ROWS);
        if (lane == 0) ptx::tma_store_commit();
    }

    // Rows of the output tile from `first` on.
    __device__ void store_group(const volatile TileRows& rows, const volatile TileRows::Group& group, int first) const {
        const int count = group.rows;
        const int first_row = group.first_row;
        if (count == 0) return;
        if (rows.clips || count == GROUP_ROWS) {
            if (lane == 0) {
#pragma unroll
                for (int panel = 0; panel < S::PANELS; ++panel) {
                    ptx::tma_store(&block.params.out_map, block.base + S::OUT + (panel * TILE_M + first) * S::ROW_BYTES, panel * S::PANEL,
                                   first_row, rows.head, rows.batch);
                }
            }
            return;
        }
        const Strides& strides = block.params.out_strides;
        T* const out = static_cast<T*>(block.params.out) + first_row * strides.token + rows.head * strides.head;
        for (int index = lane; index < count * (S::D / 8); index += 32) {
            const int row = index / (S::D / 8);
            const int chunk = index % (S::D / 8);
            if (chunk * 8 < block.params.head_dim) {
                *reinterpret_cast<uint4*>(out + row * strides.token + chunk * 8) =
                    *reinterpret_cast<const uint4*>(block.shared + S::OUT + S::Tile::offset(first + row, chunk));
            }
        }
    }
};

template <typename S>
__device__ inline void init_barriers(uint32_t base, bool mends) {
    // Warps of a warpgroup arrive one by one.
    constexpr int WARPS = 4;
    const int helpers = mends ? 1 : 0;
    for (int slot = 0; slot < ROWS_SLOTS; ++slot) {
        ptx::mbarrier_init(base + S::FULL_ROWS + 8 * slot, 1);
        ptx::mbarrier_init(base + S::FREE_ROWS + 8 * slot, (TILES + 1) * WARPS + 1 + helpers);
    }
    for (int slot = 0; slot < KEYS_SLOTS; ++slot) {
        ptx::mbarrier_init(base + S::FULL_KEYS + 8 * slot, 1);
        ptx::mbarrier_init(base + S::FREE_KEYS + 8 * slot, TILES * WARPS + helpers);
    }
    for (int stage = 0; stage < S::STAGES; ++stage) {
        for (const int barrier : {S::FULL_K, S::FREE_K, S::FULL_V, S::FREE_V, S::RAW_V}) ptx::mbarrier_init(base + barrier + 8 * stage, 1);
    }
    for (int t = 0; t < TILES; ++t) {
        for (const int barrier : {S::FULL_Q, S::FREE_Q, S::SCORES, S::OUTPUT}) ptx::mbarrier_init(base + barrier + 8 * t, 1);
        for (const int barrier : {S::PROBS, S::FACTORS_FULL, S::RESCALED, S::SUMS, S::FREE_SUMS, S::FREE_OUTPUT}) {
            ptx::mbarrier_init(base + barrier + 8 * t, WARPS);
        }
    }
    ptx::mbarrier_init_fence();
}

template <typename S>
__device__ inline void attention(const AttentionParamsSm90& params) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = ptx::shared_address(shared);
    // The same for all lanes, and known to be so.
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    const bool mends = params.form != FORM_DENSE;
    if (threadIdx.x == 0) {
        // The swizzle of the tensor cores and the copy engine follows the address.
        if (base % 1024 != 0) __trap();
        init_barriers<S>(base, mends);
    }
    if (warp == 12) ptx::tensor_alloc(base + S::TENSOR, ptx::TENSOR_COLUMNS);
    ptx::tensor_fence_before();
    __syncthreads();
    ptx::tensor_fence_after();
    const uint32_t tensor = *reinterpret_cast<const volatile uint32_t*>(shared + S::TENSOR);
    const Block<S> block = {params, shared, base};
    if (warp < 8) {
        ptx::take_registers<SOFTMAX_REGISTERS>();
        Softmaxer<S>(block, tensor, warp / 4).run();
    } else if (warp < 12) {
        ptx::release_registers<CORRECTION_REGISTERS>();
        Corrector<S>(block, tensor).run();
    } else {
        ptx::release_registers<OTHER_REGISTERS>();
        if (warp == 12) {
            Multiplier<S>(block, tensor).run();
        } else if (warp == 13) {
            Loader<S>(block).run();
        } else if (warp == 14) {
            if (mends) mend_values<S>(block);
        } else {
            write_zero_spans<typename S::T>(params, threadIdx.x % 32, 32);
        }
    }
    // No thread uses tensor memory any more.
    __syncthreads();
    if (warp == 12) ptx::tensor_free(tensor, ptx::TENSOR_COLUMNS);
}

// attention_sm100_{f16, bf16}_d{head_dim}
#define VARLEN_FA_ENTRY(NAME, ...)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ AttentionParamsSm90 params) { \
        attention<Shape<__VA_ARGS__>>(params);                                                                           \
    }
#define VARLEN_FA_ENTRIES(D, STAGES)                                     \
    VARLEN_FA_ENTRY(attention_sm100_f16_d##D, __half, D, STAGES)         \
    VARLEN_FA_ENTRY(attention_sm100_bf16_d##D, __nv_bfloat16, D, STAGES)
VARLEN_FA_SM100_TILES(VARLEN_FA_ENTRIES)

}  // namespace sm100
