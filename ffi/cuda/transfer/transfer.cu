// Operations on slots and blocks on the GPU.
//
// A thread has one unit of 16, 4 or 1 bytes of every slot's part of a layer and walks over all operations by itself. An
// operation moves a unit of one slot to the same unit of another, so what a thread reads only it has written: the
// operations happen in order without any thread waiting for another.

#include "cuda/core/launch.cuh"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace {

constexpr int kThreads = 256;

// What a unit is when it is wiped.
template <class Unit>
__device__ Unit wiped(const TransferParams& params, int64_t unit) {
  const auto word = [&](int64_t index) {
    return wiped_word(params.role, index, params.slot_bytes / static_cast<int64_t>(sizeof(uint32_t)), params.width);
  };
  if constexpr (sizeof(Unit) == 16) {
    return {word(4 * unit), word(4 * unit + 1), word(4 * unit + 2), word(4 * unit + 3)};
  } else if constexpr (sizeof(Unit) == 4) {
    return static_cast<Unit>(word(unit));
  } else {
    return static_cast<Unit>(word(unit / 4) >> 8 * (unit % 4));
  }
}

// Slots' state and blocks, to which nothing happens but copies and wipes. blockIdx.x counts the units of a slot,
// blockIdx.y the layers.
template <class Unit>
__global__ void __launch_bounds__(kThreads) state_kernel(TransferParams params) {
  const int64_t units = params.slot_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit >= units) return;
  Unit* data = reinterpret_cast<Unit*>(params.data) + int64_t{blockIdx.y} * params.slots * units + unit;
  for (int index = 0; index < params.count; ++index) {
    const Transfer transfer = transfer_at(params.operations, index, params.role, params.slots);
    if (transfer.kind == TransferKind::kWipeBlocks) {
      const int64_t count = listed(transfer, params.block_count);
      for (int64_t nth = 0; nth < count; ++nth) {
        const int64_t block = params.blocks[transfer.offset + nth];
        if (block >= 0 && block < params.slots) data[block * units] = wiped<Unit>(params, unit);
      }
    } else if (transfer.kind == TransferKind::kWipe) {
      data[transfer.slot * units] = wiped<Unit>(params, unit);
    } else if (transfer.kind != TransferKind::kNone) {
      data[transfer.slot * units] = data[transfer.source * units];
    }
  }
}

// The same for int32 arrays, whose resets and wipes write -1: tables and positions.
__global__ void __launch_bounds__(kThreads) indices_kernel(TransferParams params) {
  const int64_t units = params.slot_bytes / static_cast<int64_t>(sizeof(int32_t));
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit >= units) return;
  int32_t* data = reinterpret_cast<int32_t*>(params.data) + int64_t{blockIdx.y} * params.slots * units + unit;
  for (int index = 0; index < params.count; ++index) {
    const Transfer transfer = transfer_at(params.operations, index, params.role, params.slots);
    int32_t* target = data + transfer.slot * units;
    if (transfer.kind == TransferKind::kReset || transfer.kind == TransferKind::kWipe) {
      *target = -1;
    } else if (transfer.kind == TransferKind::kCopy) {
      *target = data[transfer.source * units];
    } else if (transfer.kind != TransferKind::kNone) {
      install_at(transfer, params.role, unit, params.blocks, params.block_count, target);
    }
  }
}

dim3 grid_of(const TransferParams& params, int64_t unit_bytes) {
  return {blocks_for(params.slot_bytes / unit_bytes, kThreads), static_cast<unsigned>(params.layers)};
}

}  // namespace

const char* transfer(CUstream_st* stream, const TransferParams& params) {
  if (params.count == 0 || params.slot_bytes == 0 || params.layers == 0 || params.slots == 0) return nullptr;
  if (is_table(params.role) || params.role == SlotArray::kPositions) {
    indices_kernel<<<grid_of(params, sizeof(int32_t)), kThreads, 0, stream>>>(params);
  } else if (params.slot_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(params.data) % 16 == 0) {
    state_kernel<uint4><<<grid_of(params, 16), kThreads, 0, stream>>>(params);
  } else if (params.slot_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(params.data) % 4 == 0) {
    state_kernel<uint32_t><<<grid_of(params, 4), kThreads, 0, stream>>>(params);
  } else {
    state_kernel<uint8_t><<<grid_of(params, 1), kThreads, 0, stream>>>(params);
  }
  return launch_error("apply_transfers");
}

}  // namespace dsv4::cuda
