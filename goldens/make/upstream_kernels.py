"""Makes goldens/ops/<op>/upstream_kernel_<case>.safetensors: calls of the CUDA and Triton kernels of mamba_ssm and causal_conv1d.

Run on a machine with an NVIDIA GPU, with both packages and their extensions built:

    python upstream_kernels.py [--device cuda:0] [--output FOLDER] [--op NAME] [--jobs 8]

Files have the tensors of ops.py (see ../README.md), in the dtypes that the kernels ran in: f32, or f16 or bf16 with parameters
in f32. Gradients are those of upstream's own backward, of the sum over all outputs that have a `cot.`; outputs without one are
those that upstream does not differentiate: the last state of the selective scan, and states by `cu_seqlens`.

Every result is compared with the recurrence in float64, written out below with torch. How far each is off, as
max|error| / max(1, max|value|), is stored as `tolerance.<name>` and `tolerance_grad.<name>`; a case beyond the limits below is
not written but named at the end, and the exit status says so. Products of f32 are IEEE, where Triton would take TF32; upstream runs in its
deterministic mode, which is also one configuration a kernel, so that nothing is tuned here.
"""

import argparse
import os
import pathlib
import subprocess
import sys

os.environ["TRITON_F32_DEFAULT"] = "ieee"
os.environ["MAMBA_DETERMINISTIC"] = "1"

import causal_conv1d  # noqa: E402
import mamba_ssm  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # noqa: E402
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn  # noqa: E402
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn  # noqa: E402
from mamba_ssm.ops.triton.layernorm_gated import layernorm_fn as gated_norm_fn  # noqa: E402
from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # noqa: E402
from mamba_ssm.ops.triton.ssd_combined import (  # noqa: E402
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

import golden_file  # noqa: E402
from draw import Draw  # noqa: E402

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 64 * 1024
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# How far outputs and gradients may be from float64: rounding of what is stored, and of what is rounded on the way.
LIMITS = {"f32": (1e-5, 5e-5), "f16": (4e-3, 1e-2), "bf16": (3e-2, 6e-2)}
NO_LIMIT = (0.0, float("inf"))

# (op, case) to a function that runs the case.
CASES = {}


# ------------------------------------------------------------------------------------------ the recurrences in float64


def packed_borders(seq_idx):
    """For each row and token, whether a sequence begins there."""
    return torch.cat([torch.ones_like(seq_idx[:, :1]), seq_idx[:, 1:] != seq_idx[:, :-1]], 1).bool()


def recurrence(x, dt, a, b, c, state=None, seq_idx=None):
    """State space models token by token: x (batch, seqlen, heads, p), dt (batch, seqlen, heads), a (heads, n or 1), b and c
    (batch, seqlen, heads, n). Gives y and the state after each token."""
    batch, seqlen, heads, p = x.shape
    state = x.new_zeros(batch, heads, p, b.shape[-1]) if state is None else state
    begins = None if seq_idx is None else packed_borders(seq_idx)
    ys, states = [], []
    for t in range(seqlen):
        if begins is not None and t > 0:
            state = torch.where(begins[:, t, None, None, None], torch.zeros_like(state), state)
        step = dt[:, t, :, None, None]
        state = torch.exp(step * a[:, None]) * state + step * x[:, t, ..., None] * b[:, t, :, None]
        ys.append((state * c[:, t, :, None]).sum(-1))
        states.append(state)
    return torch.stack(ys, 1), states


def steps(dt, bias, softplus, limit=NO_LIMIT):
    dt = dt if bias is None else dt + bias
    return (F.softplus(dt) if softplus else dt).clamp(*limit)


def by_heads(m, heads):
    """(batch, seqlen, groups, n) with a row for each head."""
    return m.repeat_interleave(heads // m.shape[2], dim=2)


def scan_reference(u, delta, a, b, c, d=None, z=None, delta_bias=None, *, softplus):
    batch, dim, seqlen = u.shape

    def coefficients(m):  # constant ones are (dim, n), others (batch, groups, n, seqlen)
        return m.expand(batch, seqlen, dim, -1) if m.dim() == 2 else by_heads(m.permute(0, 3, 1, 2), dim)

    dt = steps(delta, None if delta_bias is None else delta_bias[:, None], softplus).transpose(1, 2)
    y, states = recurrence(u.transpose(1, 2)[..., None], dt, a, coefficients(b), coefficients(c))
    y = y[..., 0].transpose(1, 2)
    y = y if d is None else y + u * d[:, None]
    return {"y": y if z is None else y * F.silu(z), "final_state": states[-1][:, :, 0]}


def ssd_reference(x, dt, a, b, c, d=None, z=None, dt_bias=None, initial_states=None, *, softplus, limit=NO_LIMIT,
                  seq_idx=None, ends=None):
    """`ends`: the last tokens of sequences in a batch of one row, whose states are then given."""
    heads = x.shape[2]
    dt = steps(dt, dt_bias, softplus, limit)
    y, states = recurrence(x, dt, a[:, None], by_heads(b, heads), by_heads(c, heads), initial_states, seq_idx)
    y = y if d is None else y + x * (d if d.dim() == 2 else d[:, None])
    final = states[-1] if ends is None else torch.cat([states[t] for t in ends])
    return {"y": y if z is None else y * F.silu(z), "final_state": final}


def state_update_reference(state, x, dt, a, b, c, d=None, z=None, dt_bias=None, *, softplus, indices=None):
    rows = slice(None) if indices is None else indices
    heads = state.dim() == 4
    lift = lambda m, axis: m if heads or m is None else m.unsqueeze(axis)  # noqa: E731
    x, dt, b, c, z = (lift(m, 1) for m in (x, dt, b, c, z))
    a, d, dt_bias = (lift(m, 0) for m in (a, d, dt_bias))
    old = lift(state[rows], 1)
    dt = steps(dt, dt_bias, softplus)
    b, c = (m.repeat_interleave(old.shape[1] // m.shape[1], dim=1)[:, :, None] for m in (b, c))
    new = torch.exp(dt[..., None] * a) * old + (dt * x)[..., None] * b
    y = (new * c).sum(-1)
    y = y if d is None else y + x * d
    y = y if z is None else y * F.silu(z)
    after = state.clone()
    after[rows] = new if heads else new[:, 0]
    return {"y": y if heads else y[:, 0], "state": after}


def conv_reference(x, weight, bias=None, initial_states=None, *, activation, seq_idx=None):
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    before = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states
    window = torch.cat([before, x], 2)
    y = 0
    for k in range(width):
        tap = window[:, :, k : k + seqlen]
        if seq_idx is not None:  # a token of another sequence is not seen
            shifted = torch.cat([seq_idx.new_full((batch, width - 1), -1), seq_idx], 1)[:, k : k + seqlen]
            tap = tap * (shifted == seq_idx)[:, None]
        y = y + tap * weight[:, k, None]
    y = y if bias is None else y + bias[:, None]
    return {"y": F.silu(y) if activation else y, "final_states": window[:, :, seqlen:]}


def conv_update_reference(x, conv_state, weight, bias=None, *, activation, indices=None):
    rows = slice(None) if indices is None else indices
    tokens = x[:, :, None] if x.dim() == 2 else x
    out = conv_reference(tokens, weight, bias, conv_state[rows], activation=activation)
    after = conv_state.clone()
    after[rows] = out["final_states"]
    return {"y": out["y"].reshape(x.shape), "conv_state": after}


def norm_reference(x, weight, bias=None, residual=None, z=None, *, centred, eps, group_size=None, norm_before_gate=True,
                   prenorm=False):
    x = x if residual is None else x + residual
    gated = x if z is None or norm_before_gate else x * F.silu(z)
    groups = gated.unflatten(-1, (-1, group_size or gated.shape[-1]))
    groups = groups - groups.mean(-1, keepdim=True) if centred else groups
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    y = y if bias is None else y + bias
    y = y * F.silu(z) if z is not None and norm_before_gate else y
    return {"y": y, "residual": x} if prenorm else {"y": y}


# ------------------------------------------------------------------------------------------------------------ a case


def emit(op, case, dtype, inputs, kernel, reference, options, draw, *, producer, differentiated=("y",), stored=(),
         indices=None):
    """Runs, checks and writes one case.

    `inputs`: name to values, or to (values, "f32") for what stays f32. `kernel` takes tensors on the GPU, `reference` float64
    ones; both give outputs by name. `differentiated`: the outputs in the gradient's loss. `stored`: outputs without one.
    `indices`: integer tensors that both take as they are.
    """
    kept = {name: value if isinstance(value, tuple) else (value, dtype) for name, value in inputs.items() if value is not None}
    device = arguments.device
    indices = {} if indices is None else indices
    leaves = {name: torch.tensor(value).to(device, DTYPES[own]).requires_grad_(bool(differentiated))
              for name, (value, own) in kept.items()}
    doubles = {name: torch.tensor(value, dtype=torch.float64).requires_grad_(bool(differentiated))
               for name, (value, _) in kept.items()}
    for name, leaf in leaves.items():
        assert torch.equal(leaf.detach().double().cpu(), doubles[name].detach()), f"{op}/{case}: {name} is not exact"
    outs = kernel(**leaves, **{name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in indices.items()})
    wanted = reference(**doubles, **{name: torch.tensor(value) for name, value in indices.items()})
    compared = {name: (outs[name], wanted[name]) for name in (*differentiated, *stored)}
    cotangents = {name: draw.normal(*outs[name].shape) for name in differentiated}
    gradients = {}
    if differentiated:
        got = torch.autograd.grad([outs[name] for name in differentiated], list(leaves.values()),
                                  [torch.tensor(cotangents[name]).to(device, outs[name].dtype) for name in differentiated])
        want = torch.autograd.grad([wanted[name] for name in differentiated], list(doubles.values()),
                                   [torch.tensor(cotangents[name]) for name in differentiated])
        gradients = {name: pair for name, *pair in zip(leaves, got, want)}
    errors = [{name: deviation(*pair) for name, pair in pairs.items()} for pairs in (compared, gradients)]
    beyond = [f"{op}/{case}: {what}{name} is off by {error:.1e}"
              for part, limit, what in zip(errors, LIMITS[dtype], ("", "the gradient of "))
              for name, error in part.items() if not error <= limit]
    if beyond:
        return beyond

    tensors = {f"in.{name}": array(leaf) for name, leaf in leaves.items()}
    tensors |= {f"out.{name}": array(pair[0]) for name, pair in compared.items()}
    tensors |= {f"cot.{name}": array(torch.tensor(value).to(outs[name].dtype)) for name, value in cotangents.items()}
    tensors |= {f"grad.{name}": array(pair[0]) for name, pair in gradients.items()}
    tensors |= {name: np.array(value, dtype=np.int64) for name, value in indices.items()}
    metadata = {"op": op, "case": f"upstream_kernel_{case}", "producer": producer, "producer_version": versions(),
                "seed": str(draw.seed), "input_grid": draw.grid, "dtype": dtype,
                "gradient_of": "sum(out * cot)" if differentiated else "none"}
    for what, part in zip(("tolerance", "tolerance_grad"), errors):
        metadata |= {f"{what}.{name}": f"{error * 1.01:.2e}" for name, error in part.items()}
    golden_file.write(arguments.output / "ops" / op / f"upstream_kernel_{case}.safetensors", tensors, metadata | options, LIMIT)
    worst = [f"{max(part.values(), default=0.0):.1e}" for part in errors]
    print(f"{op}/{case}: off by {worst[0]}, gradients {worst[1]}", flush=True)
    return []


def deviation(got, want):
    got, want = got.detach().double().cpu(), want.detach()
    assert got.shape == want.shape, (got.shape, want.shape)
    error = ((got - want).abs().max() / max(1.0, want.abs().max())).item()
    return error if error == error else float("inf")


def array(tensor):
    tensor = tensor.detach().cpu().contiguous()
    return golden_file.BFloat16(tensor.float().numpy()) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def versions():
    gpu = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else "no GPU"
    return (f"mamba_ssm {mamba_ssm.__version__}, causal_conv1d {causal_conv1d.__version__}, torch {torch.__version__}, "
            f"triton {triton.__version__}, cuda {torch.version.cuda}, {gpu}")


def flag(value):
    return "true" if value else "false"


def cases_of(op):
    """A decorator: the function describes one case, and is listed with the arguments of each in `CASES`."""
    def register(function):
        def add(case, *, dtype="f32", **options):
            assert (op, case) not in CASES, (op, case)
            draw = Draw(op, f"upstream_kernel_{case}", "f32" if dtype == "f32" else "half")
            CASES[op, case] = lambda: function(case, draw, dtype, **options)
        return add
    return register


def channels_last(x):
    """The same tensor with channels side by side in memory, which is what upstream goes by."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


# --------------------------------------------------------------------------------------------------------------- ops


@cases_of("selective_scan")
def scan(case, draw, dtype, *, batch=2, dim=4, seqlen=12, n=4, groups=1, b="varying", c="varying", d=True, z=True, bias=True,
         softplus=True):
    coefficients = lambda kind: ((draw.normal(dim, n), "f32") if kind == "constant"  # noqa: E731
                                 else draw.normal(batch, groups, n, seqlen))
    inputs = dict(
        u=draw.normal(batch, dim, seqlen),
        delta=draw.normal(batch, dim, seqlen, mean=-1) if softplus else draw.uniform(0.05, 1, batch, dim, seqlen),
        a=(draw.round(-np.exp(draw.normal(dim, n))), "f32"),
        b=coefficients(b),
        c=coefficients(c),
        d=(draw.normal(dim), "f32") if d else None,
        z=draw.normal(batch, dim, seqlen) if z else None,
        delta_bias=((draw.normal(dim, scale=0.5) if softplus else draw.uniform(0.05, 0.5, dim)), "f32") if bias else None,
    )

    def kernel(u, delta, a, b, c, d=None, z=None, delta_bias=None):
        y, state = selective_scan_fn(u, delta, a, b, c, d, z, delta_bias, softplus, return_last_state=True)
        return {"y": y, "final_state": state}

    return emit("selective_scan", case, dtype, inputs, kernel, lambda **x: scan_reference(**x, softplus=softplus),
                {"delta_softplus": flag(softplus), "b_kind": b, "c_kind": c, "ngroups": str(groups)}, draw,
                producer="mamba_ssm.ops.selective_scan_interface.selective_scan_fn",
                # Where B is constant the kernel leaves it out of its state.
                stored=["final_state"] if b == "varying" else [])


@cases_of("causal_conv1d")
def conv(case, draw, dtype, *, batch=2, dim=8, seqlen=11, width=4, bias=True, activation="silu", last=False, states=False,
         seq_idx=None):
    inputs = dict(
        x=draw.normal(batch, dim, seqlen),
        weight=draw.normal(dim, width, scale=0.6),
        bias=draw.normal(dim, scale=0.5) if bias else None,
        initial_states=draw.normal(batch, dim, width - 1) if states else None,
    )

    def kernel(x, weight, bias=None, initial_states=None, seq_idx=None):
        x = channels_last(x) if last else x
        initial_states = None if initial_states is None else channels_last(initial_states)
        out = causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, return_final_states=states, activation=activation)
        return dict(zip(("y", "final_states"), out if states else (out,)))

    return emit("causal_conv1d", case, dtype, inputs, kernel, lambda **x: conv_reference(**x, activation=activation),
                {"activation": activation or "none", "width": str(width), "memory": "channels last" if last else "time last"},
                draw, producer="causal_conv1d.causal_conv1d_fn",
                differentiated=["y", "final_states"] if states else ["y"],
                indices={"seq_idx": seq_idx} if seq_idx else None)


@cases_of("causal_conv1d_update")
def conv_update(case, draw, dtype, *, batch=3, dim=8, seqlen=None, width=4, bias=True, activation="silu", slots=None):
    inputs = dict(
        x=draw.normal(batch, dim) if seqlen is None else draw.normal(batch, dim, seqlen),
        conv_state=draw.normal(len(slots) + 2 if slots else batch, dim, width - 1),
        weight=draw.normal(dim, width, scale=0.6),
        bias=draw.normal(dim, scale=0.5) if bias else None,
    )

    def kernel(x, conv_state, weight, bias=None, indices=None):
        conv_state = conv_state.clone()
        return {"y": causal_conv1d_update(x, conv_state, weight, bias, activation, conv_state_indices=indices),
                "conv_state": conv_state}

    return emit("causal_conv1d_update", case, dtype, inputs, kernel,
                lambda **x: conv_update_reference(**x, activation=activation),
                {"activation": activation or "none", "width": str(width), "state_len": str(width - 1)}, draw,
                producer="causal_conv1d.causal_conv1d_update", differentiated=(), stored=["y", "conv_state"],
                indices={"indices": slots} if slots else None)


@cases_of("selective_state_update")
def state_update(case, draw, dtype, *, batch=3, heads=None, dim=4, n=8, groups=1, z=True, softplus=True, tied=False, slots=None):
    head, group = ((), ()) if heads is None else ((heads,), (groups,))
    one = (1,) if tied else (dim,)  # tied: one value a head, repeated, as Mamba-2 has it
    spread = lambda m, *shape: np.ascontiguousarray(np.broadcast_to(m, shape))  # noqa: E731
    inputs = dict(
        state=(draw.normal(len(slots) + 2 if slots else batch, *head, dim, n), "f32"),
        x=draw.normal(batch, *head, dim),
        dt=spread(draw.normal(batch, *head, *one, mean=-1) if softplus else draw.uniform(0.05, 1, batch, *head, *one),
                  batch, *head, dim),
        a=(spread(draw.round(-np.exp(draw.normal(*head, *one, 1 if tied else n))), *head, dim, n), "f32"),
        b=draw.normal(batch, *group, n),
        c=draw.normal(batch, *group, n),
        d=(spread(draw.normal(*head, *one), *head, dim), "f32"),
        z=draw.normal(batch, *head, dim) if z else None,
        dt_bias=(spread(draw.normal(*head, *one, scale=0.5) if softplus else draw.uniform(0.05, 0.5, *head, *one), *head, dim),
                 "f32"),
    )

    def kernel(state, x, dt, a, b, c, d, z=None, dt_bias=None, indices=None):
        state = state.clone()
        if tied:  # strides of 0 are what sends upstream down its path for Mamba-2
            dt, dt_bias, a = dt[..., :1].expand(dt.shape), dt_bias[..., :1].expand(d.shape), a[..., :1, :1].expand(a.shape)
        y = selective_state_update(state, x, dt, a, b, c, d, z, dt_bias, softplus, state_batch_indices=indices)
        return {"y": y, "state": state}

    return emit("selective_state_update", case, dtype, inputs, kernel,
                lambda **x: state_update_reference(**x, softplus=softplus),
                {"dt_softplus": flag(softplus), "form": "channels" if heads is None else "heads", "ngroups": str(groups),
                 "tied": flag(tied)}, draw,
                producer="mamba_ssm.ops.triton.selective_state_update.selective_state_update",
                differentiated=(), stored=["y", "state"], indices={"indices": slots} if slots else None)


@cases_of("ssd")
def ssd(case, draw, dtype, *, batch=1, seqlen=20, heads=2, p=8, groups=1, n=8, chunk=16, d="none", z=False, bias=False,
        softplus=False, limit=NO_LIMIT, initial=False, seq_idx=None, cu_seqlens=None):
    inputs = dict(
        x=draw.normal(batch, seqlen, heads, p),
        dt=draw.normal(batch, seqlen, heads, mean=-1) if softplus else draw.uniform(0.05, 1, batch, seqlen, heads),
        a=(draw.round(-np.exp(draw.normal(heads, scale=0.7))), "f32"),
        b=draw.normal(batch, seqlen, groups, n),
        c=draw.normal(batch, seqlen, groups, n),
        d={"none": None, "head": (draw.normal(heads), "f32"), "head_dim": (draw.normal(heads, p), "f32")}[d],
        z=draw.normal(batch, seqlen, heads, p) if z else None,
        dt_bias=((draw.normal(heads, scale=0.5) if softplus else draw.uniform(0.05, 0.5, heads)), "f32") if bias else None,
        initial_states=(draw.normal(batch, heads, p, n), "f32") if initial else None,
    )
    ends = None if cu_seqlens is None else [end - 1 for end in cu_seqlens[1:]]

    def kernel(x, dt, a, b, c, d=None, z=None, dt_bias=None, initial_states=None, seq_idx=None):
        borders = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=x.device)
        y, state = mamba_chunk_scan_combined(
            x, dt, a, b, c, chunk, D=d, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=borders,
            dt_softplus=softplus, dt_limit=limit, return_final_states=borders is None, return_varlen_states=borders is not None)
        return {"y": y, "final_state": state}

    whole = cu_seqlens is None and seq_idx is None
    return emit("ssd", case, dtype, inputs, kernel,
                lambda **x: ssd_reference(**x, softplus=softplus, limit=limit, ends=ends),
                {"chunk_size": str(chunk), "dt_softplus": flag(softplus), "dt_limit": f"{limit[0]},{limit[1]}", "d_kind": d,
                 "ngroups": str(groups)}, draw,
                producer="mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined",
                # With `cu_seqlens` upstream has no backward; with `seq_idx` alone its state is of the last sequence.
                differentiated=("y", "final_state") if whole else ("y",) if cu_seqlens is None else (),
                stored=["y", "final_state"] if cu_seqlens else [], indices={"seq_idx": seq_idx} if seq_idx else None)


@cases_of("norm")
def norm(case, draw, dtype, *, kind, shape=(4, 32), eps="1e-5", bias=False, residual=False, prenorm=False):
    width = shape[-1]
    inputs = dict(
        x=draw.normal(*shape),
        weight=(draw.normal(width, mean=1, scale=0.4), "f32"),
        bias=(draw.normal(width, scale=0.5), "f32") if bias else None,
        residual=(draw.normal(*shape), "f32") if residual else None,
    )
    function = {"rms_norm": rms_norm_fn, "layer_norm": layer_norm_fn}[kind]

    def kernel(x, weight, bias=None, residual=None):
        out = function(x, weight, bias, residual, eps=float(eps), prenorm=prenorm, residual_in_fp32=True)
        return dict(zip(("y", "residual"), out if prenorm else (out,)))

    return emit("norm", case, dtype, inputs, kernel,
                lambda **x: norm_reference(**x, centred=kind == "layer_norm", eps=float(eps), prenorm=prenorm),
                {"kind": kind, "eps": eps, "prenorm": flag(prenorm), "residual_in_fp32": "true", "group_size": "none",
                 "norm_before_gate": "none"}, draw,
                producer=f"mamba_ssm.ops.triton.layer_norm.{kind}_fn",
                differentiated=("y", "residual") if prenorm else ("y",))


@cases_of("norm")
def gated_norm(case, draw, dtype, *, kind, shape=(4, 32), eps="1e-5", bias=False, z=True, group_size=None,
               norm_before_gate=True):
    width = shape[-1]
    inputs = dict(
        x=draw.normal(*shape),
        weight=(draw.normal(width, mean=1, scale=0.4), "f32"),
        bias=(draw.normal(width, scale=0.5), "f32") if bias else None,
        z=draw.normal(*shape) if z else None,
    )

    def kernel(x, weight, bias=None, z=None):
        return {"y": gated_norm_fn(x, weight, bias, z, float(eps), group_size, norm_before_gate, kind == "rms_norm_gated")}

    return emit("norm", case, dtype, inputs, kernel,
                lambda **x: norm_reference(**x, centred=kind == "layer_norm_gated", eps=float(eps), group_size=group_size,
                                           norm_before_gate=norm_before_gate),
                {"kind": kind, "eps": eps, "prenorm": "false", "group_size": str(group_size or "none"),
                 "norm_before_gate": flag(norm_before_gate)}, draw,
                producer="mamba_ssm.ops.triton.layernorm_gated.layernorm_fn")


@cases_of("mamba2_split_conv1d_scan")
def split_conv1d_scan(case, draw, dtype, *, batch=1, seqlen=20, heads=2, p=8, groups=1, n=8, chunk=16, d="head", norm=True,
                      norm_before_gate=False, out_proj=False, limit=NO_LIMIT, initial=False, seq_idx=None):
    dim = heads * p
    channels = dim + 2 * groups * n
    inputs = dict(
        zxbcdt=draw.normal(batch, seqlen, dim + channels + heads),
        conv_weight=draw.normal(channels, 4, scale=0.6),
        conv_bias=draw.normal(channels, scale=0.5),
        dt_bias=(draw.normal(heads, mean=-1, scale=0.5), "f32"),
        a=(draw.round(-np.exp(draw.normal(heads, scale=0.7))), "f32"),
        d=({"head": draw.normal(heads), "head_dim": draw.normal(heads, p)}[d], "f32"),
        norm_weight=(draw.normal(dim, mean=1, scale=0.4), "f32") if norm else None,
        out_proj=draw.normal(8, dim, scale=0.3) if out_proj else None,
        initial_ssm_state=(draw.normal(batch, heads, p, n), "f32") if initial else None,
    )

    def kernel(zxbcdt, conv_weight, conv_bias, dt_bias, a, d, norm_weight=None, out_proj=None, initial_ssm_state=None,
               seq_idx=None):
        y, state = mamba_split_conv1d_scan_combined(
            zxbcdt, conv_weight, conv_bias, dt_bias, a, d, chunk, initial_states=initial_ssm_state, seq_idx=seq_idx,
            dt_limit=limit, return_final_states=True, rmsnorm_weight=norm_weight, rmsnorm_eps=1e-5, outproj_weight=out_proj,
            headdim=p if d.dim() == 1 else None, ngroups=groups, norm_before_gate=norm_before_gate)
        return {"y": y, "final_ssm_state": state}

    def reference(zxbcdt, conv_weight, conv_bias, dt_bias, a, d, norm_weight=None, out_proj=None, initial_ssm_state=None,
                  seq_idx=None):
        z, xbc, dt = zxbcdt.split([dim, channels, heads], dim=-1)
        xbc = conv_reference(xbc.transpose(1, 2), conv_weight, conv_bias, activation="silu", seq_idx=seq_idx)["y"]
        x, b, c = xbc.transpose(1, 2).split([dim, groups * n, groups * n], dim=-1)
        gate = z.unflatten(-1, (heads, p)) if norm_weight is None else None
        out = ssd_reference(x.unflatten(-1, (heads, p)), dt, a, b.unflatten(-1, (groups, n)), c.unflatten(-1, (groups, n)), d,
                            gate, dt_bias, initial_ssm_state, softplus=True, limit=limit, seq_idx=seq_idx)
        y = out["y"].flatten(2)
        if norm_weight is not None:
            y = norm_reference(y, norm_weight, z=z, centred=False, eps=1e-5, group_size=dim // groups,
                               norm_before_gate=norm_before_gate)["y"]
        return {"y": y if out_proj is None else y @ out_proj.T, "final_ssm_state": out["final_state"]}

    return emit("mamba2_split_conv1d_scan", case, dtype, inputs, kernel, reference,
                {"chunk_size": str(chunk), "dt_limit": f"{limit[0]},{limit[1]}", "headdim": str(p), "ngroups": str(groups),
                 "eps": "1e-5", "norm_before_gate": flag(norm_before_gate), "activation": "silu"}, draw,
                producer="mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined",
                differentiated=("y", "final_ssm_state") if seq_idx is None else ("y",),
                indices={"seq_idx": seq_idx} if seq_idx else None)


@cases_of("mamba1_inner")
def inner(case, draw, dtype, *, batch=2, seqlen=16, dim=8, n=4, rank=4, d_model=8, conv_bias=True, d=True, delta_bias=True):
    inputs = dict(
        xz=draw.normal(batch, 2 * dim, seqlen),
        conv_weight=draw.normal(dim, 4, scale=0.6),
        conv_bias=draw.normal(dim, scale=0.5) if conv_bias else None,
        x_proj=draw.normal(rank + 2 * n, dim, scale=0.4),
        dt_proj=draw.normal(dim, rank, scale=0.4),
        out_proj=draw.normal(d_model, dim, scale=0.4),
        a=(draw.round(-np.exp(draw.normal(dim, n))), "f32"),
        d=(draw.normal(dim), "f32") if d else None,
        delta_bias=(draw.normal(dim, mean=-1, scale=0.5), "f32") if delta_bias else None,
    )

    def kernel(xz, conv_weight, x_proj, dt_proj, out_proj, a, conv_bias=None, d=None, delta_bias=None):
        return {"y": mamba_inner_fn(xz, conv_weight[:, None], conv_bias, x_proj, dt_proj, out_proj, None, a, None, None, d,
                                    delta_bias, delta_softplus=True)}

    def reference(xz, conv_weight, x_proj, dt_proj, out_proj, a, conv_bias=None, d=None, delta_bias=None):
        x, z = xz.chunk(2, dim=1)
        x = conv_reference(x, conv_weight, conv_bias, activation="silu")["y"]
        dt, b, c = (x.transpose(1, 2) @ x_proj.T).split([rank, n, n], dim=-1)
        over_time = lambda m: m.transpose(1, 2)[:, None]  # noqa: E731
        y = scan_reference(x, (dt @ dt_proj.T).transpose(1, 2), a, over_time(b), over_time(c), d, z, delta_bias, softplus=True)
        return {"y": y["y"].transpose(1, 2) @ out_proj.T}

    return emit("mamba1_inner", case, dtype, inputs, kernel, reference, {"delta_softplus": "true", "activation": "silu"}, draw,
                producer="mamba_ssm.ops.selective_scan_interface.mamba_inner_fn")


# -------------------------------------------------------------------------------------------------------------- cases


def list_cases():
    none = dict(d=False, z=False, bias=False, softplus=False)
    scan("minimal", **none)
    scan("softplus_bias", d=False, z=False)
    scan("d_without_softplus", z=False, softplus=False)
    scan("all_options_groups_2", groups=2)
    scan("constant_b_constant_c", b="constant", c="constant")
    scan("constant_b_varying_c", b="constant")  # with a constant B upstream has one group
    scan("varying_b_constant_c", c="constant")
    scan("state_16", batch=1, seqlen=20, n=16)
    scan("length_128", batch=1, dim=2, seqlen=128, n=2)
    for dtype in ("bf16", "f16"):
        scan(f"minimal_{dtype}", dtype=dtype, **none)
        scan(f"all_options_{dtype}", dtype=dtype, groups=2, seqlen=20)
        scan(f"constant_b_constant_c_{dtype}", dtype=dtype, b="constant", c="constant")

    for width in (2, 3, 4):
        conv(f"width_{width}", width=width)
        conv(f"channels_last_width_{width}_states", width=width, last=True, states=True)
    conv("none_no_bias", bias=False, activation=None)
    conv("length_16", batch=1, seqlen=16)
    conv("channels_last_none_no_bias", bias=False, activation=None, last=True)
    conv("channels_last_length_2_states", seqlen=2, last=True, states=True)
    conv("channels_last_length_70", batch=1, seqlen=70, last=True, states=True)
    conv("channels_last_length_130", batch=1, seqlen=130, last=True)
    packed = [[0] * 5 + [1] + [2] * 2 + [3] * 6]
    conv("packed", batch=1, seqlen=14, last=True, seq_idx=packed)
    conv("packed_width_2", batch=1, seqlen=14, width=2, last=True, seq_idx=packed)
    for dtype in ("bf16", "f16"):
        conv(f"width_4_{dtype}", dtype=dtype, seqlen=16)
        conv(f"channels_last_states_{dtype}", dtype=dtype, last=True, states=True)
        conv(f"packed_{dtype}", dtype=dtype, batch=1, seqlen=14, last=True, seq_idx=packed)

    for width in (2, 3, 4):
        conv_update(f"token_width_{width}", width=width)
    conv_update("token_none_no_bias", bias=False, activation=None)
    conv_update("tokens_2", seqlen=2)
    conv_update("tokens_5", seqlen=5)
    conv_update("indices", slots=[4, 0, 2])
    for dtype in ("bf16", "f16"):
        conv_update(f"token_{dtype}", dtype=dtype)
        conv_update(f"indices_{dtype}", dtype=dtype, slots=[4, 0, 2])

    state_update("channels")
    state_update("channels_without_z_and_softplus", z=False, softplus=False)
    state_update("channels_state_16", dim=8, n=16)
    state_update("channels_indices", slots=[4, 0, 2])
    state_update("heads_groups_2", heads=4, groups=2)
    state_update("heads_tied", heads=4, groups=2, n=16, z=False, tied=True)
    state_update("heads_indices", heads=2, slots=[4, 0, 2])
    for dtype in ("bf16", "f16"):
        state_update(f"channels_{dtype}", dtype=dtype)
        state_update(f"heads_tied_{dtype}", dtype=dtype, heads=4, groups=2, n=16, tied=True)

    model = dict(d="head", bias=True, softplus=True)
    every = dict(heads=4, groups=2, d="head", z=True, bias=True, softplus=True, limit=(0.1, 0.6), initial=True)
    sequences = [[0] * 5 + [1] + [2] * 11 + [3] * 3]
    ssd("minimal")
    ssd("model_options", **model)
    ssd("whole_chunks", seqlen=32, heads=1, **model)
    ssd("d_head_dim_with_z", d="head_dim", z=True, bias=True)
    ssd("dt_limit", softplus=True, bias=True, limit=(0.2, 0.5))
    ssd("groups_2_initial_states", heads=4, p=4, groups=2, initial=True, bias=True, softplus=True)
    ssd("all_options", p=4, **every)
    ssd("packed", seq_idx=sequences, **model)
    ssd("packed_states", seq_idx=sequences, cu_seqlens=[0, 5, 6, 17, 20], z=True, **model)
    for dtype in ("bf16", "f16"):
        ssd(f"model_options_{dtype}", dtype=dtype, **model)
        ssd(f"all_options_{dtype}", dtype=dtype, **every)
        ssd(f"headdim_32_state_32_{dtype}", dtype=dtype, p=32, n=32, heads=1, **model)
    ssd("packed_bf16", dtype="bf16", seq_idx=sequences, **model)
    ssd("packed_states_bf16", dtype="bf16", seq_idx=sequences, cu_seqlens=[0, 5, 6, 17, 20], **model)

    norm("rms_norm", kind="rms_norm")
    norm("rms_norm_bias", kind="rms_norm", bias=True)
    norm("rms_norm_residual", kind="rms_norm", residual=True)
    norm("rms_norm_residual_prenorm", kind="rms_norm", residual=True, prenorm=True)
    norm("rms_norm_prenorm", kind="rms_norm", prenorm=True)
    norm("layer_norm", kind="layer_norm", bias=True)
    norm("layer_norm_residual_prenorm", kind="layer_norm", bias=True, residual=True, prenorm=True)
    for dtype in ("bf16", "f16"):
        norm(f"rms_norm_{dtype}", dtype=dtype, kind="rms_norm")
        norm(f"rms_norm_residual_prenorm_{dtype}", dtype=dtype, kind="rms_norm", residual=True, prenorm=True)
        norm(f"layer_norm_residual_prenorm_{dtype}", dtype=dtype, kind="layer_norm", bias=True, residual=True, prenorm=True)
    for before in (True, False):
        where = "after" if before else "before"  # where the gate is, as in the other files
        for dtype in ("f32", "bf16", "f16"):
            suffix = "" if dtype == "f32" else f"_{dtype}"
            gated_norm(f"rms_norm_gated_{where}{suffix}", dtype=dtype, kind="rms_norm_gated", norm_before_gate=before)
            gated_norm(f"rms_norm_gated_{where}_groups_2{suffix}", dtype=dtype, kind="rms_norm_gated", group_size=16,
                       norm_before_gate=before)
        gated_norm(f"layer_norm_gated_{where}_groups_2", kind="layer_norm_gated", bias=True, group_size=16,
                   norm_before_gate=before)
    gated_norm("rms_norm_gated_no_z_groups_2", kind="rms_norm_gated", z=False, group_size=16)

    split_conv1d_scan("gate", norm=False)
    split_conv1d_scan("gate_d_head_dim_out_proj", norm=False, d="head_dim", out_proj=True)
    split_conv1d_scan("norm", norm_before_gate=False)
    split_conv1d_scan("norm_before_gate", norm_before_gate=True)
    split_conv1d_scan("norm_groups_2_out_proj", heads=4, p=4, groups=2, out_proj=True, initial=True, limit=(0.05, 0.6))
    split_conv1d_scan("packed", seq_idx=sequences, out_proj=True)
    for dtype in ("bf16", "f16"):
        split_conv1d_scan(f"norm_out_proj_{dtype}", dtype=dtype, out_proj=True)
        split_conv1d_scan(f"gate_{dtype}", dtype=dtype, norm=False)

    inner("all_options")
    inner("no_options", conv_bias=False, d=False, delta_bias=False)
    inner("bf16", dtype="bf16")
    inner("f16", dtype="f16")


def main():
    parser = argparse.ArgumentParser(description="Makes goldens/ops/*/upstream_kernel_*.")
    parser.add_argument("--device", default="cuda:0", type=torch.device)
    parser.add_argument("--output", default=GOLDENS, type=pathlib.Path, help="a folder like goldens/")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--jobs", default=1, type=int, help="processes, since most of the time goes to compiling kernels")
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.parse_args(namespace=arguments)
    if arguments.jobs > 1:
        parts = [subprocess.Popen([sys.executable, *sys.argv, "--jobs", "1", "--part", f"{i}/{arguments.jobs}"])
                 for i in range(arguments.jobs)]
        sys.exit(max(part.wait() for part in parts))

    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.device.type == "cuda":
        torch.cuda.set_device(arguments.device)
    list_cases()
    part, parts = map(int, arguments.part.split("/"))
    failed = []
    chosen = [key for key in CASES if arguments.op in (None, key[0])]
    for op, case in chosen[part::parts]:
        try:
            failed += CASES[op, case]()
        except Exception as error:  # the others are made nevertheless
            failed.append(f"{op}/{case}: {type(error).__name__}: {error}")
    print(f"{len(chosen[part::parts])} cases")
    if failed:
        sys.exit("\n".join(["not written:", *failed]))


arguments = argparse.Namespace()
if __name__ == "__main__":
    main()
