// Plain codes <-> the packed layout of moesaic/matmul.h.  Compiled once, at the ABI baseline: packing
// is bound by memory and happens once per weight.
#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "moesaic/matmul.h"

namespace moesaic {
namespace {

constexpr int64_t kPanel = 16;

// Byte of code (output i of 16, kk of 4) in its group, by size of a code.
int64_t byte_in_group(DType element, int64_t i, int64_t kk) {
  switch (group_bytes(element)) {
    case 64: return 32 * (kk >> 1) + 2 * i + (kk & 1);
    case 128: return element == DType::kBFloat16 ? 64 * (kk >> 1) + 4 * i + 2 * (kk & 1) : 32 * kk + 2 * i;
    default: return 64 * kk + 4 * i;
  }
}

// One panel of E2M1: a plain byte holds the codes of k and k + 1.
template <bool pack>
void e2m1_panel(const PackArgs& args, uint8_t* plain, uint8_t* packed, int64_t outputs) {
  const int64_t row_bytes = (args.k + 1) / 2;
  const int64_t groups = (args.k + 3) / 4;
  if (pack) std::memset(packed, 0, groups * 32);
  for (int64_t i = 0; i < outputs; ++i) {
    uint8_t* row = plain + i * row_bytes;
    uint8_t* at = packed + 16 * ((i >> 2) & 1) + 8 * (i >> 3) + 2 * (i & 3);
    for (int64_t g = 0; g < groups; ++g, at += 32) {
      uint8_t* two = row + 2 * g;
      const bool more = 2 * g + 1 < row_bytes;
      if (pack) {
        uint8_t b01 = two[0], b23 = more ? two[1] : 0;
        if (4 * g + 1 >= args.k) b01 &= 15;  // the nibble past an odd k is padding, whatever it holds
        if (4 * g + 3 >= args.k) b23 &= 15;
        at[0] = uint8_t((b01 & 15) | (b23 << 4));
        at[1] = uint8_t((b01 >> 4) | (b23 & 0xf0));
      } else {
        two[0] = uint8_t((at[0] & 15) | (at[1] << 4));
        if (more) two[1] = uint8_t((at[0] >> 4) | (at[1] & 0xf0));
      }
    }
  }
}

template <bool pack, class Code>
void panel_of(const PackArgs& args, uint8_t* plain, uint8_t* packed, int64_t outputs) {
  const int64_t stride = group_bytes(args.element);
  const int64_t groups = (args.k + 3) / 4;
  if (pack) std::memset(packed, 0, groups * stride);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t at[4] = {byte_in_group(args.element, i, 0), byte_in_group(args.element, i, 1),
                           byte_in_group(args.element, i, 2), byte_in_group(args.element, i, 3)};
    uint8_t* row = plain + i * args.k * sizeof(Code);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t left = args.k - 4 * g < 4 ? args.k - 4 * g : 4;
      for (int64_t kk = 0; kk < left; ++kk) {
        uint8_t* a = row + (4 * g + kk) * sizeof(Code);
        uint8_t* b = packed + g * stride + at[kk];
        std::memcpy(pack ? b : a, pack ? a : b, sizeof(Code));
      }
    }
  }
}

bool any_nan(const PackArgs& args, const uint8_t* row) {
  bool found = false;
  for (int64_t k = 0; k < args.k; ++k) found |= (row[k] & args.nan_mask) == args.nan_code;
  return found;
}

template <bool pack>
void for_panels(const PackArgs& args) {
  const int64_t panels = (args.n + kPanel - 1) / kPanel;
  const int64_t size = group_bytes(args.element);
  const int64_t code_bits = size / 8;
  const int64_t row_bytes = (args.k * code_bits + 7) / 8;
  const int64_t panel_bytes = (args.k + 3) / 4 * size;
  parallel_tasks(args.experts * panels, args.threads, [&](int64_t task) {
    const int64_t expert = task / panels, first = task % panels * kPanel;
    const int64_t outputs = args.n - first < kPanel ? args.n - first : kPanel;
    uint8_t* plain = args.plain + (expert * args.n + first) * row_bytes;
    uint8_t* packed = args.packed + task * panel_bytes;
    switch (code_bits) {
      case 4: e2m1_panel<pack>(args, plain, packed, outputs); break;
      case 8: panel_of<pack, uint8_t>(args, plain, packed, outputs); break;
      case 16: panel_of<pack, uint16_t>(args, plain, packed, outputs); break;
      default: panel_of<pack, uint32_t>(args, plain, packed, outputs);
    }
    if (pack && args.poison) {
      float* poison = args.poison + task * kPanel;
      for (int64_t i = 0; i < kPanel; ++i)
        poison[i] = i < outputs && any_nan(args, plain + i * row_bytes) ? NAN : 0.0f;
    }
  });
}

}  // namespace

void pack_codes(const PackArgs& args) { for_panels<true>(args); }
void unpack_codes(const PackArgs& args) { for_panels<false>(args); }

}  // namespace moesaic
