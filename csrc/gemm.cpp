// y = x Wᵀ for groups of consecutive rows, one W a group: every matrix product of inference, from one row to thousands.
//
// A row's result depends, in every bit, on the row, its W and the instruction set alone: an output is one sum in the
// order that dot.h (outputs stored one by one) or axpy.h (stored transposed) fixes, the whole size at a time, so
// neither the number of rows nor the blocks, the groups or the threads enter.
//
// W is read where it lies; packing it would save nothing, because the tiles read along it anyway.  A block of W stays
// in the first cache while a block of rows, which stays in the second, goes by.  The trade-off not taken: splitting
// `size`, which a BLAS does to keep long rows in cache, and which would make the order depend on the shape.

#include <algorithm>
#include <vector>

#include "axpy.h"
#include "common.h"
#include "dot.h"
#include "operators.h"

namespace abyssal {
namespace {

constexpr int64_t kWeightBytes = 32 << 10;  // of W in an item that many rows share: most of a first-level cache
constexpr int64_t kStreamBytes = 64 << 10;  // of W in an item with one tile of rows
constexpr int64_t kRowBytes = 256 << 10;    // of x in an item
constexpr int64_t kMostOutputs = 256;       // of an item
constexpr int64_t kForkBytes = 1 << 20;     // of W: below this, and
constexpr int64_t kForkProducts = 1 << 22;  // below this, waking threads costs more than it gains
constexpr size_t kKeptFloats = 1 << 20;     // scratch kept between calls, at most

using Arguments = GemmArguments;

struct Item {
  int64_t group, row, num_rows, output, num_outputs;
};

struct Rows {  // x as the tiles read it
  const char* start;
  int64_t stride, bytes;  // from row to row in values, and of a value
};

int64_t whole_tiles(int64_t value, int64_t tile) { return std::max<int64_t>(value / tile, 1) * tile; }

int64_t outputs_of_item(const Arguments& a, bool one_tile) {
  if (a.transposed) return kStrip;
  const int64_t bytes = std::max<int64_t>(a.size * bytes_of(a.w_dtype), 1);
  const int64_t tile = one_tile ? kWideOutputs : kTileOutputs;
  return std::min(kMostOutputs, whole_tiles((one_tile ? kStreamBytes : kWeightBytes) / bytes, tile));
}

// Items in the order in which one thread would do them: a block of rows meets all outputs, then the next.
int64_t make_items(const Arguments& a, const int64_t* counts, int64_t tile_rows, std::vector<Item>& items) {
  const int64_t row_bytes = std::max<int64_t>(a.size * bytes_of(a.x_dtype), 1);
  const int64_t most_rows = whole_tiles(kRowBytes / row_bytes, tile_rows);
  int64_t first = 0;
  items.clear();
  for (int64_t group = 0; group < a.num_groups; first += counts[group++])
    for (int64_t done = 0; done < counts[group]; done += most_rows) {
      const int64_t rows = std::min(most_rows, counts[group] - done);
      const int64_t most_outputs = outputs_of_item(a, rows <= tile_rows);
      for (int64_t output = 0; output < a.num_outputs; output += most_outputs)
        items.push_back({group, first + done, rows, output, std::min(most_outputs, a.num_outputs - output)});
    }
  return first;
}

Rows rows_for(const Arguments& a, const Dot& dot, int64_t num_rows, std::vector<float>& packed) {
  const int64_t bytes = bytes_of(dot.x_dtype);
  if (dot.x_dtype == a.x_dtype && dot.half == 0) return {a.x, a.x_stride, bytes};
  const int64_t padded = padded_size(a.size);
  packed.resize(static_cast<size_t>(num_rows * padded));
  for (int64_t row = 0; row < num_rows; ++row)
    pack_row(a.x + row * a.x_stride * bytes_of(a.x_dtype), a.x_dtype, a.size, dot, packed.data() + row * padded);
  return {reinterpret_cast<const char*>(packed.data()), padded, bytes};
}

void multiply(const Arguments& a, const Item& item, Isa isa, const Dot& dot, const Axpy& axpy, const Rows& x) {
  const int64_t element = bytes_of(a.w_dtype), tile_rows = a.transposed ? axpy.max_rows : dot.max_rows;
  const char* w = a.w + (item.group * a.slot_stride + item.output * (a.transposed ? 1 : a.line_stride)) * element;
  const bool direct = a.y_dtype == kFloat32;
  float scratch[kTileRows * kMostOutputs];
  int64_t tiles = (item.num_rows + tile_rows - 1) / tile_rows;
  for (int64_t row = item.row, left = item.num_rows; left > 0; --tiles) {
    const int64_t rows = (left + tiles - 1) / tiles;  // 7 rows are 4 and 3, not 6 and 1
    const char* x_row = x.start + row * x.stride * x.bytes;
    const int64_t at = row * a.num_outputs + item.output;
    float* out = direct ? reinterpret_cast<float*>(a.y) + at : scratch;
    const int64_t out_stride = direct ? a.num_outputs : item.num_outputs;
    if (a.transposed) {
      axpy.tiles[rows - 1](w, a.line_stride, x_row, x.stride, a.size, item.num_outputs, out, out_stride, false);
    } else if (rows == 1) {
      dot_row(dot, w, a.line_stride, element, x_row, a.size, item.num_outputs, out);
    } else {
      int64_t n = 0;
      for (; n + kTileOutputs <= item.num_outputs; n += kTileOutputs)
        dot.tiles[rows - 1](w + n * a.line_stride * element, a.line_stride, x_row, x.stride, a.size, out + n,
                            out_stride);
      for (int64_t m = 0; n < item.num_outputs && m < rows; ++m)
        dot_row(dot, w + n * a.line_stride * element, a.line_stride, element, x_row + m * x.stride * x.bytes, a.size,
                item.num_outputs - n, out + m * out_stride + n);
    }
    if (!direct)
      call_vectorized(isa, [&]() ABYSSAL_INLINE_LAMBDA {
        for (int64_t m = 0; m < rows; ++m) {
          const float* source = scratch + m * item.num_outputs;
          uint16_t* y = reinterpret_cast<uint16_t*>(a.y) + at + m * a.num_outputs;
          for (int64_t n = 0; n < item.num_outputs; ++n) y[n] = to_bf16(source[n]);
        }
      });
    row += rows, left -= rows;
  }
}

Status check(const Arguments& a, const int64_t* counts) {
  for (int64_t dtype : {a.w_dtype, a.x_dtype, a.y_dtype})
    if (!is_dtype(dtype)) return kBadDtype;
  if (a.num_groups < 0 || a.num_outputs < 0 || a.size < 0) return kBadShape;
  int64_t rows = 0;
  for (int64_t group = 0; group < a.num_groups; ++group) {
    if (counts[group] < 0) return kBadShape;
    rows += counts[group];
  }
  if (rows && a.num_outputs && (!a.y || (a.size && !(a.w && a.x)))) return kNoStorage;
  return kOk;
}

}  // namespace

Status gemm(const Arguments& a, const int64_t* counts) {
  const Status status = check(a, counts);
  if (status != kOk || a.num_outputs == 0) return status;

  const Isa isa = choose_isa(a.isa_limit);
  const Axpy axpy = choose_axpy(isa, a.w_dtype == kBFloat16);
  const Dot dot = a.transposed ? in_order() : choose_dot(isa, a.w_dtype, a.x_dtype);
  thread_local std::vector<Item> kept_items;
  thread_local std::vector<float> packed;
  const int64_t num_rows = make_items(a, counts, a.transposed ? axpy.max_rows : dot.max_rows, kept_items);
  const Rows x = rows_for(a, dot, num_rows, packed);
  const Item* items = kept_items.data();  // the workers must not see their own thread_local items
  const int64_t num_items = static_cast<int64_t>(kept_items.size());

  const auto work = [=, &dot, &axpy](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) multiply(a, items[item], isa, dot, axpy, x);
  };
  const int64_t busy = a.num_groups - std::count(counts, counts + a.num_groups, 0);
  const int64_t weights = a.num_outputs * a.size;
  const bool small = busy * weights * bytes_of(a.w_dtype) < kForkBytes && num_rows * weights < kForkProducts;
  parallel_for(num_items, std::min(num_items, 8 * a.threads), small ? 1 : a.threads, a.fork, work);
  if (packed.capacity() > kKeptFloats) std::vector<float>().swap(packed);
  return kOk;
}

}  // namespace abyssal

// Returns a Status.
ABYSSAL_EXPORT int32_t abyssal_gemm(const void* record) {
  using namespace abyssal;
  GemmArguments a;
  std::memcpy(&a, record, sizeof(a));
  thread_local std::vector<int64_t> counts;
  counts.resize(static_cast<size_t>(std::max<int64_t>(a.num_groups, 0)));
  if (!counts.empty()) std::memcpy(counts.data(), static_cast<const char*>(record) + sizeof(a), counts.size() * 8);
  return gemm(a, counts.data());
}
