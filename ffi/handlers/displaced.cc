// FFI handler of save_displaced: window rows that a step takes the place of.

#include "handlers/call.h"

namespace dsv4 {

SaveDisplacedParams check_save_displaced(Call& call) {
  SaveDisplacedParams params{};
  const auto codec = call.attribute<std::string_view>("codec");
  params.window = call.window(codec, 1.0f);
  params.positions = call.data<const int32_t>("positions");
  params.plan = call.plan();
  params.layer = call.layer();
  params.window_size = static_cast<int>(call.attribute<int64_t>("size"));
  call.that(params.window_size > 0 && params.window_size <= params.window.rows, "size",
            "is not that of a window which the ring holds");
  const int64_t rows = displaced_rows(params.plan, params.window_size);
  params.stored = {call.data<uint8_t>("stored"), 1, 1, 0, params.plan.tokens, 0, kHeadDim, 1.0f};
  call.page("stored", 0, codec, params.stored);
  params.displaced = call.pool("displaced", static_cast<int>(rows), kHeadDim, codec, 1.0f);
  call.that(params.displaced.layers == 1 && params.displaced.pages == 1, "displaced", "must be one page");
  params.displaced_positions = call.indices("displaced_positions", {rows});
  if (call.failed()) return params;
  visit_codec(kHeadDim, params.window.codec, [&](auto found) {
    params.data_bytes = Layout<decltype(found)>::kDataBytes;
    params.scale_bytes = Layout<decltype(found)>::kScaleBytes;
  });
  return params;
}

}  // namespace dsv4

DSV4_HANDLERS(save_displaced, save_displaced);
