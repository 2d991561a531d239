// The FFI handler of transfer: operations on the slots of one array.

#include <optional>

#include "handlers/check.h"

namespace dsv4 {

using ffi::AnyBuffer;

std::optional<SlotArray> find_role(std::string_view name) {
  if (name == "table") return SlotArray::kTable;
  if (name == "positions") return SlotArray::kPositions;
  if (name == "state") return SlotArray::kState;
  return std::nullopt;
}

ffi::ErrorOr<TransferParams> check_transfer(AnyBuffer array, AnyBuffer operations, AnyBuffer blocks,
                                            ffi::Result<AnyBuffer> array_out, std::string_view role) {
  Checker check("transfer");
  const auto known = find_role(role);
  check.that(known.has_value(), "role", "must be table, positions or state");
  TransferParams params{};
  params.role = known.value_or(SlotArray::kState);
  const size_t slot_axis = params.role == SlotArray::kTable ? 0 : 1;
  if (params.role == SlotArray::kTable) check.indices("array", array, {kAny, kAny});
  if (params.role == SlotArray::kPositions) check.indices("array", array, {kAny, kAny, kAny});
  check.that(array.dimensions().size() > slot_axis, "array", "needs the axes [layers, slots, ...]");
  check.in_place("array", array, *array_out);
  params.data = Checker::data<uint8_t>(array);
  params.layers = slot_axis == 0 ? 1 : Checker::size(array, 0);
  params.slots = Checker::size(array, slot_axis);
  const int64_t parts = params.layers * params.slots;
  params.slot_bytes = parts == 0 ? 0 : static_cast<int64_t>(array.size_bytes()) / parts;
  params.operations = check.indices("operations", operations, {kAny, kTransferFields});
  params.count = static_cast<int>(Checker::size(operations, 0));
  params.blocks = check.indices("blocks", blocks, {kAny});
  params.block_count = Checker::size(blocks, 0);
  if (check.failed()) return check.error();
  return params;
}

// clang-format off
DSV4_HANDLERS(Transfer, transfer,
    .Arg<AnyBuffer>()  // array [layers, slots, ...], or the block table [slots, max_blocks]
    .Arg<AnyBuffer>()  // operations [n, 5]
    .Arg<AnyBuffer>()  // blocks [k]
    .Ret<AnyBuffer>()  // array, in place
    .Attr<std::string_view>("role"));
// clang-format on

}  // namespace dsv4
