// The gathers on the GPU: chosen entries, all entries, the window; dequantized to dense rows.
//
// Reading is all there is to do, so it is arranged for bytes in flight: a warp takes several rows at once, its lanes
// look up where they lie, all lanes load all of them, and only then is anything decoded. Writes are 16 bytes a lane,
// neighbouring lanes side by side.

#include "cuda/core/decoders.cuh"
#include "cuda/core/launch.cuh"
#include "cuda/core/warp_rows.cuh"
#include "ops/signatures.h"

namespace dsv4::cuda {
namespace {

constexpr int kGatherWarps = 8;
constexpr int kEnoughWarps = 2048;  // warps come first: only where there are as many do they take several rows each

// The most rows that a warp has in flight.
template <class Codec>
constexpr int rows_in_flight() {
  constexpr int kBytes = Layout<Codec>::kDataBytes;
  return kBytes >= 2048 ? 2 : kBytes >= 256 ? 4 : 8;
}

template <class Codec, class T, class Sources>
__global__ void __launch_bounds__(kGatherWarps* kWarp)
    gather_kernel(uint8_t* pool, float global_scale, Rows rows, unsigned warp_rows, Sources sources) {
  constexpr int kLanes = std::min(kWarp, Codec::kWidth / kLaneChannels<T>);  // of a row
  constexpr int kParts = Codec::kWidth / kLaneChannels<T> / kLanes;
  constexpr int kAbreast = kWarp / kLanes;
  constexpr int kSteps = rows_in_flight<Codec>() / kAbreast;
  const int lane = threadIdx.x % kWarp;
  const unsigned total = static_cast<unsigned>(rows.queries * rows.count);
  const unsigned first = (blockIdx.x * kGatherWarps + threadIdx.x / kWarp) * warp_rows;
  if (first >= total) return;
  const int here = static_cast<int>(min(warp_rows, total - first));

  Source mine{-1, -1, -1};
  if (lane < here) {
    mine = sources(first + lane);
    rows.positions[first + lane] = mine.position;
    rows.valid[first + lane] = mine.position >= 0;
  }

  const unsigned present = __ballot_sync(kAllLanes, mine.data >= 0);
  StoredChannels<Codec, T> loaded[kSteps][kParts];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int row = step * kAbreast + lane / kLanes;
    const int64_t data = __shfl_sync(kAllLanes, mine.data, row), scales = __shfl_sync(kAllLanes, mine.scales, row);
    if ((present >> row & 1u) == 0u) continue;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int channel = (part * kLanes + lane % kLanes) * kLaneChannels<T>;
      loaded[step][part].load({pool + data, pool + scales}, channel, global_scale);
    }
  }
  auto* to = static_cast<LaneChannels<T>*>(rows.values) + static_cast<int64_t>(first) * (kLanes * kParts);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int row = step * kAbreast + lane / kLanes;
    if (row >= here) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int place = part * kLanes + lane % kLanes;
      LaneChannels<T> values{};
      if (present >> row & 1u) values = loaded[step][part].decoded(place * kLaneChannels<T>);
      to[row * (kLanes * kParts) + place] = values;
    }
  }
}

template <template <class> class Sources, class Params>
const char* launch_gather(CUstream_st* stream, const char* op, const Pool& pool, const Rows& rows,
                          const Params& params) {
  const int64_t total = rows.queries * rows.count;
  if (total == 0) return nullptr;
  visit_codec(pool.width, pool.codec, [&](auto codec) {
    using Codec = decltype(codec);
    with_element(rows.element, [&](auto element) {
      const auto warp_rows =
          static_cast<unsigned>(std::clamp<int64_t>(total / kEnoughWarps, 1, rows_in_flight<Codec>()));
      gather_kernel<Codec, decltype(element)>
          <<<blocks_for(total, kGatherWarps * warp_rows), kGatherWarps * kWarp, 0, stream>>>(
              pool.data, pool.global_scale, rows, warp_rows, Sources<Codec>{params});
    });
  });
  return launch_error(op);
}

}  // namespace

const char* gather_entries(CUstream_st* stream, const GatherEntriesParams& params) {
  return launch_gather<EntrySources>(stream, "gather_entries", params.pool, params.rows, params);
}

const char* gather_window(CUstream_st* stream, const GatherWindowParams& params) {
  return launch_gather<WindowSources>(stream, "gather_window", params.window, params.rows, params);
}

}  // namespace dsv4::cuda
