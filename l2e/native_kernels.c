/* The one pass over activations that observing them takes on a CPU; see native_kernels.py.
 *
 * Sums are taken of DEPTH rows, of these sums in a slice, and of those over all slices, each in
 * float and row after row, as torch sums the rows of a slice. No product is fused with a sum, so
 * that every CPU gives the same bits.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "flags are found by their place in a word, lowest first"
#endif

enum { WIDTH = 512, DEPTH = 16, LINE = 64, WORD = 8 };

static void widen(const uint16_t *bfloat16, float *values, int width)
{
    for (int i = 0; i < width; i++) {
        const uint32_t bits = (uint32_t)bfloat16[i] << 16;
        memcpy(values + i, &bits, sizeof bits);
    }
}

static void move(float *from, float *to, int width)
{
    for (int i = 0; i < width; i++) {
        to[i] += from[i];
        from[i] = 0;
    }
}

/* Rows [top, bottom) and columns [first, last), at most WIDTH, of z [rows, neurons].
 *
 * Selected is what `mask` [rows, neurons] says, or without one each entry whose (z - mean)^2 is
 * not below `threshold` [neurons]; nothing where both are null. Of the selected entries the
 * numbers in z go to `entries` and z - mean to `deviations`, unless these are null. Added to
 * `sums` [3, neurons], unless null: z - mean, (z - mean)^2, and how many are selected.
 *
 * Returns the number of selected entries. `z` is of bfloat16 if `halves`, else of float;
 * `slice` is the number of rows of one, and `top` a multiple of it.
 */
int64_t observe(const void *z, int halves, int64_t neurons, int64_t top, int64_t bottom,
                int64_t first, int64_t last, int64_t slice, const float *mean,
                const float *threshold, const uint8_t *mask, float *sums, int64_t *entries,
                float *deviations)
{
    const int width = (int)(last - first);
    const size_t size = halves ? sizeof(uint16_t) : sizeof(float);
    float deep[3][WIDTH] = {{0}}, sliced[3][WIDTH] = {{0}};
    float widened[WIDTH], deviation[WIDTH], square[WIDTH];
    uint8_t selected[WIDTH] = {0};
    int64_t found = 0;

    for (int64_t row = top; row < bottom; row++) {
        const int64_t start = row * neurons + first;
        const char *bytes = (const char *)z + start * size;
        for (size_t ahead = 0; ahead < width * size && row + 1 < bottom; ahead += LINE)
            __builtin_prefetch(bytes + neurons * size + ahead);
        if (halves)
            widen((const uint16_t *)bytes, widened, width);
        const float *values = halves ? widened : (const float *)bytes;

        for (int i = 0; i < width; i++) {
            deviation[i] = values[i] - mean[first + i];
            square[i] = deviation[i] * deviation[i];
            deep[0][i] += deviation[i];
            deep[1][i] += square[i];
        }
        if (mask)
            memcpy(selected, mask + start, width);
        else if (threshold)
            for (int i = 0; i < width; i++)
                selected[i] = square[i] >= threshold[first + i];

        for (int i = 0; i < width; i += WORD) {
            uint64_t flags;
            memcpy(&flags, selected + i, WORD);
            for (; flags; flags &= flags - 1) {
                const int column = i + __builtin_ctzll(flags) / 8;
                deep[2][column]++;
                if (entries) {
                    entries[found] = start + column;
                    deviations[found] = deviation[column];
                }
                found++;
            }
        }

        const int ends = row + 1 == bottom || (row + 1) % slice == 0;
        for (int k = 0; sums && k < 3; k++) {
            if (ends || (row % slice + 1) % DEPTH == 0)
                move(deep[k], sliced[k], width);
            if (ends)
                move(sliced[k], sums + k * neurons + first, width);
        }
    }
    return found;
}
