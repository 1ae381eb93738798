/*
 * Batch normalization on CPUs, and what a residual network does after it: reductions and maps per channel, each in one
 * pass over activations of 32 or 16 bits.
 *
 *     z = weight * invstd * (x - mean) + bias + shortcut        y = max(0, z)
 *
 * where the shortcut and the max are optional. Sums are float64, so that neither a mean far from zero nor many values
 * cost digits; maps are float32. They subtract the mean first, in two parts: its float32 value, and the rest.
 *
 * Activations are (outer, channels, inner): for a contiguous (N, C, *) tensor outer is N and inner the pixels; for
 * channels last outer is the pixels of all images and inner is 1. What a layer knows of its input's statistics is one
 * array of doubles: count, mean[C], var[C], 1 / sqrt(var + eps)[C].
 *
 * A thread works on one channel or, with channels last, on some rows; both in an order that depends on the shape alone:
 * the same input gives the same bits with any number of threads.
 *
 * Functions that return an int return 0, or 1 without enough memory.
 */
#include <math.h>
#include <stdlib.h>

#include "numbers_cpu.h"

/* Rows that a thread takes at a time with channels last; values that are added up before they meet the sum; the pixels
 * from which on that is worth it in a channel. */
enum { ROWS = 512, TOGETHER = 4, LONG = 512 };

typedef struct {
    ptrdiff_t outer, channels, inner;
} Shape;

/* What is added up: the input, the input less the center, or the gradient of the output behind the ReLU. */
typedef enum { INPUT, DIFFERENCE, GRADIENT, GRADIENT_BY_INPUT, GRADIENT_BY_OUTPUT } Summand;

/* Of each channel. The output is scale * (x - center) + shift, before the shortcut and the ReLU; the gradient of the
 * input is of_input * (x - center) + (of_gradient * dz + constant). */
typedef struct {
    float *center, *scale, *shift, *of_input, *of_gradient, *constant;
} Coefficients;

typedef struct {
    const void *x;
    const void *other;   /* the shortcut, the gradient of the output, or NULL */
    const void *y;       /* the output, where it says what the ReLU stopped */
    void *result;        /* what the map computes; of sums, the gradient behind the ReLU, or NULL */
    double *first, *second; /* sums; with channels last, (parts, channels) each */
    Coefficients k;
    Shape s;
    Summand summand;
    int relu;
} Job;

INLINE float affine(float x, float center, float scale, float shift) { return scale * (x - center) + shift; }

/* Comparisons are such that NaN passes. */
INLINE float rectified(float z) { return 0 > z ? 0 : z; }

INLINE float gradient_behind(float dy, float z) { return z <= 0 ? 0 : dy; }

/* The summand at i, where the input is x. */
INLINE float summand_at(const Job *j, ptrdiff_t i, float x, float center, float scale, float shift, Type type,
                        Summand summand) {
    if (summand == INPUT) return x;
    if (summand == DIFFERENCE) return x - center;
    float dy = get(j->other, i, type);
    if (summand == GRADIENT_BY_INPUT) return gradient_behind(dy, affine(x, center, scale, shift));
    if (summand == GRADIENT_BY_OUTPUT) {
        dy = gradient_behind(dy, get(j->y, i, type));
        put(j->result, i, type, dy);
    }
    return dy;
}

typedef struct {
    double of_values, of_products;
} Sums;

/*
 * sum a and sum a * (x - center) over count values, step apart. In 16 bits TOGETHER values of about one size, and their
 * squares, have an exact sum in float32, which takes half the work.
 */
INLINE Sums sums_of(const Job *j, ptrdiff_t first, ptrdiff_t step, int count, float center, float scale, float shift,
                    Type type, Summand summand) {
    double sum = 0, products = 0;
    float short_sum = 0, short_products = 0;
    for (int n = 0; n < count; n++) {
        ptrdiff_t i = first + n * step;
        float x = get(j->x, i, type), a = summand_at(j, i, x, center, scale, shift, type, summand);
        if (type == FLOAT32) {
            sum += a;
            products += (double)a * (double)(x - center);
        } else {
            short_sum += a;
            short_products += a * (x - center);
        }
    }
    return type == FLOAT32 ? (Sums){sum, products} : (Sums){short_sum, short_products};
}

/* first = sum a, second = sum a * (x - center), of one channel. */
INLINE void sum_channel(Job j, ptrdiff_t c, Type type, Summand summand) {
    float center = j.k.center[c], scale = j.k.scale[c], shift = j.k.shift[c];
    double sum = 0, products = 0;
    ptrdiff_t together = type != FLOAT32 && j.s.inner >= LONG ? j.s.inner / TOGETHER : 0;
    for (ptrdiff_t o = 0; o < j.s.outer; o++) {
        ptrdiff_t at = (o * j.s.channels + c) * j.s.inner, end = at + j.s.inner;
#pragma omp simd reduction(+ : sum, products)
        for (ptrdiff_t i = at; i < at + together; i++) {
            Sums next = sums_of(&j, i, together, TOGETHER, center, scale, shift, type, summand);
            sum += next.of_values;
            products += next.of_products;
        }
#pragma omp simd reduction(+ : sum, products)
        for (ptrdiff_t i = at + TOGETHER * together; i < end; i++) {
            Sums next = sums_of(&j, i, 0, 1, center, scale, shift, type, summand);
            sum += next.of_values;
            products += next.of_products;
        }
    }
    j.first[c] = sum;
    j.second[c] = products;
}

/* The same of count rows of all channels, added to sums. */
INLINE void add_rows(const Job *j, ptrdiff_t row, int count, Type type, Summand summand, double *first, double *second) {
    ptrdiff_t channels = j->s.channels;
    const float *center = j->k.center, *scale = j->k.scale, *shift = j->k.shift;
#pragma omp simd
    for (ptrdiff_t c = 0; c < channels; c++) {
        Sums next = sums_of(j, row * channels + c, channels, count, center[c], scale[c], shift[c], type, summand);
        first[c] += next.of_values;
        second[c] += next.of_products;
    }
}

INLINE void sum_rows(Job j, ptrdiff_t part, Type type, Summand summand) {
    ptrdiff_t row = part * ROWS, end = smaller(row + ROWS, j.s.outer);
    double *first = j.first + part * j.s.channels, *second = j.second + part * j.s.channels;
    memset(first, 0, (size_t)j.s.channels * sizeof(double));
    memset(second, 0, (size_t)j.s.channels * sizeof(double));
    for (; row + TOGETHER <= end; row += TOGETHER) add_rows(&j, row, TOGETHER, type, summand, first, second);
    for (; row < end; row++) add_rows(&j, row, 1, type, summand, first, second);
}

INLINE void sum_part(Job j, ptrdiff_t part, Type type, Summand summand) {
    if (j.s.inner == 1)
        sum_rows(j, part, type, summand);
    else
        sum_channel(j, part, type, summand);
}

INLINE void sum_part_of(Job j, ptrdiff_t part, Type type) {
    switch (j.summand) {
        case INPUT: sum_part(j, part, type, INPUT); break;
        case DIFFERENCE: sum_part(j, part, type, DIFFERENCE); break;
        case GRADIENT: sum_part(j, part, type, GRADIENT); break;
        case GRADIENT_BY_INPUT: sum_part(j, part, type, GRADIENT_BY_INPUT); break;
        case GRADIENT_BY_OUTPUT: sum_part(j, part, type, GRADIENT_BY_OUTPUT); break;
    }
}

/* The output at i. */
INLINE void normalize_at(Job j, ptrdiff_t i, float center, float scale, float shift, Type type, int shortcut, int relu) {
    float z = affine(get(j.x, i, type), center, scale, shift);
    if (shortcut) z += get(j.other, i, type);
    put(j.result, i, type, relu ? rectified(z) : z);
}

/* A channel, or some rows of all. */
INLINE void normalize_part(Job j, ptrdiff_t part, Type type, int shortcut, int relu) {
    Coefficients k = j.k;
    if (j.s.inner == 1) {
        for (ptrdiff_t row = part * ROWS; row < smaller(part * ROWS + ROWS, j.s.outer); row++) {
#pragma omp simd
            for (ptrdiff_t c = 0; c < j.s.channels; c++)
                normalize_at(j, row * j.s.channels + c, k.center[c], k.scale[c], k.shift[c], type, shortcut, relu);
        }
        return;
    }
    float center = k.center[part], scale = k.scale[part], shift = k.shift[part];
    for (ptrdiff_t o = 0; o < j.s.outer; o++) {
        ptrdiff_t at = (o * j.s.channels + part) * j.s.inner;
#pragma omp simd
        for (ptrdiff_t i = at; i < at + j.s.inner; i++) normalize_at(j, i, center, scale, shift, type, shortcut, relu);
    }
}

INLINE void normalize_part_of(Job j, ptrdiff_t part, Type type) {
    if (j.relu && j.other)
        normalize_part(j, part, type, 1, 1);
    else if (j.relu)
        normalize_part(j, part, type, 0, 1);
    else if (j.other)
        normalize_part(j, part, type, 1, 0);
    else
        normalize_part(j, part, type, 0, 0);
}

/* The gradient of the input at i. */
INLINE void input_gradient_at(Job j, ptrdiff_t i, Coefficients k, ptrdiff_t c, Type type, int relu) {
    float x = get(j.x, i, type), dz = get(j.other, i, type);
    if (relu) dz = gradient_behind(dz, affine(x, k.center[c], k.scale[c], k.shift[c]));
    put(j.result, i, type, k.of_input[c] * (x - k.center[c]) + (k.of_gradient[c] * dz + k.constant[c]));
}

INLINE void input_gradient_part(Job j, ptrdiff_t part, Type type, int relu) {
    if (j.s.inner == 1) {
        for (ptrdiff_t row = part * ROWS; row < smaller(part * ROWS + ROWS, j.s.outer); row++) {
#pragma omp simd
            for (ptrdiff_t c = 0; c < j.s.channels; c++)
                input_gradient_at(j, row * j.s.channels + c, j.k, c, type, relu);
        }
        return;
    }
    float values[] = {j.k.center[part],   j.k.scale[part],       j.k.shift[part],
                      j.k.of_input[part], j.k.of_gradient[part], j.k.constant[part]};
    Coefficients k = {values, values + 1, values + 2, values + 3, values + 4, values + 5};
    for (ptrdiff_t o = 0; o < j.s.outer; o++) {
        ptrdiff_t at = (o * j.s.channels + part) * j.s.inner;
#pragma omp simd
        for (ptrdiff_t i = at; i < at + j.s.inner; i++) input_gradient_at(j, i, k, 0, type, relu);
    }
}

INLINE void input_gradient_part_of(Job j, ptrdiff_t part, Type type) {
    if (j.relu)
        input_gradient_part(j, part, type, 1);
    else
        input_gradient_part(j, part, type, 0);
}

/* One version of each function for each type and CPU. */
#define FOR_EVERY_TYPE(function)                                                           \
    FOR_EVERY_CPU static void function##_float32(Job j, ptrdiff_t part) {                  \
        function(j, part, FLOAT32);                                                        \
    }                                                                                      \
    FOR_EVERY_CPU static void function##_bfloat16(Job j, ptrdiff_t part) {                 \
        function(j, part, BFLOAT16);                                                       \
    }                                                                                      \
    FOR_EVERY_CPU static void function##_float16(Job j, ptrdiff_t part) {                  \
        function(j, part, FLOAT16);                                                        \
    }                                                                                      \
    static void (*const function##_versions[])(Job, ptrdiff_t) = {                         \
        function##_float32, function##_bfloat16, function##_float16};

FOR_EVERY_TYPE(sum_part_of)
FOR_EVERY_TYPE(normalize_part_of)
FOR_EVERY_TYPE(input_gradient_part_of)

static ptrdiff_t parts_of(Shape s) { return s.inner == 1 ? (s.outer + ROWS - 1) / ROWS : s.channels; }

static void run(void (*work)(Job, ptrdiff_t), Job j, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t part = 0; part < parts_of(j.s); part++) work(j, part);
}

/* Memory for the coefficients, zeros; free(center) frees all of it. */
static Coefficients new_coefficients(ptrdiff_t channels) {
    float *memory = calloc((size_t)(6 * channels), sizeof(float));
    return (Coefficients){memory,
                          memory + channels,
                          memory + 2 * channels,
                          memory + 3 * channels,
                          memory + 4 * channels,
                          memory + 5 * channels};
}

/* Those of the output; weight and bias may be NULL. */
static void set_output(Coefficients k, const double *statistics, const float *weight, const float *bias,
                       ptrdiff_t channels) {
    const double *mean = statistics + 1, *invstd = mean + 2 * channels;
    for (ptrdiff_t c = 0; c < channels; c++) {
        double a = invstd[c] * (weight ? weight[c] : 1);
        k.center[c] = (float)mean[c];
        k.scale[c] = (float)a;
        k.shift[c] = (float)((bias ? bias[c] : 0) - a * (mean[c] - k.center[c]));
    }
}

/* Those of the gradient of the input, from [sum dz, sum dz * xhat] over all ranks. */
static void set_input_gradient(Coefficients k, const double *statistics, const float *weight, const double *total,
                               ptrdiff_t channels) {
    const double count = statistics[0], *mean = statistics + 1, *invstd = mean + 2 * channels;
    for (ptrdiff_t c = 0; c < channels; c++) {
        double a = invstd[c] * (weight ? weight[c] : 1), b = -a * invstd[c] * total[channels + c] / count;
        k.of_input[c] = (float)b;
        k.of_gradient[c] = (float)a;
        k.constant[c] = (float)(-a * total[c] / count - b * (mean[c] - k.center[c]));
    }
}

/* sums = [sum a, sum a * (x - center)], (2, C); the job's coefficients have the float32 center. */
static int sum(Job j, Type type, const double *center, int threads, double *sums) {
    ptrdiff_t channels = j.s.channels, parts = j.s.inner == 1 ? parts_of(j.s) : 1;
    double *memory = malloc((size_t)(2 * parts * channels) * sizeof(double));
    if (!memory) return 1;
    j.first = memory;
    j.second = memory + parts * channels;
    run(sum_part_of_versions[type], j, threads);
    memset(sums, 0, (size_t)(2 * channels) * sizeof(double));
    for (ptrdiff_t part = 0; part < parts; part++)
        for (ptrdiff_t c = 0; c < channels; c++) {
            sums[c] += j.first[part * channels + c];
            sums[channels + c] += j.second[part * channels + c];
        }
    /* the part of the center that float32 cannot hold */
    for (ptrdiff_t c = 0; center && c < channels; c++) sums[channels + c] -= (center[c] - j.k.center[c]) * sums[c];
    free(memory);
    return 0;
}

/* message = [count, sum x, sum x^2], 2 C + 1 values. */
int megdet_moments(const void *x, int type, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, int threads,
                   double *message) {
    Coefficients k = new_coefficients(channels);
    if (!k.center) return 1;
    Job j = {.x = x, .k = k, .s = {outer, channels, inner}, .summand = INPUT};
    message[0] = (double)(outer * inner);
    int failed = sum(j, (Type)type, NULL, threads, message + 1);
    free(k.center);
    return failed;
}

/*
 * sums[c] = sum (x - mean)^2; sums has room for (2, C). With d the part of the mean that float32 cannot hold, the squares
 * are (x - center) (x - mean) - d (x - mean), and nothing that is large cancels.
 */
int megdet_squared_differences(const void *x, int type, const double *mean, ptrdiff_t outer, ptrdiff_t channels,
                               ptrdiff_t inner, int threads, double *sums) {
    Coefficients k = new_coefficients(channels);
    if (!k.center) return 1;
    for (ptrdiff_t c = 0; c < channels; c++) k.center[c] = (float)mean[c];
    Job j = {.x = x, .k = k, .s = {outer, channels, inner}, .summand = DIFFERENCE};
    int failed = sum(j, (Type)type, mean, threads, sums);
    for (ptrdiff_t c = 0; c < channels; c++) {
        double d = mean[c] - k.center[c];
        sums[c] = sums[channels + c] - d * (sums[c] - d * (double)(outer * inner));
    }
    free(k.center);
    return failed;
}

/* statistics from message = [count, sum x, sum x^2], both sums over all ranks. */
void megdet_statistics(const double *message, double eps, ptrdiff_t channels, double *statistics) {
    double count = message[0];
    const double *sum = message + 1, *squares = sum + channels;
    double *mean = statistics + 1, *var = mean + channels, *invstd = var + channels;
    statistics[0] = count;
    for (ptrdiff_t c = 0; c < channels; c++) {
        double m = sum[c] / count, v = squares[c] / count - m * m;
        mean[c] = m;
        var[c] = v < 0 ? 0 : v;
        invstd[c] = 1 / sqrt(var[c] + eps);
    }
}

/* Moves the running statistics towards the batch's by factor; the variance is the unbiased one. */
void megdet_update_running(const double *statistics, double factor, ptrdiff_t channels, float *running_mean,
                           float *running_var) {
    const double *mean = statistics + 1, *var = mean + channels;
    double unbiased = statistics[0] / (statistics[0] - 1);
    for (ptrdiff_t c = 0; c < channels; c++) {
        running_mean[c] = (float)(running_mean[c] + factor * (mean[c] - running_mean[c]));
        running_var[c] = (float)(running_var[c] + factor * (unbiased * var[c] - running_var[c]));
    }
}

/* y = z, or with relu max(0, z); weight, bias and shortcut may be NULL. */
int megdet_normalize(const void *x, int type, const double *statistics, const float *weight, const float *bias,
                     const void *shortcut, int relu, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, int threads,
                     void *y) {
    Coefficients k = new_coefficients(channels);
    if (!k.center) return 1;
    set_output(k, statistics, weight, bias, channels);
    Job j = {.x = x, .other = shortcut, .result = y, .k = k, .s = {outer, channels, inner}, .relu = relu};
    run(normalize_part_of_versions[type], j, threads);
    free(k.center);
    return 0;
}

/*
 * sums = [sum dz, sum dz * xhat], (2, C), with xhat = (x - mean) * invstd and dz = dy, or 0 where the ReLU stopped it.
 * With relu, y says where that was, and dz is written. Without a shortcut both may be NULL: x says it too.
 */
int megdet_gradient_sums(const void *dy, const void *x, int type, const double *statistics, const float *weight,
                         const float *bias, int relu, const void *y, ptrdiff_t outer, ptrdiff_t channels,
                         ptrdiff_t inner, int threads, void *dz, double *sums) {
    Coefficients k = new_coefficients(channels);
    if (!k.center) return 1;
    set_output(k, statistics, weight, bias, channels);
    Summand summand = !relu ? GRADIENT : y ? GRADIENT_BY_OUTPUT : GRADIENT_BY_INPUT;
    Job j = {.x = x, .other = dy, .y = y, .result = dz, .k = k, .s = {outer, channels, inner}, .summand = summand};
    const double *mean = statistics + 1, *invstd = mean + 2 * channels;
    int failed = sum(j, (Type)type, mean, threads, sums);
    for (ptrdiff_t c = 0; c < channels; c++) sums[channels + c] *= invstd[c];
    free(k.center);
    return failed;
}

/*
 * dx = weight * invstd * (dz - total[0] / count - (x - mean) * invstd * total[1] / count), with total = [sum dz, sum dz *
 * xhat] over all ranks. With relu, dz is dy where x says that the ReLU did not stop it; weight and bias may be NULL.
 */
int megdet_input_gradient(const void *dy, const void *x, int type, const double *statistics, const float *weight,
                          const float *bias, int relu, const double *total, ptrdiff_t outer, ptrdiff_t channels,
                          ptrdiff_t inner, int threads, void *dx) {
    Coefficients k = new_coefficients(channels);
    if (!k.center) return 1;
    set_output(k, statistics, weight, bias, channels);
    set_input_gradient(k, statistics, weight, total, channels);
    Job j = {.x = x, .other = dy, .result = dx, .k = k, .s = {outer, channels, inner}, .relu = relu};
    run(input_gradient_part_of_versions[type], j, threads);
    free(k.center);
    return 0;
}
