/* The library in forked children and where threads cannot start: `processes TEST DEVICE`, where TEST
 * is fork, fork_while_busy, no_threads, few_threads, little_memory or many_threads. Exits with 77,
 * and the reason, if the test cannot run here. */
#define _GNU_SOURCE
#define _DARWIN_C_SOURCE
#ifdef __linux__
#include <malloc.h>
#endif
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "varlen_fa.h"

enum { SEQ = 512, HEADS = 4, DIM = 64, ELEMENTS = SEQ * HEADS * DIM, NOT_AVAILABLE = 77, SECONDS = 60 };

static float input[ELEMENTS];
static varlen_fa_device *device = NULL;
static varlen_fa_meta *meta = NULL;
static varlen_fa_key_mask *key_mask = NULL;

/* What calls give: dense, fused, packed. */
enum { CALLS = 3 };
static float expected[CALLS][ELEMENTS];

static void die(const char *what) {
  fprintf(stderr, "%s: %s\n", what, varlen_fa_last_error());
  exit(EXIT_FAILURE);
}

static varlen_fa_tensor tensor(float *data) {
  varlen_fa_tensor made;
  memset(&made, 0, sizeof made);
  made.data = data;
  made.bytes = ELEMENTS * sizeof(float);
  made.dtype = VARLEN_FA_DTYPE_F32;
  made.memory = VARLEN_FA_MEMORY_HOST;
  made.rank = 4;
  made.shape[0] = 1, made.shape[1] = SEQ, made.shape[2] = HEADS, made.shape[3] = DIM;
  made.strides[0] = SEQ * HEADS * DIM, made.strides[1] = HEADS * DIM, made.strides[2] = DIM, made.strides[3] = 1;
  return made;
}

/* A call that is worth several threads. */
static varlen_fa_status attend(int call, float *data) {
  varlen_fa_tensor x = tensor(input), out = tensor(data);
  varlen_fa_attention_mask mask;
  varlen_fa_attention_options options;
  memset(&mask, 0, sizeof mask);
  memset(&options, 0, sizeof options);
  if (call == 0) {
    mask.kind = VARLEN_FA_MASK_KIND_KEY;
    mask.key_mask = key_mask;
  } else {
    mask.kind = VARLEN_FA_MASK_KIND_VARLEN;
    mask.query_meta = meta;
    options.path = call == 1 ? VARLEN_FA_PATH_FUSED : VARLEN_FA_PATH_PACKED;
  }
  return varlen_fa_forward(device, &options, &x, &x, &x, &mask, &out, NULL);
}

static void open_device(const char *kind, uint32_t threads) {
  const uint64_t length = 400;
  varlen_fa_status opened = strcmp(kind, "cpu") == 0 ? varlen_fa_device_open_cpu(threads, &device)
                                                     : varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_WGPU, 0, &device);
  if (opened == VARLEN_FA_STATUS_DEVICE_UNAVAILABLE) {
    fprintf(stderr, "%s\n", varlen_fa_last_error());
    exit(NOT_AVAILABLE);
  }
  if (opened != VARLEN_FA_STATUS_OK) {
    die("device_open");
  }
  for (int at = 0; at < ELEMENTS; at++) {
    input[at] = (float)(at * 7919 % 1009) / 504.5f - 1.0f;
  }
  if (varlen_fa_key_mask_from_lengths(&length, 1, SEQ, &key_mask) != VARLEN_FA_STATUS_OK ||
      varlen_fa_meta_create(key_mask, &meta) != VARLEN_FA_STATUS_OK) {
    die("meta_create");
  }
}

/* All calls on the device, which give what is expected. */
static int calls_are_right(void) {
  static float out[ELEMENTS];
  for (int call = 0; call < CALLS; call++) {
    if (attend(call, out) != VARLEN_FA_STATUS_OK) {
      fprintf(stderr, "call %d: %s\n", call, varlen_fa_last_error());
      return 0;
    }
    if (memcmp(out, expected[call], sizeof out) != 0) {
      fprintf(stderr, "call %d gives another result\n", call);
      return 0;
    }
  }
  return 1;
}

static void expect_calls(void) {
  for (int call = 0; call < CALLS; call++) {
    if (attend(call, expected[call]) != VARLEN_FA_STATUS_OK) {
      die("forward");
    }
  }
}

/* The results by the calling thread alone. */
static void expect_calls_of_one_thread(void) {
  open_device("cpu", 1);
  expect_calls();
}

/* A child that must end well within SECONDS. */
static void in_child(int (*work)(void)) {
  int status = 0;
  pid_t child = fork();
  if (child < 0) {
    perror("fork");
    exit(EXIT_FAILURE);
  }
  if (child == 0) {
    alarm(SECONDS); /* Ends the process if it hangs. */
    exit(work() ? EXIT_SUCCESS : EXIT_FAILURE);
  }
  if (waitpid(child, &status, 0) != child || status != 0) {
    fprintf(stderr, "the child ended with status %#x%s\n", (unsigned)status,
            WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? ": it hung" : "");
    exit(EXIT_FAILURE);
  }
}

static int child_and_grandchild(void) {
  if (!calls_are_right()) {
    return 0;
  }
  in_child(calls_are_right);
  /* A new device of another number of threads, and the end of the parent's. */
  if (varlen_fa_device_free(device) != VARLEN_FA_STATUS_OK) {
    die("device_free");
  }
  open_device("cpu", 3);
  return calls_are_right();
}

static int gpu_is_refused(void) {
  static float out[ELEMENTS];
  varlen_fa_device *other = NULL;
  if (attend(1, out) != VARLEN_FA_STATUS_DEVICE_LOST || strstr(varlen_fa_last_error(), "forked") == NULL) {
    die("forward in the child");
  }
  if (varlen_fa_device_synchronize(device) != VARLEN_FA_STATUS_DEVICE_LOST) {
    die("device_synchronize in the child");
  }
  if (varlen_fa_device_open(VARLEN_FA_DEVICE_KIND_WGPU, 0, &other) != VARLEN_FA_STATUS_DEVICE_UNAVAILABLE) {
    die("device_open in the child");
  }
  return varlen_fa_device_free(device) == VARLEN_FA_STATUS_OK && varlen_fa_meta_free(meta) == VARLEN_FA_STATUS_OK;
}

static void test_fork(const char *kind) {
  const int is_cpu = strcmp(kind, "cpu") == 0;
  const uint32_t threads[] = {0, 1, 2};
  for (size_t at = 0; at < (is_cpu ? 3 : 1); at++) {
    open_device(kind, threads[at]);
    expect_calls();
    in_child(is_cpu ? child_and_grandchild : gpu_is_refused);
    if (!calls_are_right()) {
      exit(EXIT_FAILURE);
    }
  }
}

static volatile int is_over = 0;

static void *stay_busy(void *unused) {
  float *out = malloc(ELEMENTS * sizeof(float));
  while (!is_over && out != NULL) {
    attend(1, out);
  }
  free(out);
  return unused;
}

/* Forks while other threads compute, when locks may be held and pools are in use. */
static void test_fork_while_busy(void) {
  enum { BUSY = 2, FORKS = 10 };
  pthread_t busy[BUSY];
  open_device("cpu", 2);
  expect_calls();
  for (int at = 0; at < BUSY; at++) {
    if (pthread_create(&busy[at], NULL, stay_busy, NULL) != 0) {
      die("pthread_create");
    }
  }
  for (int at = 0; at < FORKS; at++) {
    in_child(calls_are_right);
  }
  is_over = 1;
  for (int at = 0; at < BUSY; at++) {
    pthread_join(busy[at], NULL);
  }
}

static void *nothing(void *unused) {
  return unused;
}

static int a_thread_starts(void) {
  pthread_t thread;
  return pthread_create(&thread, NULL, nothing, NULL) == 0 && pthread_join(thread, NULL) == 0;
}

static void limit(int resource, rlim_t most) {
  struct rlimit limits = {most, most};
  if (setrlimit(resource, &limits) != 0) {
    perror("setrlimit");
    exit(NOT_AVAILABLE);
  }
}

/* The user's processes and threads are limited to none more. Root is not, so it becomes nobody. */
static void test_no_threads(void) {
  if (getuid() == 0 && setuid(65534) != 0) {
    perror("setuid");
    exit(NOT_AVAILABLE);
  }
  limit(RLIMIT_NPROC, 1);
  if (a_thread_starts()) {
    fprintf(stderr, "this system starts threads whatever the limit of processes is\n");
    exit(NOT_AVAILABLE);
  }
  expect_calls_of_one_thread();
  open_device("cpu", 0);
  if (!calls_are_right()) {
    exit(EXIT_FAILURE);
  }
  open_device("cpu", 8);
  if (!calls_are_right()) {
    exit(EXIT_FAILURE);
  }
}

#ifdef __linux__
static unsigned long address_space(void) {
  unsigned long pages = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (file == NULL || fscanf(file, "%lu", &pages) != 1) {
    fprintf(stderr, "no /proc/self/statm\n");
    exit(NOT_AVAILABLE);
  }
  fclose(file);
  return pages * (unsigned long)sysconf(_SC_PAGESIZE);
}

static unsigned long room = 0;

static int calls_in_the_room(void) {
#ifdef __GLIBC__
  /* Each arena takes 64 MiB of the room, or none: which of them it is depends on the moment. */
  mallopt(M_ARENA_MAX, 1);
#endif
  limit(RLIMIT_AS, address_space() + room);
  open_device("cpu", 64);
  return calls_are_right();
}

/* 64 threads are asked for where there is address space for none, some or all of their stacks. */
static void in_rooms(unsigned long first, unsigned long last, unsigned long step) {
  expect_calls_of_one_thread();
  for (room = first; room <= last; room += step) {
    in_child(calls_in_the_room);
  }
}
#else
static void in_rooms(unsigned long first, unsigned long last, unsigned long step) {
  fprintf(stderr, "address space is limited on Linux alone (%lu to %lu by %lu)\n", first, last, step);
  exit(NOT_AVAILABLE);
}
#endif

static void test_many_threads(void) {
  varlen_fa_device_info info;
  expect_calls_of_one_thread();
  open_device("cpu", 5000);
  if (varlen_fa_device_describe(device, &info) != VARLEN_FA_STATUS_OK || atoi(info.adapter) < 2 || atoi(info.adapter) >= 5000) {
    die("5,000 threads are not capped");
  }
  if (!calls_are_right()) {
    exit(EXIT_FAILURE);
  }
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "processes TEST DEVICE\n");
    return EXIT_FAILURE;
  }
  if (strcmp(argv[1], "fork") == 0) {
    test_fork(argv[2]);
  } else if (strcmp(argv[1], "fork_while_busy") == 0) {
    test_fork_while_busy();
  } else if (strcmp(argv[1], "no_threads") == 0) {
    test_no_threads();
  } else if (strcmp(argv[1], "few_threads") == 0) {
    in_rooms(64ul << 20, 640ul << 20, 64ul << 20);
  } else if (strcmp(argv[1], "little_memory") == 0) {
    in_rooms(8ul << 20, 32ul << 20, 2ul << 20);
  } else if (strcmp(argv[1], "many_threads") == 0) {
    test_many_threads();
  } else {
    fprintf(stderr, "no test %s\n", argv[1]);
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
