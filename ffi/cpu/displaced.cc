// Window rows set aside on the host: save_displaced.

#include "layout/displaced.h"

#include <cstring>

#include "ops/signatures.h"

namespace dsv4::cpu {

void save_displaced(const SaveDisplacedParams& params) {
  const int64_t data = params.data_bytes, scales = params.scale_bytes, rows = params.displaced.rows;
  uint8_t* to = params.displaced.data;
  for (int64_t row = 0; row < rows; ++row) {
    const DisplacedSource from = displaced_source(params, static_cast<int>(row));
    params.displaced_positions[row] = from.page == nullptr ? -1 : from.position;
    if (from.page == nullptr) continue;
    std::memcpy(to + row * data, from.page + from.row * data, data);
    std::memcpy(to + rows * data + row * scales, from.page + from.rows * data + from.row * scales, scales);
  }
}

}  // namespace dsv4::cpu
