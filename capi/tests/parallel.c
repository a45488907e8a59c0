// Attention over a sequence divided among ranks that are threads, in every mode, against one call; what
// else a call carries; and what comes of ranks that fail or differ.

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

// The call on the whole sequence; and with a bias, sinks and the log-sum-exp.
static float *whole[3], *expected, *expected_carried, *expected_lse;
static varlen_fa_tensor bias;
static varlen_fa_score_modifiers *modifiers;
static const uint64_t WIDTHS[3] = {HEADS, KV_HEADS, KV_HEADS};
static varlen_fa_device *device;
static varlen_fa_key_mask *mask;

typedef struct {
  varlen_fa_communicator *communicator;
  uint64_t rank;
  varlen_fa_parallel_mode mode;
  // Whether calls carry more than tensors.
  int carries;
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

static varlen_fa_tensor lse_tensor(float *data, uint64_t seq) {
  varlen_fa_tensor made = tensor(data, seq, 1);
  made.bytes = BATCH * HEADS * seq * sizeof(float);
  made.rank = 3;
  made.shape[1] = HEADS;
  made.shape[2] = seq;
  made.strides[2] = 1;
  made.strides[1] = (int64_t)seq;
  made.strides[0] = (int64_t)(HEADS * seq);
  return made;
}

// Tokens of a tensor, in the same memory.
static varlen_fa_tensor part(varlen_fa_tensor of, uint64_t first, uint64_t tokens) {
  uint64_t skipped = first * (uint64_t)of.strides[1] * sizeof(float);
  of.data = (char *)of.data + skipped;
  of.bytes -= skipped;
  of.shape[1] = tokens;
  return of;
}

// A call in segments with a bias, sinks and the log-sum-exp; text and image of the output are apart.
static varlen_fa_status carry(Rank *rank, varlen_fa_parallel_request *request, varlen_fa_tensor tensors[3], uint64_t seq) {
  uint64_t parts[2][2] = {{0, PREFIX}, {PREFIX, seq - PREFIX}};
  varlen_fa_tensor cut[3][2], outs[2];
  varlen_fa_segments inputs[3] = {{0}}, to = {0};
  float *out[2], *lse = floats(seq, HEADS);
  for (int half = 0; half < 2; half++) {
    for (int at = 0; at < 3; at++) cut[at][half] = part(tensors[at], parts[half][0], parts[half][1]);
    out[half] = floats(parts[half][1], HEADS);
    outs[half] = tensor(out[half], parts[half][1], HEADS);
  }
  for (int at = 0; at < 3; at++) {
    inputs[at].tensors = at ? cut[at] : &tensors[0];
    inputs[at].count = at ? 2 : 1;
  }
  to.tensors = outs;
  to.count = 2;
  varlen_fa_parallel_scores scores = {0};
  scores.bias = &bias;
  scores.modifiers = modifiers;
  varlen_fa_tensor lse_to = lse_tensor(lse, seq);
  varlen_fa_status status = varlen_fa_parallel_forward_segments(rank->communicator, request, &inputs[0], &inputs[1],
                                                                &inputs[2], &scores, &to, &lse_to);
  for (uint64_t b = 0; !status && b < BATCH; b++)
    for (uint64_t s = 0; s < seq; s++) {
      int half = s >= PREFIX;
      uint64_t token = global(rank->rank, s), at = s - parts[half][0];
      for (uint64_t h = 0; h < HEADS; h++) {
        const float *got = out[half] + ((b * parts[half][1] + at) * HEADS + h) * DIM;
        const float *want = expected_carried + ((b * SEQ + token) * HEADS + h) * DIM;
        for (int i = 0; i < DIM; i++)
          if (!(fabsf(got[i] - want[i]) <= 1e-6f)) fail("a call that carries more");
        float one = lse[(b * HEADS + h) * seq + s], other = expected_lse[(b * HEADS + h) * SEQ + token];
        if (!(one == other || fabsf(one - other) <= 1e-5f)) fail("the log-sum-exp");
      }
    }
  free(out[0]);
  free(out[1]);
  free(lse);
  return status;
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
  // A mode that is forced is refused by the call alone.
  if (rank->carries && !rank->mode) {
    options.modifiers = modifiers;
    options.has_bias = options.has_lse = 1;
  }
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
  if (rank->carries) {
    if (!rank->mode && plan.mode != VARLEN_FA_PARALLEL_MODE_GATHER) fail("the plan of what calls carry");
    end(rank, carry(rank, request, tensors, seq));
    CHECK(varlen_fa_parallel_request_free(request));
    for (int at = 0; at < 3; at++) free(local[at]);
    free(out);
    return NULL;
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
static void run_all(varlen_fa_parallel_mode mode, int carries, int fault, Rank ranks[RANKS]) {
  varlen_fa_communicator *communicators[RANKS];
  CHECK(varlen_fa_communicator_threads(RANKS, 20000, communicators));
  pthread_t threads[RANKS];
  for (uint64_t at = 0; at < RANKS; at++) {
    memset(&ranks[at], 0, sizeof ranks[at]);
    ranks[at].communicator = communicators[at];
    ranks[at].rank = at;
    ranks[at].mode = mode;
    ranks[at].carries = carries;
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

  // With more: one bias for all heads, and a sink for each.
  float *added = calloc(BATCH * SEQ * SEQ, sizeof(float)), sinks[HEADS];
  if (!added) exit(1);
  for (uint64_t i = 0; i < BATCH * SEQ * SEQ; i++) added[i] = cosf((float)i);
  for (int at = 0; at < HEADS; at++) sinks[at] = 0.5f * (float)at - 1;
  bias = tensor(added, SEQ, 1);
  bias.bytes = BATCH * SEQ * SEQ * sizeof(float);
  bias.shape[1] = 1;
  bias.shape[2] = bias.shape[3] = SEQ;
  bias.strides[0] = bias.strides[1] = SEQ * SEQ;
  bias.strides[2] = SEQ;
  CHECK(varlen_fa_score_modifiers_create(0, NULL, sinks, HEADS, &modifiers));
  attention.bias = &bias;
  attention.modifiers = modifiers;
  expected_carried = floats(SEQ, HEADS);
  expected_lse = floats(SEQ, HEADS);
  varlen_fa_tensor carried = tensor(expected_carried, SEQ, HEADS), of_lse = lse_tensor(expected_lse, SEQ);
  CHECK(varlen_fa_forward_with_lse(device, NULL, &tensors[0], &tensors[1], &tensors[2], &attention, &carried, &of_lse,
                                   NULL));

  Rank ranks[RANKS];
  for (int mode = VARLEN_FA_PARALLEL_MODE_AUTO; mode <= VARLEN_FA_PARALLEL_MODE_RING; mode++) {
    // What the plan takes has the bits of one device unless it is a ring.
    run_all(mode ? (varlen_fa_parallel_mode)mode : VARLEN_FA_PARALLEL_MODE_GATHER, 0, SAME, ranks);
    for (int at = 0; at < RANKS; at++)
      if (ranks[at].status) fail(ranks[at].message);
  }
  run_all(VARLEN_FA_PARALLEL_MODE_AUTO, 1, SAME, ranks);
  for (int at = 0; at < RANKS; at++)
    if (ranks[at].status) fail(ranks[at].message);
  run_all(VARLEN_FA_PARALLEL_MODE_RING, 1, SAME, ranks);
  int refusals = 0;
  for (int at = 0; at < RANKS; at++) {
    // One may have given up before the others have all agreed: they hear why.
    int refuses = ranks[at].status == VARLEN_FA_STATUS_NOT_APPLICABLE;
    if ((!refuses && ranks[at].status != VARLEN_FA_STATUS_RANK_LOST) || !strstr(ranks[at].message, "in the mode ring"))
      fail(ranks[at].message);
    refusals += refuses;
  }
  if (refusals == 0) fail("no rank refuses a log-sum-exp in a ring");
  run_all(VARLEN_FA_PARALLEL_MODE_GATHER, 0, OTHER_HEADS, ranks);
  for (int at = 0; at < RANKS; at++)
    if ((ranks[at].status != VARLEN_FA_STATUS_RANKS_DIFFER && ranks[at].status != VARLEN_FA_STATUS_RANK_LOST) ||
        !strstr(ranks[at].message, "heads"))
      fail(ranks[at].message);
  run_all(VARLEN_FA_PARALLEL_MODE_ULYSSES, 0, OTHER_SHAPE, ranks);
  for (int at = 0; at < RANKS; at++)
    if (ranks[at].status != (at == 2 ? VARLEN_FA_STATUS_SHAPE : VARLEN_FA_STATUS_RANK_LOST)) fail(ranks[at].message);
  run_all(VARLEN_FA_PARALLEL_MODE_RING, 0, DIES, ranks);
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

  // One rank, which needs no other: arguments of a call that are not right.
  CHECK(varlen_fa_communicator_threads(1, 0, pair));
  const uint64_t image = IMAGE;
  varlen_fa_shards in_one = {0};
  in_one.prefix = PREFIX;
  in_one.lengths = &image;
  in_one.ranks = 1;
  varlen_fa_sharded_meta *of_one = NULL;
  CHECK(varlen_fa_sharded_meta_create(mask, &in_one, 0, NULL, &of_one));
  for (int fault = 0; fault <= 6; fault++) {
    // After an error a communicator takes no more calls.
    if (fault) CHECK(varlen_fa_communicator_threads(1, 0, pair));
    varlen_fa_parallel_options options = {0};
    options.num_heads = HEADS;
    options.num_kv_heads = KV_HEADS;
    options.head_dim = DIM;
    options.dtype = VARLEN_FA_DTYPE_F32;
    options.has_lse = fault == 6 ? 2 : 1;
    varlen_fa_parallel_request *request = NULL;
    varlen_fa_status got = varlen_fa_parallel_prepare(device, pair[0], of_one, &options, &request, NULL);
    if (fault == 6) {
      if (got != VARLEN_FA_STATUS_BAD_VALUE) fail("has_lse of 2");
      CHECK(varlen_fa_communicator_free(pair[0]));
      break;
    }
    if (got) fail("a request of one rank");
    varlen_fa_segments inputs[3] = {{0}}, to = {0};
    for (int at = 0; at < 3; at++) {
      inputs[at].tensors = &tensors[at];
      inputs[at].count = 1;
    }
    to.tensors = &out;
    to.count = fault == 1 ? 0 : 1;
    varlen_fa_parallel_scores scores = {0};
    scores.bias = &bias;
    if (fault == 2) scores.reserved[3] = 1;
    varlen_fa_tensor odd = bias;
    odd.shape[3] = SEQ - 1;
    if (fault == 3) scores.bias = &odd;
    // An output where the bias lies.
    varlen_fa_tensor same = lse_tensor(fault == 4 ? added : expected_lse, SEQ);
    static const varlen_fa_status EXPECTED[] = {VARLEN_FA_STATUS_OK, VARLEN_FA_STATUS_BAD_VALUE,
                                                VARLEN_FA_STATUS_BAD_VALUE, VARLEN_FA_STATUS_BROADCAST,
                                                VARLEN_FA_STATUS_OVERLAP, VARLEN_FA_STATUS_NULL_POINTER};
    got = varlen_fa_parallel_forward_segments(pair[0], request, fault == 5 ? NULL : &inputs[0], &inputs[1], &inputs[2],
                                              fault ? &scores : NULL, &to, &same);
    if (got != EXPECTED[fault]) {
      fprintf(stderr, "fault %d of a call: status %d\n", fault, (int)got);
      fail("a call of one rank");
    }
    CHECK(varlen_fa_parallel_request_free(request));
    CHECK(varlen_fa_communicator_free(pair[0]));
  }
  CHECK(varlen_fa_sharded_meta_free(of_one));

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
  CHECK(varlen_fa_score_modifiers_free(modifiers));
  for (int at = 0; at < 3; at++) free(whole[at]);
  free(expected);
  free(expected_carried);
  free(expected_lse);
  free(added);
  puts("ok");
  return 0;
}
