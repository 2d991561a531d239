// Operations on slots and blocks on the host.

#include <algorithm>
#include <cstring>

#include "ops/signatures.h"

namespace dsv4::cpu {
namespace {

// Little-endian, as the devices are: a page need not consist of whole words.
void wipe(uint8_t* slot, const TransferParams& params) {
  const int64_t words = params.slot_bytes / static_cast<int64_t>(sizeof(uint32_t));
  for (int64_t first = 0; first < params.slot_bytes; first += sizeof(uint32_t)) {
    const uint32_t word = wiped_word(params.role, first / static_cast<int64_t>(sizeof(uint32_t)), words, params.width);
    std::memcpy(slot + first, &word, std::min<int64_t>(sizeof word, params.slot_bytes - first));
  }
}

}  // namespace

void transfer(const TransferParams& params) {
  for (int index = 0; index < params.count; ++index) {
    const Transfer transfer = transfer_at(params.operations, index, params.role, params.slots);
    if (transfer.kind == TransferKind::kWipeBlocks) {
      for (int64_t nth = 0; nth < listed(transfer, params.block_count); ++nth) {
        const int64_t block = params.blocks[transfer.offset + nth];
        for (int64_t layer = 0; layer < params.layers && block >= 0 && block < params.slots; ++layer) {
          wipe(params.data + (layer * params.slots + block) * params.slot_bytes, params);
        }
      }
      continue;
    }
    for (int64_t layer = 0; layer < params.layers && transfer.kind != TransferKind::kNone; ++layer) {
      uint8_t* slot = params.data + (layer * params.slots + transfer.slot) * params.slot_bytes;
      if (transfer.kind == TransferKind::kCopy || transfer.kind == TransferKind::kCopyBlock) {
        const uint8_t* source = params.data + (layer * params.slots + transfer.source) * params.slot_bytes;
        std::memcpy(slot, source, params.slot_bytes);
        continue;
      }
      if (transfer.kind == TransferKind::kWipe) {
        wipe(slot, params);
        continue;
      }
      int32_t* values = reinterpret_cast<int32_t*>(slot);  // tables and positions are int32
      const int64_t size = params.slot_bytes / static_cast<int64_t>(sizeof(int32_t));
      if (transfer.kind == TransferKind::kReset) {
        std::fill_n(values, size, -1);
        continue;
      }
      for (int64_t place = std::max<int64_t>(transfer.source, 0); place < size; ++place) {
        install_at(transfer, params.role, place, params.blocks, params.block_count, values + place);
      }
    }
  }
}

}  // namespace dsv4::cpu
