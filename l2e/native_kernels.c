/* The one pass over activations that observing them takes on a CPU, and the gradient of those that
 * it found; see native_kernels.py.
 *
 * Sums are taken of DEPTH rows, of these sums in a slice, and of those over all slices, each in
 * float and row after row, as torch sums the rows of a slice. No product is fused with a sum, so
 * that every CPU gives the same bits.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "flags are found by their place in a word, lowest first"
#endif

enum { WIDTH = 512, DEPTH = 16, LINE = 64, WORD = 8, AHEAD = 32 };

static float widened(uint16_t bfloat16)
{
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t rounded(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (isnan(value))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void widen(const uint16_t *bfloat16, float *values, int width)
{
    for (int i = 0; i < width; i++)
        values[i] = widened(bfloat16[i]);
}

/* A bit of each of 64 bytes that are 0 or 1; the product puts those of a word side by side. */
static uint64_t packed(const uint8_t *flags)
{
    uint64_t bits = 0, word;
    for (int i = 0; i < 8; i++) {
        memcpy(&word, flags + i * WORD, WORD);
        bits |= (word * 0x0102040810204080 >> 56) << 8 * i;
    }
    return bits;
}

static void move(float *from, float *to, int width)
{
    for (int i = 0; i < width; i++) {
        to[i] += from[i];
        from[i] = 0;
    }
}

/* The product with one more factor, whose logarithm goes to `logs` before it leaves the range of a
 * double: one logarithm for many factors. */
static double multiplied(double product, float factor, double *logs)
{
    product *= factor;
    if (product > 1e-200 && product < 1e200)
        return product;
    *logs += log(product);
    return 1;
}

/* Rows [top, bottom) and columns [first, last), at most WIDTH, of z [rows, neurons].
 *
 * Selected is what `mask` [rows, neurons] says, or without one each entry whose (z - mean)^2 is
 * not below `threshold` [neurons]; nothing where both are null. Of the selected entries the
 * numbers in z go to `entries`, and to `values` what `substitute` [neurons] has for them or, where
 * that is null, half of d log (z - mean)^2 / dz; unless `entries` is null. That is (z - mean) over
 * its square, or over `least` [neurons] where the square is less and the logarithm goes over into
 * a quadratic of the same value and slope (null: so tiny that it is no number beneath). Added to
 * `sums` [3, neurons], unless null: z - mean, (z - mean)^2, and how many are selected; and to
 * `logs` the selected entries' log (z - mean)^2, where slopes are asked for.
 *
 * Returns the number of selected entries. `z` is of bfloat16 if `halves`, else of float;
 * `slice` is the number of rows of one, and `top` a multiple of it.
 */
int64_t observe(const void *z, int halves, int64_t neurons, int64_t top, int64_t bottom,
                int64_t first, int64_t last, int64_t slice, const float *mean,
                const float *threshold, const uint8_t *mask, const float *least,
                const float *substitute, float *sums, int32_t *entries, float *values,
                double *logs)
{
    const int width = (int)(last - first);
    const size_t size = halves ? sizeof(uint16_t) : sizeof(float);
    float deep[3][WIDTH] = {{0}}, sliced[3][WIDTH] = {{0}};
    float wide[WIDTH], deviation[WIDTH], square[WIDTH];
    uint8_t selected[WIDTH] = {0};
    double product = 1;
    int64_t found = 0;

    for (int64_t row = top; row < bottom; row++) {
        const int64_t start = row * neurons + first;
        const char *bytes = (const char *)z + start * size;
        for (size_t ahead = 0; ahead < width * size && row + 1 < bottom; ahead += LINE)
            __builtin_prefetch(bytes + neurons * size + ahead);
        if (halves)
            widen((const uint16_t *)bytes, wide, width);
        const float *activations = halves ? wide : (const float *)bytes;

        for (int i = 0; i < width; i++) {
            deviation[i] = activations[i] - mean[first + i];
            square[i] = deviation[i] * deviation[i];
            deep[0][i] += deviation[i];
            deep[1][i] += square[i];
        }
        if (mask)
            memcpy(selected, mask + start, width);
        else if (threshold)
            for (int i = 0; i < width; i++)
                selected[i] = square[i] >= threshold[first + i];

        for (int i = 0; i < width; i += 8 * WORD)
            for (uint64_t bits = packed(selected + i); bits; bits &= bits - 1) {
                const int column = i + __builtin_ctzll(bits);
                deep[2][column]++;
                if (entries)
                    entries[found] = (int32_t)(start + column);
                if (entries && substitute)
                    values[found] = substitute[first + column];
                else if (entries) {
                    const float floor = least ? least[first + column] : FLT_MIN;
                    const int below = square[column] < floor;
                    const float divisor = below ? floor : square[column];
                    values[found] = deviation[column] / divisor;
                    if (below && least)
                        *logs += square[column] / floor - 1;
                    product = multiplied(product, divisor, logs);
                }
                found++;
            }

        const int ends = row + 1 == bottom || (row + 1) % slice == 0;
        for (int k = 0; sums && k < 3; k++) {
            if (ends || (row % slice + 1) % DEPTH == 0)
                move(deep[k], sliced[k], width);
            if (ends)
                move(sliced[k], sums + k * neurons + first, width);
        }
    }
    if (product != 1)
        *logs += log(product);
    return found;
}

static float gelu_slope(float x, int by_tanh)
{
    if (by_tanh) {
        const float k = 0.7978845608f, c = 0.044715f; /* sqrt(2 / pi) */
        const float t = tanhf(k * (x + c * x * x * x));
        return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * k * (1 + 3 * c * x * x);
    }
    const float density = 0.3989422804f * expf(-0.5f * x * x); /* 1 / sqrt(2 pi) */
    return 0.5f * (1 + erff(0.7071067812f * x)) + x * density;
}

/* The gradient to some entries of `pre`, in `to_pre`: gelu'(pre) (scale grad + factor value).
 *
 * `entries` [count] are their numbers, `values` [count] theirs; null: 0.
 */
void correct(const void *grad, const void *pre, int halves, int by_tanh, const int32_t *entries,
             const float *values, int64_t count, float scale, float factor, void *to_pre)
{
    const size_t size = halves ? sizeof(uint16_t) : sizeof(float);
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count) { /* these lie apart: a CPU does not see them coming */
            const size_t far = entries[i + AHEAD] * size;
            __builtin_prefetch((const char *)grad + far);
            __builtin_prefetch((const char *)pre + far);
            __builtin_prefetch((const char *)to_pre + far, 1);
        }
        const int32_t e = entries[i];
        const float x = halves ? widened(((const uint16_t *)pre)[e]) : ((const float *)pre)[e];
        const float g = halves ? widened(((const uint16_t *)grad)[e]) : ((const float *)grad)[e];
        const float to_z = scale * g + (values ? factor * values[i] : 0);
        const float gradient = to_z * gelu_slope(x, by_tanh);
        if (halves)
            ((uint16_t *)to_pre)[e] = rounded(gradient);
        else
            ((float *)to_pre)[e] = gradient;
    }
}
