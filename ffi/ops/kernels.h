// The ops as functions of their checked parameters: one set runs on the host, one launches on a CUDA stream.
#pragma once

#include "ops/params.h"

struct CUstream_st;  // cudaStream_t, so that handlers need no CUDA headers

namespace dsv4::cpu {

void begin_step(const BeginStepParams& params);
void append_window(const AppendWindowParams& params);
void append_tail(const AppendTailParams& params);
void compress(const CompressParams& params);
void flush(const FlushParams& params);
void rotate(const RotateParams& params);
void gather_entries(const GatherEntriesParams& params);
void gather_window(const GatherWindowParams& params);
void normalize(const NormalizeParams& params);
void update(const UpdateParams& params);
void transfer(const TransferParams& params);
void quantize(const QuantizeParams& params);
void dequantize(const QuantizeParams& params);

}  // namespace dsv4::cpu

// Each returns null, or the CUDA error that the launch met.
namespace dsv4::cuda {

const char* begin_step(CUstream_st* stream, const BeginStepParams& params);
const char* append_window(CUstream_st* stream, const AppendWindowParams& params);
const char* append_tail(CUstream_st* stream, const AppendTailParams& params);
const char* compress(CUstream_st* stream, const CompressParams& params);
const char* flush(CUstream_st* stream, const FlushParams& params);
const char* rotate(CUstream_st* stream, const RotateParams& params);
const char* gather_entries(CUstream_st* stream, const GatherEntriesParams& params);
const char* gather_window(CUstream_st* stream, const GatherWindowParams& params);
const char* normalize(CUstream_st* stream, const NormalizeParams& params);
const char* update(CUstream_st* stream, const UpdateParams& params);
const char* transfer(CUstream_st* stream, const TransferParams& params);
const char* quantize(CUstream_st* stream, const QuantizeParams& params);
const char* dequantize(CUstream_st* stream, const QuantizeParams& params);

}  // namespace dsv4::cuda
