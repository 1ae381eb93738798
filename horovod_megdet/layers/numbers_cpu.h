/*
 * Numbers in memory, of 32 and 16 bits, and in the registers of every CPU, where all are float32.
 *
 * The conversions are plain integer and float32 arithmetic without branches, which every compiler makes vector code of;
 * they round to nearest even, as torch does.
 */
#ifndef MEGDET_NUMBERS_CPU_H
#define MEGDET_NUMBERS_CPU_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
/* One binary for all CPUs of a cluster: the loader picks the best version that the CPU can run. These are levels of
 * instruction sets (AVX-512, AVX2); names of processors would match those and no later ones. */
#if __GNUC__ >= 12
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU __attribute__((target_clones("avx2", "default")))
#endif
#else
#define FOR_EVERY_CPU
#endif

#define INLINE static inline __attribute__((always_inline))

typedef enum { FLOAT32, BFLOAT16, FLOAT16 } Type;

INLINE size_t bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value), rounded = bits + 0x7FFF + (bits >> 16 & 1);
    rounded = (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : rounded; /* NaN */
    return (uint16_t)(rounded >> 16);
}

/* float16 has 5 bits of exponent: below 2^-14 its values are multiples of 2^-24, which the second branch adds to 1/2. */
INLINE float from_float16(uint16_t half) {
    uint32_t shifted = (uint32_t)half << 17;
    float normal = float_of((shifted >> 4) + (0xE0u << 23)) * 0x1p-112f;
    float subnormal = float_of(shifted >> 17 | 126u << 23) - 0.5f;
    uint32_t magnitude = shifted < 1u << 27 ? bits_of(subnormal) : bits_of(normal);
    return float_of(magnitude | (uint32_t)(half & 0x8000) << 16);
}

/* Adding a power of two that is 2^13 units of the value's own (or 2^-24) away rounds it to 10 bits of mantissa. */
INLINE uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value), shifted = bits << 1, exponent = shifted & 0xFF000000u;
    float magnitude = float_of(bits & 0x7FFFFFFF) * 0x1p112f * 0x1p-110f; /* over the largest float16: infinity */
    exponent = exponent < 0x71000000u ? 0x71000000u : exponent;
    uint32_t rounded = bits_of(float_of((exponent >> 1) + 0x07800000u) + magnitude);
    uint32_t half = (rounded >> 13 & 0x7C00) + (rounded & 0x0FFF);
    half = shifted > 0xFF000000u ? 0x7E00 : half; /* NaN */
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

/* values[i], and values[i] = value. The type is a constant wherever these are used, so that nothing is decided here. */
INLINE float get(const void *values, ptrdiff_t i, Type type) {
    if (type == FLOAT32) return ((const float *)values)[i];
    uint16_t half = ((const uint16_t *)values)[i];
    return type == BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

INLINE void put(void *values, ptrdiff_t i, Type type, float value) {
    if (type == FLOAT32)
        ((float *)values)[i] = value;
    else
        ((uint16_t *)values)[i] = type == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

INLINE ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

#endif
