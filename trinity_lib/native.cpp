// Routed SwiGLU experts on the CPU, fp32: one expert, or one block of its rows, per thread;
// and products of a few rows, for decoding.
//
// A grouped matrix product spreads each expert's small product over all threads and pays for
// that once an expert; here threads take whole experts. Blocks and slices follow from the
// routing alone, and every sum has one fixed order, so the bits do not depend on the number
// of threads. Names: T tokens, K choices, R = T*K rows sorted by expert, D width, F hidden.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include "native_products.h"

namespace {

using at::Tensor;

constexpr int64_t kBlock = 256;  // rows of one task; a heavy expert is several
constexpr int64_t kFew = 8;  // rows whose products read a matrix once, at memory speed
constexpr int64_t kNarrowest = 32;  // columns of the thinnest slice of a weight gradient

struct Task {
  int64_t expert, begin, end;
};

// Tasks are taken from one counter: loads are uneven, and any thread may take any task. Each
// thread has `scratch` floats of its own, which stay in its cache from task to task.
template <typename F>
void run(const std::vector<Task>& tasks, int64_t scratch, const F& work) {
  std::atomic<size_t> next{0};
  const int64_t threads = at::get_num_threads();  // also for one task: outside, BLAS would take all
  Tensor space = at::empty({threads, scratch}, at::kFloat);
  float* own = space.data_ptr<float>();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    c10::InferenceMode guard;
    for (size_t i = next++; i < tasks.size(); i = next++) work(tasks[i], own + begin * scratch);
  });
}

std::vector<Task> row_blocks(const int64_t* ends, int64_t experts) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t r = e ? ends[e - 1] : 0; r < ends[e]; r += kBlock) {
      tasks.push_back({e, r, std::min(ends[e], r + kBlock)});
    }
  }
  return tasks;
}

// Slices [begin, end) of F for the weight gradients of experts of no rows or several blocks.
std::vector<Task> weight_slices(const int64_t* ends, int64_t experts, int64_t hidden) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = ends[e] - (e ? ends[e - 1] : 0);
    if (rows > 0 && rows <= kBlock) continue;
    const int64_t wanted = std::max<int64_t>(1, (rows + kBlock - 1) / kBlock);
    const int64_t slices = std::min(wanted, std::max<int64_t>(1, hidden / kNarrowest));
    const int64_t width = (hidden + slices - 1) / slices;
    for (int64_t f = 0; f < hidden; f += width) {
      tasks.push_back({e, f, std::min(hidden, f + width)});
    }
  }
  return tasks;
}

// Copies past the caches: a plain write would first read what it replaces from memory.
void stream(const float* from, float* to, int64_t size) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; i + 16 <= size; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
    _mm_sfence();  // such writes wait for no barrier
  }
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    for (; i + 8 <= size; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    _mm_sfence();
  }
#endif
  std::copy(from + i, from + size, to + i);
}

// out[r, f] = <x[r], w[f]> for N rows r: [N, D] by [F, D].
template <int N>
void dots(const float* x, const float* w, float* out, int64_t F, int64_t D, int64_t stride) {
  for (int64_t f = 0; f < F; ++f) {
    Vec sum[N];
    for (int r = 0; r < N; ++r) sum[r] = Vec(0.0f);
    for (int64_t d = 0; d < D; d += Vec::size()) {
      const int64_t left = std::min<int64_t>(Vec::size(), D - d);
      const Vec weight = Vec::loadu(w + f * D + d, left);
      for (int r = 0; r < N; ++r) sum[r] = at::vec::fmadd(weight, Vec::loadu(x + r * D + d, left), sum[r]);
    }
    for (int r = 0; r < N; ++r) out[r * stride + f] = total(sum[r]);
  }
}

// out[r] = sum over f of h[r, f] * w[f] for N rows r: [N, F] by [F, D].
template <int N>
void sums(const float* h, const float* w, float* out, int64_t F, int64_t D) {
  for (int64_t d = 0; d < D; d += Vec::size()) {
    const int64_t left = std::min<int64_t>(Vec::size(), D - d);
    Vec sum[N];
    for (int r = 0; r < N; ++r) sum[r] = Vec(0.0f);
    for (int64_t f = 0; f < F; ++f) {
      const Vec weight = Vec::loadu(w + f * D + d, left);
      for (int r = 0; r < N; ++r) sum[r] = at::vec::fmadd(weight, Vec(h[r * F + f]), sum[r]);
    }
    for (int r = 0; r < N; ++r) sum[r].store(out + r * D + d, left);
  }
}

// Calls f with std::integral_constant<int, n>, n from 1 to kFew.
template <int N = 1, typename F>
void few(int64_t n, const F& f) {
  if constexpr (N < kFew) {
    if (n > N) return few<N + 1>(n, f);
  }
  f(std::integral_constant<int, N>());
}

void gather(const float* from, const int64_t* order, const Task& t, int64_t K, int64_t D, float* to) {
  for (int64_t r = t.begin; r < t.end; ++r) {
    std::copy_n(from + order[r] / K * D, D, to + (r - t.begin) * D);
  }
}

// hidden = silu(gate) * up
void swiglu(const float* gate, const float* up, float* hidden, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::size()) {
    const int64_t left = std::min<int64_t>(Vec::size(), n - i);
    const Vec g = Vec::loadu(gate + i, left), u = Vec::loadu(up + i, left);
    (g / (Vec(1.0f) + g.neg().exp()) * u).store(hidden + i, left);
  }
}

// From the gradient of `hidden`, before weighting, to those of gate and up; `hidden` becomes
// weight * silu(gate) * up. Returns the gradient of the row's weight.
float swiglu_backward(
    const float* gate, const float* up, float* hidden, float weight, float* dgate, float* dup, int64_t n) {
  Vec gradient(0.0f);
  const Vec one(1.0f), w(weight);
  for (int64_t i = 0; i < n; i += Vec::size()) {
    const int64_t left = std::min<int64_t>(Vec::size(), n - i);
    const Vec g = Vec::loadu(gate + i, left), u = Vec::loadu(up + i, left);
    const Vec d = Vec::loadu(hidden + i, left);
    const Vec s = one / (one + g.neg().exp());
    const Vec silu = g * s, h = silu * u, dw = d * w;
    gradient = at::vec::fmadd(d, h, gradient);  // lanes past the end are loaded as zeros
    (dw * u * s * (one + g * (one - s))).store(dgate + i, left);
    (dw * silu).store(dup + i, left);
    (h * w).store(hidden + i, left);
  }
  return total(gradient);
}

// to[t] = sum over k of row[inverse[t * K + k]] (times its weight), in the order of k.
void combine(
    const float* rows, const int64_t* inverse, const float* weights, float* to, int64_t T, int64_t K, int64_t D) {
  at::parallel_for(0, T, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* out = to + t * D;
      for (int64_t k = 0; k < K; ++k) {
        const float* row = rows + inverse[t * K + k] * D;
        const Vec w(weights ? weights[t * K + k] : 1.0f);
        for (int64_t d = 0; d < D; d += Vec::size()) {
          const int64_t left = std::min<int64_t>(Vec::size(), D - d);
          const Vec product = Vec::loadu(row + d, left) * w;
          (k ? Vec::loadu(out + d, left) + product : product).store(out + d, left);
        }
      }
    }
  });
}

void check(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  for (const Tensor& t : {x, gate, up, down}) {
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_cpu(), "the native experts take fp32 on the CPU");
  }
}

// y_TD; what backward needs: gate and up before activation [R, F]; order_R, inverse_R, ends_E.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_, const Tensor& gate_, const Tensor& up_, const Tensor& down_,
    const Tensor& experts_, const Tensor& weights_) {
  check(x_, gate_, up_, down_);
  const Tensor x = x_.contiguous(), gate = gate_.contiguous(), up = up_.contiguous();
  const Tensor down = down_.contiguous(), experts = experts_.contiguous(), weights = weights_.contiguous();
  const int64_t T = experts.size(0), K = experts.size(1), R = T * K;
  const int64_t E = gate.size(0), F = gate.size(1), D = gate.size(2);
  const auto counts = experts.options();
  Tensor order = at::empty({R}, counts), inverse = at::empty({R}, counts), ends = at::zeros({E}, counts);
  Tensor gate_RF = at::empty({R, F}, x.options()), up_RF = at::empty({R, F}, x.options());
  Tensor y_RD = at::empty({R, D}, x.options()), y = at::empty({T, D}, x.options());

  const int64_t* chosen = experts.const_data_ptr<int64_t>();
  int64_t *o = order.data_ptr<int64_t>(), *inv = inverse.data_ptr<int64_t>(), *end = ends.data_ptr<int64_t>();
  for (int64_t r = 0; r < R; ++r) {
    TORCH_CHECK(chosen[r] >= 0 && chosen[r] < E, "expert ", chosen[r], " of ", E, " was chosen");
    ++end[chosen[r]];
  }
  for (int64_t e = 1; e < E; ++e) end[e] += end[e - 1];
  std::vector<int64_t> at(E, 0);
  for (int64_t e = 1; e < E; ++e) at[e] = end[e - 1];
  for (int64_t r = 0; r < R; ++r) {
    inv[r] = at[chosen[r]]++;
    o[inv[r]] = r;
  }

  const float *xs = x.const_data_ptr<float>(), *wg = gate.const_data_ptr<float>();
  const float *wu = up.const_data_ptr<float>(), *wd = down.const_data_ptr<float>();
  float *g = gate_RF.data_ptr<float>(), *u = up_RF.data_ptr<float>(), *ys = y_RD.data_ptr<float>();
  run(row_blocks(end, E), kBlock * (D + 3 * F), [&](const Task& t, float* rows) {
    const int64_t n = t.end - t.begin, w = t.expert * F * D;
    float* hidden = rows + n * D;
    gather(xs, o, t, K, D, rows);
    if (n <= kFew) {
      few(n, [&](auto count) {
        constexpr int N = decltype(count)::value;
        dots<N>(rows, wg + w, g + t.begin * F, F, D, F);
        dots<N>(rows, wu + w, u + t.begin * F, F, D, F);
        swiglu(g + t.begin * F, u + t.begin * F, hidden, n * F);
        sums<N>(hidden, wd + w, ys + t.begin * D, F, D);
      });
      return;
    }
    float *g_ = hidden + n * F, *u_ = g_ + n * F;
    product(g_, {rows, D}, {wg + w, D, true}, n, F, D);
    product(u_, {rows, D}, {wu + w, D, true}, n, F, D);
    swiglu(g_, u_, hidden, n * F);
    stream(g_, g + t.begin * F, n * F);
    stream(u_, u + t.begin * F, n * F);
    product(ys + t.begin * D, {hidden, F}, {wd + w, D}, n, D, F);
  });
  combine(ys, inv, weights.const_data_ptr<float>(), y.data_ptr<float>(), T, K, D);
  return {y, gate_RF, up_RF, order, inverse, ends};
}

// Gradients of x, gate, up, down and of the routing weights.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& gate_, const Tensor& up_, const Tensor& down_,
    const Tensor& weights_, const Tensor& gate_RF, const Tensor& up_RF, const Tensor& order,
    const Tensor& inverse, const Tensor& ends) {
  check(dy_, x_, gate_, up_);
  const Tensor dy = dy_.contiguous(), x = x_.contiguous(), gate = gate_.contiguous(), up = up_.contiguous();
  const Tensor down = down_.contiguous(), weights = weights_.contiguous();
  const int64_t T = weights.size(0), K = weights.size(1), R = T * K;
  const int64_t E = gate.size(0), F = gate.size(1), D = gate.size(2);
  const auto like = x.options();
  Tensor x_RD = at::empty({R, D}, like), dy_RD = at::empty({R, D}, like), dx_RD = at::empty({R, D}, like);
  Tensor dgate_RF = at::empty({R, F}, like), dup_RF = at::empty({R, F}, like), hidden_RF = at::empty({R, F}, like);
  Tensor dx = at::empty({T, D}, like), dweights = at::empty({T, K}, like);
  Tensor dgate = at::empty({E, F, D}, like), dup = at::empty({E, F, D}, like), ddown = at::empty({E, F, D}, like);

  const int64_t *o = order.const_data_ptr<int64_t>(), *end = ends.const_data_ptr<int64_t>();
  const float *xs = x.const_data_ptr<float>(), *dys = dy.const_data_ptr<float>();
  const float *wg = gate.const_data_ptr<float>(), *wu = up.const_data_ptr<float>(), *wd = down.const_data_ptr<float>();
  const float* ws = weights.const_data_ptr<float>();
  float *xr = x_RD.data_ptr<float>(), *dyr = dy_RD.data_ptr<float>(), *dxr = dx_RD.data_ptr<float>();
  float *g = dgate_RF.data_ptr<float>(), *u = dup_RF.data_ptr<float>(), *h = hidden_RF.data_ptr<float>();
  const float *gs = gate_RF.const_data_ptr<float>(), *us = up_RF.const_data_ptr<float>();
  float* dws = dweights.data_ptr<float>();
  float *dg = dgate.data_ptr<float>(), *du = dup.data_ptr<float>(), *dd = ddown.data_ptr<float>();
  // Rows [first, first + n) of an expert: their x and dy, and dgate, dup, hidden of width F.
  struct Rows {
    float *x, *dy, *gate, *up, *hidden;
  };
  const auto weight_gradients = [&](const Task& t, int64_t n, const Rows& rows, float* space) {
    const int64_t width = t.end - t.begin, w = (t.expert * F + t.begin) * D, f = t.begin;
    const Matrix left[] = {{rows.gate + f, F, true}, {rows.up + f, F, true}, {rows.hidden + f, F, true}};
    const Matrix right[] = {{rows.x, D}, {rows.x, D}, {rows.dy, D}};
    float* const to[] = {dg + w, du + w, dd + w};
    for (int i = 0; i < 3; ++i) {
      product(space, left[i], right[i], width, D, n);
      stream(space, to[i], width * D);
    }
  };
  const auto kept = [&](int64_t r) { return Rows{xr + r * D, dyr + r * D, g + r * F, u + r * F, h + r * F}; };
  run(row_blocks(end, E), kBlock * (2 * D + 3 * F) + F * D, [&](const Task& t, float* space) {
    const int64_t n = t.end - t.begin, w = t.expert * F * D;
    const int64_t first = t.expert ? end[t.expert - 1] : 0;
    const bool whole = t.begin == first && t.end == end[t.expert];
    float *own = space + F * D, *wide = own + 2 * n * D;
    const Rows rows = whole ? Rows{own, own + n * D, wide, wide + n * F, wide + 2 * n * F} : kept(t.begin);
    gather(xs, o, t, K, D, rows.x);
    gather(dys, o, t, K, D, rows.dy);
    product(rows.hidden, {rows.dy, D}, {wd + w, D, true}, n, F, D);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = o[t.begin + i], f = (t.begin + i) * F;
      dws[r] = swiglu_backward(
          gs + f, us + f, rows.hidden + i * F, ws[r], rows.gate + i * F, rows.up + i * F, F);
    }
    float* dx_ = dxr + t.begin * D;
    product(dx_, {rows.gate, F}, {wg + w, D}, n, D, F);
    product(dx_, {rows.up, F}, {wu + w, D}, n, D, F, true);
    if (whole) weight_gradients({t.expert, 0, F}, n, rows, space);
  });
  run(weight_slices(end, E, F), F * D, [&](const Task& t, float* space) {
    const int64_t first = t.expert ? end[t.expert - 1] : 0, n = end[t.expert] - first;
    if (n) return weight_gradients(t, n, kept(first), space);
    const int64_t w = (t.expert * F + t.begin) * D, size = (t.end - t.begin) * D;
    for (float* d : {dg, du, dd}) std::fill_n(d + w, size, 0.0f);
  });
  combine(dxr, inverse.const_data_ptr<int64_t>(), nullptr, dx.data_ptr<float>(), T, K, D);
  return {dx, dgate, dup, ddown, dweights};
}

// x [n, D] by each w [F, D], n at most kFew: [n, F] each; without gradients. One call for all
// that share an x, since a call costs what a small matrix does.
std::vector<Tensor> few_rows(const Tensor& x_, at::TensorList matrices) {
  const Tensor x = x_.contiguous();
  const int64_t n = x.size(0), D = x.size(1);
  TORCH_CHECK(0 < n && n <= kFew, "few_rows takes 1 to ", kFew, " rows, not ", n);
  std::vector<Tensor> held, outs;
  std::vector<int64_t> ends{0};
  for (const Tensor& w : matrices) {
    check(x, w, w, w);
    TORCH_CHECK(w.size(1) == D, "a matrix takes rows of width ", w.size(1), ", not ", D);
    held.push_back(w.contiguous());
    outs.push_back(at::empty({n, w.size(0)}, x.options()));
    ends.push_back(ends.back() + w.size(0));
  }
  const float* xs = x.const_data_ptr<float>();
  at::parallel_for(0, ends.back(), std::max<int64_t>(1, (1 << 15) / D), [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < held.size(); ++i) {
      const int64_t from = std::max(begin, ends[i]) - ends[i], to = std::min(end, ends[i + 1]) - ends[i];
      if (from >= to) continue;
      const float* w = held[i].const_data_ptr<float>() + from * D;
      float* out = outs[i].data_ptr<float>() + from;
      few(n, [&](auto count) {
        dots<decltype(count)::value>(xs, w, out, to - from, D, ends[i + 1] - ends[i]);
      });
    }
  });
  return outs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trinity_native, m) {
  m.def("experts(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor experts, Tensor weights) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("experts_backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor down, Tensor weights, "
        "Tensor gate_RF, Tensor up_RF, Tensor order, Tensor inverse, Tensor ends) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("few_rows(Tensor x, Tensor[] matrices) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(trinity_native, CPU, m) {
  m.impl("experts", forward);
  m.impl("experts_backward", backward);
  m.impl("few_rows", few_rows);
}
