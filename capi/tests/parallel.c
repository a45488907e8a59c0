// Attention over a sequence divided among ranks that are threads, in every mode, against one call; and
// what comes of ranks that fail or differ.

#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "varlen_fa.h"

enum { BATCH = 2, PREFIX = 5, IMAGE = 30, RANKS = 3, HEADS = 6, KV_HEADS = 3, DIM = 16, SEQ = PREFIX + IMAGE };

static const uint64_t LENGTHS[RANKS] = {13, 0, 17};

static void fail(const char *what) {
  fprintf(stderr, "%s: %s\n", what, varlen_fa_last_error());
  exit(1);
}

#define CHECK(call) \
  do { \
    if ((call) != VARLEN_FA_STATUS_OK) fail(#call); \
  } while (0)

static varlen_fa_tensor tensor(float *data, uint64_t seq, uint64_t heads) {
  varlen_fa_tensor made = {0};
  made.data = data;
  made.bytes = BATCH * seq * heads * DIM * sizeof(float);
  made.dtype = VARLEN_FA_DTYPE_F32;
  made.rank = 4;
  made.shape[0] = BATCH;
  made.shape[1] = seq;
  made.shape[2] = heads;
  made.shape[3] = DIM;
  made.strides[3] = 1;
  made.strides[2] = DIM;
  made.strides[1] = (int64_t)(heads * DIM);
  made.strides[0] = (int64_t)(seq * heads * DIM);
  return made;
}

static float *floats(uint64_t seq, uint64_t heads) {
  float *made = calloc((size_t)(BATCH * seq * heads * DIM + 1), sizeof(float));
  if (!made) exit(1);
  return made;
}

// The call on the whole sequence.
static float *whole[3], *expected;
static const uint64_t WIDTHS[3] = {HEADS, KV_HEADS, KV_HEADS};
static varlen_fa_device *device;
static varlen_fa_key_mask *mask;

typedef struct {
  varlen_fa_communicator *communicator;
  uint64_t rank;
  varlen_fa_parallel_mode mode;
  // 0, or what this rank does otherwise than the others.
  enum { SAME, OTHER_HEADS, OTHER_SHAPE, DIES } fault;
  varlen_fa_status status;
  char message[256];
} Rank;

static void end(Rank *rank, varlen_fa_status status) {
  rank->status = status;
  snprintf(rank->message, sizeof rank->message, "%s", status ? varlen_fa_last_error() : "");
  CHECK(varlen_fa_communicator_free(rank->communicator));
}

static uint64_t global(uint64_t rank, uint64_t local) {
  if (local < PREFIX) return local;
  for (uint64_t before = 0; before < rank; before++) local += LENGTHS[before];
  return local;
}

static void *run(void *argument) {
  Rank *rank = argument;
  varlen_fa_shards shards = {0};
  shards.prefix = PREFIX;
  shards.lengths = LENGTHS;
  shards.ranks = RANKS;
  varlen_fa_sharded_meta *meta = NULL;
  CHECK(varlen_fa_sharded_meta_create(mask, &shards, rank->rank, NULL, &meta));
  varlen_fa_parallel_options options = {0};
  options.num_heads = rank->fault == OTHER_HEADS ? 2 * HEADS : HEADS;
  options.num_kv_heads = KV_HEADS;
  options.head_dim = DIM;
  options.dtype = VARLEN_FA_DTYPE_F32;
  options.mode = rank->mode;
  varlen_fa_parallel_request *request = NULL;
  varlen_fa_parallel_plan plan = {0};
  varlen_fa_status status =
      varlen_fa_parallel_prepare(device, rank->communicator, meta, &options, &request, &plan);
  CHECK(varlen_fa_sharded_meta_free(meta));
  if (status || rank->fault == DIES) {
    end(rank, status);
    CHECK(varlen_fa_parallel_request_free(request));
    return NULL;
  }
  if ((rank->mode && plan.mode != rank->mode) || !strlen(plan.text)) fail("the plan");

  uint64_t seq = PREFIX + LENGTHS[rank->rank];
  float *local[3], *out = floats(seq, HEADS);
  varlen_fa_tensor tensors[3], to = tensor(out, seq, HEADS);
  for (int at = 0; at < 3; at++) {
    size_t row = (size_t)WIDTHS[at] * DIM;
    local[at] = floats(seq, WIDTHS[at]);
    for (uint64_t b = 0; b < BATCH; b++)
      for (uint64_t s = 0; s < seq; s++)
        memcpy(local[at] + (b * seq + s) * row, whole[at] + (b * SEQ + global(rank->rank, s)) * row, row * sizeof(float));
    tensors[at] = tensor(local[at], seq, WIDTHS[at]);
  }
  if (rank->fault == OTHER_SHAPE) tensors[1].shape[2] = 1;
  status = varlen_fa_parallel_forward(rank->communicator, request, &tensors[0], &tensors[1], &tensors[2], &to);
  end(rank, status);
  size_t row = HEADS * DIM;
  for (uint64_t b = 0; !status && b < BATCH; b++)
    for (uint64_t s = 0; s < seq; s++)
      for (size_t i = 0; i < row; i++) {
        float got = out[(b * seq + s) * row + i], want = expected[(b * SEQ + global(rank->rank, s)) * row + i];
        if (!(fabsf(got - want) <= (rank->mode == VARLEN_FA_PARALLEL_MODE_RING ? 1e-6f : 0.0f))) {
          fprintf(stderr, "mode %u, rank %u, row %u: %g, expected %g\n", (unsigned)rank->mode, (unsigned)rank->rank,
                  (unsigned)s, (double)got, (double)want);
          exit(1);
        }
      }
  CHECK(varlen_fa_parallel_request_free(request));
  for (int at = 0; at < 3; at++) free(local[at]);
  free(out);
  return NULL;
}

// Runs all ranks; rank 2 has the fault.
static void run_all(varlen_fa_parallel_mode mode, int fault, Rank ranks[RANKS]) {
  varlen_fa_communicator *communicators[RANKS];
  CHECK(varlen_fa_communicator_threads(RANKS, 20000, communicators));
  pthread_t threads[RANKS];
  for (uint64_t at = 0; at < RANKS; at++) {
    memset(&ranks[at], 0, sizeof ranks[at]);
    ranks[at].communicator = communicators[at];
    ranks[at].rank = at;
    ranks[at].mode = mode;
    if (at == 2) ranks[at].fault = fault;
    if (pthread_create(&threads[at], NULL, run, &ranks[at])) exit(1);
  }
  for (int at = 0; at < RANKS; at++)
    if (pthread_join(threads[at], NULL)) exit(1);
}

int main(void) {
  CHECK(varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_CPU, 0, &device));
  varlen_fa_run runs[] = {{0, 0, 3}, {0, 6, SEQ}, {1, 1, SEQ - 4}};
  CHECK(varlen_fa_key_mask_from_runs(runs, 3, BATCH, SEQ, &mask));
  varlen_fa_tensor tensors[3];
  for (int at = 0; at < 3; at++) {
    whole[at] = floats(SEQ, WIDTHS[at]);
    for (uint64_t i = 0; i < BATCH * SEQ * WIDTHS[at] * DIM; i++) whole[at][i] = sinf((float)(i * (uint64_t)(at + 3)));
    tensors[at] = tensor(whole[at], SEQ, WIDTHS[at]);
  }
  expected = floats(SEQ, HEADS);
  varlen_fa_tensor out = tensor(expected, SEQ, HEADS);
  varlen_fa_meta *meta = NULL;
  CHECK(varlen_fa_meta_create(mask, &meta));
  varlen_fa_attention_mask attention = {0};
  attention.kind = VARLEN_FA_MASK_KIND_VARLEN;
  attention.query_meta = meta;
  CHECK(varlen_fa_forward(device, NULL, &tensors[0], &tensors[1], &tensors[2], &attention, &out, NULL));

  Rank ranks[RANKS];
  for (int mode = VARLEN_FA_PARALLEL_MODE_AUTO; mode <= VARLEN_FA_PARALLEL_MODE_RING; mode++) {
    // What the plan takes has the bits of one device unless it is a ring.
    run_all(mode ? (varlen_fa_parallel_mode)mode : VARLEN_FA_PARALLEL_MODE_GATHER, SAME, ranks);
    for (int at = 0; at < RANKS; at++)
      if (ranks[at].status) fail(ranks[at].message);
  }
  run_all(VARLEN_FA_PARALLEL_MODE_GATHER, OTHER_HEADS, ranks);
  for (int at = 0; at < RANKS; at++)
    if ((ranks[at].status != VARLEN_FA_STATUS_RANKS_DIFFER && ranks[at].status != VARLEN_FA_STATUS_RANK_LOST) ||
        !strstr(ranks[at].message, "heads"))
      fail(ranks[at].message);
  run_all(VARLEN_FA_PARALLEL_MODE_ULYSSES, OTHER_SHAPE, ranks);
  for (int at = 0; at < RANKS; at++)
    if (ranks[at].status != (at == 2 ? VARLEN_FA_STATUS_SHAPE : VARLEN_FA_STATUS_RANK_LOST)) fail(ranks[at].message);
  run_all(VARLEN_FA_PARALLEL_MODE_RING, DIES, ranks);
  for (int at = 0; at < 2; at++)
    if (ranks[at].status != VARLEN_FA_STATUS_RANK_LOST) fail(ranks[at].message);

  // A child made by fork has the handle, but is no rank: an error at once, and not a wait.
  varlen_fa_communicator *pair[2];
  CHECK(varlen_fa_communicator_threads(2, 100000, pair));
  const uint64_t halves[2] = {15, 15};
  varlen_fa_shards in_two = {0};
  in_two.prefix = PREFIX;
  in_two.lengths = halves;
  in_two.ranks = 2;
  varlen_fa_sharded_meta *of_child = NULL;
  CHECK(varlen_fa_sharded_meta_create(mask, &in_two, 0, NULL, &of_child));
  pid_t child = fork();
  if (child == 0) {
    varlen_fa_parallel_options options = {0};
    options.num_heads = options.num_kv_heads = HEADS;
    options.head_dim = DIM;
    options.dtype = VARLEN_FA_DTYPE_F32;
    varlen_fa_parallel_request *request = NULL;
    alarm(60);
    varlen_fa_status status = varlen_fa_parallel_prepare(device, pair[0], of_child, &options, &request, NULL);
    _exit(status == VARLEN_FA_STATUS_RANK_LOST && strstr(varlen_fa_last_error(), "forked") ? 0 : 1);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) fail("the child");
  CHECK(varlen_fa_sharded_meta_free(of_child));
  for (int at = 0; at < 2; at++) CHECK(varlen_fa_communicator_free(pair[at]));

  // What cannot be.
  varlen_fa_communicator *none = NULL;
  if (varlen_fa_communicator_threads(0, 0, &none) != VARLEN_FA_STATUS_SHARDING) fail("no rank");
  const varlen_fa_device *devices[2] = {device, device};
  varlen_fa_communicator *peers[2] = {NULL, NULL};
  if (varlen_fa_communicator_peers(devices, 2, 0, peers) != VARLEN_FA_STATUS_DEVICE_MISMATCH || peers[0]) fail("CPU peers");
  if (varlen_fa_communicator_peers(devices, 0, 0, peers) != VARLEN_FA_STATUS_SHARDING) fail("no peer");
  if (varlen_fa_communicator_peers(NULL, 2, 0, peers) != VARLEN_FA_STATUS_NULL_POINTER) fail("NULL devices");
  varlen_fa_status status_of_cpu = varlen_fa_communicator_nccl(device, "127.0.0.1:0", 0, 1, 0, NULL, &none);
  if (status_of_cpu != VARLEN_FA_STATUS_DEVICE_MISMATCH && status_of_cpu != VARLEN_FA_STATUS_DEVICE_UNAVAILABLE) fail("NCCL on a CPU");
  if (varlen_fa_communicator_nccl(device, "nowhere", 0, 1, 0, NULL, &none) != VARLEN_FA_STATUS_BAD_VALUE) fail("no address");
  if (varlen_fa_communicator_connect("nowhere", 0, 2, 1, &none) != VARLEN_FA_STATUS_BAD_VALUE) fail("no address");
  if (varlen_fa_communicator_connect(NULL, 0, 2, 1, &none) != VARLEN_FA_STATUS_NULL_POINTER) fail("NULL");
  if (varlen_fa_communicator_connect("127.0.0.1:0", 1, 2, 50, &none) != VARLEN_FA_STATUS_RANK_TIMED_OUT) fail("nobody");
  varlen_fa_shards shards = {0};
  varlen_fa_sharded_meta *made = NULL;
  if (varlen_fa_sharded_meta_create(mask, &shards, 0, NULL, &made) != VARLEN_FA_STATUS_SHARDING) fail("no shard");
  shards.lengths = LENGTHS;
  shards.ranks = RANKS;
  if (varlen_fa_sharded_meta_create(mask, &shards, 0, NULL, &made) != VARLEN_FA_STATUS_MASK_SIZE) fail("another S");
  CHECK(varlen_fa_meta_free(meta));
  CHECK(varlen_fa_key_mask_free(mask));
  CHECK(varlen_fa_device_free(device));
  for (int at = 0; at < 3; at++) free(whole[at]);
  free(expected);
  puts("ok");
  return 0;
}
