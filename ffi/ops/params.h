// What each op is given, after checking: raw pointers and sizes. Handlers fill these; kernels and CPU loops read them.
#pragma once

#include <cstdint>

#include "layout/geometry.h"
#include "layout/plan.h"
#include "layout/transfer.h"

namespace dsv4 {

enum class Element { kFloat32, kBFloat16 };

// A pool [layers, pages, page] of rows of one codec, `rows` to a page.
struct Pool {
  uint8_t* data;
  int64_t layers;
  int64_t pages;
  int64_t page_bytes;
  int rows;
  int codec;  // index into the codecs of its width, see ffi/layout/codecs.h
  int width;
  float global_scale;
};

struct Tail {
  // [layers, slots, 2 (kv, score), rows, width]; running: [layers, slots, depth + 1 states, 3 (max, denominator, sum),
  // width]
  float* data;
  int64_t layers;
  int slots;
  int width;
  TailGeometry geometry;
  bool running;  // HCA: the open window is kept pooled, not row by row
};

// A compressor's inputs for the tokens of a step, [tokens, columns]; columns = 2 * width with overlap, else width.
struct Projections {
  const void* kv;
  const void* gate;
  Element element;
  const float* position_bias;  // [ratio, columns]
  int columns;
};

struct BlockTable {
  const int32_t* data;  // [slots, max_blocks]
  int slots;
  int max_blocks;
};

// Rows read out of a pool: values [queries, count, width], positions and valid [queries, count].
struct Rows {
  void* values;
  Element element;
  int32_t* positions;
  bool* valid;
  int64_t queries;
  int64_t count;
};

struct BeginStepParams {
  int32_t* block_table;
  int32_t* write_table;  // as large
  int max_blocks;
  int32_t* window_positions;  // [layers, slots, ring]
  int64_t window_layers;
  int ring;
  int slots;
  Plan plan;
  int32_t* plan_copy;
};

struct AppendWindowParams {
  Pool window;
  int32_t* positions;  // [layers, slots, ring]
  const void* rows;    // [tokens, width]
  Element element;
  Plan plan;
  const int32_t* layer;
};

struct AppendTailParams {
  Tail tail;
  Projections projections;
  Plan plan;
  const int32_t* layer;
};

// A compressor: what it made of the step's tokens, what it keeps between steps, and how its entries are finished.
struct Compressor {
  Tail tail;
  Projections projections;
  const float* norm_weight;  // [width]
  const float* cos;          // [closing, 32]
  const float* sin;
  float eps;
  bool hadamard;
};

struct CompressParams {
  Compressor compressor;
  float* entries;  // [closing, width]
  int closing;
  Plan plan;
  const int32_t* layer;
};

struct FlushParams {
  Pool pool;
  const float* entries;  // [closing, width]
  int closing;
  BlockTable table;
  int ratio;
  Plan plan;
  const int32_t* layer;
};

struct RotateParams {
  Tail tail;
  Plan plan;
  const int32_t* layer;
};

// One of the cache's arrays, and what happens to its slots, in order; for a pool of blocks, these.
struct TransferParams {
  uint8_t* data;  // [layers, slots, slot_bytes]
  int64_t layers;
  int64_t slots;
  int64_t slot_bytes;
  int64_t width;  // of a tail's rows
  SlotArray role;
  const int32_t* operations;  // [count, 5]
  int count;
  const int32_t* blocks;  // [block_count]
  int64_t block_count;
};

// Chosen entries of every token, or the first entries of every request.
struct GatherEntriesParams {
  Pool pool;
  BlockTable table;
  Plan plan;
  const int32_t* indices;  // [tokens, count], or null: entries 0 .. count-1 by request
  int ratio;
  Rows rows;
  const int32_t* layer;
};

// The best entries of every token by the indexer's scores.
struct IndexTopkParams {
  Pool pool;
  BlockTable table;
  Plan plan;
  const int32_t* layer;
  int ratio;
  const void* queries;  // [tokens, heads, 128]
  Element element;
  const float* head_weights;  // [tokens, heads]
  int heads;
  bool hadamard;
  int k;
  int32_t* indices;  // [tokens, k]
  float* scores;     // [tokens, k], or null
  // Workspaces for `slab` tokens at a time: the scores of every entry that there can be, and rounded queries.
  float* every_score;  // [slab, capacity]
  int64_t slab;
  int64_t capacity;
  uint8_t* prepared;  // [slab, kPreparedBytes], or null: a block rounds the queries it needs
};

// Room for the rounded queries of a token, 64 rows of 128 halves, and its head weights.
constexpr int64_t kPreparedBytes = 64 * kKeyDim * 2 + 64 * 4;

// The window rows of every request up to its last token, or up to the token before its first.
struct GatherWindowParams {
  Pool window;
  const int32_t* positions;  // [layers, slots, ring]
  Plan plan;
  bool before;
  Rows rows;
  const int32_t* layer;
};

// RMSNorm and RoPE of window rows, each at its own position.
struct Norm {
  const float* weight;  // [512], or null: rows come finished
  const float* cos;     // [tokens, 32]
  const float* sin;
  float eps;
};

struct NormalizeParams {
  const void* rows;  // [count, 512]
  Element element;
  Norm norm;
  float* out;  // [count, 512]
  int64_t count;
};

// One compressor's part of an update: without one, tail.data is null.
struct Compression {
  Compressor compressor;
  Pool pool;
};

// All writes of one layer and step. Finished windows are stored before the tails move on; nothing is cleared.
struct UpdateParams {
  AppendWindowParams window;  // its plan is the step's
  Norm norm;
  Compression entries;
  Compression keys;
  BlockTable table;
  const int32_t* kind_layer;  // the layer's index among those of its kind
};

constexpr int kAttendedHeads = 64;  // that a block of attention's Hopper kernel takes

// Attention of a step's tokens over rows as they are stored: window rows, then entries. Keys and values are the same.
struct AttendParams {
  Pool window;                      // [layers, slots, page(ring)]
  const int32_t* window_positions;  // [layers, slots, ring]
  const int32_t* window_layer;
  int window_size;  // a token at position t sees window rows t - window_size + 1 .. t

  // Window rows that the step displaced, or data is null: a page of `displaced_rows` rows. A row of request r at
  // position p is row (window_size - 1) * (r + 1) + first token of r + p - start of r.
  Pool displaced;                      // [1, 1, page]
  const int32_t* displaced_positions;  // [rows], -1 where nothing was saved

  Pool entries;  // [layers, blocks, page(128 / ratio)]; data is null: the window alone
  BlockTable table;
  const int32_t* entries_layer;
  int ratio;
  const int32_t* indices;  // [tokens, count] entry ids in any order, below 0 none; null: entries 0 .. count - 1
  int count;

  Plan plan;
  const void* queries;  // [tokens, heads, 512]
  Element query_element;
  int heads;
  const float* sinks;  // [heads], or null
  const float* cos;    // [tokens, 32], or null: the output's trailing 64 channels are not rotated back
  const float* sin;
  float scale;

  void* output;  // [tokens, heads, 512]
  Element output_element;
  float* lse;  // [tokens, heads], natural, without the sink; -inf where nothing is seen

  // Workspace for few tokens: a token's rows are shared by the blocks of a cluster, and if they are many, by `parts`
  // clusters, which are merged afterwards.
  int blocks;          // of a cluster: 1, 2, 4, 8 or 16
  int block_heads;     // heads of a block: 16, 32 or 64, a cluster for each so many
  float* block_sums;   // [clusters, blocks, block_heads, 512]; two blocks or one need none
  int parts;           // 1: none
  float* part_rows;    // [parts, tokens, heads, 512] sums in units of the part's maximum
  float* part_shares;  // [parts, tokens, heads, 2] maximum (base 2) and sum of the part's softmax
};

// How many rows are set aside for attention.
inline int64_t displaced_rows(const Plan& plan, int window_size) {
  return (window_size - int64_t{1}) * plan.requests + plan.tokens;
}

// The rows that attention gets as `displaced`, copied as they are stored before the step's rows go into the ring.
struct SaveDisplacedParams {
  Pool window;
  const int32_t* positions;  // [layers, slots, ring]
  const int32_t* layer;
  int window_size;
  Pool stored;  // one page of the step's rows
  Plan plan;
  Pool displaced;  // see AttendParams
  int32_t* displaced_positions;
  int data_bytes;  // of a row
  int scale_bytes;
};

// Rows <-> one page of them.
struct QuantizeParams {
  Pool page;
  void* rows;  // [page.rows, width]
  Element element;
};

}  // namespace dsv4
