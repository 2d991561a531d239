// An update on the host: the ops it stands for, one after the other.

#include <vector>

#include "ops/signatures.h"

namespace dsv4::cpu {

void update(const UpdateParams& params) {
  const Plan& plan = params.window.plan;
  const auto store_closed = [&](const Compression& part) {
    const Compressor& compressor = part.compressor;
    if (compressor.tail.data == nullptr) return;
    const int ratio = compressor.tail.geometry.ratio;
    const int closing = closing_capacity(plan.tokens, plan.requests, ratio);
    std::vector<float> entries(static_cast<size_t>(closing) * compressor.tail.width);
    compress({compressor, entries.data(), closing, plan, params.kind_layer});
    flush({part.pool, entries.data(), closing, params.table, ratio, plan, params.kind_layer});
    append_tail({compressor.tail, compressor.projections, plan, params.kind_layer});
  };
  store_closed(params.entries);
  store_closed(params.keys);

  AppendWindowParams window = params.window;
  std::vector<float> finished;
  if (params.norm.weight != nullptr) {
    finished.resize(static_cast<size_t>(plan.tokens) * kHeadDim);
    normalize({window.rows, window.element, params.norm, finished.data(), plan.tokens});
    window.rows = finished.data();
    window.element = Element::kFloat32;
  }
  append_window(window);
}

}  // namespace dsv4::cpu
