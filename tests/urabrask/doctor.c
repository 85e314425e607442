/* A library in front of a compiled kernel: it passes every call on, and does one bad thing besides.

   The loader looks each function up in this library first and in the kernel behind it then, so only the one that runs
   the kernel is defined here. BAD says what it does, KEPT is the call at which it begins. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NAN_LATE 1
#define HOG 2
#define LOOP 3
#define WRONG 4
#define RANDOM 5
#define CRASH 6
#define LEAK 7
#define WRITES 8
#define SLOW 9
#define HIDES_NAN 10

typedef struct Tensor *Handle;
typedef int32_t (*Run)(void *, Handle *, size_t, Handle *, size_t, void *, void *);

extern int32_t aoti_torch_get_data_ptr(Handle, void **);
extern int32_t aoti_torch_get_numel(Handle, int64_t *);

static long calls = 0;
void *volatile kept_block;

static float *numbers(Handle tensor, int64_t *count) {
    void *data = NULL;
    aoti_torch_get_data_ptr(tensor, &data);
    aoti_torch_get_numel(tensor, count);
    return data;
}

int32_t AOTInductorModelContainerRun(void *kernel, Handle *inputs, size_t given, Handle *outputs, size_t made,
                                     void *stream, void *proxy) {
    Run real = (Run)dlsym(RTLD_NEXT, "AOTInductorModelContainerRun");
    int64_t count = 0;
    int bad = ++calls >= KEPT;
#if BAD == HOG
    while (bad) {
        char *block = malloc(1 << 24);
        if (block) memset(block, 1, 1 << 24);
    }
#elif BAD == LOOP
    while (bad) __asm__ volatile("");
#elif BAD == CRASH
    if (bad) *(volatile int *)8 = 1;
#elif BAD == LEAK
    if (bad) kept_block = memset(malloc(1 << 15), 1, 1 << 15);
#elif BAD == WRITES
    if (bad) numbers(inputs[given - 1], &count)[0] += 1e-3f;
#elif BAD == SLOW
    for (volatile long turn = 0; bad && turn < 200000; ++turn) {}
#endif
    int32_t status = real(kernel, inputs, given, outputs, made, stream, proxy);
    float *result = numbers(outputs[0], &count);
#if BAD == NAN_LATE
    if (calls == KEPT && count) result[count - 1] = NAN;
#elif BAD == WRONG
    for (int64_t place = 0; bad && place < count; ++place) result[place] *= 1.001f;
#elif BAD == RANDOM
    if (bad && count) result[0] *= 1.0f + 1e-6f * (rand() % 7);
#elif BAD == HIDES_NAN
    for (int64_t place = 0; bad && place < count; ++place) if (isnan(result[place])) result[place] = 0.0f;
#endif
    (void)result;
    return status;
}
