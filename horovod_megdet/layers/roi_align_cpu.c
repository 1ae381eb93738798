/*
 * RoIAlign (Mask R-CNN, https://arxiv.org/abs/1703.06870) and its gradient on CPUs: what torchvision's operator with
 * aligned=False computes, in the same order of additions, so that float32 results have the same bits.
 *
 * torchvision goes through one channel after the other, and adds one number at a time. Here the channels of a pixel lie
 * side by side: a block of them is copied into, or from, a map of its own, small enough for a core's cache, and each
 * sample reads or adds a run of them.
 *
 * A thread works on a block of channels of an image, on the RoIs in the order given: the same input gives the same bits
 * with any number of threads.
 */
#include <math.h>
#include <stdlib.h>

#include "numbers_cpu.h"

/* Channels of a map; pixels that are copied at a time. */
enum { BLOCK = 32, TILE = 16 };

typedef struct {
    ptrdiff_t images, channels, height, width;
    int channels_last;
} Maps;

typedef struct {
    const float *boxes;      /* (count, 5): image, x1, y1, x2, y2 */
    const int64_t *levels;   /* (count,): only the RoIs of one level are looked at */
    ptrdiff_t count, level;
    double scale;            /* pixels of the map per pixel of the image */
    ptrdiff_t size, samples; /* bins along each side of a RoI, and samples along each side of a bin */
} RoIs;

/* Where a sample lies along one axis: between two pixels of the map, with their shares; nowhere if outside. */
typedef struct {
    ptrdiff_t low, high;
    float low_share, high_share;
    int inside;
} Sample;

/* What a thread needs for itself. */
typedef struct {
    float *map;       /* (height, width, BLOCK) */
    float *bins;      /* (size, size, BLOCK) */
    Sample *vertical; /* (size * samples,) */
    Sample *horizontal;
} Scratch;

/* The channels [from, to) of one image of the maps: where a value lies is first + c * channel + p * pixel. */
typedef struct {
    ptrdiff_t first, channel, pixel, channels, pixels;
} Part;

static Part part_of(Maps m, ptrdiff_t image, ptrdiff_t from) {
    ptrdiff_t pixels = m.height * m.width, start = image * m.channels * pixels;
    ptrdiff_t channels = smaller(BLOCK, m.channels - from);
    if (m.channels_last) return (Part){start + from, 1, m.channels, channels, pixels};
    return (Part){start + from * pixels, pixels, 1, channels, pixels};
}

/* The channels [from, from + BLOCK) of the bins of a RoI, (channels, bins) in memory. */
static Part bins_of(Maps m, RoIs r, ptrdiff_t roi, ptrdiff_t from) {
    ptrdiff_t bins = r.size * r.size;
    return (Part){(roi * m.channels + from) * bins, bins, 1, smaller(BLOCK, m.channels - from), bins};
}

/* block[p][c] = values, and 0 in the channels beyond the last. */
INLINE void read_part(const void *values, Type type, Part part, float *block) {
    for (ptrdiff_t first = 0; first < part.pixels; first += TILE) {
        ptrdiff_t end = smaller(first + TILE, part.pixels);
        if (part.channels < BLOCK) memset(block + first * BLOCK, 0, (size_t)((end - first) * BLOCK) * sizeof(float));
        if (part.channel == 1)
            for (ptrdiff_t p = first; p < end; p++)
                for (ptrdiff_t c = 0; c < part.channels; c++)
                    block[p * BLOCK + c] = get(values, part.first + p * part.pixel + c, type);
        else
            for (ptrdiff_t c = 0; c < part.channels; c++)
                for (ptrdiff_t p = first; p < end; p++)
                    block[p * BLOCK + c] = get(values, part.first + c * part.channel + p, type);
    }
}

INLINE void write_part(const float *block, Type type, Part part, void *values) {
    for (ptrdiff_t first = 0; first < part.pixels; first += TILE) {
        ptrdiff_t end = smaller(first + TILE, part.pixels);
        if (part.channel == 1)
            for (ptrdiff_t p = first; p < end; p++)
                for (ptrdiff_t c = 0; c < part.channels; c++)
                    put(values, part.first + p * part.pixel + c, type, block[p * BLOCK + c]);
        else
            for (ptrdiff_t c = 0; c < part.channels; c++)
                for (ptrdiff_t p = first; p < end; p++)
                    put(values, part.first + c * part.channel + p, type, block[p * BLOCK + c]);
    }
}

/* The samples of a RoI from start to end, in pixels of the image, along an axis of so many pixels of the map. */
static void find_samples(RoIs r, float start, float end, ptrdiff_t pixels, Sample *samples) {
    start *= (float)r.scale;
    float length = end * (float)r.scale - start;
    float bin = (length > 1 ? length : 1) / (float)r.size;
    for (ptrdiff_t i = 0; i < r.size * r.samples; i++) {
        float at = start + (float)(i / r.samples) * bin + ((float)(i % r.samples) + 0.5f) * bin / (float)r.samples;
        Sample *s = samples + i;
        s->inside = at >= -1 && at <= (float)pixels; /* false for NaN */
        if (!s->inside) continue;
        at = at > 0 ? at : 0;
        s->low = (ptrdiff_t)at;
        s->high = s->low + 1;
        if (s->high >= pixels) {
            s->low = s->high = pixels - 1;
            at = (float)s->low;
        }
        s->high_share = at - (float)s->low;
        s->low_share = (float)(1. - s->high_share);
    }
}

/* Whether a RoI belongs to this level and image; if so, its samples are found. */
static int find_roi(Maps m, RoIs r, ptrdiff_t roi, ptrdiff_t image, Scratch scratch) {
    const float *box = r.boxes + 5 * roi;
    if (r.levels[roi] != r.level || (ptrdiff_t)box[0] != image) return 0;
    find_samples(r, box[1], box[3], m.width, scratch.horizontal);
    find_samples(r, box[2], box[4], m.height, scratch.vertical);
    return 1;
}

/* The four pixels around a sample, row by row, and their shares. */
typedef struct {
    float *pixels[4];
    float shares[4];
} Corners;

INLINE Corners corners_of(float *map, ptrdiff_t width, Sample y, Sample x) {
    float *low = map + y.low * width * BLOCK, *high = map + y.high * width * BLOCK;
    return (Corners){
        {low + x.low * BLOCK, low + x.high * BLOCK, high + x.low * BLOCK, high + x.high * BLOCK},
        {y.low_share * x.low_share, y.low_share * x.high_share, y.high_share * x.low_share, y.high_share * x.high_share},
    };
}

INLINE void gather(Corners at, float *sum) {
    const float *a = at.pixels[0], *b = at.pixels[1], *c = at.pixels[2], *d = at.pixels[3];
#pragma omp simd
    for (int i = 0; i < BLOCK; i++)
        sum[i] += at.shares[0] * a[i] + at.shares[1] * b[i] + at.shares[2] * c[i] + at.shares[3] * d[i];
}

INLINE void scatter(const float *gradient, Corners at) {
    for (int corner = 0; corner < 4; corner++) {
        float *pixel = at.pixels[corner], share = at.shares[corner];
#pragma omp simd
        for (int i = 0; i < BLOCK; i++) pixel[i] += gradient[i] * share;
    }
}

/* Means of the samples in each bin of a RoI, from the map; or the other way, the gradients of bins into the map. */
FOR_EVERY_CPU static void pool(Maps m, RoIs r, Scratch scratch) {
    memset(scratch.bins, 0, (size_t)(r.size * r.size * BLOCK) * sizeof(float));
    for (ptrdiff_t bin = 0; bin < r.size * r.size; bin++) {
        const Sample *vertical = scratch.vertical + bin / r.size * r.samples;
        const Sample *horizontal = scratch.horizontal + bin % r.size * r.samples;
        float *sum = scratch.bins + bin * BLOCK;
        for (ptrdiff_t y = 0; y < r.samples; y++)
            for (ptrdiff_t x = 0; x < r.samples; x++)
                if (vertical[y].inside && horizontal[x].inside)
                    gather(corners_of(scratch.map, m.width, vertical[y], horizontal[x]), sum);
        for (int c = 0; c < BLOCK; c++) sum[c] /= (float)(r.samples * r.samples);
    }
}

FOR_EVERY_CPU static void spread(Maps m, RoIs r, Scratch scratch) {
    for (ptrdiff_t bin = 0; bin < r.size * r.size; bin++) {
        const Sample *vertical = scratch.vertical + bin / r.size * r.samples;
        const Sample *horizontal = scratch.horizontal + bin % r.size * r.samples;
        float *gradient = scratch.bins + bin * BLOCK;
        for (int c = 0; c < BLOCK; c++) gradient[c] /= (float)(r.samples * r.samples);
        for (ptrdiff_t y = 0; y < r.samples; y++)
            for (ptrdiff_t x = 0; x < r.samples; x++)
                if (vertical[y].inside && horizontal[x].inside)
                    scatter(gradient, corners_of(scratch.map, m.width, vertical[y], horizontal[x]));
    }
}

FOR_EVERY_CPU static void read_any(const void *values, Type type, Part part, float *block) {
    switch (type) {
        case FLOAT32: read_part(values, FLOAT32, part, block); break;
        case BFLOAT16: read_part(values, BFLOAT16, part, block); break;
        case FLOAT16: read_part(values, FLOAT16, part, block); break;
    }
}

FOR_EVERY_CPU static void write_any(const float *block, Type type, Part part, void *values) {
    switch (type) {
        case FLOAT32: write_part(block, FLOAT32, part, values); break;
        case BFLOAT16: write_part(block, BFLOAT16, part, values); break;
        case FLOAT16: write_part(block, FLOAT16, part, values); break;
    }
}

static size_t scratch_bytes(Maps m, RoIs r) {
    size_t values = (size_t)(m.height * m.width + r.size * r.size) * BLOCK;
    return values * sizeof(float) + 2 * (size_t)(r.size * r.samples) * sizeof(Sample);
}

static Scratch scratch_at(void *memory, Maps m, RoIs r) {
    Sample *vertical = memory, *horizontal = vertical + r.size * r.samples;
    float *map = (float *)(horizontal + r.size * r.samples);
    return (Scratch){map, map + m.height * m.width * BLOCK, vertical, horizontal};
}

static void pool_image(const void *features, Type type, Maps m, RoIs r, ptrdiff_t image, ptrdiff_t from,
                       Scratch scratch, void *pooled) {
    read_any(features, type, part_of(m, image, from), scratch.map);
    for (ptrdiff_t roi = 0; roi < r.count; roi++) {
        if (!find_roi(m, r, roi, image, scratch)) continue;
        pool(m, r, scratch);
        write_any(scratch.bins, type, bins_of(m, r, roi, from), pooled);
    }
}

static void spread_image(const void *gradient, Type type, Maps m, RoIs r, ptrdiff_t image, ptrdiff_t from,
                         Scratch scratch, void *features) {
    memset(scratch.map, 0, (size_t)(m.height * m.width * BLOCK) * sizeof(float));
    for (ptrdiff_t roi = 0; roi < r.count; roi++) {
        if (!find_roi(m, r, roi, image, scratch)) continue;
        read_any(gradient, type, bins_of(m, r, roi, from), scratch.bins);
        spread(m, r, scratch);
    }
    write_any(scratch.map, type, part_of(m, image, from), features);
}

/* Both directions: from features to the RoIs of one level, and from their gradient to that of the features. */
static int for_all_blocks(void (*work)(const void *, Type, Maps, RoIs, ptrdiff_t, ptrdiff_t, Scratch, void *),
                          const void *from, Type type, Maps m, RoIs r, int threads, void *to) {
    ptrdiff_t blocks = (m.channels + BLOCK - 1) / BLOCK;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        void *memory = malloc(scratch_bytes(m, r));
        failed = memory == NULL;
#pragma omp for
        for (ptrdiff_t task = 0; task < m.images * blocks; task++)
            if (memory) work(from, type, m, r, task / blocks, task % blocks * BLOCK, scratch_at(memory, m, r), to);
        free(memory);
    }
    return failed;
}

/*
 * pooled (count, channels, size, size) = RoIAlign of features (images, channels, height, width), both of one type,
 * where a RoI is of this level; the others are left as they are. Returns 0, or 1 without enough memory.
 */
int megdet_roi_align(const void *features, int type, ptrdiff_t images, ptrdiff_t channels, ptrdiff_t height,
                     ptrdiff_t width, int channels_last, const float *boxes, const int64_t *levels, ptrdiff_t count,
                     ptrdiff_t level, double scale, ptrdiff_t size, ptrdiff_t samples, int threads, void *pooled) {
    Maps m = {images, channels, height, width, channels_last};
    RoIs r = {boxes, levels, count, level, scale, size, samples};
    return for_all_blocks(pool_image, features, (Type)type, m, r, threads, pooled);
}

/* The gradient of the features, all of it, from that of pooled. Returns 0, or 1 without enough memory. */
int megdet_roi_align_backward(const void *gradient, int type, ptrdiff_t images, ptrdiff_t channels, ptrdiff_t height,
                              ptrdiff_t width, int channels_last, const float *boxes, const int64_t *levels,
                              ptrdiff_t count, ptrdiff_t level, double scale, ptrdiff_t size, ptrdiff_t samples,
                              int threads, void *features) {
    Maps m = {images, channels, height, width, channels_last};
    RoIs r = {boxes, levels, count, level, scale, size, samples};
    return for_all_blocks(spread_image, gradient, (Type)type, m, r, threads, features);
}
