// The entry points for XLA. Each takes one attribute, the description of the leaf and what the call is about.
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "library.h"
#include "xla/ffi/api/c_api.h"

typedef XLA_FFI_CallFrame Frame;

static XLA_FFI_Error *failed(const Frame *frame, XLA_FFI_Error_Code code, const char *message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

// XLA asks which version a handler was written for.
static int answers_version(const Frame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

// Work shared by threads of XLA's pool: each takes the next part until none is left. It is freed by the last
// that lets go of it: a thread may come when all is done.
typedef struct {
  Run *run;
  void *work;
  int64_t parts;
  atomic_llong next, done;
  atomic_int holders;
} Shared;

static void let_go(Shared *shared) {
  if (atomic_fetch_sub(&shared->holders, 1) == 1) free(shared);
}

static void help(Shared *shared) {
  for (int64_t part; (part = atomic_fetch_add(&shared->next, 1)) < shared->parts;) {
    shared->run(shared->work, part);
    atomic_fetch_add(&shared->done, 1);
  }
}

static void task(void *data) {
  help(data);
  let_go(data);
}

static void in_parallel(const Frame *frame, int64_t parts, Run *run, void *work) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args asked = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &threads};
  XLA_FFI_Error *error = parts > 1 ? frame->api->XLA_FFI_ThreadPool_NumThreads(&asked) : NULL;
  Shared *shared = parts > 1 && !error && threads > 1 ? malloc(sizeof *shared) : NULL;
  if (error) {
    XLA_FFI_Error_Destroy_Args args = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    frame->api->XLA_FFI_Error_Destroy(&args);
  }
  if (!shared) {
    for (int64_t part = 0; part < parts; part++) run(work, part);
    return;
  }
  int64_t helpers = (threads < parts ? threads : parts) - 1;
  shared->run = run, shared->work = work, shared->parts = parts;
  atomic_init(&shared->next, 0), atomic_init(&shared->done, 0), atomic_init(&shared->holders, 1);
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, task, shared};
    atomic_fetch_add(&shared->holders, 1);
    if ((error = frame->api->XLA_FFI_ThreadPool_Schedule(&args))) {
      XLA_FFI_Error_Destroy_Args destroyed = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
      frame->api->XLA_FFI_Error_Destroy(&destroyed);
      let_go(shared);
      break;
    }
  }
  help(shared);
  while (atomic_load(&shared->done) < parts) {  // what others have begun, and are about to finish
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  let_go(shared);
}

// The description and the arrays of a call; 0 if it is not one of ours.
static int read_call(const Frame *frame, const int64_t **spec, void *arrays[32]) {
  if (frame->attrs.size != 1 || frame->attrs.types[0] != XLA_FFI_AttrType_ARRAY || frame->args.size > 32) return 0;
  const XLA_FFI_Array *attribute = frame->attrs.attrs[0];
  if (attribute->dtype != XLA_FFI_DataType_S64) return 0;
  *spec = attribute->data;
  for (int64_t i = 0; i < frame->args.size; i++) arrays[i] = ((XLA_FFI_Buffer *)frame->args.args[i])->data;
  return 1;
}

static void *result(const Frame *frame) { return ((XLA_FFI_Buffer *)frame->rets.rets[0])->data; }

static const int64_t *extra(const int64_t *spec) { return spec + 10 + 4 * spec[9]; }

#define BEGIN                                                                                                  \
  if (answers_version(frame)) return NULL;                                                                     \
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return NULL;                                              \
  const int64_t *spec;                                                                                         \
  void *arrays[32];                                                                                            \
  if (!read_call(frame, &spec, arrays)) return failed(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "btc_jax: bad call"); \
  const int64_t *more = extra(spec);                                                                           \
  (void)more

enum { PART = 1 << 16 };  // weights of a part

// All weights. Besides the leaf: the number of pieces, the dtype to write, and the three numbers of `Columns`.
EXPORTED XLA_FFI_Error *btc_ffi_decode(Frame *frame) {
  BEGIN;
  Decoding decoding;
  if (!btc_begin(spec, arrays, more, result(frame), &decoding))
    return failed(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "btc_jax: no memory to decode a leaf");
  in_parallel(frame, decoding.pieces * decoding.parts, btc_decode_part, &decoding);
  btc_end(&decoding);
  return NULL;
}

typedef struct {
  const Leaf *leaf;
  Cursor *cursors;
  const float *x;
  int64_t rows, inputs, outputs, step;
  float *y;
} Product;

static void multiply_part(void *work, int64_t part) {
  const Product *p = work;
  Cursor at = p->cursors[part];
  int64_t first = part * p->step, last = first + p->step < p->outputs ? first + p->step : p->outputs;
  btc_kernels->multiply(p->leaf, &at, p->x, p->rows, p->inputs, p->outputs, first, last, p->y);
}

// x @ weights.T, float32. Besides the leaf: rows of x, columns of x. The last array is x.
EXPORTED XLA_FFI_Error *btc_ffi_multiply(Frame *frame) {
  BEGIN;
  Leaf leaf;
  int n = btc_read_leaf(spec, arrays, 0, &leaf);
  Product product = {&leaf, NULL, arrays[n], more[0], more[1], leaf.size / more[1], 0, result(frame)};
  product.step = PART / product.inputs > 0 ? PART / product.inputs : 1;
  int64_t parts = (product.outputs + product.step - 1) / product.step;
  product.cursors = malloc((size_t)(parts + 1) * sizeof *product.cursors);
  if (!product.cursors) return failed(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "btc_jax: no memory to multiply");
  Cursor at = {0};
  for (int64_t part = 0; part < parts; part++) {
    btc_kernels->advance(&leaf, &at, part * product.step * product.inputs / leaf.block_size);
    product.cursors[part] = at;
  }
  in_parallel(frame, parts, multiply_part, &product);
  free(product.cursors);
  return NULL;
}

static int by_row(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

// Some rows of a matrix, float32. Besides the leaf: how many, and columns. The last array holds their numbers, int32, each
// in bounds.
EXPORTED XLA_FFI_Error *btc_ffi_rows(Frame *frame) {
  BEGIN;
  Leaf leaf;
  int n = btc_read_leaf(spec, arrays, 0, &leaf);
  int64_t count = more[0], columns = more[1], rows = leaf.size / columns;
  const int32_t *wanted = arrays[n];
  int64_t(*order)[2] = malloc((size_t)(count + 1) * sizeof *order);
  if (!order) return failed(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "btc_jax: no memory to look up rows");
  for (int64_t i = 0; i < count; i++) order[i][0] = wanted[i], order[i][1] = i;
  qsort(order, (size_t)count, sizeof *order, by_row);  // one walk through the headers
  Cursor at = {0};
  float *out = result(frame);
  for (int64_t i = 0; i < count; i++) {
    int64_t row = order[i][0];
    if (row < 0 || row >= rows) continue;
    if (i && order[i - 1][0] == row) {  // once more
      memcpy(out + order[i][1] * columns, out + order[i - 1][1] * columns, (size_t)columns * sizeof *out);
      continue;
    }
    btc_kernels->part(&leaf, &at, row * columns, columns, out + order[i][1] * columns);
  }
  free(order);
  return NULL;
}

typedef struct {
  const Leaf *leaf;
  int64_t start, count, step;
  Cursor *cursors;
  float *out;
} Tile;

static void tile_part(void *work, int64_t part) {
  const Tile *t = work;
  Cursor at = t->cursors[part];
  int64_t from = part * t->step, count = t->count - from < t->step ? t->count - from : t->step;
  btc_kernels->part(t->leaf, &at, t->start + from, count, t->out + from);
}

// Rows of a matrix that follow each other, float32. Besides the leaf: how many, and columns. The last array holds the number
// of the first, int32.
EXPORTED XLA_FFI_Error *btc_ffi_tile(Frame *frame) {
  BEGIN;
  Leaf leaf;
  int n = btc_read_leaf(spec, arrays, 0, &leaf);
  Tile tile = {&leaf, *(const int32_t *)arrays[n] * more[1], more[0] * more[1], PART, NULL, result(frame)};
  if (tile.start < 0 || tile.start > leaf.size - tile.count)
    return failed(frame, XLA_FFI_Error_Code_OUT_OF_RANGE, "btc_jax: a tile beyond the leaf");
  int64_t parts = (tile.count + PART - 1) / PART;
  tile.cursors = malloc((size_t)(parts + 1) * sizeof *tile.cursors);
  if (!tile.cursors) return failed(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "btc_jax: no memory for a tile");
  Cursor at = {0};
  for (int64_t part = 0; part < parts; part++) {
    btc_kernels->advance(&leaf, &at, (tile.start + part * PART) / leaf.block_size);
    tile.cursors[part] = at;
  }
  in_parallel(frame, parts, tile_part, &tile);
  free(tile.cursors);
  return NULL;
}
