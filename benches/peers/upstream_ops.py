"""Times the ops of mamba_ssm and causal-conv1d on a GPU, on the shapes and under the names of benches/cuda.rs.

Run: python upstream_ops.py OUTPUT.json [--case PART]
     (needs torch, triton, mamba_ssm; rows of kernels that are not built are left out)

Medians of triton.testing.do_bench; `fwd_bwd_ms` is forward and backward from a given gradient.
"""

import argparse
import importlib.util
import json
import sys
import types

import torch

for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)  # so that the Python around it can be imported
BUILT = {name: hasattr(sys.modules.get(name) or __import__(name), "__file__") for name in ("selective_scan_cuda", "causal_conv1d_cuda")}

import triton
from triton.testing import do_bench

ROWS = []


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def uniform(low, high, *shape, dtype=torch.bfloat16):
    return torch.empty(*shape, device="cuda").uniform_(low, high).to(dtype)


def row(name, f, inputs, differentiable=True):
    """`f` takes the inputs and gives the outputs that have gradients."""
    if args.case not in name:
        return
    try:
        timed = {"case": name, "fwd_ms": do_bench(lambda: f(*inputs), return_mode="median")}
        if differentiable:
            tracked = [x.detach().requires_grad_() for x in inputs]
            grads = [torch.randn_like(y) for y in f(*tracked)]
            step = lambda: torch.autograd.backward(f(*tracked), grads)
            timed["fwd_bwd_ms"] = do_bench(step, grad_to_none=tracked, return_mode="median")
    except Exception as error:
        timed = {"case": name, "error": f"{type(error).__name__}: {error}"}
    print(timed, flush=True)
    ROWS.append(timed)


def scan():
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    for dtype, b, d, l in [("bf16", 1, 2048, 2048), ("bf16", 8, 2048, 2048), ("bf16", 8, 2048, 8192),
                           ("bf16", 1, 5120, 2048), ("f32", 8, 2048, 2048), ("f32", 8, 2048, 8192)]:
        t, n = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype], 16
        inputs = [normal(b, d, l, dtype=t), uniform(-5, -2, b, d, l, dtype=t), uniform(-8, -0.5, d, n, dtype=torch.float32),
                  normal(b, n, l, dtype=t), normal(b, n, l, dtype=t), normal(d, dtype=torch.float32), normal(b, d, l, dtype=t),
                  normal(d, dtype=torch.float32)]
        row(f"selective_scan {dtype} B{b} D{d} L{l} N{n}",
            lambda u, delta, a, b, c, d, z, bias: [selective_scan_fn(u, delta, a, b, c, d, z, bias, True)], inputs)


def ssd():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    for b, l, h, p, n, g in [(1, 2048, 80, 64, 128, 1), (8, 2048, 32, 64, 128, 1), (8, 8192, 32, 64, 128, 1), (8, 2048, 24, 64, 128, 1)]:
        inputs = [normal(b, l, h, p), uniform(-5, -2, b, l, h), uniform(-8, -0.5, h, dtype=torch.float32), normal(b, l, g, n),
                  normal(b, l, g, n), normal(h, dtype=torch.float32), normal(h, dtype=torch.float32)]
        row(f"ssd_chunk_scan bf16 B{b} L{l} H{h} P{p} N{n} G{g}",
            lambda x, dt, a, b, c, d, bias: [
                mamba_chunk_scan_combined(x, dt, a, b, c, 256, D=d, dt_bias=bias, dt_softplus=True)], inputs)


def conv():
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    for axes, b, d, l in [("BDL", 8, 4096, 2048), ("BLD", 8, 4096, 2048), ("BDL", 1, 5376, 2048), ("BLD", 1, 5376, 2048)]:
        last = axes == "BLD"
        x = normal(b, l, d) if last else normal(b, d, l)
        row(f"causal_conv1d bf16 {axes} B{b} D{d} L{l} W4",
            lambda x, w, bias: [causal_conv1d_fn(x.transpose(1, 2) if last else x, w, bias, activation="silu")],
            [x, normal(d, 4), normal(d)])
    for b in (1, 64, 256):
        d = 5376
        row(f"causal_conv1d_update bf16 D{d} W4 B{b}", lambda x, state, w, bias: causal_conv1d_update(x, state, w, bias, "silu"),
            [normal(b, d), normal(b, d, 3), normal(d, 4), normal(d)], differentiable=False)


def norms():
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    for rows, dim in [(16384, 2560), (64, 2560)]:
        row(f"add_rms_norm bf16 {rows}x{dim}",
            lambda x, residual, w: list(rms_norm_fn(x, w, None, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True)),
            [normal(rows, dim), normal(rows, dim, dtype=torch.float32), normal(dim, dtype=torch.float32)])
    for rows, dim in [(16384, 5120), (64, 5120)]:
        row(f"gated_rms_norm bf16 {rows}x{dim}",
            lambda x, z, w: [rmsnorm_fn(x, w, None, z=z, eps=1e-5, norm_before_gate=False)],
            [normal(rows, dim), normal(rows, dim), normal(dim, dtype=torch.float32)])


def steps():
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    f32 = torch.float32
    for b in (1, 64, 256):
        d, n = 5120, 16
        row(f"selective_state_update bf16 D{d} N{n} B{b}",
            lambda state, x, dt, a, bb, c, dd, z, bias: selective_state_update(state, x, dt, a, bb, c, dd, z, bias, True),
            [normal(b, d, n, dtype=f32), normal(b, d), uniform(-5, -2, b, d), uniform(-8, -0.5, d, n, dtype=f32), normal(b, n),
             normal(b, n), normal(d, dtype=f32), normal(b, d), normal(d, dtype=f32)], differentiable=False)
    for b in (1, 64, 256):
        h, p, n = 80, 64, 128
        tie = lambda x, *shape: x.reshape(*x.shape, *[1] * (len(shape) - x.dim())).expand(*shape)
        row(f"selective_state_update bf16 H{h} P{p} N{n} B{b}",
            lambda state, x, dt, a, bb, c, dd, z, bias: selective_state_update(
                state, x, tie(dt, b, h, p), tie(a, h, p, n), bb, c, tie(dd, h, p), z, tie(bias, h, p), True),
            [normal(b, h, p, n, dtype=f32), normal(b, h, p), uniform(-5, -2, b, h), uniform(-8, -0.5, h, dtype=f32),
             normal(b, 1, n), normal(b, 1, n), normal(h, dtype=f32), normal(b, h, p), normal(h, dtype=f32)], differentiable=False)


def main():
    torch.manual_seed(0)
    norms()
    steps()
    ssd()
    if BUILT["causal_conv1d_cuda"]:
        conv()
    if BUILT["selective_scan_cuda"]:
        scan()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "gpu": torch.cuda.get_device_name(0)}
    try:
        import mamba_ssm

        versions["mamba_ssm"] = mamba_ssm.__version__
    except Exception as error:
        versions["mamba_ssm"] = f"{error}"
    with open(args.output, "w") as out:
        json.dump({"versions": versions, "rows": ROWS}, out, indent=1)


parser = argparse.ArgumentParser()
parser.add_argument("output")
parser.add_argument("--case", default="", help="only cases whose name contains this")
args = parser.parse_args()
main()
