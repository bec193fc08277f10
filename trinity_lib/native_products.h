// fp32 matrix products of one thread, over ATen's vectors: tiles of registers and a packed panel.
//
// BLAS would do as well where it uses the CPU's widest instructions; MKL, which torch ships,
// does so on Intel's alone (LOG.md has the rates). Bits follow from the sizes alone.

#pragma once

#include <algorithm>
#include <cstdint>

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLane = Vec::size();
constexpr int64_t kWide = 2 * kLane;  // columns of a panel and of a tile
constexpr int kTall = kLane == 16 ? 12 : 6;  // rows of a tile: what the registers hold
constexpr int64_t kDeep = 128;  // rows of a panel: 16 KB at most, for any first cache

inline float total(const Vec& lanes) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, lanes);
}

// A matrix in memory, and whether it is meant transposed; `stride` floats from row to row.
struct Matrix {
  const float* data;
  int64_t stride;
  bool transposed = false;
};

// What Vec holds, as the compiler's own type: a class's it may keep in memory.
typedef float Lanes __attribute__((vector_size(sizeof(Vec)), aligned(4), may_alias));

// c [M, columns] = a [M, depth] times the panel, or added to c. a[i, p] is a[i * down + p * right].
template <int M>
void tile(
    float* c, int64_t stride, const float* a, int64_t down, int64_t right, const float* panel,
    int64_t depth, int64_t columns, bool add) {
  Lanes sum[M][2] = {};
  for (int64_t p = 0; p < depth; ++p) {
    const Lanes left = *reinterpret_cast<const Lanes*>(panel + p * kWide);
    const Lanes rest = *reinterpret_cast<const Lanes*>(panel + p * kWide + kLane);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const float value = a[i * down + p * right];
      sum[i][0] += value * left;
      sum[i][1] += value * rest;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    float* to = c + i * stride;
    if (columns == kWide) {
      Lanes *one = reinterpret_cast<Lanes*>(to), *other = reinterpret_cast<Lanes*>(to + kLane);
      *one = add ? *one + sum[i][0] : sum[i][0];
      *other = add ? *other + sum[i][1] : sum[i][1];
      continue;
    }
    const Lanes both[2] = {sum[i][0], sum[i][1]};
    const float* row = reinterpret_cast<const float*>(both);
    for (int64_t j = 0; j < columns; ++j) to[j] = add ? to[j] + row[j] : row[j];
  }
}

template <int M = kTall, typename... Rest>
void tile_of(int64_t rows, Rest... rest) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<M - 1>(rows, rest...);
  }
  tile<M>(rest...);
}

// Rows [row, row + depth) of b in its columns [column, column + columns), zeros beside them.
inline void pack(const Matrix& b, int64_t row, int64_t column, int64_t depth, int64_t columns, float* panel) {
  if (!b.transposed) {
    const float* from = b.data + row * b.stride + column;
    for (float* to = panel; to < panel + depth * kWide; to += kWide, from += b.stride) {
      if (columns == kWide) {  // a copy of a known size needs no call
        std::copy_n(from, kWide, to);
      } else {
        std::fill(std::copy_n(from, columns, to), to + kWide, 0.0f);
      }
    }
    return;
  }
  const float* from = b.data + column * b.stride + row;
  int64_t p = 0;
  for (; columns == kWide && p + kLane <= depth; p += kLane) {
    for (int64_t j = 0; j < kWide; j += kLane) {
      at::vec::transpose_mxn<float, kLane, kLane>(
          from + j * b.stride + p, b.stride, panel + p * kWide + j, kWide);
    }
  }
  for (; p < depth; ++p) {
    for (int64_t j = 0; j < kWide; ++j) panel[p * kWide + j] = j < columns ? from[j * b.stride + p] : 0.0f;
  }
}

// c [m, n] = a [m, k] times b [k, n], added to what is there if asked.
inline void product(float* c, const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k, bool add = false) {
  alignas(64) float panel[kDeep * kWide];
  if (k == 0 && !add) std::fill_n(c, m * n, 0.0f);
  const int64_t down = a.transposed ? 1 : a.stride, right = a.transposed ? a.stride : 1;
  for (int64_t p = 0; p < k; p += kDeep) {
    const int64_t depth = std::min(kDeep, k - p);
    for (int64_t j = 0; j < n; j += kWide) {
      const int64_t columns = std::min(kWide, n - j);
      pack(b, p, j, depth, columns, panel);
      for (int64_t i = 0; i < m; i += kTall) {
        tile_of(
            std::min<int64_t>(kTall, m - i), c + i * n + j, n, a.data + i * down + p * right, down, right,
            panel, depth, columns, add || p > 0);
      }
    }
  }
}

}  // namespace
