// The FFI handler of transfer: operations on the slots, or blocks, of one array.

#include "handlers/call.h"

namespace dsv4 {

TransferParams check_transfer(Call& call) {
  TransferParams params{};
  const auto role = call.attribute<std::string_view>("role");
  const bool is_table = role == "table" || role == "write_table";
  call.that(is_table || role == "positions" || role == "state" || role == "tail" || role == "blocks", "role",
            "must be table, write_table, positions, state, tail or blocks");
  if (is_table) {
    params.role = role == "table" ? SlotArray::kTable : SlotArray::kWriteTable;
    params.layers = 1;
    call.indices("array", {kAny, kAny});
  } else {
    params.role = role == "positions"       ? SlotArray::kPositions
                  : role == "state"         ? SlotArray::kState
                  : role == "blocks"        ? SlotArray::kBlocks
                  : call.rank("array") == 4 ? SlotArray::kRunningTail
                                            : SlotArray::kTail;
    params.layers = call.size("array", 0);
    if (role == "positions") call.indices("array", {kAny, kAny, kAny});
    call.that(call.rank("array") >= 2, "array", "needs the axes [layers, slots, ...]");
    if (role == "tail") {
      call.type("array", ffi::F32);
      call.that(call.rank("array") == 4 || call.rank("array") == 5, "array",
                "needs the axes of a tail, [layers, slots, 2, rows, width] or [layers, slots, 3 states, width]");
      params.width = call.size("array", call.rank("array") - 1);
    }
  }
  params.slots = call.size("array", is_table ? 0 : 1);
  const int64_t parts = params.layers * params.slots;
  params.slot_bytes = parts == 0 ? 0 : call.bytes("array") / parts;
  params.data = call.data<uint8_t>("array");
  params.operations = call.indices("operations", {kAny, kTransferFields});
  params.count = static_cast<int>(call.size("operations", 0));
  params.blocks = call.indices("blocks", {kAny});
  params.block_count = call.size("blocks", 0);
  return params;
}

}  // namespace dsv4

DSV4_HANDLERS(transfer, transfer);
