// A packed leaf as the kernels see it, and the cursor that walks through its planes. See btc_jax/planes.py.
#ifndef BTC_LEAF_H
#define BTC_LEAF_H

#include <stdint.h>

enum { MOST_PLANES = 8, MOST_WEIGHTS = 256 };  // planes of a leaf; weights of a block
enum { MULTILEVEL = 0, UNIFORM = 1 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };

typedef struct {
  const uint32_t *words;  // `rows` rows of `row_words` words
  int64_t rows;
  int row_words, bits, end;  // bits of each code; a block has a row here if its width is at least `end`
  int every;                 // whether each block has its own row, present or not
} Plane;

typedef struct {
  int kind, block_size, planes, rounding;  // rounding: what the dtype of the leaf keeps of a weight
  int64_t size, blocks;                    // weights; number of blocks, the last possibly short
  int low, high;                           // the widths of a uniform leaf; the one width of a multilevel leaf, or -1
  Plane plane[MOST_PLANES];
  const uint8_t *header;  // multilevel: a byte for each block
  float step, centre;
  const void *minimum, *maximum;  // uniform: extremes of each block, float16 or float32
  const uint8_t *wide;            // a bit for each block; NULL where all have the same width
  int extremes_are_float32;
  int intact;  // whether the seal is; else every weight is NaN
} Leaf;

// The next row of each plane.
typedef struct {
  int64_t block, row[MOST_PLANES];
} Cursor;

// What the 256 headers of the multilevel format mean. The last index of `middles` is for leaves of one width, -1 is 9.
typedef struct {
  uint8_t widths[256];
  float halves[256], middles[10][256];
} Tables;
extern Tables btc_tables;

// A leaf as `count` rows of `length` weights, to be written as columns. Of a leaf of three axes, rows are of `count / inner`
// times `inner`, and columns of `inner` times `count / inner`; of a matrix, `inner` is 1.
typedef struct {
  int64_t count, length, inner;
} Columns;

// The functions of one instruction set.
typedef struct {
  // Moves a cursor on to a block.
  void (*advance)(const Leaf *, Cursor *, int64_t block);
  // Decodes so many blocks into whole blocks of floats, rounded as the leaf is.
  void (*decode)(const Leaf *, Cursor *, int64_t blocks, float *out);
  // y[r * outputs + o] = sum over i of x[r * inputs + i] * weight[o * inputs + i], for outputs from `first` to `last`.
  void (*multiply)(const Leaf *, Cursor *, const float *x, int64_t rows, int64_t inputs, int64_t outputs, int64_t first,
                   int64_t last, float *y);
  // Weights from `start` on, so many. The cursor may be at any block before.
  void (*part)(const Leaf *, Cursor *, int64_t start, int64_t count, float *out);
  // To the nearest bfloat16, or the even one of two.
  void (*narrow)(const float *in, int64_t count, uint16_t *out);
  // Columns `first` to `last` of a matrix whose columns are rows of weights, from a cursor at the start of each row.
  void (*columns)(const Leaf *, const Cursor *, Columns, int64_t first, int64_t last, int to, void *out);
} Kernels;

extern const Kernels btc_kernels_portable, btc_kernels_avx2, btc_kernels_avx512;

#endif
