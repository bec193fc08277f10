// A step of Muon for a batch of matrices, fp32 on the CPU: one matrix per thread, which stays
// in that thread's cache from its gradient to its update.
//
// Names: E matrices of N rows and M columns, S the lesser of N and M.

#include <cmath>
#include <cstdint>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "native_products.h"

namespace {

using at::Tensor;

// f(i, n) for n at most kLane numbers from i on.
template <typename F>
void by_lanes(int64_t size, const F& f) {
  for (int64_t i = 0; i < size; i += kLane) f(i, std::min(kLane, size - i));
}

// to = alpha * from
void scale(float* to, float alpha, const float* from, int64_t size) {
  by_lanes(size, [&](int64_t i, int64_t n) { (Vec(alpha) * Vec::loadu(from + i, n)).store(to + i, n); });
}

// to = alpha * to + beta * from
void blend(float* to, float alpha, const float* from, float beta, int64_t size) {
  const Vec a(alpha), b(beta);
  by_lanes(size, [&](int64_t i, int64_t n) {
    at::vec::fmadd(b, Vec::loadu(from + i, n), a * Vec::loadu(to + i, n)).store(to + i, n);
  });
}

// x [N, M] by way of `other` of its size and two of [S, S]; where the result is, one of the two.
float* newton_schulz(
    float* x, float* other, float* gram, float* poly, int64_t N, int64_t M, int64_t steps,
    at::ArrayRef<double> coefficients) {
  const bool wide = N <= M;
  const int64_t S = std::min(N, M), size = N * M;
  const float a = coefficients[0], b = coefficients[1], c = coefficients[2];
  Vec squares(0.0f);
  by_lanes(size, [&](int64_t i, int64_t n) {
    const Vec part = Vec::loadu(x + i, n);  // lanes past the end are zeros
    squares = at::vec::fmadd(part, part, squares);
  });
  scale(x, 1.0f / (std::sqrt(total(squares)) + 1e-7f), x, size);
  for (int64_t step = 0; step < steps; ++step) {
    product(gram, {x, M, !wide}, {x, M, wide}, S, S, wide ? M : N);
    product(poly, {gram, S}, {gram, S}, S, S, S);
    blend(poly, c, gram, b, S * S);
    scale(other, a, x, size);
    if (wide) {
      product(other, {poly, S}, {x, M}, N, M, S, true);
    } else {
      product(other, {x, M}, {poly, S}, N, M, S, true);
    }
    std::swap(x, other);
  }
  return x;
}

// Moves `weights` and `momentum` [E, N, M] in place; see muon.py. `rest`: a matrix without any
// gradient stays as it is, and so does its momentum.
void muon(
    Tensor& weights, const Tensor& gradient_, Tensor& momentum, double beta, double rate, double decay,
    int64_t steps, bool rest, at::ArrayRef<double> coefficients) {
  const Tensor gradient = gradient_.contiguous();
  for (const Tensor& t : {weights, gradient, momentum}) {
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_cpu() && t.is_contiguous(), "muon takes contiguous fp32");
    TORCH_CHECK(t.dim() == 3 && t.sizes() == weights.sizes(), "muon takes tensors of one shape [E, N, M]");
  }
  TORCH_CHECK(coefficients.size() == 3, "a quintic has three coefficients");
  const int64_t E = weights.size(0), N = weights.size(1), M = weights.size(2);
  const int64_t size = N * M, square = std::min(N, M) * std::min(N, M);
  float *ws = weights.data_ptr<float>(), *ms = momentum.data_ptr<float>();
  const float* gs = gradient.const_data_ptr<float>();
  at::parallel_for(0, E, 1, [&](int64_t begin, int64_t end) {
    c10::InferenceMode guard;
    Tensor space = at::empty({2 * (size + square)}, at::kFloat);
    float* x = space.data_ptr<float>();
    for (int64_t e = begin; e < end; ++e) {
      float *w = ws + e * size, *m = ms + e * size;
      const float* g = gs + e * size;
      if (rest && std::all_of(g, g + size, [](float value) { return value == 0.0f; })) continue;
      const Vec keep(beta), take(1.0 - beta);
      by_lanes(size, [&](int64_t i, int64_t n) {
        const Vec now = Vec::loadu(g + i, n);
        const Vec averaged = at::vec::fmadd(take, now, keep * Vec::loadu(m + i, n));
        averaged.store(m + i, n);
        at::vec::fmadd(keep, averaged, take * now).store(x + i, n);
      });
      float* other = x + size;
      float* result = newton_schulz(
          x, other, other + size, other + size + square, N, M, steps, coefficients);
      blend(w, 1.0 - decay, result, -rate, size);
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trinity_native, m) {
  m.def("muon(Tensor(a!) weights, Tensor gradient, Tensor(b!) momentum, float beta, float rate, "
        "float decay, int steps, bool rest, float[] coefficients) -> ()");
}

TORCH_LIBRARY_IMPL(trinity_native, CPU, m) {
  m.impl("muon", muon);
}
