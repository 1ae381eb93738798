/*
 * Non-maximum suppression on CPUs: what torchvision's operator does with the boxes of one image and level, for all of
 * them in one call, with the same arithmetic, so that the same boxes are kept.
 *
 * A box that is kept is compared with all that come after it at once, in vector code; torchvision compares one pair at a
 * time, and each of its calls sorts and copies the boxes in a dozen operators.
 */
#include <math.h>
#include <stdlib.h>

#include "numbers_cpu.h"

enum { COORDINATES = 4 };

/* The boxes of an image and level, each coordinate and the areas in an array of its own. */
typedef struct {
    float *x1, *y1, *x2, *y2, *area;
    int32_t *suppressed;
} Boxes;

static Boxes boxes_at(float *values, int32_t *suppressed, ptrdiff_t first, ptrdiff_t all) {
    float *start = values + first;
    return (Boxes){start, start + all, start + 2 * all, start + 3 * all, start + 4 * all, suppressed + first};
}

FOR_EVERY_CPU static void suppress(const float *boxes, ptrdiff_t count, float limit, Boxes b, uint8_t *kept) {
    for (ptrdiff_t i = 0; i < count; i++, boxes += COORDINATES) {
        b.x1[i] = boxes[0], b.y1[i] = boxes[1], b.x2[i] = boxes[2], b.y2[i] = boxes[3];
        b.area[i] = (b.x2[i] - b.x1[i]) * (b.y2[i] - b.y1[i]);
        b.suppressed[i] = 0;
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        kept[i] = !b.suppressed[i];
        if (!kept[i]) continue;
        float x1 = b.x1[i], y1 = b.y1[i], x2 = b.x2[i], y2 = b.y2[i], area = b.area[i];
#pragma omp simd
        for (ptrdiff_t j = i + 1; j < count; j++) {
            float left = x1 > b.x1[j] ? x1 : b.x1[j], right = x2 < b.x2[j] ? x2 : b.x2[j];
            float top = y1 > b.y1[j] ? y1 : b.y1[j], bottom = y2 < b.y2[j] ? y2 : b.y2[j];
            float width = right > left ? right - left : 0, height = bottom > top ? bottom - top : 0;
            float shared = width * height;
            b.suppressed[j] |= shared / (area + b.area[j] - shared) > limit;
        }
    }
}

/* The largest float that is not above: no float lies between the two, so that both limits decide alike. */
static float rounded_down(double threshold) {
    float limit = (float)threshold;
    return limit > threshold ? nextafterf(limit, -INFINITY) : limit;
}

/* boxes (images, per_image, 4): those of the first level, sizes[0] of them, then of the next, ...; each by falling score.
 * kept (images, per_image). Returns 1 without memory. */
int megdet_suppress(const float *boxes, ptrdiff_t images, ptrdiff_t per_image, const int64_t *sizes, ptrdiff_t levels,
                    double threshold, int threads, uint8_t *kept) {
    ptrdiff_t all = images * per_image;
    if (!all) return 0;
    float *values = malloc((size_t)all * 5 * sizeof(float));
    int32_t *suppressed = malloc((size_t)all * sizeof(int32_t));
    if (values && suppressed) {
        float limit = rounded_down(threshold);
#pragma omp parallel for num_threads(threads)
        for (ptrdiff_t image = 0; image < images; image++) {
            ptrdiff_t first = image * per_image;
            for (ptrdiff_t level = 0; level < levels; first += sizes[level++])
                suppress(boxes + first * COORDINATES, sizes[level], limit, boxes_at(values, suppressed, first, all),
                         kept + first);
        }
    }
    int failed = !values || !suppressed;
    free(values);
    free(suppressed);
    return failed;
}
