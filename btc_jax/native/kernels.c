// Decoding, and multiplying with what is decoded while it is in the cache. Compiled once for each instruction set, with
// vectors of the compiler's own kind (GCC and Clang), which it turns into whatever the processor has.
#include <math.h>
#include <string.h>

#include "leaf.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define PASTE(a, b) a##b
#define NAMED(a, b) PASTE(a, b)
#define EACH(i, n) for (int i = 0; i < (n); i++)

typedef float F8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t U8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint64_t U64 __attribute__((vector_size(32), aligned(8)));
typedef uint32_t U4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t I8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint8_t B32 __attribute__((vector_size(32)));
#define AT(type, place) (*(type *)(place))

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (I8){__VA_ARGS__})
#endif

// Each byte of a word eight times, out of a vector of copies of it.
#define EIGHT(i) i, i, i, i, i, i, i, i
#ifdef __clang__
#define SPREAD(a) __builtin_shufflevector(a, a, EIGHT(0), EIGHT(1), EIGHT(18), EIGHT(19))
#else
#define SPREAD(a) __builtin_shuffle(a, (B32){EIGHT(0), EIGHT(1), EIGHT(18), EIGHT(19)})
#endif

#define U64_OF(x) ((U64){x, x, x, x})
static inline F8 all(float x) { return (F8){x, x, x, x, x, x, x, x}; }
static inline float least(float a, float b) { return a < b ? a : b; }

static float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  float x;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else {  // subnormal
    x = (float)rest * 0x1p-24f;
    memcpy(&bits, &x, 4);
  }
  bits |= sign;
  memcpy(&x, &bits, 4);
  return x;
}

static inline U8 to_bfloat16(F8 x) {
  U8 bits = (U8)x;
  U8 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  U8 nan = (U8)(x != x);
  return (rounded & ~nan) | (nan & (bits >> 16 | 0x40));
}

static inline F8 kept(F8 x, int rounding) { return rounding == BFLOAT16 ? (F8)(to_bfloat16(x) << 16) : x; }

// The width of a block.
static inline int width_of(const Leaf *leaf, int64_t block) {
  if (leaf->kind == MULTILEVEL) return leaf->low >= 0 ? leaf->low : btc_tables.widths[leaf->header[block]];
  return leaf->wide && !(leaf->wide[block >> 3] >> (block & 7) & 1) ? leaf->low : leaf->high;
}

static inline int64_t sum_of_bytes(B32 bytes) {
  U64 eights = (U64)bytes, low = U64_OF(0x00ff00ff00ff00ff);
  U64 sums = ((eights & low) + (eights >> 8 & low)) * U64_OF(0x0001000100010001) >> 48;
  return (int64_t)(sums[0] + sums[1] + sums[2] + sums[3]);
}

// How many blocks from one to another are in each plane.
static void count_rows(const Leaf *leaf, int64_t from, int64_t block, int64_t count[MOST_PLANES]) {
  int64_t blocks = block - from;
  EACH(k, MOST_PLANES) count[k] = 0;
  int mixed = leaf->kind == MULTILEVEL ? leaf->low < 0 : leaf->wide != NULL;
  if (!mixed) {
    EACH(k, MOST_PLANES) count[k] = blocks;
  } else if (leaf->kind == MULTILEVEL) {
    const uint8_t *header = leaf->header + from;
    int64_t i = 0;
    while (i < blocks) {  // at most 255 times, so that bytes can count
      int64_t end = i + 32 * 255 < blocks ? i + 32 * 255 : blocks;
      B32 more[MOST_PLANES] = {0};
      for (; i < end; i += 32) {
        B32 h = {0};  // a block of header 0 is in no plane
        if (end - i >= 32) memcpy(&h, header + i, 32);
        else memcpy(&h, header + i, (size_t)(end - i));
        B32 escaped = (B32)(h - 1 < 7);  // headers 1 to 7, of 8 bits
        more[0] -= (B32)(h != 0);
        for (int k = 1; k < MOST_PLANES; k++) more[k] -= (B32)(h >= (uint8_t)(32 * k)) | escaped;
      }
      EACH(k, MOST_PLANES) count[k] += sum_of_bytes(more[k]);
    }
  } else {
    int64_t i = from, wide = 0;
    for (; i < block && i & 7; i++) wide += leaf->wide[i >> 3] >> (i & 7) & 1;
    for (; i + 8 <= block; i += 8) wide += __builtin_popcount(leaf->wide[i >> 3]);
    for (; i < block; i++) wide += leaf->wide[i >> 3] >> (i & 7) & 1;
    EACH(k, leaf->planes) count[k] = leaf->plane[k].end > leaf->low ? wide : blocks;
  }
}

static void advance(const Leaf *leaf, Cursor *at, int64_t block) {
  int64_t count[MOST_PLANES];
  count_rows(leaf, at->block, block, count);
  EACH(k, leaf->planes) at->row[k] += leaf->plane[k].every ? block - at->block : count[k];
  at->block = block;
}

// Words that repeat in a vector, as far as they interleave.
static inline U8 words_1(const uint32_t *row) { return (U8){0} + row[0]; }
static inline U8 words_2(const uint32_t *row) {
  uint64_t two;
  memcpy(&two, row, 8);
  return (U8)((U64){0} + two);
}
static inline U8 words_4(const uint32_t *row) {
  U4 four;
  memcpy(&four, row, 16);
  return (U8){four[0], four[1], four[2], four[3], four[0], four[1], four[2], four[3]};
}
static inline U8 words_8(const uint32_t *row) {
  return AT(const U8, row);
}
static const U8 lanes_1 = {0, 1, 2, 3, 4, 5, 6, 7}, lanes_2 = {0, 0, 1, 1, 2, 2, 3, 3}, lanes_4 = {0, 0, 0, 0, 1, 1, 1, 1},
                lanes_8 = {0};

// A row of words that interleave in runs of J, to the codes of a block, eight in a vector: see planes.py.
#define FIELD(J, BITS)                                                                                       \
  static inline __attribute__((always_inline)) void field_##J##_##BITS(const uint32_t *row, int size, U8 *codes) { \
    EACH(v, size / 8) {                                                                                      \
      int run = 8 * v * (BITS) / (32 * (J)), first = 8 * v / (J) - run * (32 / (BITS));                      \
      U8 shift = lanes_##J * (BITS) + (uint32_t)((BITS) * first);                                            \
      U8 value = words_##J(row + run * (J)) >> shift & ((1u << (BITS)) - 1);                                 \
      codes[v] = codes[v] << (BITS) | value;                                                                 \
    }                                                                                                        \
  }
FIELD(1, 1) FIELD(2, 1) FIELD(4, 1) FIELD(8, 1)
FIELD(1, 2) FIELD(2, 2) FIELD(4, 2) FIELD(8, 2)
FIELD(1, 4) FIELD(2, 4) FIELD(4, 4) FIELD(8, 4)
FIELD(1, 8) FIELD(2, 8) FIELD(4, 8) FIELD(8, 8)

static inline __attribute__((always_inline)) void field(const Plane *plane, const uint32_t *row, int size, U8 *codes) {
  int run = plane->row_words & -plane->row_words;  // gcd(words, 8)
  switch ((run > 8 ? 8 : run) * 16 + plane->bits) {
#define CASE(J, BITS) \
  case (J)*16 + (BITS): field_##J##_##BITS(row, size, codes); break;
    CASE(1, 1) CASE(2, 1) CASE(4, 1) CASE(8, 1)
    CASE(1, 2) CASE(2, 2) CASE(4, 2) CASE(8, 2)
    CASE(1, 4) CASE(2, 4) CASE(4, 4) CASE(8, 4)
    CASE(1, 8) CASE(2, 8) CASE(4, 8) CASE(8, 8)
  }
}

static inline const uint32_t *row_at(const Plane *plane, int64_t row) {
  if (row >= plane->rows) row = plane->rows - 1;  // only in a leaf that was forged
  return plane->words + row * plane->row_words;
}

// The grid of a block of the multilevel format: level = code * scale + shift, and a cubic of it.
static inline void cubic_grid(const Leaf *leaf, int64_t block, int width, float grid[5]) {
  int header = leaf->header[block];
  float half = leaf->step * btc_tables.halves[header], n = (float)(1 << width);
  grid[0] = 2 / n, grid[1] = (1 - n) / n, grid[2] = 0.75f * half, grid[3] = 0.25f * half;
  grid[4] = leaf->centre + half * btc_tables.middles[leaf->low < 0 ? 9 : leaf->low][header];
}

static inline F8 cubic_level(F8 code, const float grid[5]) {
  F8 u = code * all(grid[0]) + all(grid[1]);
  return all(grid[4]) + u * (all(grid[2]) + all(grid[3]) * (u * u));
}

static inline void even_grid(const Leaf *leaf, int64_t block, int width, float grid[2]) {
  float low, high;
  if (leaf->extremes_are_float32) {
    low = ((const float *)leaf->minimum)[block], high = ((const float *)leaf->maximum)[block];
  } else {
    low = from_half(((const uint16_t *)leaf->minimum)[block]), high = from_half(((const uint16_t *)leaf->maximum)[block]);
  }
  float step = (high - low) / (float)((1 << width) - 1);
  grid[0] = step < 0x1p-126f ? 0 : step, grid[1] = low;
}

// Of any format: codes in vectors of words. The size of a block is a constant where this is inlined.
static inline __attribute__((always_inline)) void decode_words(const Leaf *leaf, Cursor *at, int64_t blocks, float *out,
                                                               int size) {
  int kind = leaf->kind;
  for (int64_t b = 0; b < blocks; b++, at->block++, out += size) {
    int width = width_of(leaf, at->block), total = 0;
    U8 codes[MOST_WEIGHTS / 8];
    EACH(v, size / 8) codes[v] = (U8){0};
    EACH(k, leaf->planes) {
      const Plane *plane = &leaf->plane[k];
      int present = width >= plane->end;
      if (present) field(plane, row_at(plane, at->row[k]), size, codes), total = plane->end;
      at->row[k] += present | plane->every;
    }
    if (total > width) EACH(v, size / 8) codes[v] >>= (uint32_t)(total - width);
    float grid[5];
    if (kind == MULTILEVEL) {
      cubic_grid(leaf, at->block, width, grid);
      EACH(v, size / 8) {
        AT(F8, out + 8 * v) = cubic_level(__builtin_convertvector((I8)codes[v], F8), grid);
      }
    } else {
      even_grid(leaf, at->block, width, grid);
      EACH(v, size / 8) {
        AT(F8, out + 8 * v) = all(grid[1]) + __builtin_convertvector((I8)codes[v], F8) * all(grid[0]);
      }
    }
  }
}

static void decode_any(const Leaf *leaf, Cursor *at, int64_t blocks, float *out) {
  switch (leaf->block_size) {
    case 32: decode_words(leaf, at, blocks, out, 32); break;
    case 64: decode_words(leaf, at, blocks, out, 64); break;
    case 128: decode_words(leaf, at, blocks, out, 128); break;
    default: decode_words(leaf, at, blocks, out, leaf->block_size);
  }
}

// Twice the codes, plus the bits of a word.
static inline B32 appended(B32 codes, uint32_t word) {
#ifdef __AVX512BW__
  __m256i twice = (__m256i)(codes + codes);
  return (B32)_mm256_mask_sub_epi8(twice, word, twice, _mm256_set1_epi8(-1));
#else
  const B32 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                   1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  B32 bytes = SPREAD((B32)((U8){0} + word));
  return codes + codes - (B32)((bytes & bit) == bit);
#endif
}

// Of the usual format, planes of one bit and blocks of 32: codes in bytes. No branch on the width of a block, which cannot
// be foreseen: a plane that it has no row in gives zeros, and the scale makes up for them.
static inline __attribute__((always_inline)) void decode_bits(const Leaf *leaf, const Cursor *at, int64_t blocks,
                                                              float *out, int planes) {
  const uint32_t *next[MOST_PLANES];
  const uint8_t *headers = leaf->header + at->block;
  EACH(k, planes) next[k] = leaf->plane[k].words + at->row[k];
  for (int64_t b = 0; b < blocks; b++, out += 32) {
    int header = headers[b], width = btc_tables.widths[header];
    B32 codes = {0};
    EACH(k, planes) {
      uint32_t present = width > k;
      codes = appended(codes, *next[k] & -present);
      next[k] += present;
    }
    float half = leaf->step * btc_tables.halves[header], n = (float)(1 << width);
    float grid[5] = {2 / (n * (float)(1 << (planes - width))), (1 - n) / n, 0.75f * half, 0.25f * half};
    grid[4] = leaf->centre + half * btc_tables.middles[9][header];
    int32_t wide[32];
    EACH(i, 32) wide[i] = codes[i];
    EACH(v, 4) AT(F8, out + 8 * v) = cubic_level(__builtin_convertvector(AT(I8, wide + 8 * v), F8), grid);
  }
}

static void decode_usual(const Leaf *leaf, Cursor *at, int64_t blocks, float *out) {
  for (int64_t lot; blocks; blocks -= lot, out += 32 * lot) {  // with as many planes as one of its blocks has
    lot = blocks < 64 ? blocks : 64;
    int64_t count[MOST_PLANES];
    count_rows(leaf, at->block, at->block + lot, count);
    int widest = 0, usual = 1;
    EACH(k, MOST_PLANES) {
      const Plane *plane = &leaf->plane[k];
      if (!count[k]) continue;
      widest = k + 1;
      usual &= k < leaf->planes && at->row[k] + count[k] < plane->rows && (!plane->every || count[k] == lot);
    }
    if (!usual) {  // a plane with room for others, its last row, or a leaf that was forged
      decode_words(leaf, at, lot, out, 32);
      continue;
    }
    switch (widest) {
#define OF(n) \
  case n: decode_bits(leaf, at, lot, out, n); break;
      OF(0) OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8)
    }
    at->block += lot;
    EACH(k, leaf->planes) at->row[k] += leaf->plane[k].every ? lot : count[k];
  }
}

static void decode(const Leaf *leaf, Cursor *at, int64_t blocks, float *out) {
  int64_t count = blocks * leaf->block_size;
  if (!leaf->intact) {
    for (int64_t i = 0; i < count; i++) out[i] = NAN;
    return;
  }
  if (leaf->kind == MULTILEVEL && leaf->low < 0 && leaf->block_size == 32) {
    decode_usual(leaf, at, blocks, out);
  } else {
    decode_any(leaf, at, blocks, out);
  }
  if (leaf->rounding != FLOAT32) {
    for (int64_t i = 0; i < count; i += 8) {
      AT(F8, out + i) = kept(AT(F8, out + i), leaf->rounding);
    }
  }
}

enum { SCRATCH = 4096 };  // floats decoded at once: 16 KiB, which stay in the nearest cache

// Weights from `start` on. The cursor moves to the block of the next weight, which may be the last that was decoded.
static void part(const Leaf *leaf, Cursor *at, int64_t start, int64_t count, float *out) {
  float scratch[MOST_WEIGHTS];
  int64_t size = leaf->block_size, skipped = start % size;
  advance(leaf, at, start / size);
  while (count > 0) {
    int64_t whole = count / size;
    if (skipped == 0 && whole > 0) {
      decode(leaf, at, whole, out);
      out += whole * size, count -= whole * size;
      continue;
    }
    int64_t here = size - skipped < count ? size - skipped : count;
    Cursor before = *at;
    decode(leaf, at, 1, scratch);
    memcpy(out, scratch + skipped, (size_t)here * sizeof *out);
    if (skipped + here < size) *at = before;
    skipped = 0, out += here, count -= here;
  }
}

static inline float sum(F8 x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// Of so many rows of x the products with one row of weights, in so many sums that do not wait for each other.
static inline __attribute__((always_inline)) void products(const float *w, const float *x, int rows, int64_t stride,
                                                           int64_t count, float *y, int64_t apart, int sums) {
  F8 sum_of[4][4] = {0};
  int64_t i = 0, step = 8 * sums;
  for (; i + step <= count; i += step)
    EACH(s, sums) {
      F8 weights = AT(const F8, w + i + 8 * s);
      EACH(r, rows) sum_of[r][s] += weights * AT(const F8, x + r * stride + i + 8 * s);
    }
  EACH(r, rows) {
    float rest = 0;
    for (int64_t j = i; j < count; j++) rest += w[j] * x[r * stride + j];
    for (int s = 1; s < sums; s++) sum_of[r][0] += sum_of[r][s];
    y[r * apart] += sum(sum_of[r][0]) + rest;
  }
}

static void multiply(const Leaf *leaf, Cursor *at, const float *x, int64_t rows, int64_t inputs, int64_t outputs,
                     int64_t first, int64_t last, float *y) {
  float scratch[SCRATCH];
  int64_t size = leaf->block_size, here = first * inputs, end = last * inputs;
  for (int64_t r = 0; r < rows; r++) memset(y + r * outputs + first, 0, (size_t)(last - first) * 4);
  advance(leaf, at, here / size);
  while (here < end) {
    int64_t start = at->block * size, blocks = (end - start + size - 1) / size;
    if (blocks > SCRATCH / size) blocks = SCRATCH / size;
    decode(leaf, at, blocks, scratch);
    int64_t until = start + blocks * size < end ? start + blocks * size : end;
    while (here < until) {
      int64_t output = here / inputs, input = here % inputs;
      int64_t count = inputs - input < until - here ? inputs - input : until - here;
      const float *w = scratch + (here - start), *row = x + input;
      float *to = y + output;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) products(w, row + r * inputs, 4, inputs, count, to + r * outputs, outputs, 2);
      for (; r < rows; r++) products(w, row + r * inputs, 1, inputs, count, to + r * outputs, outputs, 4);
      here += count;
    }
  }
}

static inline uint16_t bfloat16_of(float x) { return (uint16_t)to_bfloat16(all(x))[0]; }

static void narrow(const float *in, int64_t count, uint16_t *out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    U8 bits = to_bfloat16(AT(const F8, in + i));
    EACH(j, 8) out[i + j] = (uint16_t)bits[j];
  }
  for (; i < count; i++) out[i] = bfloat16_of(in[i]);
}

// Eight rows of eight columns: pairs, fours and eights change places.
static inline __attribute__((always_inline)) void transpose_square(const float *in, int64_t columns, float *out,
                                                                   int64_t stride) {
  F8 v[8], w[8];
  EACH(i, 8) v[i] = AT(const F8, in + i * columns);
  EACH(i, 4) {
    w[2 * i] = SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    w[2 * i + 1] = SHUFFLE(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  EACH(i, 2) EACH(j, 2) {
    v[4 * i + j] = SHUFFLE(w[4 * i + j], w[4 * i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    v[4 * i + j + 2] = SHUFFLE(w[4 * i + j], w[4 * i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  EACH(j, 4) {
    AT(F8, out + j * stride) = SHUFFLE(v[j], v[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    AT(F8, out + (j + 4) * stride) = SHUFFLE(v[j], v[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

enum { HIGH = 64, WIDE = 256 };  // rows and columns that are decoded before they are written as columns

static void store(const float *in, int64_t rows, int64_t columns, int to, void *out, int64_t stride) {
  int64_t wide = to == FLOAT32 ? columns / 8 * 8 : 0, high = rows / 8 * 8;
  float *floats = out;
  uint16_t *halves = out;
  for (int64_t c = 0; c < wide; c += 8)
    for (int64_t r = 0; r < high; r += 8) transpose_square(in + r * WIDE + c, WIDE, floats + c * stride + r, stride);
  for (int64_t c = 0; c < columns; c++)
    for (int64_t r = c < wide ? high : 0; r < rows; r++) {
      if (to == FLOAT32) floats[c * stride + r] = in[r * WIDE + c];
      else halves[c * stride + r] = bfloat16_of(in[r * WIDE + c]);
    }
}

static void columns(const Leaf *leaf, const Cursor *cursors, Columns shape, int64_t first, int64_t last, int to,
                    void *out) {
  float scratch[HIGH * WIDE];
  Cursor at[HIGH];
  int64_t row[HIGH], depth = shape.count / shape.inner;
  for (int64_t start = first; start < last; start += HIGH) {
    int64_t high = last - start < HIGH ? last - start : HIGH;
    for (int64_t i = 0; i < high; i++) {
      row[i] = (start + i) % depth * shape.inner + (start + i) / depth;
      at[i] = cursors[row[i]];
    }
    for (int64_t c = 0; c < shape.length; c += WIDE) {
      int64_t wide = shape.length - c < WIDE ? shape.length - c : WIDE;
      for (int64_t i = 0; i < high; i++) part(leaf, &at[i], row[i] * shape.length + c, wide, scratch + i * WIDE);
      store(scratch, high, wide, to, (char *)out + (c * shape.count + start) * (to == FLOAT32 ? 4 : 2), shape.count);
    }
  }
}

const Kernels NAMED(btc_kernels_, ISA) = {advance, decode, multiply, part, narrow, columns};
