// hopper_fa._C: parameter structs in, status out. Integers for pointers, strides and the stream; no torch
// headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

#include "common/block_range.h"
#include "common/exp2_linear.h"
#include "common/exp2_polynomial.h"
#include "common/query_walk.h"
#include "common/tile_scheduler.h"
#include "common/tile_table.h"
#include "hopper_fa/backward.h"
#include "hopper_fa/forward.h"
#include "hopper_fa/probe.h"
#include "hopper_fa/quantize.h"
#include "quantize/layout.h"

namespace py = pybind11;
using namespace hopper_fa;

namespace {

TensorRef tensor_ref(std::uintptr_t data, int64_t batch_stride, int64_t row_stride, int64_t head_stride) {
  return {reinterpret_cast<void*>(data), batch_stride, row_stride, head_stride};
}

py::dict tile_dict(int index) {
  ForwardTile const& t = kForwardTiles[index];
  bool const specialised = t.producer_registers > 0;
  py::dict d;
  d["tile"] = index;
  d["variant"] = t.variant;
  d["head_dim"] = t.head_dim;
  d["block_m"] = t.block_m;
  d["block_n"] = t.block_n;
  d["q_stages"] = t.q_stages;
  d["kv_stages"] = t.kv_stages;
  d["consumer_warpgroups"] = t.block_m / 64;
  d["threads"] = t.block_m * 2 + (specialised ? 128 : 0);
  d["producer_registers"] = t.producer_registers;
  d["consumer_registers"] = t.consumer_registers;
  d["warp_specialised"] = specialised;
  d["ping_pong"] = t.ping_pong == PingPong::kNever     ? "never"
                   : t.ping_pong == PingPong::kAfterQK ? "after_qk"
                                                       : "after_pv";
  d["overlap"] = t.overlap;
  d["fma_exp2_octets"] = t.fma_exp2_octets;
  d["rescale_threshold"] = t.rescale_threshold;
  d["peak_bits"] = t.peak_bits;
  d["element_bytes"] = t.element_bytes;
  d["pv_parts"] = t.pv_parts;
  d["tma_store"] = t.store != Store::kPlain;
  d["flush_floats"] = forward_flush_floats(t);
  d["shared_memory"] = forward_shared_memory(t);
  return d;
}

// Every tile-table row, with the dtypes this binary holds a kernel for ("bf16", "fp16", "e4m3", "int8";
// empty: not built).
std::vector<py::dict> forward_tiles() {
  std::vector<py::dict> rows;
  for (int i = 0; i < kNumForwardTiles; ++i) {
    py::dict d = tile_dict(i);
    std::vector<std::string> dtypes;
    if (has_forward(DType::kBF16, i)) dtypes.push_back("bf16");
    if (has_forward(DType::kFP16, i)) dtypes.push_back("fp16");
    if (has_forward(DType::kE4M3, i)) dtypes.push_back("e4m3");
    if (has_forward(DType::kInt8, i)) dtypes.push_back("int8");
    d["dtypes"] = dtypes;
    rows.push_back(d);
  }
  return rows;
}

// The rows of the backward's table, as forward_tiles.
std::vector<py::dict> backward_tiles() {
  std::vector<py::dict> rows;
  for (int i = 0; i < kNumBackwardTiles; ++i) {
    BackwardTile const& t = kBackwardTiles[i];
    py::dict d;
    d["tile"] = i;
    d["variant"] = t.variant;
    d["head_dim"] = t.head_dim;
    d["block_m"] = t.block_m;
    d["block_n"] = t.block_n;
    d["q_stages"] = t.q_stages;
    d["do_stages"] = t.do_stages;
    d["ds_stages"] = t.ds_stages;
    d["producer_registers"] = t.producer_registers;
    d["consumer_registers"] = t.consumer_registers;
    d["split"] = t.split;
    d["dq_registers"] = t.dq_registers;
    d["quantized"] = t.factors != Factors::kNone;
    d["threads"] = backward_threads(t);
    d["shared_memory"] = backward_shared_memory(t);
    std::vector<std::string> dtypes;
    if (has_backward(DType::kBF16, i)) dtypes.push_back("bf16");
    if (has_backward(DType::kFP16, i)) dtypes.push_back("fp16");
    d["dtypes"] = dtypes;
    rows.push_back(d);
  }
  return rows;
}

// All tiles of a problem, (m_block, head, batch), in the order they are started.
std::vector<std::tuple<int, int, int>> tile_order(int batch, int heads_q, int q_heads_per_kv, int seqlen_q,
                                                  int tile_rows, long long kv_bytes, bool causal) {
  TileScheduler const s =
      make_tile_scheduler(batch, heads_q, q_heads_per_kv, seqlen_q, tile_rows, kv_bytes, causal);
  std::vector<std::tuple<int, int, int>> order;
  for (int i = 0; i < s.num_tiles; ++i) {
    Tile const t = s.get(i);
    order.emplace_back(t.m_block, t.head, t.batch);
  }
  return order;
}

ForwardParams forward_params(int dtype, int tile, std::uintptr_t q, int64_t q_batch, int64_t q_row,
                             int64_t q_head, std::uintptr_t k, int64_t k_batch, int64_t k_row, int64_t k_head,
                             std::uintptr_t v, int64_t v_batch, int64_t v_row, int64_t v_head,
                             std::uintptr_t out, int64_t out_batch, int64_t out_row, int64_t out_head,
                             std::uintptr_t lse, std::uintptr_t workspace, int batch, int seqlen_q,
                             int seqlen_k, int heads_q, int heads_kv, int head_dim, float softmax_scale,
                             bool causal) {
  ForwardParams p{};
  p.dtype = static_cast<DType>(dtype);
  p.tile = tile;
  p.q = tensor_ref(q, q_batch, q_row, q_head);
  p.k = tensor_ref(k, k_batch, k_row, k_head);
  p.v = tensor_ref(v, v_batch, v_row, v_head);
  p.out = tensor_ref(out, out_batch, out_row, out_head);
  p.lse = reinterpret_cast<float*>(lse);
  p.workspace = reinterpret_cast<int*>(workspace);
  p.batch = batch;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.head_dim = head_dim;
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  return p;
}

// Pointer, batch, row and head stride.
using Strided = std::tuple<std::uintptr_t, int64_t, int64_t, int64_t>;

TensorRef tensor_ref(Strided const& t) {
  return std::apply([](auto... x) { return tensor_ref(x...); }, t);
}

// Pointer, batch, head and group stride.
using Scale = std::tuple<std::uintptr_t, int, int, int>;

ScaleRef scale_ref(Scale const& s) {
  return {reinterpret_cast<float const*>(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s)};
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

BackwardParams backward_params(int dtype, int tile, Strided const& q, Strided const& k, Strided const& v,
                               Strided const& out, Strided const& dout, Strided const& dq, Strided const& dk,
                               Strided const& dv, std::uintptr_t lse, std::uintptr_t dlse,
                               std::uintptr_t dq_sum, std::uintptr_t rows, std::uintptr_t turns, int batch,
                               int seqlen_q, int seqlen_k, int heads_q, int heads_kv, int head_dim,
                               float softmax_scale, bool causal, bool deterministic) {
  BackwardParams p{};
  p.dtype = static_cast<DType>(dtype);
  p.tile = tile;
  p.q = tensor_ref(q);
  p.k = tensor_ref(k);
  p.v = tensor_ref(v);
  p.out = tensor_ref(out);
  p.dout = tensor_ref(dout);
  p.dq = tensor_ref(dq);
  p.dk = tensor_ref(dk);
  p.dv = tensor_ref(dv);
  p.lse = pointer<float const>(lse);
  p.dlse = pointer<float const>(dlse);
  p.dq_sum = pointer<float>(dq_sum);
  p.rows = pointer<float>(rows);
  p.turns = pointer<int>(turns);
  p.batch = batch;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.head_dim = head_dim;
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.deterministic = deterministic;
  return p;
}

// backward(..., stream), and backward_quantized(..., stream, dtype of the codes, then the other members of
// BackwardCodes in their order), where ... are the arguments of backward_params.
template <class... Args>
void def_backward(py::module_& m, BackwardParams (*make)(Args...)) {
  m.def("backward", [=](Args... args, std::uintptr_t stream) {
    return static_cast<int>(run_backward(make(args...), pointer<CUstream_st>(stream)));
  });
  m.def("backward_quantized",
        [=](Args... args, std::uintptr_t stream, int code_dtype, std::uintptr_t q, std::uintptr_t k,
            std::uintptr_t v, int v_channels, Scale const& q_scale, Scale const& k_scale, int q_group_rows,
            int k_group_rows, std::uintptr_t v_scale, std::uintptr_t v_mean, std::uintptr_t lse_shift,
            std::uintptr_t k_mean, bool rotated, std::string const& signs) {
          BackwardCodes codes{};
          if (signs.size() > sizeof(codes.signs)) return static_cast<int>(Status::kInvalidArgument);
          codes.dtype = static_cast<DType>(code_dtype);
          codes.q = pointer<void const>(q);
          codes.k = pointer<void const>(k);
          codes.v = pointer<void const>(v);
          codes.v_channels = v_channels;
          codes.q_scale = scale_ref(q_scale);
          codes.k_scale = scale_ref(k_scale);
          codes.q_group_rows = q_group_rows;
          codes.k_group_rows = k_group_rows;
          codes.v_scale = pointer<float const>(v_scale);
          codes.v_mean = pointer<float const>(v_mean);
          codes.lse_shift = pointer<float const>(lse_shift);
          codes.k_mean = pointer<float const>(k_mean);
          codes.rotated = rotated;
          std::memcpy(codes.signs, signs.data(), signs.size());
          BackwardParams p = make(args...);
          p.codes = &codes;
          return static_cast<int>(run_backward(p, pointer<CUstream_st>(stream)));
        });
}

void bind_backward(py::module_& m) {
  m.def("backward_tiles", &backward_tiles);
  m.def("backward_workspace", [](int tile, int batch, int seqlen_q, int heads_q) {
    BackwardWorkspace const w = backward_workspace(tile, batch, seqlen_q, heads_q);
    return std::make_tuple(w.dq_sum, w.rows, w.turns);
  });
  // Host-compiled kernel logic, for the tests: the query blocks of a key block in the order it visits them,
  // each with the number of key blocks that add to dQ before it in deterministic mode.
  m.def("query_walk",
        [](int n_block, int seqlen_q, int seqlen_k, int block_m, int block_n, bool causal, int group_size) {
          int const m_blocks = ceil_div(seqlen_q, block_m), n_blocks = ceil_div(seqlen_k, block_n);
          QueryWalk const walk = query_walk(n_block, n_blocks, m_blocks, seqlen_q, seqlen_k, block_m, block_n,
                                            causal, group_size);
          std::vector<std::tuple<int, int>> steps;
          for (int step = 0; step < walk.count; ++step) {
            int const m = walk.block(step);
            steps.emplace_back(
                m, dq_turn(walk, n_block, n_blocks, m, seqlen_q, seqlen_k, block_m, block_n, group_size));
          }
          return steps;
        });
  def_backward(m, &backward_params);
}

// forward(..., stream) and forward_fp8(..., stream, out_dtype, q_scale, q_group_rows, k_scale, v_scale,
// v_mean, lse_shift, p_offset, rescale_threshold, key_bias, flush_interval, flush), where ... are the
// arguments of forward_params. NOTE: positional and flat on purpose: keyword arguments and structs cost
// microseconds a call.
template <class... Args>
void def_forward(py::module_& m, ForwardParams (*make)(Args...)) {
  auto const run = [](ForwardParams const& p, std::uintptr_t stream) {
    return static_cast<int>(run_forward(p, reinterpret_cast<CUstream_st*>(stream)));
  };
  m.def("forward", [=](Args... args, std::uintptr_t stream) { return run(make(args...), stream); });
  m.def("forward_fp8",
        [=](Args... args, std::uintptr_t stream, int out_dtype, Scale const& q_scale, int q_group_rows,
            Scale const& k_scale, std::uintptr_t v_scale, std::uintptr_t v_mean, std::uintptr_t lse_shift,
            float p_offset, float rescale_threshold, Scale const& key_bias, int flush_interval,
            std::uintptr_t flush) {
          ForwardParams p = make(args...);
          p.fp8.out_dtype = static_cast<DType>(out_dtype);
          p.fp8.q_scale = scale_ref(q_scale);
          p.fp8.k_scale = scale_ref(k_scale);
          p.fp8.q_group_rows = q_group_rows;
          p.fp8.v_scale = reinterpret_cast<float const*>(v_scale);
          p.fp8.v_mean = reinterpret_cast<float const*>(v_mean);
          p.fp8.lse_shift = reinterpret_cast<float const*>(lse_shift);
          p.fp8.p_offset = p_offset;
          p.fp8.rescale_threshold = rescale_threshold;
          p.key_bias = scale_ref(key_bias);
          p.fp8.flush_interval = flush_interval;
          p.fp8.flush = reinterpret_cast<float*>(flush);
          return run(p, stream);
        });
}

// Input types ("bf16", "fp16", "e4m3") that this binary holds quantisation kernels for.
std::vector<std::string> quantize_dtypes() {
  std::vector<std::string> dtypes;
  if (has_quantize(DType::kBF16)) dtypes.push_back("bf16");
  if (has_quantize(DType::kFP16)) dtypes.push_back("fp16");
  if (has_quantize(DType::kE4M3)) dtypes.push_back("e4m3");
  return dtypes;
}

// Flat arguments, as of `forward`; 0 stands for null pointers.
void bind_quantize(py::module_& m) {
  m.attr("GRANULARITIES") = py::dict(py::arg("none") = static_cast<int>(Granularity::kNone),
                                     py::arg("tensor") = static_cast<int>(Granularity::kTensor),
                                     py::arg("group") = static_cast<int>(Granularity::kGroup),
                                     py::arg("head") = static_cast<int>(Granularity::kHead),
                                     py::arg("block") = static_cast<int>(Granularity::kBlock),
                                     py::arg("token") = static_cast<int>(Granularity::kToken),
                                     py::arg("channel") = static_cast<int>(Granularity::kChannel));
  m.attr("OVERLAPS") = py::dict(py::arg("none") = static_cast<int>(Overlap::kNone),
                                py::arg("loads") = static_cast<int>(Overlap::kLoads),
                                py::arg("all") = static_cast<int>(Overlap::kAll));
  m.def("quantize_dtypes", &quantize_dtypes);
  m.def("quantize_v_workspace", &quantize_v_workspace);

  m.def("token_stats", [](int dtype, std::uintptr_t x, int64_t x_batch, int64_t x_row, int64_t x_head,
                          int batch, int seqlen, int heads, int head_dim, int shift, std::uintptr_t mean,
                          std::uintptr_t amax, int granularity, std::uintptr_t outgrown, int overlap,
                          std::uintptr_t stream) {
    TokenStatsParams p;
    p.in = {static_cast<DType>(dtype), tensor_ref(x, x_batch, x_row, x_head), batch, seqlen, heads, head_dim};
    p.shift = shift;
    p.mean = pointer<float>(mean);
    p.amax = pointer<uint32_t>(amax);
    p.granularity = static_cast<Granularity>(granularity);
    p.outgrown = pointer<uint32_t>(outgrown);
    p.overlap = static_cast<Overlap>(overlap);
    return static_cast<int>(run_token_stats(p, pointer<CUstream_st>(stream)));
  });

  m.def("quantize_rows", [](int dtype, std::uintptr_t x, int64_t x_batch, int64_t x_row, int64_t x_head,
                            int batch, int seqlen, int heads, int head_dim, int out_dtype, bool queries,
                            int q_heads_per_kv, int granularity, int rows_per_block, std::uintptr_t mean,
                            bool rotate, std::string const& signs, std::uintptr_t other_mean,
                            std::uintptr_t dots, std::uintptr_t amax, std::uintptr_t out,
                            std::uintptr_t scale, int overlap, std::uintptr_t stream) {
    QuantizeRowsParams p{};
    if (signs.size() > sizeof(p.signs)) return static_cast<int>(Status::kInvalidArgument);
    p.in = {static_cast<DType>(dtype), tensor_ref(x, x_batch, x_row, x_head), batch, seqlen, heads, head_dim};
    p.out_dtype = static_cast<DType>(out_dtype);
    p.queries = queries;
    p.q_heads_per_kv = q_heads_per_kv;
    p.granularity = static_cast<Granularity>(granularity);
    p.rows_per_block = rows_per_block;
    p.mean = pointer<float>(mean);
    p.rotate = rotate;
    std::memcpy(p.signs, signs.data(), signs.size());
    p.other_mean = pointer<float>(other_mean);
    p.dots = pointer<float>(dots);
    p.amax = pointer<uint32_t>(amax);
    p.out = pointer<void>(out);
    p.scale = pointer<float>(scale);
    p.overlap = static_cast<Overlap>(overlap);
    return static_cast<int>(run_quantize_rows(p, pointer<CUstream_st>(stream)));
  });

  m.def("quantize_v", [](int dtype, std::uintptr_t x, int64_t x_batch, int64_t x_row, int64_t x_head,
                         int batch, int seqlen, int heads, int head_dim, std::uintptr_t mean, bool smooth,
                         bool compensate, std::uintptr_t amax, int granularity, std::uintptr_t outgrown,
                         std::uintptr_t out, std::uintptr_t scale, std::uintptr_t workspace, int overlap,
                         std::uintptr_t stream) {
    QuantizeVParams p;
    p.in = {static_cast<DType>(dtype), tensor_ref(x, x_batch, x_row, x_head), batch, seqlen, heads, head_dim};
    p.mean = pointer<float>(mean);
    p.smooth = smooth;
    p.compensate = compensate;
    p.amax = pointer<uint32_t>(amax);
    p.granularity = static_cast<Granularity>(granularity);
    p.outgrown = pointer<uint32_t>(outgrown);
    p.out = pointer<void>(out);
    p.scale = pointer<float>(scale);
    p.workspace = pointer<float>(workspace);
    p.overlap = static_cast<Overlap>(overlap);
    return static_cast<int>(run_quantize_v(p, pointer<CUstream_st>(stream)));
  });

  // Host-compiled index arithmetic, for the tests.
  m.def("tile_columns", &tile_columns);
  m.def("sampled_token", &sampled_token);
  m.def("key_at", &key_at);
  m.def("key_mask", &key_mask);
  m.def("hadamard_block", &hadamard_block);
  m.def("hadamard_norm", &hadamard_norm);
  m.def("v_tile_groups", &v_tile_groups);
  m.def("v_slot", &v_slot);
  m.def("row_slot", &row_slot);
  m.def("token_slot", &token_slot);
  m.def("code_slot", &code_slot);
  m.def("quantize_tile", [](int index, int heads, int blocks) {
    QuantizeTile const t = make_quantize_tiles(heads, blocks).get(index);
    return std::make_tuple(t.block, t.head, t.batch);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled face of hopper_fa; only hopper_fa/kernels.py imports it.";
  m.attr("cuda_version") = HOPPER_FA_CUDA_VERSION;
  m.attr("cutlass_version") = HOPPER_FA_CUTLASS_VERSION;
  m.attr("STATUS_OK") = static_cast<int>(Status::kOk);
  m.attr("DTYPES") = py::dict(
      py::arg("bf16") = static_cast<int>(DType::kBF16), py::arg("fp16") = static_cast<int>(DType::kFP16),
      py::arg("e4m3") = static_cast<int>(DType::kE4M3), py::arg("int8") = static_cast<int>(DType::kInt8));
  m.attr("STATUS") = py::dict(py::arg("no_instance") = static_cast<int>(Status::kNoInstance),
                              py::arg("invalid_argument") = static_cast<int>(Status::kInvalidArgument),
                              py::arg("wrong_device") = static_cast<int>(Status::kWrongDevice),
                              py::arg("driver_error") = static_cast<int>(Status::kDriverError),
                              py::arg("launch_error") = static_cast<int>(Status::kLaunchError));

  m.attr("FORWARD_WORKSPACE_INTS") = kForwardWorkspaceInts;

  m.def("forward_tiles", &forward_tiles);
  m.attr("EXP2_LINEAR_MEAN") = kExp2LinearMean;
  m.def("exp2_polynomial",
        [] { return std::vector<float>(std::begin(kExp2Polynomial), std::end(kExp2Polynomial)); });

  def_forward(m, &forward_params);

  m.def("accumulator_probe", [](std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, std::uintptr_t d,
                                int problems, int k, std::uintptr_t stream) {
    AccumulatorProbeParams const p{reinterpret_cast<void const*>(a),
                                   reinterpret_cast<void const*>(b),
                                   reinterpret_cast<float const*>(c),
                                   reinterpret_cast<float*>(d),
                                   problems,
                                   k};
    return static_cast<int>(run_accumulator_probe(p, reinterpret_cast<CUstream_st*>(stream)));
  });

  // Host-compiled kernel logic, for the tests and the emulator.
  m.def("block_range", [](int row, int rows, int seqlen_q, int seqlen_k, bool causal, int block_n) {
    BlockRange const r = block_range(row, rows, seqlen_q, seqlen_k, causal, block_n);
    return std::make_tuple(r.end, r.unmasked);
  });
  m.def("tile_order", &tile_order);
  m.def("choose_warpgroups", &choose_warpgroups);

  bind_quantize(m);
  bind_backward(m);
}
