/* Masked attention on a padded batch, from C: two sentences of different lengths, attention among the
 * valid tokens only.
 *
 *     cargo build --release -p varlen-fa-capi
 *     cc -std=c11 -Icapi/include capi/examples/masked_attention.c -Ltarget/release -lvarlen_fa -lm -o masked_attention
 *     LD_LIBRARY_PATH=target/release ./masked_attention cpu
 *
 * The argument is the device: auto (the default), cpu, wgpu or cuda. The result is compared with a
 * plain loop in double. Exits with 77 if the device is not available.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "varlen_fa.h"

enum { BATCH = 2, SEQ = 37, HEADS = 6, KV_HEADS = 2, DIM = 32, NOT_AVAILABLE = 77 };

/* Where q, k and v lie in one row of a fused projection [B, S, H + 2*Hkv, D]. */
enum { Q_HEAD = 0, K_HEAD = HEADS, V_HEAD = HEADS + KV_HEADS, FUSED_HEADS = HEADS + 2 * KV_HEADS };

static float qkv[BATCH][SEQ][FUSED_HEADS][DIM];
static float out[BATCH][SEQ][HEADS][DIM];
static const uint64_t lengths[BATCH] = {29, 11};

static void require(varlen_fa_status status, const char *what) {
  if (status != VARLEN_FA_STATUS_OK) {
    fprintf(stderr, "%s failed with status %u: %s\n", what, (unsigned)status, varlen_fa_last_error());
    exit(status == VARLEN_FA_STATUS_DEVICE_UNAVAILABLE ? NOT_AVAILABLE : EXIT_FAILURE);
  }
}

/* A view of some heads of the fused projection: no copy, only strides. */
static varlen_fa_tensor heads_of_qkv(int first, int count) {
  varlen_fa_tensor tensor = {0};
  const uint64_t shape[4] = {BATCH, SEQ, (uint64_t)count, DIM};
  const int64_t strides[4] = {SEQ * FUSED_HEADS * DIM, FUSED_HEADS * DIM, DIM, 1};
  tensor.data = &qkv[0][0][first][0];
  tensor.bytes = sizeof qkv - (size_t)first * DIM * sizeof(float);
  tensor.dtype = VARLEN_FA_DTYPE_F32;
  tensor.rank = 4;
  memcpy(tensor.shape, shape, sizeof shape);
  memcpy(tensor.strides, strides, sizeof strides);
  return tensor;
}

static varlen_fa_tensor whole_out(void) {
  varlen_fa_tensor tensor = {0};
  const uint64_t shape[4] = {BATCH, SEQ, HEADS, DIM};
  const int64_t strides[4] = {SEQ * HEADS * DIM, HEADS * DIM, DIM, 1};
  tensor.data = out;
  tensor.bytes = sizeof out;
  tensor.dtype = VARLEN_FA_DTYPE_F32;
  tensor.rank = 4;
  memcpy(tensor.shape, shape, sizeof shape);
  memcpy(tensor.strides, strides, sizeof strides);
  return tensor;
}

/* What the row of one valid query and head should be, slowly and in double. */
static void expected_row(int b, int s, int h, double row[DIM]) {
  double weights[SEQ], sum = 0.0;
  int kv = h / (HEADS / KV_HEADS), keys = (int)lengths[b];
  for (int key = 0; key < keys; key++) {
    double score = 0.0;
    for (int d = 0; d < DIM; d++) {
      score += (double)qkv[b][s][Q_HEAD + h][d] * (double)qkv[b][key][K_HEAD + kv][d];
    }
    weights[key] = exp(score / sqrt(DIM));
    sum += weights[key];
  }
  for (int d = 0; d < DIM; d++) {
    row[d] = 0.0;
    for (int key = 0; key < keys; key++) {
      row[d] += weights[key] / sum * (double)qkv[b][key][V_HEAD + kv][d];
    }
  }
}

/* The largest difference from the double loop; infinity if a masked row is not exactly +0.0. */
static double largest_error(void) {
  double largest = 0.0, row[DIM];
  for (int b = 0; b < BATCH; b++) {
    for (int s = 0; s < SEQ; s++) {
      for (int h = 0; h < HEADS; h++) {
        if ((uint64_t)s < lengths[b]) {
          expected_row(b, s, h, row);
        }
        for (int d = 0; d < DIM; d++) {
          if ((uint64_t)s < lengths[b]) {
            double error = fabs((double)out[b][s][h][d] - row[d]);
            largest = error <= largest ? largest : error; /* NaN counts as larger */
          } else if (out[b][s][h][d] != 0.0f || signbit(out[b][s][h][d])) {
            return INFINITY;
          }
        }
      }
    }
  }
  return largest;
}

int main(int argc, char **argv) {
  const char *name = argc > 1 ? argv[1] : "auto";
  varlen_fa_device_kind kind = VARLEN_FA_DEVICE_KIND_AUTO;
  if (strcmp(name, "cpu") == 0) {
    kind = VARLEN_FA_DEVICE_KIND_CPU;
  } else if (strcmp(name, "wgpu") == 0) {
    kind = VARLEN_FA_DEVICE_KIND_WGPU;
  } else if (strcmp(name, "cuda") == 0) {
    kind = VARLEN_FA_DEVICE_KIND_CUDA;
  } else if (strcmp(name, "auto") != 0) {
    fprintf(stderr, "expected auto, cpu, wgpu or cuda, got %s\n", name);
    return EXIT_FAILURE;
  }

  /* Once per application. */
  varlen_fa_device *device = NULL;
  varlen_fa_device_info info;
  require(varlen_fa_device_open(kind, 0, &device), "opening the device");
  require(varlen_fa_device_describe(device, &info), "describing the device");
  printf("varlen-fa %s on %s\n", varlen_fa_version_string(), info.name);
  if ((info.dtypes & (1u << VARLEN_FA_DTYPE_F32)) == 0) {
    fprintf(stderr, "this program computes in f32, which %s does not\n", info.name);
    return NOT_AVAILABLE;
  }

  /* Once per request: which tokens are valid. */
  varlen_fa_key_mask *mask = NULL;
  varlen_fa_meta *meta = NULL;
  require(varlen_fa_key_mask_from_lengths(lengths, BATCH, SEQ, &mask), "making the mask");
  require(varlen_fa_meta_create(mask, &meta), "making the metadata");
  require(varlen_fa_key_mask_free(mask), "freeing the mask");

  /* The values of masked tokens do not matter. */
  uint32_t state = 1;
  for (int b = 0; b < BATCH; b++) {
    for (int s = 0; s < SEQ; s++) {
      for (int h = 0; h < FUSED_HEADS; h++) {
        for (int d = 0; d < DIM; d++) {
          state = state * 1664525u + 1013904223u;
          qkv[b][s][h][d] = (uint64_t)s < lengths[b] ? (float)(state >> 8) / 8388608.0f - 1.0f : NAN;
        }
      }
    }
  }
  memset(out, 0xff, sizeof out); /* NaN: every element is written */

  /* In every layer and step. */
  varlen_fa_tensor q = heads_of_qkv(Q_HEAD, HEADS), k = heads_of_qkv(K_HEAD, KV_HEADS), v = heads_of_qkv(V_HEAD, KV_HEADS);
  varlen_fa_tensor o = whole_out();
  varlen_fa_attention_mask among_valid = {0};
  varlen_fa_plan plan;
  among_valid.kind = VARLEN_FA_MASK_KIND_VARLEN;
  among_valid.query_meta = meta;
  require(varlen_fa_forward(device, NULL, &q, &k, &v, &among_valid, &o, &plan), "attention");
  printf("taken: %s\n", plan.text);

  double error = largest_error();
  printf("largest error %.1e, masked rows are exactly zero: %s\n", error, isfinite(error) ? "yes" : "no");
  require(varlen_fa_meta_free(meta), "freeing the metadata");
  require(varlen_fa_device_free(device), "freeing the device");
  return error < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
