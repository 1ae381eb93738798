/*
 * Batch normalisation of float32 activations on CPUs: reductions and maps per channel, in one pass each.
 *
 * Activations are (outer, channels, inner): for a contiguous (N, C, *) tensor outer is N and inner the pixels; for
 * channels last outer is the pixels of all images and inner is 1. Sums are float64, so that neither a mean far from zero
 * nor many values cost digits. Maps subtract the mean first, in two parts: its float32 value, and the rest.
 *
 * A channel is worked on by one thread, in an order that depends on the shape alone: the same input gives the same bits
 * with any number of threads.
 */
#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* One binary for all CPUs of a cluster: the loader picks the version that the CPU can run. */
#define FOR_EVERY_CPU __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FOR_EVERY_CPU
#endif

/* Channels that a thread takes at a time: a cache line of them with channels last. */
enum { BLOCK = 16 };

typedef struct {
    ptrdiff_t outer, channels, inner;
} Shape;

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* sums[0][c] = sum a, sums[1][c] = sum a * (b - centre), over the channels [from, to); centre may be NULL. */
FOR_EVERY_CPU static void sum_channels(const float *a, const float *b, const double *centre, Shape s, ptrdiff_t from,
                                       ptrdiff_t to, double *sums) {
    double first[BLOCK] = {0}, second[BLOCK] = {0};
    if (s.inner == 1) {
        float centres[BLOCK] = {0};
        for (ptrdiff_t c = from; centre && c < to; c++) centres[c - from] = (float)centre[c];
        for (ptrdiff_t o = 0; o < s.outer; o++) {
            const float *row_a = a + o * s.channels + from, *row_b = b + o * s.channels + from;
#pragma omp simd
            for (ptrdiff_t c = 0; c < to - from; c++) {
                first[c] += row_a[c];
                second[c] += (double)row_a[c] * (double)(row_b[c] - centres[c]);
            }
        }
    } else {
        for (ptrdiff_t c = from; c < to; c++) {
            float k = centre ? (float)centre[c] : 0;
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
        /* the part of the centre that float32 cannot hold */
        double rest = centre ? centre[c] - (float)centre[c] : 0;
        sums[c] = first[c - from];
        sums[s.channels + c] = second[c - from] - rest * first[c - from];
    }
}

/* y = scale * (x - centre) + shift per channel, and + slope * other where there is one. */
FOR_EVERY_CPU static void map_channels(const float *x, const float *other, const float *centre, const float *scale,
                                       const float *slope, const float *shift, Shape s, ptrdiff_t from, ptrdiff_t to,
                                       float *y) {
    /* With channels last the inner loop runs over the channels, else over the pixels of one. */
    if (s.inner == 1) {
        for (ptrdiff_t o = 0; o < s.outer; o++) {
            ptrdiff_t at = o * s.channels;
            if (other) {
#pragma omp simd
                for (ptrdiff_t c = from; c < to; c++)
                    y[at + c] = scale[c] * (x[at + c] - centre[c]) + (slope[c] * other[at + c] + shift[c]);
            } else {
#pragma omp simd
                for (ptrdiff_t c = from; c < to; c++) y[at + c] = scale[c] * (x[at + c] - centre[c]) + shift[c];
            }
        }
        return;
    }
    for (ptrdiff_t c = from; c < to; c++) {
        float k = centre[c], a = scale[c], b = slope ? slope[c] : 0, d = shift[c];
        for (ptrdiff_t o = 0; o < s.outer; o++) {
            ptrdiff_t at = (o * s.channels + c) * s.inner;
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

/* sums = [sum a, sum a * (b - centre)], (2, C). For the moments of x both are x and centre is NULL. */
void megdet_sums(const float *a, const float *b, const double *centre, ptrdiff_t outer, ptrdiff_t channels,
                 ptrdiff_t inner, int threads, double *sums) {
    Shape s = {outer, channels, inner};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t c = 0; c < channels; c += BLOCK) sum_channels(a, b, centre, s, c, smaller(c + BLOCK, channels), sums);
}

/* y = weight * invstd * (x - mean) + bias; weight and bias may be NULL. vectors is room for 3 C floats. */
void megdet_normalise(const float *x, const double *mean, const double *invstd, const float *weight, const float *bias,
                      ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, int threads, float *vectors, float *y) {
    Shape s = {outer, channels, inner};
    float *centre = vectors, *scale = vectors + channels, *shift = vectors + 2 * channels;
    for (ptrdiff_t c = 0; c < channels; c++) {
        double a = invstd[c] * (weight ? weight[c] : 1);
        centre[c] = (float)mean[c];
        scale[c] = (float)a;
        shift[c] = (float)((bias ? bias[c] : 0) - a * (mean[c] - centre[c]));
    }
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t c = 0; c < channels; c += BLOCK)
        map_channels(x, NULL, centre, scale, NULL, shift, s, c, smaller(c + BLOCK, channels), y);
}

/*
 * dx = weight * invstd * (dy - sums[0] / count - (x - mean) * invstd * sums[1] / count), with sums = [sum dy, sum dy *
 * xhat] over all ranks; weight may be NULL. vectors is room for 4 C floats.
 */
void megdet_input_gradient(const float *dy, const float *x, const double *mean, const double *invstd,
                           const float *weight, const double *sums, double count, ptrdiff_t outer, ptrdiff_t channels,
                           ptrdiff_t inner, int threads, float *vectors, float *dx) {
    Shape s = {outer, channels, inner};
    float *centre = vectors, *scale = vectors + channels, *slope = vectors + 2 * channels;
    float *shift = vectors + 3 * channels;
    for (ptrdiff_t c = 0; c < channels; c++) {
        double a = invstd[c] * (weight ? weight[c] : 1), b = -a * invstd[c] * sums[channels + c] / count;
        centre[c] = (float)mean[c];
        scale[c] = (float)b;
        slope[c] = (float)a;
        shift[c] = (float)(-a * sums[c] / count - b * (mean[c] - centre[c]));
    }
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (ptrdiff_t c = 0; c < channels; c += BLOCK)
        map_channels(x, dy, centre, scale, slope, shift, s, c, smaller(c + BLOCK, channels), dx);
}
