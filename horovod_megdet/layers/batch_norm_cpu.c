/*
 * Batch normalization of float32 activations on CPUs: reductions and maps per channel, in one pass each.
 *
 * Activations are (outer, channels, inner): for a contiguous (N, C, *) tensor outer is N and inner the pixels; for
 * channels last outer is the pixels of all images and inner is 1. Sums are float64, so that neither a mean far from zero
 * nor many values cost digits. Maps subtract the mean first, in two parts: its float32 value, and the rest.
 *
 * What a layer knows of its input's statistics is one array of doubles: count, mean[C], var[C], 1 / sqrt(var + eps)[C].
 *
 * A channel is worked on by one thread, in an order that depends on the shape alone: the same input gives the same bits
 * with any number of threads.
 */
#include <math.h>

#include "numbers_cpu.h"

/* Channels that a thread takes at a time: a cache line of them with channels last. */
enum { BLOCK = 16 };

typedef struct {
    ptrdiff_t outer, channels, inner;
} Shape;

/* sums[0][c] = sum a, sums[1][c] = sum a * (b - center), over the channels [from, to); center may be NULL. */
FOR_EVERY_CPU static void sum_channels(const float *a, const float *b, const double *center, Shape s, ptrdiff_t from,
                                       ptrdiff_t to, double *sums) {
    double first[BLOCK] = {0}, second[BLOCK] = {0};
    if (s.inner == 1) {
        float centers[BLOCK] = {0};
        for (ptrdiff_t c = from; center && c < to; c++) centers[c - from] = (float)center[c];
        for (ptrdiff_t o = 0; o < s.outer; o++) {
            const float *row_a = a + o * s.channels + from, *row_b = b + o * s.channels + from;
#pragma omp simd
            for (ptrdiff_t c = 0; c < to - from; c++) {
                first[c] += row_a[c];
                second[c] += (double)row_a[c] * (double)(row_b[c] - centers[c]);
            }
        }
    } else {
        for (ptrdiff_t c = from; c < to; c++) {
            float k = center ? (float)center[c] : 0;
            double sum = 0, product = 0;
            for (ptrdiff_t o = 0; o < s.outer; o++) {
                const float *row_a = a + (o * s.channels + c) * s.inner, *row_b = b + (o * s.channels + c) * s.inner;
#pragma omp simd reduction(+ : sum, product)
                for (ptrdiff_t i = 0; i < s.inner; i++) {
                    sum += row_a[i];
                    product += (double)row_a[i] * (double)(row_b[i] - k);
                }
            }
            first[c - from] = sum;
            second[c - from] = product;
        }
    }
    for (ptrdiff_t c = from; c < to; c++) {
        /* the part of the center that float32 cannot hold */
        double rest = center ? center[c] - (float)center[c] : 0;
        sums[c] = first[c - from];
        sums[s.channels + c] = second[c - from] - rest * first[c - from];
    }
}

/* y = scale * (x - center) + shift, and + slope * other where there is one, over the channels [from, to). */
FOR_EVERY_CPU static void map_channels(const float *x, const float *other, const float *center, const float *scale,
                                       const float *slope, const float *shift, Shape s, ptrdiff_t from, ptrdiff_t to,
                                       float *y) {
    ptrdiff_t channels = to - from;
    if (s.inner == 1) {
        for (ptrdiff_t o = 0; o < s.outer; o++) {
            const float *row = x + o * s.channels + from, *row_other = other ? other + o * s.channels + from : NULL;
            float *result = y + o * s.channels + from;
            if (other) {
#pragma omp simd
                for (ptrdiff_t c = 0; c < channels; c++)
                    result[c] = scale[c] * (row[c] - center[c]) + (slope[c] * row_other[c] + shift[c]);
            } else {
#pragma omp simd
                for (ptrdiff_t c = 0; c < channels; c++) result[c] = scale[c] * (row[c] - center[c]) + shift[c];
            }
        }
        return;
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        float k = center[c], a = scale[c], b = slope[c], d = shift[c];
        for (ptrdiff_t o = 0; o < s.outer; o++) {
            ptrdiff_t at = (o * s.channels + from + c) * s.inner;
            if (other) {
#pragma omp simd
                for (ptrdiff_t i = at; i < at + s.inner; i++) y[i] = a * (x[i] - k) + (b * other[i] + d);
            } else {
#pragma omp simd
                for (ptrdiff_t i = at; i < at + s.inner; i++) y[i] = a * (x[i] - k) + d;
            }
        }
    }
}

/* sums = [sum a, sum a * (b - center)], (2, C); center may be NULL. */
void megdet_sums(const float *a, const float *b, const double *center, ptrdiff_t outer, ptrdiff_t channels,
                 ptrdiff_t inner, int threads, double *sums) {
    Shape s = {outer, channels, inner};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t c = 0; c < channels; c += BLOCK) sum_channels(a, b, center, s, c, smaller(c + BLOCK, channels), sums);
}

/* message = [count, sum x, sum x^2], 2 C + 1 values. */
void megdet_moments(const float *x, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, int threads,
                    double *message) {
    message[0] = (double)(outer * inner);
    megdet_sums(x, x, NULL, outer, channels, inner, threads, message + 1);
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

/* y = weight * invstd * (x - mean) + bias; weight and bias may be NULL. */
void megdet_normalize(const float *x, const double *statistics, const float *weight, const float *bias,
                      ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, int threads, float *y) {
    Shape s = {outer, channels, inner};
    const double *mean = statistics + 1, *invstd = mean + 2 * channels;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t from = 0; from < channels; from += BLOCK) {
        ptrdiff_t to = smaller(from + BLOCK, channels);
        float center[BLOCK], scale[BLOCK], slope[BLOCK] = {0}, shift[BLOCK];
        for (ptrdiff_t c = from; c < to; c++) {
            double a = invstd[c] * (weight ? weight[c] : 1);
            center[c - from] = (float)mean[c];
            scale[c - from] = (float)a;
            shift[c - from] = (float)((bias ? bias[c] : 0) - a * (mean[c] - center[c - from]));
        }
        map_channels(x, NULL, center, scale, slope, shift, s, from, to, y);
    }
}

/* sums = [sum dy, sum dy * xhat], (2, C), with xhat = (x - mean) * invstd. */
void megdet_gradient_sums(const float *dy, const float *x, const double *statistics, ptrdiff_t outer,
                          ptrdiff_t channels, ptrdiff_t inner, int threads, double *sums) {
    const double *mean = statistics + 1, *invstd = mean + 2 * channels;
    megdet_sums(dy, x, mean, outer, channels, inner, threads, sums);
    for (ptrdiff_t c = 0; c < channels; c++) sums[channels + c] *= invstd[c];
}

/*
 * dx = weight * invstd * (dy - sums[0] / count - (x - mean) * invstd * sums[1] / count), with sums = [sum dy, sum dy *
 * xhat] over all ranks; weight may be NULL.
 */
void megdet_input_gradient(const float *dy, const float *x, const double *statistics, const float *weight,
                           const double *sums, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, int threads,
                           float *dx) {
    Shape s = {outer, channels, inner};
    const double count = statistics[0], *mean = statistics + 1, *invstd = mean + 2 * channels;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t from = 0; from < channels; from += BLOCK) {
        ptrdiff_t to = smaller(from + BLOCK, channels);
        float center[BLOCK], scale[BLOCK], slope[BLOCK], shift[BLOCK];
        for (ptrdiff_t c = from; c < to; c++) {
            double a = invstd[c] * (weight ? weight[c] : 1), b = -a * invstd[c] * sums[channels + c] / count;
            center[c - from] = (float)mean[c];
            scale[c - from] = (float)b;
            slope[c - from] = (float)a;
            shift[c - from] = (float)(-a * sums[c] / count - b * (mean[c] - center[c - from]));
        }
        map_channels(x, dy, center, scale, slope, shift, s, from, to, dx);
    }
}
