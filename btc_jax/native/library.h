// What the entry points of the library share.
#ifndef BTC_LIBRARY_H
#define BTC_LIBRARY_H

#include "leaf.h"

#define EXPORTED __attribute__((visibility("default")))

extern const Kernels *btc_kernels;

// A leaf, or one of its pieces, from a description and its arrays, in the order of both in btc_jax/backends/native.py.
// Returns how many arrays it has.
int btc_read_leaf(const int64_t *spec, void *const *arrays, int64_t piece, Leaf *leaf);

// Work that is cut into parts; `run(work, part)` does one.
typedef void Run(void *work, int64_t part);

// All weights of some pieces, in parts: in the order of the blocks, or with rows as columns if `shape.length` is not 0.
typedef struct {
  const Leaf *leaves;
  const Cursor *cursors;  // of each piece: at each part, or at each row that becomes a column
  Columns shape;
  int64_t pieces, parts, step;  // parts of a piece; blocks of a part, or columns
  int to;                       // FLOAT32 or BFLOAT16
  void *out;
} Decoding;
void btc_decode_part(void *decoding, int64_t part);

// Plans a decoding, and makes its cursors. Returns 0 if memory runs out; else `btc_end` frees them.
int btc_begin(const int64_t *spec, void *const *arrays, const int64_t *more, void *out, Decoding *decoding);
void btc_end(Decoding *decoding);

#endif
