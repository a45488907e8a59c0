/* The library loaded, used, unloaded and loaded again, as plug-ins are: `unload LIBRARY`. Threads of
 * the CPU device are alive when dlclose is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "varlen_fa.h"

enum { ROUNDS = 3, SEQ = 512, HEADS = 4, DIM = 64, ELEMENTS = SEQ * HEADS * DIM };

static float input[ELEMENTS], output[ELEMENTS];

static void *symbol(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (found == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(EXIT_FAILURE);
  }
  return found;
}

/* Through memcpy: ISO C has no conversion between pointers to objects and to functions. */
#define FUNCTION(library, name, pointer)                 \
  do {                                                   \
    void *found = symbol(library, name);                 \
    memcpy(&(pointer), &found, sizeof found);            \
  } while (0)

static void use(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(EXIT_FAILURE);
  }
  varlen_fa_status (*open_cpu)(uint32_t, varlen_fa_device **);
  varlen_fa_status (*close)(varlen_fa_device *);
  varlen_fa_status (*forward)(const varlen_fa_device *, const varlen_fa_attention_options *, const varlen_fa_tensor *,
                              const varlen_fa_tensor *, const varlen_fa_tensor *, const varlen_fa_attention_mask *,
                              const varlen_fa_tensor *, varlen_fa_plan *);
  FUNCTION(library, "varlen_fa_device_open_cpu", open_cpu);
  FUNCTION(library, "varlen_fa_device_free", close);
  FUNCTION(library, "varlen_fa_forward", forward);

  const uint64_t shape[4] = {1, SEQ, HEADS, DIM};
  const int64_t strides[4] = {SEQ * HEADS * DIM, HEADS * DIM, DIM, 1};
  varlen_fa_tensor in = {0}, out;
  in.bytes = sizeof input;
  in.dtype = VARLEN_FA_DTYPE_F32;
  in.rank = 4;
  memcpy(in.shape, shape, sizeof shape);
  memcpy(in.strides, strides, sizeof strides);
  in.data = input;
  out = in;
  out.data = output;
  memset(output, 0xff, sizeof output);

  varlen_fa_device *device = NULL;
  if (open_cpu(2, &device) != VARLEN_FA_STATUS_OK ||
      forward(device, NULL, &in, &in, &in, NULL, &out, NULL) != VARLEN_FA_STATUS_OK ||
      close(device) != VARLEN_FA_STATUS_OK) {
    fprintf(stderr, "a call failed\n");
    exit(EXIT_FAILURE);
  }
  for (int at = 0; at < ELEMENTS; at++) {
    if (!(output[at] > 0.499f && output[at] < 0.501f)) {
      fprintf(stderr, "element %d is %g\n", at, (double)output[at]);
      exit(EXIT_FAILURE);
    }
  }
  if (dlclose(library) != 0) {
    fprintf(stderr, "%s\n", dlerror());
    exit(EXIT_FAILURE);
  }
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "expected the library\n");
    return EXIT_FAILURE;
  }
  for (int at = 0; at < ELEMENTS; at++) {
    input[at] = 0.5f;
  }
  for (int round = 0; round < ROUNDS; round++) {
    use(argv[1]);
    /* What the threads do after their work, they do now. */
    usleep(50000);
  }
  puts("unloaded and loaded again");
  return EXIT_SUCCESS;
}
