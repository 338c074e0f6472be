// The library: what the processor can, leaves from their descriptions, and decoding for callers on the host.
#include "library.h"

#include <stdlib.h>
#include <string.h>

Tables btc_tables;
const Kernels *btc_kernels = &btc_kernels_portable;

// Sets the meaning of headers, which is written down in btc_jax/formats/multilevel.py, and tells the instruction set.
EXPORTED const char *btc_start(const uint8_t *widths, const float *halves, const float *middles, const char *most) {
  memcpy(btc_tables.widths, widths, sizeof btc_tables.widths);
  memcpy(btc_tables.halves, halves, sizeof btc_tables.halves);
  memcpy(btc_tables.middles, middles, sizeof btc_tables.middles);
  btc_kernels = &btc_kernels_portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !strcmp(most, "avx512")) return btc_kernels = &btc_kernels_avx512, "avx512";
  if (avx2 && strcmp(most, "portable")) return btc_kernels = &btc_kernels_avx2, "avx2";
#endif
  (void)most;
  return "portable";
}

int btc_read_leaf(const int64_t *spec, void *const *arrays, int64_t piece, Leaf *leaf) {
  *leaf = (Leaf){.kind = (int)spec[0],
                 .block_size = (int)spec[1],
                 .rounding = (int)spec[2],
                 .size = spec[3],
                 .blocks = spec[4],
                 .low = (int)spec[5],
                 .high = (int)spec[6],
                 .extremes_are_float32 = (int)spec[7],
                 .planes = (int)spec[9]};
  int mixed = (int)spec[8], n = 0;
  for (const int64_t *p = spec + 10; n < leaf->planes; n++, p += 4) {
    int64_t rows = p[0], words = p[1];
    int end = rows ? (int)p[3] : 99;  // no block has a row where there is none
    leaf->plane[n] = (Plane){(const uint32_t *)arrays[n] + piece * rows * words, rows, (int)words, (int)p[2], end,
                             rows == leaf->blocks};
  }
  if (leaf->kind == MULTILEVEL) {
    leaf->centre = ((const float *)arrays[n])[piece];
    leaf->header = (const uint8_t *)arrays[n + 1] + piece * leaf->blocks;
    leaf->step = ((const float *)arrays[n + 2])[piece];
    n += 3;
  } else {
    int64_t start = piece * leaf->blocks * (leaf->extremes_are_float32 ? 4 : 2);
    leaf->maximum = (const char *)arrays[n++] + start;
    leaf->minimum = (const char *)arrays[n++] + start;
    if (mixed) leaf->wide = (const uint8_t *)arrays[n++] + piece * ((leaf->blocks + 7) / 8);
  }
  static const uint16_t seal[2] = {0x50b1, 0xa24c};  // see btc_jax/seal.py
  leaf->intact = !memcmp((const uint16_t *)arrays[n] + 2 * piece, seal, sizeof seal);
  return n + 1;
}

enum { SCRATCH = 4096, PART = 1 << 16 };  // weights decoded at once; weights of a part

int btc_begin(const int64_t *spec, void *const *arrays, const int64_t *more, void *out, Decoding *d) {
  *d = (Decoding){.pieces = more[0], .to = (int)more[1], .shape = {more[2], more[3], more[4]}, .out = out};
  int64_t blocks = spec[4], size = spec[3], cursors;
  if (d->shape.length) {
    d->step = PART / d->shape.length / 64 * 64 + 64;  // whole lines of what is written
    d->parts = (d->shape.count + d->step - 1) / d->step;
    cursors = d->shape.count;
  } else {
    d->step = PART / spec[1];
    d->parts = cursors = (blocks + d->step - 1) / d->step;
  }
  Leaf *leaves = malloc((size_t)d->pieces * sizeof *leaves);
  Cursor *at = malloc((size_t)(d->pieces * cursors) * sizeof *at);
  d->leaves = leaves, d->cursors = at;
  if (!leaves || !at) return btc_end(d), 0;
  for (int64_t piece = 0; piece < d->pieces; piece++) {
    btc_read_leaf(spec, arrays, piece, &leaves[piece]);
    Cursor cursor = {0};
    for (int64_t i = 0; i < cursors; i++) {
      int64_t block = d->shape.length ? i * (size / d->shape.count) / spec[1] : i * d->step;
      btc_kernels->advance(&leaves[piece], &cursor, block);
      at[piece * cursors + i] = cursor;
    }
  }
  return 1;
}

void btc_end(Decoding *d) { free((void *)d->leaves), free((void *)d->cursors); }

void btc_decode_part(void *work, int64_t number) {
  const Decoding *d = work;
  int64_t piece = number / d->parts, part = number % d->parts, first = part * d->step;
  const Leaf *leaf = &d->leaves[piece];
  char *out = (char *)d->out + piece * leaf->size * (d->to == FLOAT32 ? 4 : 2);
  if (d->shape.length) {
    int64_t last = first + d->step < d->shape.count ? first + d->step : d->shape.count;
    btc_kernels->columns(leaf, d->cursors + piece * d->shape.count, d->shape, first, last, d->to, out);
    return;
  }
  Cursor at = d->cursors[number];
  int64_t start = first * leaf->block_size, end = start + d->step * leaf->block_size;
  if (end > leaf->size) end = leaf->size;
  if (d->to == FLOAT32) {
    btc_kernels->part(leaf, &at, start, end - start, (float *)out + start);
    return;
  }
  float scratch[SCRATCH];
  for (int64_t count; start < end; start += count) {
    count = end - start < SCRATCH ? end - start : SCRATCH;
    btc_kernels->part(leaf, &at, start, count, scratch);
    btc_kernels->narrow(scratch, count, (uint16_t *)out + start);
  }
}

// Decodes all weights on the host. Returns whether there was memory for it.
EXPORTED int btc_decode(const int64_t *spec, void *const *arrays, const int64_t *more, void *out) {
  Decoding decoding;
  if (!btc_begin(spec, arrays, more, out, &decoding)) return 0;
  for (int64_t part = 0; part < decoding.pieces * decoding.parts; part++) btc_decode_part(&decoding, part);
  btc_end(&decoding);
  return 1;
}
