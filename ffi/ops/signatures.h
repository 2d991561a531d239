// Every op, once: its kernels, its parameters, and the names of what it takes and gives, in the order of the call.
//
// A result that has the name of an operand is that operand, updated in place. Names are all that connects Python
// (dsv4_jax/native/signatures.py orders by them), the handlers (ffi/handlers/call.h finds operands by them) and the
// digest that tells whether the two fit.
#pragma once

#include <string_view>

#include "ops/params.h"

// X(op, kernel, Params, operands, results, attributes)
#define DSV4_OPS(X)                                                                                                  \
  X(begin_step, begin_step, BeginStepParams, "block_table write_table window_positions plan",                        \
    "block_table write_table window_positions plan_copy", "tokens requests")                                         \
  X(append_window, append_window, AppendWindowParams, "window positions rows plan layer", "window positions",        \
    "tokens requests codec global_scale")                                                                            \
  X(append_tail, append_tail, AppendTailParams, "tail kv gate position_bias plan layer", "tail",                     \
    "tokens requests ratio")                                                                                         \
  X(rotate, rotate, RotateParams, "tail plan layer", "tail", "tokens requests ratio")                                \
  X(compress, compress, CompressParams, "tail kv gate position_bias norm_weight cos sin plan layer", "tail entries", \
    "tokens requests ratio eps hadamard")                                                                            \
  X(normalize, normalize, NormalizeParams, "rows norm_weight cos sin", "finished", "eps")                            \
  X(flush, flush, FlushParams, "pool entries block_table plan layer", "pool",                                        \
    "tokens requests ratio codec global_scale")                                                                      \
  X(transfer, transfer, TransferParams, "array operations blocks", "array", "role")                                  \
  X(quantize, quantize, QuantizeParams, "rows", "page", "codec global_scale")                                        \
  X(dequantize, dequantize, QuantizeParams, "page", "rows", "codec global_scale")                                    \
  X(gather_entries, gather_entries, GatherEntriesParams, "pool block_table plan indices layer",                      \
    "pool values row_positions valid", "tokens requests ratio codec global_scale")                                   \
  X(gather_all_entries, gather_entries, GatherEntriesParams, "pool block_table plan layer",                          \
    "pool values row_positions valid", "tokens requests ratio codec global_scale")                                   \
  X(gather_window, gather_window, GatherWindowParams, "window positions plan layer",                                 \
    "window positions values row_positions valid", "tokens requests before codec global_scale")                      \
  X(index_topk, index_topk, IndexTopkParams, "pool block_table plan queries head_weights layer",                     \
    "pool indices scores every_score prepared", "tokens requests ratio codec global_scale hadamard")                 \
  X(save_displaced, save_displaced, SaveDisplacedParams, "window positions stored plan layer",                       \
    "window positions displaced displaced_positions", "tokens requests size codec")                                  \
  X(attend_window, attend, AttendParams,                                                                             \
    "window positions displaced displaced_positions queries sinks cos sin plan layer",                               \
    "window positions output lse block_sums part_rows part_shares", "tokens requests size scale window_codec")       \
  X(attend_entries, attend, AttendParams,                                                                            \
    "window positions displaced displaced_positions entries block_table indices queries sinks cos sin plan layer "   \
    "kind_layer",                                                                                                    \
    "window positions entries output lse block_sums part_rows part_shares",                                          \
    "tokens requests size ratio scale window_codec entry_codec entry_global_scale")                                  \
  X(attend_all_entries, attend, AttendParams,                                                                        \
    "window positions displaced displaced_positions entries block_table queries sinks cos sin plan layer "           \
    "kind_layer",                                                                                                    \
    "window positions entries output lse block_sums part_rows part_shares",                                          \
    "tokens requests size ratio count scale window_codec entry_codec entry_global_scale")                            \
  X(update_swa, update, UpdateParams, "window positions rows row_norm_weight row_cos row_sin plan layer",            \
    "window positions", "tokens requests eps window_codec")                                                          \
  X(update_hca, update, UpdateParams,                                                                                \
    "window positions entries tail rows row_norm_weight row_cos row_sin plan layer kind_layer block_table "          \
    "kv gate position_bias norm_weight cos sin",                                                                     \
    "window positions entries tail", "tokens requests eps window_codec entry_codec entry_global_scale")              \
  X(update_csa, update, UpdateParams,                                                                                \
    "window positions entries tail keys key_tail rows row_norm_weight row_cos row_sin plan layer kind_layer "        \
    "block_table kv gate position_bias norm_weight cos sin "                                                         \
    "key_kv key_gate key_position_bias key_norm_weight key_cos key_sin",                                             \
    "window positions entries tail keys key_tail",                                                                   \
    "tokens requests eps window_codec entry_codec key_codec entry_global_scale key_global_scale hadamard")

struct CUstream_st;  // cudaStream_t, so that handlers need no CUDA headers

namespace dsv4 {

struct Signature {
  std::string_view op;
  std::string_view operands;  // names with a space between
  std::string_view results;
  std::string_view attributes;
};

#define DSV4_SIGNATURE(op, kernel, Params, operands, results, attributes) \
  constexpr Signature signature_of_##op{#op, operands, results, attributes};
DSV4_OPS(DSV4_SIGNATURE)
#undef DSV4_SIGNATURE

// The kernels: one set runs on the host, one launches on a CUDA stream and returns null or what the launch met.
#define DSV4_DECLARE(op, kernel, Params, ...) void kernel(const Params& params);
namespace cpu {
DSV4_OPS(DSV4_DECLARE)
}
#undef DSV4_DECLARE

#define DSV4_DECLARE(op, kernel, Params, ...) const char* kernel(CUstream_st* stream, const Params& params);
namespace cuda {
DSV4_OPS(DSV4_DECLARE)
}
#undef DSV4_DECLARE

}  // namespace dsv4
