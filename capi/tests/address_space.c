/* Masks, metadata, ranges of keys and score modifiers where memory runs out: OUT_OF_MEMORY, never an abort. Each
 * call is made with 20 sizes of what is left of the address space. Exits with 77 where that cannot be limited. */
#define _GNU_SOURCE
#include <stdio.h>

#ifndef __GLIBC__
int main(void) {
  fprintf(stderr, "the address space is limited on Linux with the GNU C library only\n");
  return 77;
}
#else

#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "varlen_fa.h"

enum { SIZES = 20, SEQ = 16, MEBIBYTE = 1 << 20 };
#define BATCH ((uint64_t)1 << 18)
#define TOKENS (BATCH * SEQ)

/* What calls are made of. */
static uint8_t flags[(1 << 18) * 16];
static uint64_t lengths[1 << 18];
static varlen_fa_run runs[1 << 18];
static int32_t cu_seqlens[(1 << 18) + 1], copied[(1 << 18) * 16];
static uint32_t documents[(1 << 18) * 16];
static varlen_fa_key_range ranges[(1 << 18) * 16];
static float values[(1 << 18) * 16];
static varlen_fa_device *device = NULL;
static varlen_fa_key_mask *mask = NULL;

static varlen_fa_status from_integers(void) {
  varlen_fa_key_mask *made = NULL;
  varlen_fa_status status = varlen_fa_key_mask_from_integers(flags, VARLEN_FA_MASK_DTYPE_U8, BATCH, SEQ, &made);
  varlen_fa_key_mask_free(made);
  return status;
}

static varlen_fa_status from_lengths(void) {
  varlen_fa_key_mask *made = NULL;
  varlen_fa_status status = varlen_fa_key_mask_from_lengths(lengths, BATCH, SEQ, &made);
  varlen_fa_key_mask_free(made);
  return status;
}

static varlen_fa_status from_runs(void) {
  varlen_fa_key_mask *made = NULL;
  varlen_fa_status status = varlen_fa_key_mask_from_runs(runs, BATCH, BATCH, SEQ, &made);
  varlen_fa_key_mask_free(made);
  return status;
}

static varlen_fa_status meta_create(void) {
  varlen_fa_meta *made = NULL;
  varlen_fa_status status = varlen_fa_meta_create(mask, &made);
  varlen_fa_meta_free(made);
  return status;
}

/* Metadata is made anew, since it keeps the tables that are made to be copied. */
static varlen_fa_status meta_copy_indices(void) {
  varlen_fa_meta *made = NULL;
  varlen_fa_status status = varlen_fa_meta_create(mask, &made);
  if (status == VARLEN_FA_STATUS_OK) {
    status = varlen_fa_meta_copy_indices(made, (uint32_t *)copied, TOKENS / 2);
  }
  varlen_fa_meta_free(made);
  return status;
}

static varlen_fa_status meta_copy_inv_indices(void) {
  varlen_fa_meta *made = NULL;
  varlen_fa_status status = varlen_fa_meta_create(mask, &made);
  if (status == VARLEN_FA_STATUS_OK) {
    status = varlen_fa_meta_copy_inv_indices(made, copied, TOKENS);
  }
  varlen_fa_meta_free(made);
  return status;
}

static varlen_fa_status meta_copy_cu_seqlens(void) {
  varlen_fa_meta *made = NULL;
  varlen_fa_cu_seqlens *of_meta = NULL;
  varlen_fa_status status = varlen_fa_meta_create(mask, &made);
  if (status == VARLEN_FA_STATUS_OK) {
    status = varlen_fa_meta_copy_cu_seqlens(made, copied, BATCH + 1);
  }
  if (status == VARLEN_FA_STATUS_OK) {
    status = varlen_fa_cu_seqlens_from_meta(made, &of_meta);
  }
  varlen_fa_cu_seqlens_free(of_meta);
  varlen_fa_meta_free(made);
  return status;
}

static varlen_fa_status cu_seqlens_create(void) {
  varlen_fa_cu_seqlens *made = NULL;
  varlen_fa_status status = varlen_fa_cu_seqlens_create(cu_seqlens, BATCH + 1, &made);
  varlen_fa_cu_seqlens_free(made);
  return status;
}

/* Documents of two tokens, of which each row numbers its own. */
static varlen_fa_status meta_from_document_ids(void) {
  varlen_fa_meta *made = NULL;
  varlen_fa_status status = varlen_fa_meta_from_document_ids(documents, BATCH, SEQ, &made);
  varlen_fa_meta_free(made);
  return status;
}

static varlen_fa_ranges_of all_tokens(void) {
  varlen_fa_ranges_of of = {0};
  of.batch = 1;
  of.seq_q = of.seq_k = TOKENS;
  return of;
}

static varlen_fa_status key_ranges_window(void) {
  varlen_fa_key_ranges *made = NULL;
  varlen_fa_ranges_of of = all_tokens();
  varlen_fa_status status = varlen_fa_key_ranges_window(&of, 3, 0, &made);
  varlen_fa_key_ranges_free(made);
  return status;
}

static varlen_fa_status key_ranges_prefix(void) {
  varlen_fa_key_ranges *made = NULL;
  varlen_fa_ranges_of of = all_tokens();
  varlen_fa_status status = varlen_fa_key_ranges_prefix(&of, 3, &made);
  varlen_fa_key_ranges_free(made);
  return status;
}

static varlen_fa_status key_ranges_from_values(void) {
  varlen_fa_key_ranges *made = NULL;
  varlen_fa_ranges_of of = all_tokens();
  varlen_fa_status status = varlen_fa_key_ranges_from_values(&of, ranges, TOKENS, &made);
  varlen_fa_key_ranges_free(made);
  return status;
}

static varlen_fa_status key_ranges_intersect(void) {
  varlen_fa_key_ranges *one = NULL, *made = NULL;
  varlen_fa_ranges_of of = all_tokens();
  varlen_fa_status status = varlen_fa_key_ranges_window(&of, -1, 0, &one);
  if (status == VARLEN_FA_STATUS_OK) {
    status = varlen_fa_key_ranges_intersect(one, one, &made);
  }
  varlen_fa_key_ranges_free(one);
  varlen_fa_key_ranges_free(made);
  return status;
}

static varlen_fa_status score_modifiers(void) {
  varlen_fa_score_modifiers *made = NULL;
  varlen_fa_status status = varlen_fa_score_modifiers_create(0.0f, values, values, TOKENS, &made);
  varlen_fa_score_modifiers_free(made);
  return status;
}

static varlen_fa_status device_meta(void) {
  varlen_fa_device_meta *made = NULL;
  varlen_fa_mask_view view = {0};
  view.data = flags;
  view.bytes = sizeof flags;
  view.dtype = VARLEN_FA_MASK_DTYPE_U8;
  view.shape[0] = BATCH;
  view.shape[1] = SEQ;
  view.strides[0] = SEQ;
  view.strides[1] = 1;
  varlen_fa_status status = varlen_fa_device_meta_create(device, BATCH, SEQ, &made);
  if (status == VARLEN_FA_STATUS_OK) {
    status = varlen_fa_device_meta_rebuild(made, &view);
  }
  varlen_fa_device_meta_free(made);
  return status;
}

typedef struct {
  const char *name;
  varlen_fa_status (*run)(void);
  /* Bytes that the call allocates, at most. */
  size_t bytes;
} call;

static const call CALLS[] = {
    {"key_mask_from_integers", from_integers, 4 * MEBIBYTE},
    {"key_mask_from_lengths", from_lengths, 6 * MEBIBYTE},
    {"key_mask_from_runs", from_runs, 4 * MEBIBYTE},
    {"meta_create", meta_create, 24 * MEBIBYTE},
    {"meta_copy_indices", meta_copy_indices, 36 * MEBIBYTE},
    {"meta_copy_inv_indices", meta_copy_inv_indices, 48 * MEBIBYTE},
    {"meta_copy_cu_seqlens", meta_copy_cu_seqlens, 24 * MEBIBYTE},
    {"cu_seqlens_create", cu_seqlens_create, 2 * MEBIBYTE},
    {"device_meta", device_meta, 48 * MEBIBYTE},
    {"meta_from_document_ids", meta_from_document_ids, 48 * MEBIBYTE},
    {"key_ranges_window", key_ranges_window, 34 * MEBIBYTE},
    {"key_ranges_prefix", key_ranges_prefix, 34 * MEBIBYTE},
    {"key_ranges_from_values", key_ranges_from_values, 104 * MEBIBYTE},
    {"key_ranges_intersect", key_ranges_intersect, 68 * MEBIBYTE},
    {"score_modifiers", score_modifiers, 34 * MEBIBYTE},
};

/* Address space that the process has now, in bytes. */
static size_t taken(void) {
  unsigned long pages = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (file == NULL || fscanf(file, "%lu", &pages) != 1) {
    perror("/proc/self/statm");
    exit(1);
  }
  fclose(file);
  return (size_t)pages * (size_t)sysconf(_SC_PAGESIZE);
}

static void limit(rlim_t bytes) {
  struct rlimit limits;
  if (getrlimit(RLIMIT_AS, &limits) == 0) {
    limits.rlim_cur = bytes;
    if (setrlimit(RLIMIT_AS, &limits) == 0) {
      return;
    }
  }
  perror("RLIMIT_AS");
  exit(1);
}

int main(void) {
  int failures = 0;
  /* Lists are mapped and unmapped, so that each call starts with the same memory. */
  mallopt(M_MMAP_THRESHOLD, 1 << 16);
  for (uint64_t row = 0; row < BATCH; row++) {
    lengths[row] = SEQ / 2;
    runs[row].row = BATCH - 1 - row;
    runs[row].end = SEQ / 2;
    cu_seqlens[row + 1] = (int32_t)(row + 1);
  }
  for (uint64_t at = 0; at < TOKENS; at++) {
    flags[at] = at % 2;
    documents[at] = (uint32_t)(at / 2 % (SEQ / 2)) + 1;
    ranges[at].end = at;
  }
  if (varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_CPU, 0, &device) != VARLEN_FA_STATUS_OK ||
      varlen_fa_key_mask_from_integers(flags, VARLEN_FA_MASK_DTYPE_U8, BATCH, SEQ, &mask) != VARLEN_FA_STATUS_OK) {
    fprintf(stderr, "%s\n", varlen_fa_last_error());
    return 1;
  }
  for (size_t at = 0; at < sizeof CALLS / sizeof *CALLS; at++) {
    int refused = 0, done = 0;
    for (size_t size = 0; size < SIZES; size++) {
      /* The smallest is little more than messages take; the last one is enough for the call. */
      size_t left = MEBIBYTE / 2 + CALLS[at].bytes * size / (SIZES - 1);
      limit(taken() + left);
      varlen_fa_status status = CALLS[at].run();
      limit(RLIM_INFINITY);
      refused += status == VARLEN_FA_STATUS_OUT_OF_MEMORY;
      done += status == VARLEN_FA_STATUS_OK;
    }
    printf("%s: %d sizes were too small, %d were enough\n", CALLS[at].name, refused, done);
    if (refused == 0 || done == 0 || refused + done != SIZES) {
      fprintf(stderr, "%s: of %d sizes %d were refused and %d were enough\n", CALLS[at].name, SIZES, refused, done);
      failures++;
    }
  }
  varlen_fa_key_mask_free(mask);
  varlen_fa_device_free(device);
  return failures != 0;
}
#endif
