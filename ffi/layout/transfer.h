// Operations on slots and blocks, as dsv4_jax/layout/transfers.py writes them.
#pragma once

#include <cstdint>

#include "layout/bits.h"
#include "layout/geometry.h"

namespace dsv4 {

enum class TransferKind : int32_t {
  kNone = 0,
  kReset = 1,
  kInstall = 2,
  kCopy = 3,
  kCopyBlock = 4,
  kShare = 5,
  kWipe = 6,
  kWipeBlocks = 7
};

// What one of the cache's arrays is, and so which operations concern it. A block counts as a slot of its array.
enum class SlotArray {
  kTable,        // the block table: resets, installed and shared blocks, wipes
  kWriteTable,   // the write table: the same, but shared blocks are none
  kPositions,    // the positions of window rows: resets, copies, wipes
  kState,        // all else that a slot has: copies, wipes
  kTail,         // rows that wait to be compressed: the same
  kRunningTail,  // the states of an open window: the same
  kBlocks,       // a page for each block: copied and wiped blocks
};

constexpr int kTransferFields = 5;

struct Transfer {
  TransferKind kind;
  int64_t slot;
  int64_t source;  // the slot or block to copy from, or the first place of installed blocks
  int64_t offset;  // of these among all block ids
  int64_t count;
};

DSV4_HOST_DEVICE bool is_table(SlotArray role) { return role == SlotArray::kTable || role == SlotArray::kWriteTable; }

// Operation `index` as an array of this role with so many slots is concerned, kNone if it is not.
DSV4_HOST_DEVICE Transfer transfer_at(const int32_t* operations, int index, SlotArray role, int64_t slots) {
  const int32_t* fields = operations + static_cast<int64_t>(index) * kTransferFields;
  Transfer transfer{static_cast<TransferKind>(fields[0]), fields[1], fields[2], fields[3], fields[4]};
  bool concerns = transfer.slot >= 0 && transfer.slot < slots;
  switch (transfer.kind) {
    case TransferKind::kReset:
      concerns = concerns && (is_table(role) || role == SlotArray::kPositions);
      break;
    case TransferKind::kInstall:
    case TransferKind::kShare:
      concerns = concerns && is_table(role) && transfer.offset >= 0;
      break;
    case TransferKind::kCopy:
    case TransferKind::kCopyBlock:
      concerns = concerns && !is_table(role) &&
                 (role == SlotArray::kBlocks) == (transfer.kind == TransferKind::kCopyBlock) && transfer.source >= 0 &&
                 transfer.source < slots && transfer.source != transfer.slot;
      break;
    case TransferKind::kWipe:
      concerns = concerns && role != SlotArray::kBlocks;
      break;
    case TransferKind::kWipeBlocks:
      concerns = role == SlotArray::kBlocks && transfer.offset >= 0;
      break;
    default:
      concerns = false;
  }
  if (!concerns) transfer.kind = TransferKind::kNone;
  return transfer;
}

// What the 32-bit word `word` of a slot's `words` (or a block's) is when it is wiped: what init_cache writes. `width`
// is that of a tail's rows.
DSV4_HOST_DEVICE uint32_t wiped_word(SlotArray role, int64_t word, int64_t words, int64_t width) {
  switch (role) {
    case SlotArray::kTable:
    case SlotArray::kWriteTable:
    case SlotArray::kPositions:
      return ~0u;
    case SlotArray::kTail:  // kv, then scores
      return word < words / 2 ? 0u : bits_of(kClearedScore);
    case SlotArray::kRunningTail:  // max, denominator, sum of each state
      return word / width % 3 == 0 ? bits_of(kClearedScore) : 0u;
    default:
      return 0u;
  }
}

// How many block ids an operation has, if there are so many from its offset on.
DSV4_HOST_DEVICE int64_t listed(const Transfer& transfer, int64_t available) {
  const int64_t left = available - transfer.offset;
  return transfer.count < left ? transfer.count : left;
}

// Puts into `place` of a table's row what an installation has for it, of so many block ids.
DSV4_HOST_DEVICE void install_at(const Transfer& transfer, SlotArray role, int64_t place, const int32_t* blocks,
                                 int64_t available, int32_t* row_at_place) {
  const int64_t nth = place - transfer.source;
  if (nth < 0 || nth >= listed(transfer, available)) return;
  const bool only_read = transfer.kind == TransferKind::kShare && role == SlotArray::kWriteTable;
  *row_at_place = only_read ? -1 : blocks[transfer.offset + nth];
}

}  // namespace dsv4
