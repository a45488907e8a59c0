/* The contract of the C library, in good calls and in bad ones: `contract cpu` or `contract wgpu`.
 * Exits with 77 if the device is absent. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "varlen_fa.h"

enum { BATCH = 2, SEQ = 12, HEADS = 4, DIM = 16, TOKENS = BATCH * SEQ, ELEMENTS = TOKENS * HEADS * DIM, NOT_AVAILABLE = 77 };

/* Sizes are part of the binary interface; test_varlen_fa.py has the same numbers. */
_Static_assert(sizeof(void *) != 8 || (sizeof(varlen_fa_tensor) == 112 && sizeof(varlen_fa_mask_view) == 72), "size");
_Static_assert(sizeof(void *) != 8 || (sizeof(varlen_fa_attention_mask) == 88 && sizeof(varlen_fa_plan) == 272), "size");
_Static_assert(sizeof(varlen_fa_attention_options) == 48 && sizeof(varlen_fa_run) == 24, "size");
_Static_assert(sizeof(varlen_fa_key_range) == 16 && (sizeof(void *) != 8 || sizeof(varlen_fa_ranges_of) == 72), "size");
_Static_assert(sizeof(void *) != 8 || sizeof(varlen_fa_qk_segment) == 104, "size");
_Static_assert(sizeof(varlen_fa_device_info) == 440 && sizeof(varlen_fa_meta_info) == 64, "size");

static int failures = 0;
static varlen_fa_device *device = NULL;
static int is_cpu = 0;

/* One spare element, so that a misaligned address stays inside. */
static float q_data[ELEMENTS + 1], k_data[ELEMENTS + 1], v_data[ELEMENTS + 1], out_data[ELEMENTS + 1];
static const uint64_t lengths[BATCH] = {7, 12};
enum { TOTAL = 19 };

static void fail(int line, const char *what, const char *detail) {
  fprintf(stderr, "line %d: %s: %s\n", line, what, detail);
  failures++;
}

#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition, "is false"))
#define OK(call) expect_ok(__LINE__, #call, (call))
#define REFUSED(call, status, words) expect_refused(__LINE__, #call, (call), (status), (words))

static void expect_ok(int line, const char *call, varlen_fa_status got) {
  if (got != VARLEN_FA_STATUS_OK) {
    fail(line, call, varlen_fa_last_error());
  }
}

static void expect_refused(int line, const char *call, varlen_fa_status got, varlen_fa_status wanted, const char *words) {
  char detail[512];
  if (got != wanted) {
    snprintf(detail, sizeof detail, "expected status %u, got %u: %s", (unsigned)wanted, (unsigned)got,
             got == VARLEN_FA_STATUS_OK ? "" : varlen_fa_last_error());
    fail(line, call, detail);
  } else if (strstr(varlen_fa_last_error(), words) == NULL) {
    snprintf(detail, sizeof detail, "expected a message with \"%s\", got \"%s\"", words, varlen_fa_last_error());
    fail(line, call, detail);
  }
}

static void fill(float *data, int count, uint32_t seed) {
  for (int at = 0; at < count; at++) {
    seed = seed * 1664525u + 1013904223u;
    data[at] = (float)(seed >> 8) / 8388608.0f - 1.0f;
  }
}

static varlen_fa_tensor tensor(void *data, uint64_t b, uint64_t s, uint64_t h, uint64_t d) {
  varlen_fa_tensor made = {0};
  const uint64_t shape[4] = {b, s, h, d};
  const int64_t strides[4] = {(int64_t)(s * h * d), (int64_t)(h * d), (int64_t)d, 1};
  made.data = data;
  made.bytes = b * s * h * d * sizeof(float);
  made.dtype = VARLEN_FA_DTYPE_F32;
  made.rank = 4;
  memcpy(made.shape, shape, sizeof shape);
  memcpy(made.strides, strides, sizeof strides);
  return made;
}

static varlen_fa_tensor packed_tensor(void *data, uint64_t rows, uint64_t h, uint64_t d) {
  varlen_fa_tensor made = tensor(data, 1, rows, h, d);
  made.rank = 3;
  memmove(made.shape, made.shape + 1, 3 * sizeof made.shape[0]);
  memmove(made.strides, made.strides + 1, 3 * sizeof made.strides[0]);
  return made;
}

static varlen_fa_tensor padded(void *data) { return tensor(data, BATCH, SEQ, HEADS, DIM); }

static varlen_fa_meta *meta_of_lengths(void) {
  varlen_fa_key_mask *mask = NULL;
  varlen_fa_meta *meta = NULL;
  OK(varlen_fa_key_mask_from_lengths(lengths, BATCH, SEQ, &mask));
  OK(varlen_fa_meta_create(mask, &meta));
  OK(varlen_fa_key_mask_free(mask));
  return meta;
}

static varlen_fa_attention_mask varlen(const varlen_fa_meta *meta) {
  varlen_fa_attention_mask mask = {0};
  mask.kind = VARLEN_FA_MASK_KIND_VARLEN;
  mask.query_meta = meta;
  return mask;
}

/* A good call, which SPOILED makes bad. */
typedef struct call {
  varlen_fa_attention_options options;
  varlen_fa_tensor q, k, v, out;
  varlen_fa_attention_mask mask;
} call;

static call good_call(const varlen_fa_meta *meta) {
  call made;
  memset(&made, 0, sizeof made);
  made.q = padded(q_data);
  made.k = padded(k_data);
  made.v = padded(v_data);
  made.out = padded(out_data);
  made.mask = varlen(meta);
  return made;
}

static varlen_fa_status run(const call *c) {
  return varlen_fa_forward(device, &c->options, &c->q, &c->k, &c->v, &c->mask, &c->out, NULL);
}

/* Refused with the status and words, and nothing was written. */
static void spoiled(int line, const char *what, const call *c, varlen_fa_status status, const char *words) {
  varlen_fa_plan plan;
  memset(out_data, 0xa5, sizeof out_data);
  memset(&plan, 0xa5, sizeof plan);
  expect_refused(line, what,
                 varlen_fa_forward(device, &c->options, &c->q, &c->k, &c->v, &c->mask, &c->out, &plan), status, words);
  for (size_t at = 0; at < sizeof out_data; at++) {
    if (((unsigned char *)out_data)[at] != 0xa5) {
      fail(line, what, "the output was written");
      break;
    }
  }
  for (size_t at = 0; at < sizeof plan; at++) {
    if (((unsigned char *)&plan)[at] != 0xa5) {
      fail(line, what, "the plan was written");
      break;
    }
  }
}

#define SPOILED(change, status, words)         \
  do {                                         \
    call c = good_call(meta);                  \
    change;                                    \
    spoiled(__LINE__, #change, &c, (status), (words)); \
  } while (0)

static void bad_tensors(const varlen_fa_meta *meta) {
  SPOILED(c.q.data = NULL, VARLEN_FA_STATUS_NULL_POINTER, "`q.data`");
  SPOILED(c.out.data = NULL, VARLEN_FA_STATUS_NULL_POINTER, "`out.data`");
  SPOILED(c.k.data = (void *)(uintptr_t)64, VARLEN_FA_STATUS_NULL_POINTER, "0x40");
  SPOILED(c.v.data = (char *)v_data + 1, VARLEN_FA_STATUS_MISALIGNED, "`v.data`");
  SPOILED(c.out.data = (char *)out_data + 2, VARLEN_FA_STATUS_MISALIGNED, "multiple of 4");
  SPOILED(c.q.data = (void *)(UINTPTR_MAX - 3), VARLEN_FA_STATUS_TOO_LARGE, "`q.data`");
  SPOILED(c.q.bytes = 0, VARLEN_FA_STATUS_BUFFER_TOO_SMALL, "`q`");
  SPOILED(c.k.bytes -= 1, VARLEN_FA_STATUS_BUFFER_TOO_SMALL, "`k`: the view reaches byte 6144 of a buffer of 6143 bytes");
  SPOILED(c.out.bytes -= 4, VARLEN_FA_STATUS_BUFFER_TOO_SMALL, "`out`");
  SPOILED(c.out.strides[0] += 1, VARLEN_FA_STATUS_BUFFER_TOO_SMALL, "`out`");
  SPOILED(c.v.strides[1] = 1 << 20, VARLEN_FA_STATUS_BUFFER_TOO_SMALL, "`v`");
  SPOILED(c.v.strides[1] = INT64_MAX, VARLEN_FA_STATUS_TOO_LARGE, "`v`");
  SPOILED(c.q.strides[2] = -DIM, VARLEN_FA_STATUS_BAD_VALUE, "`q.strides`");
  SPOILED(c.q.shape[0] = UINT64_MAX, VARLEN_FA_STATUS_TOO_LARGE, "`q");
  SPOILED(c.q.rank = 0, VARLEN_FA_STATUS_RANK, "`q.rank`: expected 1 to 4, got 0");
  SPOILED(c.q.rank = 5, VARLEN_FA_STATUS_RANK, "got 5");
  SPOILED(c.q.rank = 3; c.q.strides[2] = 1, VARLEN_FA_STATUS_RANK, "`q`: expected 4");
  SPOILED(c.q.dtype = 0, VARLEN_FA_STATUS_BAD_VALUE, "`q.dtype`: expected 1 (f32) or 2 (f16) or 3 (bf16), got 0");
  SPOILED(c.out.dtype = 77, VARLEN_FA_STATUS_BAD_VALUE, "got 77");
  SPOILED(c.k.dtype = VARLEN_FA_DTYPE_F16, VARLEN_FA_STATUS_DTYPE_MISMATCH, "`k`");
  SPOILED(c.v.memory = 7, VARLEN_FA_STATUS_BAD_VALUE, "`v.memory`");
  SPOILED(c.v.memory = VARLEN_FA_MEMORY_CUDA, VARLEN_FA_STATUS_DEVICE_MISMATCH, "`v`");
  SPOILED(c.out.memory = VARLEN_FA_MEMORY_CUDA, VARLEN_FA_STATUS_DEVICE_MISMATCH, "`out`");
  SPOILED(c.q.reserved[1] = 1, VARLEN_FA_STATUS_BAD_VALUE, "`q.reserved`");
  SPOILED(c.q.reserved_word = 1, VARLEN_FA_STATUS_BAD_VALUE, "`q.reserved_word`");
  SPOILED(c.q.strides[3] = 2; c.q.strides[2] = 0, VARLEN_FA_STATUS_INNER_STRIDE, "`q`");
  SPOILED(c.out.strides[3] = 2; c.out.strides[2] = 0, VARLEN_FA_STATUS_INNER_STRIDE, "`out`");
  SPOILED(c.out.strides[0] = 0, VARLEN_FA_STATUS_SELF_OVERLAP, "`out`");
  SPOILED(c.q.shape[3] = 12, VARLEN_FA_STATUS_SHAPE, "`k`");
  SPOILED(c.q.shape[3] = c.k.shape[3] = c.v.shape[3] = c.out.shape[3] = 0, VARLEN_FA_STATUS_HEAD_DIM, "got 0");
  SPOILED(c.k.shape[2] = c.v.shape[2] = 3, VARLEN_FA_STATUS_HEADS_NOT_DIVISIBLE, "num_heads = 4");
  SPOILED(c.out.shape[1] = 11, VARLEN_FA_STATUS_SHAPE, "`out`");
  SPOILED(c.q.shape[1] = c.k.shape[1] = c.v.shape[1] = c.out.shape[1] = 11, VARLEN_FA_STATUS_MASK_SIZE, "metadata");
}

static void bad_outputs(const varlen_fa_meta *meta) {
  /* An output over an input, over a part of it, and between its rows. */
  SPOILED(c.q = padded(out_data), VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `q`");
  SPOILED(c.v = padded(out_data), VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `v`");
  SPOILED(c.k.data = &out_data[1]; c.k.strides[0] = c.k.strides[1] = 0, VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `k`");
  static float both[2 * ELEMENTS];
  memset(both, 0xa5, sizeof both);
  call c = good_call(meta);
  c.q = tensor(both, BATCH, SEQ, HEADS, DIM);
  c.out = tensor(both + HEADS * DIM, BATCH, SEQ, HEADS, DIM);
  for (int dim = 0; dim < 2; dim++) {
    c.q.strides[dim] *= 2;
    c.out.strides[dim] *= 2;
  }
  c.q.bytes = sizeof both;
  c.out.bytes = sizeof both - HEADS * DIM * sizeof(float);
  REFUSED(run(&c), VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `q`");
  for (size_t at = 0; at < sizeof both; at++) {
    CHECK(((unsigned char *)both)[at] == 0xa5);
  }
}

static void bad_options_and_masks(const varlen_fa_meta *meta) {
  SPOILED(c.options.has_softmax_scale = 2, VARLEN_FA_STATUS_BAD_VALUE, "`options.has_softmax_scale`");
  SPOILED(c.options.has_softmax_scale = 1; c.options.softmax_scale = NAN, VARLEN_FA_STATUS_SOFTMAX_SCALE, "NaN");
  SPOILED(c.options.path = 9, VARLEN_FA_STATUS_BAD_VALUE, "`options.path`");
  SPOILED(c.options.path = VARLEN_FA_PATH_ZERO, VARLEN_FA_STATUS_NOT_APPLICABLE, "zero");
  SPOILED(c.options.kernel = 99, VARLEN_FA_STATUS_BAD_VALUE, "`options.kernel`");
  SPOILED(c.options.kernel = VARLEN_FA_KERNEL_CUDA_SM80, VARLEN_FA_STATUS_NOT_APPLICABLE, "sm80");
  SPOILED(c.options.reserved[0] = 1, VARLEN_FA_STATUS_BAD_VALUE, "`options.reserved`");
  SPOILED(c.mask.kind = 99, VARLEN_FA_STATUS_BAD_VALUE, "`mask.kind`");
  SPOILED(c.mask.kind = VARLEN_FA_MASK_KIND_NONE, VARLEN_FA_STATUS_BAD_VALUE, "`mask.query_meta`");
  SPOILED(c.mask.query_meta = NULL, VARLEN_FA_STATUS_NULL_POINTER, "`mask.query_meta`");
  SPOILED(c.mask.kind = VARLEN_FA_MASK_KIND_VARLEN_CROSS, VARLEN_FA_STATUS_NULL_POINTER, "`mask.key_meta`");
  SPOILED(c.mask.reserved[1] = 1, VARLEN_FA_STATUS_BAD_VALUE, "`mask.reserved`");
  SPOILED(c.mask.query_meta = (const varlen_fa_meta *)device, VARLEN_FA_STATUS_BAD_HANDLE, "got a device handle");
  SPOILED(c.mask.query_meta = (const varlen_fa_meta *)&c, VARLEN_FA_STATUS_BAD_HANDLE, "never issued");
  varlen_fa_tensor bias = packed_tensor(q_data, 2, 3, 4);
  SPOILED(memset(&c.mask, 0, sizeof c.mask); c.mask.kind = VARLEN_FA_MASK_KIND_BIAS; c.mask.bias = &bias,
          VARLEN_FA_STATUS_BROADCAST, "bias");
  bias = padded(out_data);
  SPOILED(memset(&c.mask, 0, sizeof c.mask); c.mask.kind = VARLEN_FA_MASK_KIND_BIAS; c.mask.bias = &bias,
          VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `bias`");

  call c = good_call(meta);
  REFUSED(varlen_fa_forward(NULL, NULL, &c.q, &c.k, &c.v, NULL, &c.out, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`device`");
  REFUSED(varlen_fa_forward(device, NULL, NULL, &c.k, &c.v, NULL, &c.out, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`q`");
  REFUSED(varlen_fa_forward(device, NULL, &c.q, &c.k, &c.v, NULL, NULL, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`out`");
  REFUSED(varlen_fa_forward(device, NULL, &c.q, &c.k, &c.v, NULL, &c.out, (varlen_fa_plan *)(uintptr_t)0x100002),
          VARLEN_FA_STATUS_MISALIGNED, "`plan`");
  REFUSED(varlen_fa_forward((varlen_fa_device *)meta, NULL, &c.q, &c.k, &c.v, NULL, &c.out, NULL),
          VARLEN_FA_STATUS_BAD_HANDLE, "`device`: expected a device handle, got a metadata handle");
}

/* Names are those of the constants and of plans; a number without a name gives NULL. */
static void names(const varlen_fa_device_info *info) {
  CHECK(strcmp(varlen_fa_status_name(VARLEN_FA_STATUS_BAD_HANDLE), "BAD_HANDLE") == 0);
  CHECK(strcmp(varlen_fa_device_kind_name(VARLEN_FA_DEVICE_KIND_CPU), "cpu") == 0);
  CHECK(strcmp(varlen_fa_dtype_name(VARLEN_FA_DTYPE_BF16), "bf16") == 0);
  CHECK(strcmp(varlen_fa_path_name(VARLEN_FA_PATH_FUSED), "fused") == 0);
  CHECK(strcmp(varlen_fa_kernel_name(VARLEN_FA_KERNEL_CUDA_SM100), "sm100") == 0);
  CHECK(strcmp(varlen_fa_reason_name(VARLEN_FA_REASON_ALL_VALID), "all-valid") == 0);
  for (uint32_t number = 0; number < 32; number++) {
    CHECK((info->kernels >> number & 1) == 0 || varlen_fa_kernel_name(number) != NULL);
    CHECK((info->dtypes >> number & 1) == 0 || varlen_fa_dtype_name(number) != NULL);
  }
  CHECK(varlen_fa_kernel_name(VARLEN_FA_KERNEL_UNLISTED) == NULL && varlen_fa_status_name(UINT32_MAX) == NULL);
  CHECK(varlen_fa_reason_name(8) == NULL && varlen_fa_dtype_name(0) == NULL);
}

static void handles(void) {
  varlen_fa_device *other = NULL;
  REFUSED(varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_CPU, 0, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`device`");
  REFUSED(varlen_fa_device_open(42, 0, &other), VARLEN_FA_STATUS_BAD_VALUE, "`kind`");
  REFUSED(varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_CPU, 1, &other), VARLEN_FA_STATUS_BAD_VALUE, "`ordinal`");
  REFUSED(varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_CUDA, 999, &other), VARLEN_FA_STATUS_DEVICE_UNAVAILABLE, "cuda:999");
  CHECK(other == NULL);
  OK(varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_CPU, 0, &other));
  OK(varlen_fa_device_synchronize(other));
  OK(varlen_fa_device_free(other));
  REFUSED(varlen_fa_device_free(other), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
  REFUSED(varlen_fa_device_synchronize(other), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
  OK(varlen_fa_device_free(NULL));
  OK(varlen_fa_key_mask_free(NULL));
  OK(varlen_fa_meta_free(NULL));
  OK(varlen_fa_device_meta_free(NULL));
  OK(varlen_fa_cu_seqlens_free(NULL));
  OK(varlen_fa_key_ranges_free(NULL));

  varlen_fa_meta *meta = meta_of_lengths();
  varlen_fa_cu_seqlens *cu = NULL;
  OK(varlen_fa_cu_seqlens_from_meta(meta, &cu));
  REFUSED(varlen_fa_key_mask_free((varlen_fa_key_mask *)meta), VARLEN_FA_STATUS_BAD_HANDLE, "got a metadata handle");
  OK(varlen_fa_meta_free(meta));
  call c = good_call(meta);
  REFUSED(run(&c), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
  /* The sequences of freed metadata stay valid. */
  varlen_fa_tensor rows = packed_tensor(q_data, TOTAL, HEADS, DIM), out = packed_tensor(out_data, TOTAL, HEADS, DIM);
  OK(varlen_fa_varlen_attention(device, NULL, &rows, &rows, &rows, cu, cu, &out, NULL, NULL));
  OK(varlen_fa_cu_seqlens_free(cu));
  REFUSED(varlen_fa_cu_seqlens_free(cu), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
}

static void expect_same_tokens(int line, varlen_fa_key_mask *mask) {
  varlen_fa_meta *meta = NULL;
  varlen_fa_meta_info info;
  uint32_t indices[TOTAL];
  int32_t inv_indices[TOKENS], cu_seqlens[BATCH + 1];
  expect_ok(line, "meta", varlen_fa_meta_create(mask, &meta));
  OK(varlen_fa_meta_describe(meta, &info));
  CHECK(info.batch == BATCH && info.seq == SEQ && info.total_valid == TOTAL && info.max_seqlen == 12);
  OK(varlen_fa_meta_copy_indices(meta, indices, TOTAL));
  OK(varlen_fa_meta_copy_inv_indices(meta, inv_indices, TOKENS));
  OK(varlen_fa_meta_copy_cu_seqlens(meta, cu_seqlens, BATCH + 1));
  for (int32_t at = 0, packed = 0; at < TOKENS; at++) {
    int valid = (uint64_t)(at % SEQ) < lengths[at / SEQ];
    if (inv_indices[at] != (valid ? packed : -1) || (valid && indices[packed] != (uint32_t)at)) {
      fail(line, "metadata", "differs from the lengths");
      break;
    }
    packed += valid;
  }
  CHECK(cu_seqlens[0] == 0 && cu_seqlens[1] == 7 && cu_seqlens[2] == TOTAL);
  REFUSED(varlen_fa_meta_copy_indices(meta, indices, TOTAL - 1), VARLEN_FA_STATUS_LENGTH, "`indices`");
  REFUSED(varlen_fa_meta_copy_cu_seqlens(meta, NULL, BATCH + 1), VARLEN_FA_STATUS_NULL_POINTER, "`values`");
  OK(varlen_fa_meta_free(meta));
  OK(varlen_fa_key_mask_free(mask));
}

static void masks(void) {
  varlen_fa_key_mask *mask = NULL;
  uint8_t bytes[TOKENS];
  int16_t shorts[TOKENS];
  int32_t words[TOKENS];
  int64_t longs[TOKENS];
  for (int at = 0; at < TOKENS; at++) {
    int valid = (uint64_t)(at % SEQ) < lengths[at / SEQ];
    bytes[at] = valid ? 255 : 0;
    shorts[at] = valid ? INT16_MIN : 0;
    words[at] = valid ? -1 : 0;
    longs[at] = valid ? INT64_MIN : 0;
  }
  OK(varlen_fa_key_mask_from_lengths(lengths, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_integers(bytes, VARLEN_FA_MASK_DTYPE_U8, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_integers(shorts, VARLEN_FA_MASK_DTYPE_U16, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_integers(words, VARLEN_FA_MASK_DTYPE_U32, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_integers(longs, VARLEN_FA_MASK_DTYPE_U64, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  float numbers[TOKENS];
  uint16_t halves[TOKENS], brains[TOKENS];
  for (int at = 0; at < TOKENS; at++) {
    int valid = (uint64_t)(at % SEQ) < lengths[at / SEQ];
    bytes[at] = valid;
    numbers[at] = valid ? -0.0f : at % 2 ? -10000.0f : -INFINITY;
    halves[at] = valid ? 0 : 0xfbff;
    brains[at] = valid ? 0x8000 : 0xff7f;
  }
  OK(varlen_fa_key_mask_from_additive(numbers, VARLEN_FA_DTYPE_F32, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_additive(halves, VARLEN_FA_DTYPE_F16, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_additive(brains, VARLEN_FA_DTYPE_BF16, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_integers_strict(bytes, VARLEN_FA_MASK_DTYPE_U8, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_integers_strict(bytes, VARLEN_FA_MASK_DTYPE_U8, BATCH, SEQ, &mask));
  varlen_fa_key_mask *copy = NULL;
  OK(varlen_fa_key_mask_broadcast(mask, BATCH, &copy));
  expect_same_tokens(__LINE__, copy);
  copy = NULL;
  REFUSED(varlen_fa_key_mask_broadcast(mask, BATCH + 1, &copy), VARLEN_FA_STATUS_MASK_SIZE, "`mask`");
  REFUSED(varlen_fa_key_mask_broadcast(NULL, BATCH, &copy), VARLEN_FA_STATUS_NULL_POINTER, "`row`");
  CHECK(copy == NULL);
  OK(varlen_fa_key_mask_free(mask));
  // One row of seven tokens for both rows: those of the second row are not the lengths.
  OK(varlen_fa_key_mask_from_integers_strict(bytes, VARLEN_FA_MASK_DTYPE_U8, 1, SEQ, &mask));
  OK(varlen_fa_key_mask_broadcast(mask, BATCH, &copy));
  OK(varlen_fa_key_mask_free(mask));
  varlen_fa_meta *rows = NULL;
  varlen_fa_meta_info info;
  OK(varlen_fa_meta_create(copy, &rows));
  OK(varlen_fa_meta_describe(rows, &info));
  CHECK(info.batch == BATCH && info.total_valid == BATCH * 7);
  OK(varlen_fa_meta_free(rows));
  OK(varlen_fa_key_mask_free(copy));

  const varlen_fa_run runs[] = {{1, 4, 12}, {0, 0, 7}, {1, 0, 4}, {0, 3, 3}};
  OK(varlen_fa_key_mask_from_runs(runs, 4, BATCH, SEQ, &mask));
  expect_same_tokens(__LINE__, mask);
  OK(varlen_fa_key_mask_from_lengths(NULL, 0, SEQ, &mask));
  OK(varlen_fa_key_mask_free(mask));

  mask = NULL;
  REFUSED(varlen_fa_key_mask_from_integers(NULL, VARLEN_FA_MASK_DTYPE_U8, BATCH, SEQ, &mask), VARLEN_FA_STATUS_NULL_POINTER, "`mask`");
  REFUSED(varlen_fa_key_mask_from_integers(bytes, 3, BATCH, SEQ, &mask), VARLEN_FA_STATUS_BAD_VALUE, "`dtype`");
  REFUSED(varlen_fa_key_mask_from_integers((char *)longs + 4, VARLEN_FA_MASK_DTYPE_U64, 1, 1, &mask), VARLEN_FA_STATUS_MISALIGNED, "`mask`");
  REFUSED(varlen_fa_key_mask_from_integers(bytes, VARLEN_FA_MASK_DTYPE_U8, UINT64_MAX, UINT64_MAX, &mask), VARLEN_FA_STATUS_TOO_LARGE, "`mask`");
  numbers[SEQ + 2] = -2.5f;
  bytes[1] = 255;
  REFUSED(varlen_fa_key_mask_from_additive(numbers, VARLEN_FA_DTYPE_F32, BATCH, SEQ, &mask), VARLEN_FA_STATUS_MASK_ROW, "row 1: token 2");
  REFUSED(varlen_fa_key_mask_from_additive(numbers, 4, BATCH, SEQ, &mask), VARLEN_FA_STATUS_BAD_VALUE, "`dtype`");
  REFUSED(varlen_fa_key_mask_from_additive(NULL, VARLEN_FA_DTYPE_F32, BATCH, SEQ, &mask), VARLEN_FA_STATUS_NULL_POINTER, "`mask`");
  REFUSED(varlen_fa_key_mask_from_integers_strict(bytes, VARLEN_FA_MASK_DTYPE_U8, BATCH, SEQ, &mask), VARLEN_FA_STATUS_MASK_ROW, "row 0: token 1");
  REFUSED(varlen_fa_key_mask_from_integers_strict(bytes, 3, BATCH, SEQ, &mask), VARLEN_FA_STATUS_BAD_VALUE, "`dtype`");
  const uint64_t too_long[] = {3, SEQ + 1};
  REFUSED(varlen_fa_key_mask_from_lengths(too_long, 2, SEQ, &mask), VARLEN_FA_STATUS_MASK_ROW, "row 1");
  const varlen_fa_run outside[] = {{2, 0, 1}, {0, 3, 13}, {0, 5, 4}};
  REFUSED(varlen_fa_key_mask_from_runs(outside, 1, BATCH, SEQ, &mask), VARLEN_FA_STATUS_MASK_ROW, "a row below 2");
  REFUSED(varlen_fa_key_mask_from_runs(outside + 1, 1, BATCH, SEQ, &mask), VARLEN_FA_STATUS_MASK_ROW, "3..13");
  REFUSED(varlen_fa_key_mask_from_runs(outside + 2, 1, BATCH, SEQ, &mask), VARLEN_FA_STATUS_MASK_ROW, "5..4");
  REFUSED(varlen_fa_key_mask_from_runs(NULL, 0, UINT64_MAX, 0, &mask), VARLEN_FA_STATUS_TOO_LARGE, "`mask`");
  REFUSED(varlen_fa_key_mask_from_lengths(lengths, BATCH, SEQ, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`key_mask`");
  REFUSED(varlen_fa_meta_create(NULL, (varlen_fa_meta **)&mask), VARLEN_FA_STATUS_NULL_POINTER, "`key_mask`");
  CHECK(mask == NULL);

  varlen_fa_cu_seqlens *cu = NULL;
  const int32_t falling[] = {0, 5, 4}, late[] = {1, 5};
  REFUSED(varlen_fa_cu_seqlens_create(falling, 3, &cu), VARLEN_FA_STATUS_CU_SEQLENS, "never fall");
  REFUSED(varlen_fa_cu_seqlens_create(late, 2, &cu), VARLEN_FA_STATUS_CU_SEQLENS, "first value of 0");
  REFUSED(varlen_fa_cu_seqlens_create(NULL, 0, &cu), VARLEN_FA_STATUS_CU_SEQLENS, "no values");
  CHECK(cu == NULL);
}

/* Attention over the first five keys and over the others, merged, is attention over all; its
 * log-sum-exp is checked in double. */
static void log_sum_exp_and_merge(const varlen_fa_meta *meta) {
  static float outs[3][ELEMENTS], lses[3][BATCH * HEADS * SEQ], whole[ELEMENTS];
  const varlen_fa_run runs[2][BATCH] = {{{0, 0, 5}, {1, 0, 5}}, {{0, 5, 7}, {1, 5, SEQ}}};
  varlen_fa_tensor q = padded(q_data), k = padded(k_data), v = padded(v_data), to = padded(whole);
  varlen_fa_tensor out[3], lse[3];
  varlen_fa_attention_mask mask = varlen(meta);
  for (int part = 0; part < 3; part++) {
    out[part] = padded(outs[part]);
    lse[part] = packed_tensor(lses[part], BATCH, HEADS, SEQ);
  }
  for (int part = 0; part < 2; part++) {
    varlen_fa_key_mask *kept = NULL;
    varlen_fa_meta *keys = NULL;
    OK(varlen_fa_key_mask_from_runs(runs[part], 2, BATCH, SEQ, &kept));
    OK(varlen_fa_meta_create(kept, &keys));
    mask.kind = VARLEN_FA_MASK_KIND_VARLEN_CROSS;
    mask.key_meta = keys;
    OK(varlen_fa_forward_with_lse(device, NULL, &q, &k, &v, &mask, &out[part], &lse[part], NULL));
    OK(varlen_fa_meta_free(keys));
    OK(varlen_fa_key_mask_free(kept));
  }
  OK(varlen_fa_merge_attention(device, &out[0], &lse[0], &out[1], &lse[1], &out[2], &lse[2]));
  mask = varlen(meta);
  OK(varlen_fa_forward_with_lse(device, NULL, &q, &k, &v, &mask, &to, NULL, NULL));
  for (int at = 0; at < ELEMENTS; at++) CHECK(fabsf(outs[2][at] - whole[at]) < 1e-5f);
  for (int at = 0; at < BATCH * HEADS * SEQ; at++) {
    const int b = at / SEQ / HEADS, h = at / SEQ % HEADS, s = at % SEQ, length = (int)lengths[b];
    double sum = 0.0;
    for (int key = 0; s < length && key < length; key++) {
      double score = 0.0;
      for (int d = 0; d < DIM; d++) {
        score += (double)q_data[((b * SEQ + s) * HEADS + h) * DIM + d] * (double)k_data[((b * SEQ + key) * HEADS + h) * DIM + d];
      }
      sum += exp(score / 4.0);
    }
    CHECK(s < length ? fabs((double)lses[2][at] - log(sum)) < 1e-5 : lses[2][at] == -INFINITY);
  }

  REFUSED(varlen_fa_forward_with_lse(device, NULL, &q, &k, &v, &mask, &to, &to, NULL), VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `lse`");
  REFUSED(varlen_fa_forward_with_lse(device, NULL, &q, &k, &v, &mask, &to, &out[0], NULL), VARLEN_FA_STATUS_SHAPE, "`lse`");
  REFUSED(varlen_fa_merge_attention(device, &out[0], &lse[0], &out[1], &lse[1], &out[0], NULL), VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `out1`");
  REFUSED(varlen_fa_merge_attention(device, &out[0], &out[0], &out[1], &lse[1], &out[2], NULL), VARLEN_FA_STATUS_SHAPE, "`lse1`");
  REFUSED(varlen_fa_merge_attention(device, NULL, &lse[0], &out[1], &lse[1], &out[2], NULL), VARLEN_FA_STATUS_NULL_POINTER, "`out1`");
  OK(varlen_fa_merge_attention(device, &out[0], &lse[0], &out[1], &lse[1], &out[2], NULL));
}

/* Tensors in segments give the bits of whole ones; messages name segment and argument. */
static void segments_of_attention(const varlen_fa_meta *meta) {
  enum { TEXT = 2, IMAGE = SEQ - TEXT, TOKEN = HEADS * DIM };
  static float whole[2][ELEMENTS], parts[2][2][ELEMENTS];
  varlen_fa_tensor tensors[2][2], many[9] = {0};
  varlen_fa_segments x = {0}, out = {0}, bad;
  varlen_fa_attention_mask mask = {0};
  varlen_fa_plan plan = {0};
  const int length[2] = {TEXT, IMAGE};
  fill(whole[0], ELEMENTS, 11);
  for (int part = 0; part < 2; part++) {
    const size_t row = (size_t)length[part] * TOKEN * sizeof(float);
    for (int b = 0; b < BATCH; b++)
      memcpy(parts[0][part] + b * length[part] * TOKEN, whole[0] + (b * SEQ + part * TEXT) * TOKEN, row);
    memset(parts[1][part], 0xff, sizeof parts[1][part]);
    for (int i = 0; i < 2; i++) tensors[i][part] = tensor(parts[i][part], BATCH, (uint64_t)length[part], HEADS, DIM);
  }
  mask.kind = VARLEN_FA_MASK_KIND_VARLEN;
  mask.query_meta = meta;
  x.tensors = tensors[0];
  out.tensors = tensors[1];
  x.count = out.count = 2;
  const varlen_fa_tensor one = padded(whole[0]), written = padded(whole[1]);

  bad = x;
  bad.count = 0;
  REFUSED(varlen_fa_forward_segments(device, NULL, &bad, &x, &x, &mask, &out, NULL, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`q`: expected 1 to 8 segments, got 0");
  bad.tensors = many;
  bad.count = 9;
  REFUSED(varlen_fa_forward_segments(device, NULL, &x, &x, &x, &mask, &bad, NULL, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`out`: expected 1 to 8 segments, got 9");
  bad = x;
  bad.tensors = NULL;
  REFUSED(varlen_fa_forward_segments(device, NULL, &x, &bad, &x, &mask, &out, NULL, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`k.tensors`");
  REFUSED(varlen_fa_forward_segments(device, NULL, &x, &x, NULL, &mask, &out, NULL, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`v`");
  bad = x;
  bad.reserved[1] = 1;
  REFUSED(varlen_fa_forward_segments(device, NULL, &x, &x, &bad, &mask, &out, NULL, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`v.reserved`");
  bad = x;
  bad.tensors = many;
  many[0] = tensors[0][0];
  many[1] = tensors[0][1];
  many[1].shape[0] = 1;
  REFUSED(varlen_fa_forward_segments(device, NULL, &x, &bad, &x, &mask, &out, NULL, NULL), VARLEN_FA_STATUS_SHAPE, "`segments[1].k`");
  many[1] = tensors[0][1];
  many[1].rank = 5;
  REFUSED(varlen_fa_forward_segments(device, NULL, &x, &bad, &x, &mask, &out, NULL, NULL), VARLEN_FA_STATUS_RANK, "`segments[1].k.rank`");
  bad = out;
  bad.tensors = tensors[0];
  REFUSED(varlen_fa_forward_segments(device, NULL, &x, &x, &x, &mask, &bad, NULL, NULL), VARLEN_FA_STATUS_OVERLAP, "`segments[0].out`");
  bad = x;
  bad.count = 1;
  REFUSED(varlen_fa_forward_segments(device, NULL, &bad, &bad, &bad, &mask, &out, NULL, NULL), VARLEN_FA_STATUS_SHAPE, "`out`");
  for (int part = 0; part < 2; part++)
    for (int at = 0; at < ELEMENTS; at++) CHECK(parts[1][part][at] != parts[1][part][at]);

  OK(varlen_fa_forward(device, NULL, &one, &one, &one, &mask, &written, NULL));
  OK(varlen_fa_forward_segments(device, NULL, &x, &x, &x, &mask, &out, NULL, &plan));
  for (int part = 0; part < 2; part++)
    for (int b = 0; b < BATCH; b++)
      CHECK(memcmp(parts[1][part] + b * length[part] * TOKEN, whole[1] + (b * SEQ + part * TEXT) * TOKEN, (size_t)length[part] * TOKEN * sizeof(float)) == 0);
  /* One segment is the tensor itself. */
  memset(whole[1], 0xff, sizeof whole[1]);
  bad = x;
  bad.tensors = &written;
  bad.count = 1;
  OK(varlen_fa_forward_segments(device, NULL, &x, &x, &x, &mask, &bad, NULL, &plan));
  CHECK(memcmp(parts[1][0], whole[1], (size_t)TEXT * TOKEN * sizeof(float)) == 0);
}

/* Two segments, one replaced and one not, against double; masked rows stay as they are. */
static void prepare_qk(void) {
  enum { TEXT = 3, HALF = 5 };
  static float text[2][BATCH * TEXT * HEADS * DIM], image[2][ELEMENTS], out[2][ELEMENTS], before[BATCH * TEXT * HEADS * DIM];
  static float weight[DIM], cosines[TEXT * HALF], sines[TEXT * HALF];
  const uint64_t kept[BATCH] = {2, TEXT + SEQ};
  varlen_fa_qk_segment segments[2] = {0}, bad[2];
  varlen_fa_tensor tensors[2][2], outs[2], w = packed_tensor(weight, 1, 1, DIM), tables[2];
  varlen_fa_key_mask *mask = NULL;
  varlen_fa_meta *meta = NULL;
  for (int i = 0; i < 2; i++) {
    fill(text[i], BATCH * TEXT * HEADS * DIM, 7);
    fill(image[i], ELEMENTS, 8 + (unsigned)i);
    memset(out[i], 0xff, sizeof out[i]);
    tensors[0][i] = tensor(text[i], BATCH, TEXT, HEADS, DIM);
    tensors[1][i] = padded(image[i]);
    outs[i] = padded(out[i]);
    tables[i] = packed_tensor(i ? sines : cosines, 1, TEXT, HALF);
    tables[i].rank = 2;
    memmove(tables[i].shape, tables[i].shape + 1, 2 * sizeof w.shape[0]);
    memmove(tables[i].strides, tables[i].strides + 1, 2 * sizeof w.strides[0]);
  }
  memcpy(before, text[0], sizeof before);
  w.rank = 1;
  w.shape[0] = DIM;
  w.strides[0] = 1;
  for (int d = 0; d < DIM; d++) weight[d] = 0.5f + 0.1f * (float)d;
  for (int at = 0; at < TEXT * HALF; at++) {
    cosines[at] = cosf(0.7f * (float)at);
    sines[at] = sinf(0.7f * (float)at);
  }
  segments[0].q = &tensors[0][0];
  segments[0].k = &tensors[0][1];
  segments[0].q_weight = segments[0].k_weight = &w;
  segments[0].eps = 1e-6f;
  segments[0].cos = &tables[0];
  segments[0].sin = &tables[1];
  segments[0].pairing = VARLEN_FA_ROTARY_PAIRING_HALVES;
  segments[1].q = &tensors[1][0];
  segments[1].k = &tensors[1][1];
  segments[1].q_out = &outs[0];
  segments[1].k_out = &outs[1];
  OK(varlen_fa_key_mask_from_lengths(kept, BATCH, TEXT + SEQ, &mask));
  OK(varlen_fa_meta_create(mask, &meta));

  memcpy(bad, segments, sizeof bad);
  REFUSED(varlen_fa_prepare_qk(device, segments, 0, NULL, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`segments`: expected 1 to 8 segments, got 0");
  REFUSED(varlen_fa_prepare_qk(device, segments, 9, NULL, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`segments`: expected 1 to 8 segments, got 9");
  REFUSED(varlen_fa_prepare_qk(device, NULL, 1, NULL, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`segments`");
  REFUSED(varlen_fa_prepare_qk(device, segments, 2, mask, meta), VARLEN_FA_STATUS_BAD_VALUE, "`meta`");
  REFUSED(varlen_fa_prepare_qk(device, segments, 1, mask, NULL), VARLEN_FA_STATUS_MASK_SIZE, "`mask`");
  bad[1].k = NULL;
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`segments[1].k`");
  bad[1].k = &tensors[1][1];
  bad[1].k_out = NULL;
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`segments[1].k_out`");
  bad[1].k_out = &outs[0];
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_OVERLAP, "`segments[1].q_out` may share memory with `segments[1].k_out`");
  bad[1].k_out = &tensors[1][0];
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_OVERLAP, "`segments[1].k_out` may share memory with `segments[1].q`");
  bad[1] = segments[1];
  bad[0].k_weight = NULL;
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`segments[0].k_weight`");
  bad[0] = segments[0];
  bad[0].eps = -1.0f;
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`segments[0].eps`");
  bad[0] = segments[0];
  bad[0].sin = NULL;
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`segments[0].sin`");
  bad[0] = segments[0];
  bad[0].pairing = (varlen_fa_rotary_pairing)0;
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`segments[0].pairing`");
  bad[0] = segments[0];
  bad[0].reserved[3] = 1;
  REFUSED(varlen_fa_prepare_qk(device, bad, 2, mask, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`segments[0].reserved`");
  CHECK(memcmp(before, text[0], sizeof before) == 0);

  /* An output that is its input's own memory is the input replaced. */
  segments[0].q_out = &tensors[0][0];
  segments[0].k_out = &tensors[0][1];
  OK(varlen_fa_prepare_qk(device, segments, 2, NULL, meta));
  for (int row = 0; row < BATCH * TEXT * HEADS; row++) {
    const int b = row / HEADS / TEXT, s = row / HEADS % TEXT;
    const float *x = before + row * DIM;
    double expected[DIM], power = 0.0;
    for (int d = 0; d < DIM; d++) power += (double)x[d] * (double)x[d];
    for (int d = 0; d < DIM; d++) expected[d] = (double)x[d] * (double)weight[d] / sqrt(power / DIM + 1e-6);
    for (int i = 0; i < HALF; i++) {
      const double first = expected[i], second = expected[HALF + i];
      const double cosine = (double)cosines[s * HALF + i], sine = (double)sines[s * HALF + i];
      expected[i] = first * cosine - second * sine;
      expected[HALF + i] = second * cosine + first * sine;
    }
    for (int d = 0; d < DIM; d++) {
      const float found = text[0][row * DIM + d];
      CHECK(b == 0 && s >= 2 ? memcmp(&found, x + d, sizeof found) == 0 : fabs((double)found - expected[d]) < 1e-5);
    }
  }
  CHECK(memcmp(text[0], text[1], sizeof before) == 0);
  /* Without norm and rotation, and of the second batch row alone. */
  for (int i = 0; i < 2; i++) {
    const int first = SEQ * HEADS * DIM;
    for (int at = 0; at < first; at++) CHECK(out[i][at] != out[i][at]);
    CHECK(memcmp(out[i] + first, image[i] + first, (size_t)(ELEMENTS - first) * sizeof(float)) == 0);
  }
  OK(varlen_fa_key_mask_free(mask));
  OK(varlen_fa_meta_free(meta));
}

/* pack, attention over packed rows and scatter give what the packed path gives, bit for bit; lse is
 * checked in double. */
static void primitives(const varlen_fa_meta *meta) {
  static float packed[3][TOTAL * HEADS * DIM], attended[TOTAL * HEADS * DIM], lse[HEADS * TOTAL], whole[ELEMENTS];
  varlen_fa_tensor q = padded(q_data), k = padded(k_data), v = padded(v_data), out = padded(out_data);
  varlen_fa_tensor pq = packed_tensor(packed[0], TOTAL, HEADS, DIM), pk = packed_tensor(packed[1], TOTAL, HEADS, DIM);
  varlen_fa_tensor pv = packed_tensor(packed[2], TOTAL, HEADS, DIM), po = packed_tensor(attended, TOTAL, HEADS, DIM);
  varlen_fa_tensor sums = packed_tensor(lse, 1, HEADS, TOTAL), to = padded(whole);
  varlen_fa_attention_options options = {0};
  varlen_fa_attention_mask mask = varlen(meta);
  varlen_fa_cu_seqlens *cu = NULL;
  varlen_fa_plan plan;
  const int32_t values[] = {0, 7, TOTAL};
  sums.rank = 2;
  memmove(sums.shape, sums.shape + 1, 2 * sizeof sums.shape[0]);
  memmove(sums.strides, sums.strides + 1, 2 * sizeof sums.strides[0]);
  options.path = VARLEN_FA_PATH_PACKED;

  OK(varlen_fa_cu_seqlens_create(values, 3, &cu));
  OK(varlen_fa_pack_qkv(device, &q, &k, &v, meta, &pq, &pk, &pv));
  OK(varlen_fa_varlen_attention(device, NULL, &pq, &pk, &pv, cu, cu, &po, &sums, &plan));
  CHECK(plan.path == VARLEN_FA_PATH_PACKED && plan.reason == VARLEN_FA_REASON_ALREADY_PACKED);
  CHECK(strstr(plan.text, "packed by") == plan.text);
  memset(whole, 0xff, sizeof whole);
  OK(varlen_fa_scatter_to_padded(device, &po, meta, &to));
  OK(varlen_fa_forward(device, &options, &q, &k, &v, &mask, &out, &plan));
  CHECK(plan.path == VARLEN_FA_PATH_PACKED && plan.reason == VARLEN_FA_REASON_PATH_FORCED);
  CHECK(memcmp(whole, out_data, sizeof whole) == 0);
  CHECK(memcmp(packed[0], q_data, 7 * HEADS * DIM * sizeof(float)) == 0);
  CHECK(whole[0] != 0.0f && whole[8 * HEADS * DIM] == 0.0f);
  for (int row = 0; row < TOTAL; row++) {
    for (int h = 0; h < HEADS; h++) {
      double sum = 0.0;
      for (int key = row < 7 ? 0 : 7; key < (row < 7 ? 7 : TOTAL); key++) {
        double score = 0.0;
        for (int d = 0; d < DIM; d++) {
          score += (double)packed[0][(row * HEADS + h) * DIM + d] * (double)packed[1][(key * HEADS + h) * DIM + d];
        }
        sum += exp(score / 4.0);
      }
      CHECK(fabs((double)lse[h * TOTAL + row] - log(sum)) < 1e-5);
    }
  }

  REFUSED(varlen_fa_pack_qkv(device, &q, &k, &v, meta, &pq, &pq, &pv), VARLEN_FA_STATUS_OVERLAP, "`packed_q` may share memory with `packed_k`");
  REFUSED(varlen_fa_pack_qkv(device, &q, &k, &v, meta, &pq, &pk, &v), VARLEN_FA_STATUS_OVERLAP, "`packed_v` may share memory with `v`");
  REFUSED(varlen_fa_pack_qkv(device, &q, &k, &v, NULL, &pq, &pk, &pv), VARLEN_FA_STATUS_NULL_POINTER, "`meta`");
  REFUSED(varlen_fa_pack_qkv(device, &q, &k, &v, meta, &q, &pk, &pv), VARLEN_FA_STATUS_OVERLAP, "`packed_q`");
  REFUSED(varlen_fa_varlen_attention(device, NULL, &pq, &pk, &pv, cu, cu, &po, &po, NULL), VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `lse`");
  REFUSED(varlen_fa_varlen_attention(device, &options, &pq, &pk, &pv, cu, cu, &po, NULL, NULL), VARLEN_FA_STATUS_NOT_APPLICABLE, "`options.path`");
  REFUSED(varlen_fa_varlen_attention(device, NULL, &pq, &pk, &pv, cu, NULL, &po, NULL, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`cu_seqlens_k`");
  REFUSED(varlen_fa_varlen_attention(device, NULL, &q, &pk, &pv, cu, cu, &po, NULL, NULL), VARLEN_FA_STATUS_RANK, "`q`");
  REFUSED(varlen_fa_scatter_to_padded(device, &po, meta, &po), VARLEN_FA_STATUS_OVERLAP, "`padded` may share memory with `packed`");
  pq.shape[0] -= 1;
  REFUSED(varlen_fa_pack_qkv(device, &q, &k, &v, meta, &pq, &pk, &pv), VARLEN_FA_STATUS_SHAPE, "`packed_q`");
  REFUSED(varlen_fa_varlen_attention(device, NULL, &pq, &pk, &pv, cu, cu, &pq, NULL, NULL), VARLEN_FA_STATUS_OVERLAP, "`out`");
  REFUSED(varlen_fa_scatter_to_padded(device, &pq, meta, &to), VARLEN_FA_STATUS_SHAPE, "`packed`");
  OK(varlen_fa_cu_seqlens_free(cu));
}

/* Four masks with the same meaning; strides of every kind; what lies between the rows of an output
 * stays. */
static void equal_masks(const varlen_fa_meta *meta) {
  static float expected[ELEMENTS], turned[ELEMENTS], roomy[TOKENS * (HEADS + 1) * DIM];
  static float bias_data[BATCH * SEQ];
  varlen_fa_key_mask *key_mask = NULL;
  call c = good_call(meta);
  OK(run(&c));
  memcpy(expected, out_data, sizeof expected);

  OK(varlen_fa_key_mask_from_lengths(lengths, BATCH, SEQ, &key_mask));
  memset(&c.mask, 0, sizeof c.mask);
  c.mask.kind = VARLEN_FA_MASK_KIND_KEY;
  c.mask.key_mask = key_mask;
  OK(run(&c));
  for (int token = 0; token < TOKENS; token++) {
    bias_data[token] = (uint64_t)(token % SEQ) < lengths[token / SEQ] ? 0.0f : -INFINITY;
    for (int at = 0; at < HEADS * DIM && (uint64_t)(token % SEQ) < lengths[token / SEQ]; at++) {
      CHECK(fabsf(out_data[token * HEADS * DIM + at] - expected[token * HEADS * DIM + at]) < 1e-5f);
    }
  }
  memcpy(turned, out_data, sizeof turned);
  /* [B, H, Sq, Sk] with strides of 0. */
  varlen_fa_tensor bias = tensor(bias_data, BATCH, HEADS, SEQ, SEQ);
  bias.strides[0] = SEQ;
  bias.strides[1] = bias.strides[2] = 0;
  bias.bytes = sizeof bias_data;
  memset(&c.mask, 0, sizeof c.mask);
  c.mask.kind = VARLEN_FA_MASK_KIND_BIAS;
  c.mask.bias = &bias;
  memset(out_data, 0xff, sizeof out_data);
  OK(run(&c));
  for (int at = 0; at < ELEMENTS; at++) {
    CHECK(fabsf(out_data[at] - turned[at]) < 1e-5f);
  }
  OK(varlen_fa_key_mask_free(key_mask));

  /* k as [B, H, S, D] memory; the output with a spare head. */
  for (int b = 0; b < BATCH; b++) {
    for (int s = 0; s < SEQ; s++) {
      for (int h = 0; h < HEADS; h++) {
        memcpy(&turned[((b * HEADS + h) * SEQ + s) * DIM], &k_data[((b * SEQ + s) * HEADS + h) * DIM], DIM * sizeof(float));
      }
    }
  }
  memset(roomy, 0xa5, sizeof roomy);
  c = good_call(meta);
  c.k = padded(turned);
  c.k.strides[1] = DIM;
  c.k.strides[2] = SEQ * DIM;
  c.out = padded(roomy);
  c.out.strides[0] = SEQ * (HEADS + 1) * DIM;
  c.out.strides[1] = (HEADS + 1) * DIM;
  c.out.bytes = sizeof roomy - DIM * sizeof(float);
  OK(run(&c));
  for (int token = 0; token < TOKENS; token++) {
    const float *row = &roomy[token * (HEADS + 1) * DIM];
    CHECK(memcmp(row, &expected[token * HEADS * DIM], HEADS * DIM * sizeof(float)) == 0);
    for (size_t at = 0; at < DIM * sizeof(float); at++) {
      CHECK(((const unsigned char *)(row + HEADS * DIM))[at] == 0xa5);
    }
  }

  /* Cross-attention with the same metadata twice is self-attention. */
  c = good_call(meta);
  c.mask.kind = VARLEN_FA_MASK_KIND_VARLEN_CROSS;
  c.mask.key_meta = meta;
  memset(out_data, 0xff, sizeof out_data);
  OK(run(&c));
  CHECK(memcmp(out_data, expected, sizeof expected) == 0);

  /* So it is with equal metadata of two handles. */
  varlen_fa_meta *equal = meta_of_lengths();
  c.mask.key_meta = equal;
  memset(out_data, 0xff, sizeof out_data);
  OK(run(&c));
  CHECK(memcmp(out_data, expected, sizeof expected) == 0);
  OK(varlen_fa_meta_free(equal));

  /* No mask at all, and a scale. */
  c = good_call(meta);
  c.options.has_softmax_scale = 1;
  c.options.softmax_scale = 0.25f;
  OK(run(&c));
  CHECK(memcmp(out_data, expected, sizeof expected) == 0);
  varlen_fa_plan plan;
  OK(varlen_fa_forward(device, NULL, &c.q, &c.k, &c.v, NULL, &c.out, &plan));
  CHECK(plan.path == VARLEN_FA_PATH_DENSE && plan.reason == VARLEN_FA_REASON_NO_MASK);

  /* Such a call, warmed up. */
  const uint64_t q_shape[4] = {BATCH, SEQ, HEADS, DIM};
  varlen_fa_plan warmed;
  OK(varlen_fa_warm_up(device, NULL, VARLEN_FA_DTYPE_F32, q_shape, q_shape, NULL, &warmed));
  CHECK(warmed.path == plan.path && warmed.kernel == plan.kernel && strcmp(warmed.text, plan.text) == 0);
  REFUSED(varlen_fa_warm_up(device, NULL, 99, q_shape, q_shape, NULL, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`dtype`");
  REFUSED(varlen_fa_warm_up(device, NULL, VARLEN_FA_DTYPE_F32, q_shape, NULL, NULL, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`kv_shape`");

  /* Nothing to do needs no memory. */
  varlen_fa_tensor nothing = tensor(NULL, 0, SEQ, HEADS, DIM);
  OK(varlen_fa_forward(device, NULL, &nothing, &nothing, &nothing, NULL, &nothing, NULL));
}

/* Which keys a query sees, and what is added to its scores, in this test's own words. */
typedef struct rule {
  /* Valid tokens of each batch row: first <= token < end. */
  int first[BATCH], end[BATCH];
  /* Keys before and after a query's own place; -1 is no limit. */
  int left, right;
  /* Keys that every query sees. */
  int prefix;
  /* Whether rows of masked queries are zeros. */
  int drops_queries;
  const uint32_t *documents;
  /* [SEQ, SEQ] */
  const float *bias;
} rule;

static rule whole_rows(int left, int right) {
  rule made = {{0, 0}, {SEQ, SEQ}, left, right, 0, 0, NULL, NULL};
  return made;
}

static int sees(const rule *r, int b, int i, int j) {
  if (j < r->first[b] || j >= r->end[b]) {
    return 0;
  }
  if (r->documents != NULL && (r->documents[b * SEQ + i] == 0 || r->documents[b * SEQ + i] != r->documents[b * SEQ + j])) {
    return 0;
  }
  return j < r->prefix || ((r->left < 0 || i - j <= r->left) && (r->right < 0 || j - i <= r->right));
}

/* The output is what a loop over pairs gives, in double. */
static void expect_rule(int line, const rule *r) {
  int wrong = 0, not_zero = 0;
  for (int at = 0; at < TOKENS * HEADS; at++) {
    int b = at / HEADS / SEQ, i = at / HEADS % SEQ, h = at % HEADS;
    int is_masked = r->drops_queries && (i < r->first[b] || i >= r->end[b]);
    double sum = 0.0, expected[DIM] = {0.0};
    for (int j = 0; j < SEQ && !is_masked; j++) {
      const int key = ((b * SEQ + j) * HEADS + h) * DIM;
      double score = 0.0;
      if (!sees(r, b, i, j)) {
        continue;
      }
      for (int d = 0; d < DIM; d++) {
        score += (double)q_data[at * DIM + d] * (double)k_data[key + d];
      }
      double weight = exp(score / 4.0 + (r->bias == NULL ? 0.0 : (double)r->bias[i * SEQ + j]));
      sum += weight;
      for (int d = 0; d < DIM; d++) {
        expected[d] += weight * (double)v_data[key + d];
      }
    }
    for (int d = 0; d < DIM; d++) {
      float got = out_data[at * DIM + d];
      not_zero += sum == 0.0 && (got != 0.0f || signbit(got));
      wrong += !(fabs((double)got - (sum > 0.0 ? expected[d] / sum : 0.0)) < 1e-5);
    }
  }
  if (wrong + not_zero > 0) {
    char detail[96];
    snprintf(detail, sizeof detail, "%d elements differ, %d of rows without keys are not +0.0", wrong, not_zero);
    fail(line, "attention with ranges", detail);
  }
}

#define RUNS_AS(change, r)                 \
  do {                                     \
    call c = good_call(meta);              \
    change;                                \
    memset(out_data, 0xff, sizeof out_data); \
    OK(run(&c));                           \
    expect_rule(__LINE__, (r));            \
  } while (0)

static varlen_fa_ranges_of padded_sizes(void) {
  varlen_fa_ranges_of of = {0};
  of.batch = BATCH;
  of.seq_q = of.seq_k = SEQ;
  return of;
}

static varlen_fa_key_ranges *window(int64_t left, int64_t right) {
  varlen_fa_ranges_of of = padded_sizes();
  varlen_fa_key_ranges *made = NULL;
  OK(varlen_fa_key_ranges_window(&of, left, right, &made));
  return made;
}

static void key_ranges_results(void) {
  static float bias_data[SEQ * SEQ];
  /* Padding on the left, and between. */
  const varlen_fa_run runs[] = {{0, 5, SEQ}, {1, 1, SEQ}};
  const rule padding = {{5, 1}, {SEQ, SEQ}, -1, -1, 0, 1, NULL, NULL};
  varlen_fa_key_mask *mask = NULL;
  varlen_fa_meta *meta = NULL;
  varlen_fa_key_ranges *causal = window(-1, 0), *local = window(3, 2), *prefix = NULL, *own = NULL, *both = NULL;
  varlen_fa_ranges_of of = padded_sizes();
  varlen_fa_key_range values[TOKENS];
  OK(varlen_fa_key_mask_from_runs(runs, 2, BATCH, SEQ, &mask));
  OK(varlen_fa_meta_create(mask, &meta));
  OK(varlen_fa_key_ranges_prefix(&of, 4, &prefix));
  for (int at = 0; at < TOKENS; at++) {
    int i = at % SEQ;
    values[at].first = (uint64_t)(i > 3 ? i - 3 : 0);
    values[at].end = (uint64_t)(i + 3 < SEQ ? i + 3 : SEQ);
  }
  OK(varlen_fa_key_ranges_from_values(&of, values, TOKENS, &own));
  OK(varlen_fa_key_ranges_intersect(causal, local, &both));
  fill(bias_data, SEQ * SEQ, 9);
  varlen_fa_tensor bias = tensor(bias_data, 1, 1, SEQ, SEQ);

  rule r = whole_rows(-1, 0);
  RUNS_AS((memset(&c.mask, 0, sizeof c.mask), c.mask.ranges = causal), &r);
  r = padding;
  r.drops_queries = 0;
  r.right = 0;
  RUNS_AS((memset(&c.mask, 0, sizeof c.mask), c.mask.kind = VARLEN_FA_MASK_KIND_KEY, c.mask.key_mask = mask,
           c.mask.ranges = causal), &r);
  r = padding;
  r.right = 0;
  RUNS_AS(c.mask.ranges = causal, &r);
  RUNS_AS((c.mask.ranges = causal, c.options.path = VARLEN_FA_PATH_DENSE), &r);
  RUNS_AS((c.mask.ranges = causal, c.options.path = VARLEN_FA_PATH_PACKED), &r);
  RUNS_AS((c.mask.ranges = causal, c.mask.kind = VARLEN_FA_MASK_KIND_VARLEN_CROSS, c.mask.key_meta = meta), &r);
  r.prefix = 4;
  RUNS_AS(c.mask.ranges = prefix, &r);
  r = padding;
  r.left = 3;
  r.right = 2;
  RUNS_AS(c.mask.ranges = local, &r);
  RUNS_AS(c.mask.ranges = own, &r);
  r.right = 0;
  RUNS_AS(c.mask.ranges = both, &r);
  r = padding;
  r.bias = bias_data;
  RUNS_AS(c.mask.bias = &bias, &r);
  r.left = 3;
  r.right = 2;
  RUNS_AS((c.mask.bias = &bias, c.mask.ranges = local), &r);
  r = whole_rows(-1, 0);
  r.bias = bias_data;
  RUNS_AS((memset(&c.mask, 0, sizeof c.mask), c.mask.kind = VARLEN_FA_MASK_KIND_BIAS, c.mask.bias = &bias,
           c.mask.ranges = causal), &r);
  RUNS_AS((memset(&c.mask, 0, sizeof c.mask), c.mask.bias = &bias, c.mask.ranges = causal), &r);

  /* Ranges outlive the handles of what they were made of, and a call that was warmed up is the same. */
  call c = good_call(meta);
  c.mask.ranges = both;
  const uint64_t shape[4] = {BATCH, SEQ, HEADS, DIM};
  varlen_fa_plan warmed, plan;
  OK(varlen_fa_warm_up(device, NULL, VARLEN_FA_DTYPE_F32, shape, shape, &c.mask, &warmed));
  OK(varlen_fa_forward(device, NULL, &c.q, &c.k, &c.v, &c.mask, &c.out, &plan));
  CHECK(strcmp(warmed.text, plan.text) == 0);
  c.options.ranges = both;
  REFUSED(varlen_fa_warm_up(device, &c.options, VARLEN_FA_DTYPE_F32, shape, shape, &c.mask, NULL), VARLEN_FA_STATUS_BAD_VALUE, "`options.ranges`");
  memset(&c.mask, 0, sizeof c.mask);
  c.mask.ranges = causal;
  OK(varlen_fa_forward(device, NULL, &c.q, &c.k, &c.v, &c.mask, &c.out, &plan));
  CHECK(plan.path == VARLEN_FA_PATH_DENSE && plan.reason == VARLEN_FA_REASON_KEY_RANGES);
  CHECK(strcmp(varlen_fa_reason_name(plan.reason), "key-ranges") == 0);

  OK(varlen_fa_key_mask_free(mask));
  OK(varlen_fa_meta_free(meta));
  OK(varlen_fa_key_ranges_free(causal));
  OK(varlen_fa_key_ranges_free(local));
  OK(varlen_fa_key_ranges_free(prefix));
  OK(varlen_fa_key_ranges_free(own));
  OK(varlen_fa_key_ranges_free(both));
}

static void documents(const varlen_fa_meta *plain) {
  static const uint32_t ids[TOKENS] = {3, 3, 3, 0, 7, 7, 7, 7, 7, 0, 0, 1, 5, 5, 4, 4, 4, 4, 9, 0, 2, 2, 2, 2};
  varlen_fa_meta *meta = NULL;
  varlen_fa_meta_info info;
  varlen_fa_key_ranges *causal = window(-1, 0);
  OK(varlen_fa_meta_from_document_ids(ids, BATCH, SEQ, &meta));
  OK(varlen_fa_meta_describe(meta, &info));
  CHECK(info.batch == BATCH && info.seq == SEQ && info.total_valid == 20 && info.max_seqlen == 11);
  rule r = whole_rows(-1, -1);
  r.documents = ids;
  RUNS_AS((void)0, &r);
  RUNS_AS(c.options.path = VARLEN_FA_PATH_DENSE, &r);
  RUNS_AS(c.options.path = VARLEN_FA_PATH_PACKED, &r);
  r.right = 0;
  RUNS_AS(c.mask.ranges = causal, &r);
  SPOILED((c.mask.kind = VARLEN_FA_MASK_KIND_VARLEN_CROSS, c.mask.key_meta = plain), VARLEN_FA_STATUS_NOT_APPLICABLE,
          "`mask`: metadata of documents in cross-attention");
  varlen_fa_key_ranges *shorter = NULL;
  varlen_fa_ranges_of of = padded_sizes();
  of.seq_k = SEQ - 1;
  OK(varlen_fa_key_ranges_window(&of, -1, 0, &shorter));
  SPOILED(c.mask.ranges = shorter, VARLEN_FA_STATUS_MASK_SIZE, "`ranges`: expected ranges for [B, Sq, Sk] = [2, 12, 12]");
  OK(varlen_fa_key_ranges_free(shorter));
  OK(varlen_fa_meta_free(meta));
  OK(varlen_fa_key_ranges_free(causal));

  static const uint32_t two_places[] = {1, 1, 2, 4, 0, 4};
  varlen_fa_meta *none = NULL;
  REFUSED(varlen_fa_meta_from_document_ids(two_places, 2, 3, &none), VARLEN_FA_STATUS_MASK_ROW,
          "`document_ids`: row 1: the tokens of a document together, got document 4 in two places");
  REFUSED(varlen_fa_meta_from_document_ids(NULL, 2, 3, &none), VARLEN_FA_STATUS_NULL_POINTER, "`document_ids`");
  REFUSED(varlen_fa_meta_from_document_ids(ids, 2, 3, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`meta`");
  REFUSED(varlen_fa_meta_from_document_ids((const uint32_t *)((const char *)ids + 2), 1, 3, &none),
          VARLEN_FA_STATUS_MISALIGNED, "`document_ids`");
  REFUSED(varlen_fa_meta_from_document_ids(ids, UINT64_MAX, 2, &none), VARLEN_FA_STATUS_TOO_LARGE, "`document_ids`");
  REFUSED(varlen_fa_meta_from_document_ids(NULL, UINT64_MAX, 0, &none), VARLEN_FA_STATUS_TOO_LARGE, "batch");
  CHECK(none == NULL);
  OK(varlen_fa_meta_from_document_ids(NULL, 0, 3, &none));
  OK(varlen_fa_meta_free(none));
}

/* Ranges of packed rows, in options: causal among the tokens of each sequence. */
static void packed_ranges(void) {
  const int32_t edges[] = {0, 7, TOTAL}, others[] = {0, 8, TOTAL}, three[] = {0, 7, 7, TOTAL};
  static float lse[HEADS * TOTAL];
  varlen_fa_tensor q = packed_tensor(q_data, TOTAL, HEADS, DIM), k = packed_tensor(k_data, TOTAL, HEADS, DIM);
  varlen_fa_tensor v = packed_tensor(v_data, TOTAL, HEADS, DIM), out = packed_tensor(out_data, TOTAL, HEADS, DIM);
  varlen_fa_tensor sums = packed_tensor(lse, 1, HEADS, TOTAL);
  varlen_fa_cu_seqlens *cu = NULL, *other = NULL, *more = NULL;
  varlen_fa_key_ranges *causal = NULL, *of_others = NULL, *of_padded = window(-1, 0), *none = NULL;
  varlen_fa_attention_options options = {0};
  varlen_fa_ranges_of of = {0};
  varlen_fa_key_range values[TOTAL];
  sums.rank = 2;
  memmove(sums.shape, sums.shape + 1, 2 * sizeof sums.shape[0]);
  memmove(sums.strides, sums.strides + 1, 2 * sizeof sums.strides[0]);
  OK(varlen_fa_cu_seqlens_create(edges, 3, &cu));
  OK(varlen_fa_cu_seqlens_create(others, 3, &other));
  OK(varlen_fa_cu_seqlens_create(three, 4, &more));
  of.cu_seqlens_q = of.cu_seqlens_k = cu;
  OK(varlen_fa_key_ranges_window(&of, -1, 0, &causal));
  options.ranges = causal;
  for (int own = 0; own < 2; own++) {
    memset(out_data, 0xff, sizeof out_data);
    OK(varlen_fa_varlen_attention(device, &options, &q, &k, &v, cu, cu, &out, &sums, NULL));
    for (int row = 0; row < TOTAL; row++) {
      for (int h = 0; h < HEADS; h++) {
        double sum = 0.0, expected[DIM] = {0.0};
        for (int key = row < 7 ? 0 : 7; key <= row; key++) {
          double score = 0.0;
          for (int d = 0; d < DIM; d++) {
            score += (double)q_data[(row * HEADS + h) * DIM + d] * (double)k_data[(key * HEADS + h) * DIM + d];
          }
          sum += exp(score / 4.0);
          for (int d = 0; d < DIM; d++) {
            expected[d] += exp(score / 4.0) * (double)v_data[(key * HEADS + h) * DIM + d];
          }
        }
        CHECK(fabs((double)lse[h * TOTAL + row] - log(sum)) < 1e-5);
        for (int d = 0; d < DIM; d++) {
          CHECK(fabs((double)out_data[(row * HEADS + h) * DIM + d] - expected[d] / sum) < 1e-5);
        }
      }
    }
    /* The same from values, which count from the first key of a sequence. */
    for (int row = 0; row < TOTAL; row++) {
      values[row].first = 0;
      values[row].end = (uint64_t)(row < 7 ? row : row - 7) + 1;
    }
    OK(varlen_fa_key_ranges_free(causal));
    OK(varlen_fa_key_ranges_from_values(&of, values, TOTAL, &causal));
    options.ranges = causal;
  }

  values[8].end = 13;
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, TOTAL, &none), VARLEN_FA_STATUS_MASK_ROW,
          "`values`: row 1: a range inside 0..12 for query 1, got 0..13");
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, TOTAL - 1, &none), VARLEN_FA_STATUS_LENGTH, "`values`");
  of.cu_seqlens_k = NULL;
  REFUSED(varlen_fa_key_ranges_window(&of, -1, 0, &none), VARLEN_FA_STATUS_NULL_POINTER, "`of.cu_seqlens_k`");
  of.cu_seqlens_k = more;
  REFUSED(varlen_fa_key_ranges_window(&of, -1, 0, &none), VARLEN_FA_STATUS_CU_SEQLENS, "`cu_seqlens_k`: expected as many sequences");
  of.cu_seqlens_k = (const varlen_fa_cu_seqlens *)causal;
  REFUSED(varlen_fa_key_ranges_prefix(&of, 1, &none), VARLEN_FA_STATUS_BAD_HANDLE, "`of.cu_seqlens_k`: expected a cu_seqlens handle, got a key ranges handle");
  of.cu_seqlens_k = cu;
  of.batch = 2;
  REFUSED(varlen_fa_key_ranges_window(&of, -1, 0, &none), VARLEN_FA_STATUS_BAD_VALUE, "`of.batch`: expected 0 with cu_seqlens, got 2");
  of.batch = 0;
  of.seq_k = 12;
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, 1, &none), VARLEN_FA_STATUS_BAD_VALUE, "`of.seq_k`: expected 0 with cu_seqlens, got 12");
  of.seq_k = 0;
  of.cu_seqlens_k = other;
  OK(varlen_fa_key_ranges_window(&of, -1, 0, &of_others));
  REFUSED(varlen_fa_key_ranges_intersect(causal, of_others, &none), VARLEN_FA_STATUS_MASK_SIZE, "`other`");
  REFUSED(varlen_fa_key_ranges_intersect(causal, of_padded, &none), VARLEN_FA_STATUS_MASK_SIZE, "`other`");

  memset(out_data, 0xa5, sizeof out_data);
  memset(lse, 0xa5, sizeof lse);
  const varlen_fa_key_ranges *const wrong[] = {of_others, of_padded};
  for (int at = 0; at < 2; at++) {
    options.ranges = wrong[at];
    REFUSED(varlen_fa_varlen_attention(device, &options, &q, &k, &v, cu, cu, &out, &sums, NULL), VARLEN_FA_STATUS_MASK_SIZE,
            "`ranges`: expected ranges for 2 packed sequences of 19 queries and 19 keys");
  }
  options.ranges = (const varlen_fa_key_ranges *)cu;
  REFUSED(varlen_fa_varlen_attention(device, &options, &q, &k, &v, cu, cu, &out, &sums, NULL), VARLEN_FA_STATUS_BAD_HANDLE,
          "`options.ranges`: expected a key ranges handle, got a cu_seqlens handle");
  OK(varlen_fa_key_ranges_free(causal));
  options.ranges = causal;
  REFUSED(varlen_fa_varlen_attention(device, &options, &q, &k, &v, cu, cu, &out, &sums, NULL), VARLEN_FA_STATUS_BAD_HANDLE,
          "`options.ranges`");
  for (size_t at = 0; at < sizeof out_data; at++) {
    CHECK(((unsigned char *)out_data)[at] == 0xa5);
  }
  for (size_t at = 0; at < sizeof lse; at++) {
    CHECK(((unsigned char *)lse)[at] == 0xa5);
  }
  CHECK(none == NULL);

  /* Ranges keep what they need of the sequences. */
  of.cu_seqlens_k = cu;
  OK(varlen_fa_key_ranges_window(&of, -1, 0, &causal));
  OK(varlen_fa_cu_seqlens_free(other));
  OK(varlen_fa_cu_seqlens_free(more));
  of.cu_seqlens_k = other;
  REFUSED(varlen_fa_key_ranges_window(&of, -1, 0, &none), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
  options.ranges = causal;
  OK(varlen_fa_varlen_attention(device, &options, &q, &k, &v, cu, cu, &out, NULL, NULL));
  OK(varlen_fa_cu_seqlens_free(cu));
  OK(varlen_fa_key_ranges_free(causal));
  OK(varlen_fa_key_ranges_free(of_others));
  OK(varlen_fa_key_ranges_free(of_padded));
}

static void bad_ranges(const varlen_fa_meta *meta) {
  const varlen_fa_ranges_of good = padded_sizes();
  varlen_fa_ranges_of of = good;
  varlen_fa_key_range values[TOKENS] = {{0, 0}};
  varlen_fa_key_ranges *causal = window(-1, 0), *other = NULL, *freed = window(0, 0), *none = NULL;
  OK(varlen_fa_key_ranges_free(freed));

  REFUSED(varlen_fa_key_ranges_window(NULL, -1, 0, &none), VARLEN_FA_STATUS_NULL_POINTER, "`of`");
  REFUSED(varlen_fa_key_ranges_window(&of, -1, 0, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`ranges`");
  REFUSED(varlen_fa_key_ranges_window((const varlen_fa_ranges_of *)(uintptr_t)0x100004, -1, 0, &none), VARLEN_FA_STATUS_MISALIGNED, "`of`");
  REFUSED(varlen_fa_key_ranges_window(&of, -2, 0, &none), VARLEN_FA_STATUS_BAD_VALUE, "`left`: expected -1 for no limit, or a number of keys, got -2");
  REFUSED(varlen_fa_key_ranges_window(&of, 0, INT64_MIN, &none), VARLEN_FA_STATUS_BAD_VALUE, "`right`");
  REFUSED(varlen_fa_key_ranges_prefix(NULL, 1, &none), VARLEN_FA_STATUS_NULL_POINTER, "`of`");
  REFUSED(varlen_fa_key_ranges_prefix(&of, 1, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`ranges`");
  of.reserved[2] = 1;
  REFUSED(varlen_fa_key_ranges_window(&of, -1, 0, &none), VARLEN_FA_STATUS_BAD_VALUE, "`of.reserved`");
  of = good;
  of.batch = UINT64_MAX;
  REFUSED(varlen_fa_key_ranges_window(&of, -1, 0, &none), VARLEN_FA_STATUS_TOO_LARGE, "queries of the ranges");
  of = good;
  of.seq_k = UINT64_C(1) << 31;
  REFUSED(varlen_fa_key_ranges_prefix(&of, 1, &none), VARLEN_FA_STATUS_TOO_LARGE, "keys of the ranges");
  of = good;
  REFUSED(varlen_fa_key_ranges_from_values(NULL, values, TOKENS, &none), VARLEN_FA_STATUS_NULL_POINTER, "`of`");
  REFUSED(varlen_fa_key_ranges_from_values(&of, NULL, TOKENS, &none), VARLEN_FA_STATUS_NULL_POINTER, "`values`");
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, TOKENS, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`ranges`");
  REFUSED(varlen_fa_key_ranges_from_values(&of, (varlen_fa_key_range *)((char *)values + 4), 1, &none), VARLEN_FA_STATUS_MISALIGNED, "`values`");
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, UINT64_MAX, &none), VARLEN_FA_STATUS_TOO_LARGE, "`values`");
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, 0, &none), VARLEN_FA_STATUS_LENGTH, "`values`: expected 24 elements, got 0");
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, TOKENS - 1, &none), VARLEN_FA_STATUS_LENGTH, "`values`: expected 24 elements, got 23");
  values[SEQ + 3].first = 5;
  values[SEQ + 3].end = 4;
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, TOKENS, &none), VARLEN_FA_STATUS_MASK_ROW,
          "`values`: row 1: a range inside 0..12 for query 3, got 5..4");
  values[SEQ + 3].first = 0;
  values[SEQ + 3].end = SEQ + 1;
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, TOKENS, &none), VARLEN_FA_STATUS_MASK_ROW, "got 0..13");
  values[SEQ + 3].end = UINT64_MAX;
  REFUSED(varlen_fa_key_ranges_from_values(&of, values, TOKENS, &none), VARLEN_FA_STATUS_MASK_ROW, "got 0..18446744073709551615");

  of.seq_k = SEQ - 1;
  OK(varlen_fa_key_ranges_window(&of, INT64_MAX, INT64_MAX, &other));
  REFUSED(varlen_fa_key_ranges_intersect(NULL, causal, &none), VARLEN_FA_STATUS_NULL_POINTER, "`one`");
  REFUSED(varlen_fa_key_ranges_intersect(causal, NULL, &none), VARLEN_FA_STATUS_NULL_POINTER, "`other`");
  REFUSED(varlen_fa_key_ranges_intersect(causal, causal, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`ranges`");
  REFUSED(varlen_fa_key_ranges_intersect(freed, causal, &none), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
  REFUSED(varlen_fa_key_ranges_intersect(causal, (const varlen_fa_key_ranges *)meta, &none), VARLEN_FA_STATUS_BAD_HANDLE,
          "`other`: expected a key ranges handle, got a metadata handle");
  REFUSED(varlen_fa_key_ranges_intersect(causal, other, &none), VARLEN_FA_STATUS_MASK_SIZE,
          "`other`: expected ranges for [B, Sq, Sk] = [2, 12, 12], got ranges for [B, Sq, Sk] = [2, 12, 11]");
  CHECK(none == NULL);
  REFUSED(varlen_fa_key_ranges_free(freed), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
  REFUSED(varlen_fa_key_ranges_free((varlen_fa_key_ranges *)device), VARLEN_FA_STATUS_BAD_HANDLE, "got a device handle");
  OK(varlen_fa_key_ranges_free(NULL));

  SPOILED(c.options.ranges = causal, VARLEN_FA_STATUS_BAD_VALUE, "`options.ranges`: expected NULL: the mask has ranges");
  SPOILED(c.options.ranges = freed, VARLEN_FA_STATUS_BAD_HANDLE, "`options.ranges`");
  SPOILED(c.mask.ranges = other, VARLEN_FA_STATUS_MASK_SIZE, "`ranges`: expected ranges for [B, Sq, Sk] = [2, 12, 12]");
  SPOILED((memset(&c.mask, 0, sizeof c.mask), c.mask.ranges = other), VARLEN_FA_STATUS_MASK_SIZE, "`ranges`");
  SPOILED(c.mask.ranges = freed, VARLEN_FA_STATUS_BAD_HANDLE, "`mask.ranges`");
  SPOILED(c.mask.ranges = (const varlen_fa_key_ranges *)meta, VARLEN_FA_STATUS_BAD_HANDLE, "`mask.ranges`: expected a key ranges handle, got a metadata handle");
  SPOILED(c.mask.query_meta = (const varlen_fa_meta *)causal, VARLEN_FA_STATUS_BAD_HANDLE, "got a key ranges handle");
  /* A bias beside metadata is checked like one of its own. */
  varlen_fa_tensor bias = packed_tensor(q_data, 2, 3, 4);
  SPOILED(c.mask.bias = &bias, VARLEN_FA_STATUS_BROADCAST, "bias");
  bias = padded(out_data);
  SPOILED(c.mask.bias = &bias, VARLEN_FA_STATUS_OVERLAP, "`out` may share memory with `bias`");
  bias.data = NULL;
  SPOILED(c.mask.bias = &bias, VARLEN_FA_STATUS_NULL_POINTER, "`bias.data`");
  SPOILED((memset(&c.mask, 0, sizeof c.mask), c.mask.kind = VARLEN_FA_MASK_KIND_BIAS), VARLEN_FA_STATUS_NULL_POINTER, "`bias`");
  OK(varlen_fa_key_ranges_free(causal));
  OK(varlen_fa_key_ranges_free(other));
}

static void device_meta(const varlen_fa_meta *meta) {
  static float expected[ELEMENTS];
  static uint16_t columns[SEQ * 4];
  varlen_fa_device_meta *on_device = NULL;
  call c = good_call(meta);
  OK(run(&c));
  memcpy(expected, out_data, sizeof expected);

  OK(varlen_fa_device_meta_create(device, BATCH, SEQ, &on_device));
  memset(&c.mask, 0, sizeof c.mask);
  c.mask.kind = VARLEN_FA_MASK_KIND_DEVICE_VARLEN;
  c.mask.query_device_meta = on_device;
  OK(run(&c)); /* nothing is valid yet */
  for (int at = 0; at < ELEMENTS; at++) {
    CHECK(out_data[at] == 0.0f);
  }
  /* A [S, 4] array of which columns 0 and 2 are the batch rows. */
  for (uint64_t s = 0; s < SEQ; s++) {
    columns[s * 4] = s < lengths[0] ? 0x100 : 0;
    columns[s * 4 + 2] = s < lengths[1] ? 1 : 0;
  }
  varlen_fa_mask_view mask = {0};
  mask.data = columns;
  mask.bytes = sizeof columns;
  mask.dtype = VARLEN_FA_MASK_DTYPE_U16;
  mask.shape[0] = BATCH;
  mask.shape[1] = SEQ;
  mask.strides[0] = 2;
  mask.strides[1] = 4;
  OK(varlen_fa_device_meta_rebuild(on_device, &mask));
  OK(run(&c));
  CHECK(memcmp(out_data, expected, sizeof expected) == 0);
  c.mask.kind = VARLEN_FA_MASK_KIND_DEVICE_VARLEN_CROSS;
  c.mask.key_device_meta = on_device;
  OK(run(&c));
  CHECK(memcmp(out_data, expected, sizeof expected) == 0);

  varlen_fa_device_meta *equal = NULL;
  OK(varlen_fa_device_meta_create(device, BATCH, SEQ, &equal));
  c.mask.key_device_meta = equal;
  OK(run(&c)); /* no key is valid yet */
  for (int at = 0; at < ELEMENTS; at++) {
    CHECK(out_data[at] == 0.0f);
  }
  OK(varlen_fa_device_meta_rebuild(equal, &mask));
  OK(run(&c));
  CHECK(memcmp(out_data, expected, sizeof expected) == 0);
  OK(varlen_fa_device_meta_free(equal));
  c.mask.key_device_meta = on_device;

  varlen_fa_mask_view bad = mask;
  bad.data = NULL;
  REFUSED(varlen_fa_device_meta_rebuild(on_device, &bad), VARLEN_FA_STATUS_NULL_POINTER, "`mask.data`");
  bad = mask;
  bad.data = (char *)columns + 1;
  REFUSED(varlen_fa_device_meta_rebuild(on_device, &bad), VARLEN_FA_STATUS_MISALIGNED, "`mask.data`");
  bad = mask;
  bad.bytes = 93;
  REFUSED(varlen_fa_device_meta_rebuild(on_device, &bad), VARLEN_FA_STATUS_BUFFER_TOO_SMALL, "byte 94 of a buffer of 93");
  bad = mask;
  bad.shape[1] = SEQ - 1;
  REFUSED(varlen_fa_device_meta_rebuild(on_device, &bad), VARLEN_FA_STATUS_MASK_SIZE, "`mask`");
  /* Two bytes as a mask of 2^45 tokens: refused for its size, not gathered. */
  bad = mask;
  bad.shape[0] = UINT64_C(1) << 31;
  bad.shape[1] = UINT64_C(1) << 14;
  bad.strides[0] = bad.strides[1] = 0;
  REFUSED(varlen_fa_device_meta_rebuild(on_device, &bad), VARLEN_FA_STATUS_MASK_SIZE, "`mask`");
  bad = mask;
  bad.memory = VARLEN_FA_MEMORY_CUDA;
  REFUSED(varlen_fa_device_meta_rebuild(on_device, &bad), VARLEN_FA_STATUS_DEVICE_MISMATCH, "`mask`");
  REFUSED(varlen_fa_device_meta_rebuild(on_device, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`mask`");
  /* It takes ranges and a bias, as that of the host does. */
  static float bias_data[SEQ * SEQ], with_ranges[ELEMENTS];
  varlen_fa_tensor bias = tensor(bias_data, 1, 1, SEQ, SEQ);
  varlen_fa_key_ranges *causal = window(-1, 0);
  fill(bias_data, SEQ * SEQ, 11);
  call host = good_call(meta);
  host.mask.ranges = causal;
  host.mask.bias = &bias;
  OK(run(&host));
  memcpy(with_ranges, out_data, sizeof with_ranges);
  host.mask = c.mask;
  host.mask.ranges = causal;
  host.mask.bias = &bias;
  memset(out_data, 0xff, sizeof out_data);
  OK(run(&host));
  CHECK(memcmp(out_data, with_ranges, sizeof with_ranges) == 0);
  OK(varlen_fa_key_ranges_free(causal));
  OK(run(&c)); /* as it was */
  CHECK(memcmp(out_data, expected, sizeof expected) == 0);
  OK(varlen_fa_device_meta_free(on_device));
  REFUSED(varlen_fa_device_meta_rebuild(on_device, &mask), VARLEN_FA_STATUS_BAD_HANDLE, "freed");
}

/* Threads that share handles get the same results and their own messages, and only one of them frees
 * a handle. */
typedef struct worker {
  const varlen_fa_meta *meta;
  varlen_fa_meta *to_free;
  const float *expected;
  int number, errors, freed;
} worker;

static void *work(void *argument) {
  worker *self = argument;
  float *own = malloc(ELEMENTS * sizeof(float));
  char words[32];
  if (own == NULL) {
    self->errors++;
    return NULL;
  }
  for (int round = 0; round < (is_cpu ? 50 : 5); round++) {
    call c = good_call(self->meta);
    c.out = padded(own);
    self->errors += run(&c) != VARLEN_FA_STATUS_OK || memcmp(own, self->expected, ELEMENTS * sizeof(float)) != 0;
    c.q.rank = 10 + (uint32_t)self->number;
    snprintf(words, sizeof words, "got %d", 10 + self->number);
    self->errors += run(&c) != VARLEN_FA_STATUS_RANK || strstr(varlen_fa_last_error(), words) == NULL;
  }
  self->freed = varlen_fa_meta_free(self->to_free) == VARLEN_FA_STATUS_OK;
  free(own);
  return NULL;
}

static void threads(const varlen_fa_meta *meta) {
  enum { COUNT = 4 };
  static float expected[ELEMENTS];
  pthread_t started[COUNT];
  worker workers[COUNT];
  varlen_fa_meta *to_free = meta_of_lengths();
  int freed = 0;
  call c = good_call(meta);
  OK(run(&c));
  memcpy(expected, out_data, sizeof expected);
  REFUSED(varlen_fa_meta_describe(meta, NULL), VARLEN_FA_STATUS_NULL_POINTER, "`info`");
  for (int number = 0; number < COUNT; number++) {
    workers[number] = (worker){meta, to_free, expected, number, 0, 0};
    CHECK(pthread_create(&started[number], NULL, work, &workers[number]) == 0);
  }
  for (int number = 0; number < COUNT; number++) {
    CHECK(pthread_join(started[number], NULL) == 0);
    CHECK(workers[number].errors == 0);
    freed += workers[number].freed;
  }
  CHECK(freed == 1);
  CHECK(strstr(varlen_fa_last_error(), "`info`") != NULL);
}

int main(int argc, char **argv) {
  is_cpu = argc > 1 && strcmp(argv[1], "cpu") == 0;
  CHECK(strcmp(varlen_fa_last_error(), "") == 0);
  CHECK(varlen_fa_version() == VARLEN_FA_VERSION_MAJOR * 1000000u + VARLEN_FA_VERSION_MINOR * 1000u + VARLEN_FA_VERSION_PATCH);
  varlen_fa_status opened = varlen_fa_device_open(is_cpu ? VARLEN_FA_DEVICE_KIND_CPU : VARLEN_FA_DEVICE_KIND_WGPU, 0, &device);
  if (opened == VARLEN_FA_STATUS_DEVICE_UNAVAILABLE) {
    fprintf(stderr, "%s\n", varlen_fa_last_error());
    return NOT_AVAILABLE;
  }
  OK(opened);
  varlen_fa_device_info info;
  OK(varlen_fa_device_describe(device, &info));
  CHECK(info.kind == (is_cpu ? VARLEN_FA_DEVICE_KIND_CPU : VARLEN_FA_DEVICE_KIND_WGPU) && strlen(info.name) > 2);
  CHECK((info.dtypes & 1u << VARLEN_FA_DTYPE_F16) != 0 && info.kernels != 0 && info.max_buffer_bytes > 0);
  fill(q_data, ELEMENTS, 1);
  fill(k_data, ELEMENTS, 2);
  fill(v_data, ELEMENTS, 3);

  varlen_fa_meta *meta = meta_of_lengths();
  OK(varlen_fa_meta_upload(meta, device));
  call c = good_call(meta);
  OK(run(&c));
  bad_tensors(meta);
  bad_outputs(meta);
  bad_options_and_masks(meta);
  names(&info);
  handles();
  masks();
  primitives(meta);
  log_sum_exp_and_merge(meta);
  segments_of_attention(meta);
  prepare_qk();
  equal_masks(meta);
  device_meta(meta);
  key_ranges_results();
  documents(meta);
  packed_ranges();
  bad_ranges(meta);
  threads(meta);
  OK(varlen_fa_meta_free(meta));
  OK(varlen_fa_device_free(device));
  printf("%s: %d failures\n", info.name, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
