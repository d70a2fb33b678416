"""Makes goldens/ops/<op>/<case>.safetensors with the reference functions of mamba_ssm and causal_conv1d.

Run: python ops.py [--op NAME] [--skip-kernels]

Each file holds `in.<name>`, `out.<name>`, and where the op has gradients `cot.<name>` (a random cotangent per output) and
`grad.<name>` (the gradient of sum over outputs of sum(out * cot) by every input). All are float64; inputs and cotangents
are exactly representable in float32 (`input_grid` = "f32"), or in both bfloat16 and float16 ("half"). Options are strings
in `__metadata__`.

The reference functions cast to float32 inside; `upstream.float64` turns these casts into casts to float64. What comes out
is checked here three times before it is written:
1. outputs against the recurrences of recurrences.py, to 1e-10;
2. every gradient, along a random direction, against the complex step through these recurrences, to 1e-9;
3. where a Triton kernel of the same op exists, outputs and gradients against that kernel, interpreted in float32, to 1e-5.
Where two published references can say the same thing, both are asked and must agree to 1e-10.
"""

import argparse
import pathlib
from unittest import mock

import upstream  # before torch: it sets the environment

import numpy as np
import torch
import torch.nn.functional as F
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton import layer_norm, layernorm_gated, ssd_combined
from mamba_ssm.ops.triton import selective_state_update as state_update_module

import golden_file
import recurrences
from draw import Draw

GOLDENS = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 64 * 1024
MAMBA = upstream.version("mamba_ssm", "torch", "triton")
CONV = upstream.version("causal_conv1d", "torch")

written = {}
worst = {"recurrence": 0.0, "complex step": 0.0, "other reference": 0.0, "kernel": 0.0}
arguments = argparse.Namespace(op=None, skip_kernels=False)


# ---------------------------------------------------------------------------------------------------------- numbers


def difference(got, want):
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    return float(np.abs(np.asarray(got) - np.asarray(want)).max(initial=0)) / scale


def agree(what, got, want, tolerance, context):
    if got.shape != want.shape:
        raise AssertionError(f"{context}: {what}: shape {got.shape} against {want.shape}")
    error = difference(got, want)
    worst[what] = max(worst[what], error)
    if not error <= tolerance:
        raise AssertionError(f"{context}: {what}: {error:.2e} > {tolerance:.0e}")


def run(function, inputs, cotangents, dtype=torch.float64):
    """Outputs of `function`, and the gradient by each input if there are cotangents."""
    leaves = {name: torch.tensor(value, dtype=dtype).requires_grad_(cotangents is not None)
              for name, value in inputs.items()}
    outs = function(**leaves)
    if cotangents is None:
        return {name: out.detach().double().numpy() for name, out in outs.items()}, {}
    loss = sum((out * torch.tensor(cotangents[name], dtype=dtype)).sum() for name, out in outs.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return ({name: out.detach().double().numpy() for name, out in outs.items()},
            {name: grad.double().numpy() for name, grad in zip(leaves, grads)})


def emit(op, case, draw, inputs, options, reference, recurrence, *, producer, version,
         others=(), kernel=None, differentiable=True, extra=None):
    """Runs, checks and writes one case. A kernel may leave gradients out; `extra` is stored as it is."""
    if arguments.op not in (None, op):
        return
    context = f"{op}/{case}"
    assert context not in written, context
    with upstream.float64():
        outs, _ = run(reference, inputs, None)
    cotangents = {name: draw.normal(*out.shape) for name, out in outs.items()} if differentiable else None
    with upstream.float64():
        outs, grads = run(reference, inputs, cotangents)
    for name, value in {**outs, **grads}.items():
        assert np.all(np.isfinite(value)), f"{context}: {name} is not finite"

    expected = recurrence(**inputs)
    assert set(expected) == set(outs), (context, set(expected), set(outs))
    for name in outs:
        agree("recurrence", outs[name], expected[name], 1e-10, f"{context}: {name}")
    for name, grad in grads.items():
        direction = np.random.Generator(np.random.PCG64(1)).standard_normal(grad.shape)
        moved = recurrence(**{**inputs, name: inputs[name] + 1e-30j * direction})
        slope = sum((moved[out].imag * cotangents[out]).sum() for out in outs) / 1e-30
        agree("complex step", np.array((grad * direction).sum()), np.array(slope), 1e-9, f"{context}: {name}")
    for other in others:
        with upstream.float64():
            other_outs, other_grads = run(other, inputs, cotangents)
        for name, value in {**outs, **grads}.items():
            agree("other reference", {**other_outs, **other_grads}[name], value, 1e-10, f"{context}: {name}")
    if kernel is not None and not arguments.skip_kernels:
        with upstream.interpreted():
            kernel_outs, kernel_grads = run(kernel, inputs, None if extra else cotangents, torch.float32)
        for name, value in {**outs, **({} if extra else grads)}.items():
            agree("kernel", {**kernel_outs, **kernel_grads}[name], value, 1e-5, f"{context}: {name}")

    tensors = {f"in.{name}": value for name, value in inputs.items()} | (extra or {})
    tensors |= {f"out.{name}": value for name, value in outs.items()}
    if differentiable:
        tensors |= {f"cot.{name}": value for name, value in cotangents.items()}
        tensors |= {f"grad.{name}": value for name, value in grads.items()}
    metadata = {"op": op, "case": case, "seed": str(draw.seed), "input_grid": draw.grid, "producer": producer,
                "producer_version": version, "gradient_of": "sum(out * cot)" if differentiable else "none"}
    golden_file.write(GOLDENS / "ops" / op / f"{case}.safetensors", tensors, metadata | options, LIMIT)
    written[context] = sum(value.size for value in tensors.values())


def flag(value):
    return "true" if value else "false"


def only(**values):
    return {name: value for name, value in values.items() if value is not None}


def sequences(seq_idx):
    """Row, start and end of each run of equal ids that are not negative, which mark padding."""
    found = []
    for row, ids in enumerate(seq_idx):
        borders = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
        found += [(row, start, end) for start, end in zip(borders, borders[1:]) if ids[start] >= 0]
    return found


def one_by_one(function, seq_idx, axis, like, packed, inputs, join):
    """`function` on each sequence alone: `packed` inputs, and its first output, have time on `axis`; states come one each."""
    y, states = join.zeros_like(inputs[like]), []
    if join is np:
        y = y.astype(np.result_type(*inputs.values()))
    else:
        y = y.clone()
    for i, (row, start, end) in enumerate(sequences(seq_idx)):
        at = (slice(row, row + 1),) + (slice(None),) * (axis - 1) + (slice(start, end),)
        part = {name: value[at] if name in packed else value[i : i + 1] if name == "initial_states" else value
                for name, value in inputs.items()}
        out, state = function(**part).values()
        y[at] = out
        states.append(state)
    return y, join.concatenate(states) if join is np else torch.cat(states)


# --------------------------------------------------------------------------------------------------- selective_scan


def scan_case(case, *, batch=2, dim=4, seqlen=6, n=3, groups=1, b="varying", c="varying", d=True, z=True, bias=True,
              softplus=True, grid="f32", strong=False):
    draw = Draw("selective_scan", case, grid)
    matrix = lambda kind: draw.normal(dim, n) if kind == "constant" else draw.normal(batch, groups, n, seqlen)  # noqa: E731
    inputs = only(
        u=draw.normal(batch, dim, seqlen),
        # without softplus delta + delta_bias must be positive by itself
        delta=draw.uniform(25, 35, batch, dim, seqlen) if strong
        else draw.normal(batch, dim, seqlen, mean=-1) if softplus else draw.uniform(0.05, 1, batch, dim, seqlen),
        a=draw.round(-np.exp(draw.normal(dim, n) + (2 if strong else 0))),
        b=matrix(b),
        c=matrix(c),
        d=draw.normal(dim) if d else None,
        z=draw.normal(batch, dim, seqlen) if z else None,
        delta_bias=(draw.normal(dim, scale=0.5) if softplus else draw.uniform(0.05, 0.5, dim)) if bias else None,
    )

    def reference(u, delta, a, b, c, d=None, z=None, delta_bias=None):
        y, state = selective_scan_ref(u, delta, a, b, c, d, z, delta_bias, softplus, return_last_state=True)
        return {"y": y, "final_state": state}

    emit("selective_scan", case, draw, inputs, {"delta_softplus": flag(softplus), "b_kind": b, "c_kind": c,
                                               "ngroups": str(groups)},
         reference, lambda **kw: recurrences.selective_scan(**kw, delta_softplus=softplus),
         producer="mamba_ssm.ops.selective_scan_interface.selective_scan_ref", version=MAMBA)


def selective_scan():
    none = dict(d=False, z=False, bias=False, softplus=False)
    scan_case("minimal", batch=1, dim=2, seqlen=3, n=2, **none)
    scan_case("all_options", dim=4, seqlen=7, n=4, groups=2)
    scan_case("softplus_only", d=False, z=False, bias=False)
    scan_case("softplus_bias", d=False, z=False)
    scan_case("bias_without_softplus", d=False, z=False, softplus=False)
    scan_case("d_only", **{**none, "d": True})
    scan_case("z_only", **{**none, "z": True})
    scan_case("all_options_without_softplus", softplus=False)
    scan_case("groups_2", dim=6, groups=2)
    scan_case("groups_4", dim=8, groups=4, n=2)
    scan_case("groups_equal_dim", dim=3, groups=3, n=2)
    scan_case("constant_b_varying_c", b="constant", groups=2)
    scan_case("varying_b_constant_c", c="constant", groups=2)
    scan_case("constant_b_constant_c", b="constant", c="constant")
    scan_case("length_1", seqlen=1)
    scan_case("length_70", batch=1, dim=3, seqlen=70, n=2)
    scan_case("state_1", n=1)
    scan_case("state_5", n=5, seqlen=9)
    scan_case("state_16", batch=1, dim=5, seqlen=19, n=16)
    scan_case("dim_17", batch=1, dim=17, seqlen=5, n=8)
    scan_case("strong_decay", strong=True)
    scan_case("half_inputs", dim=8, seqlen=17, n=4, grid="half")


# --------------------------------------------------------------------------------------------------------------- ssd


def ssd_case(case, *, batch=2, seqlen=8, heads=2, p=3, groups=1, n=5, chunk=4, d="none", z=False, bias=False,
             softplus=False, limit=(0.0, float("inf")), initial=False, grid="f32", strong=False):
    draw = Draw("ssd", case, grid)
    inputs = only(
        x=draw.normal(batch, seqlen, heads, p),
        dt=draw.uniform(25, 35, batch, seqlen, heads) if strong
        else draw.normal(batch, seqlen, heads, mean=-1) if softplus else draw.uniform(0.05, 1, batch, seqlen, heads),
        a=draw.round(-np.exp(draw.normal(heads, scale=0.7) + (2 if strong else 0))),
        b=draw.normal(batch, seqlen, groups, n),
        c=draw.normal(batch, seqlen, groups, n),
        d={"none": None, "head": draw.normal(heads), "head_dim": draw.normal(heads, p)}[d],
        z=draw.normal(batch, seqlen, heads, p) if z else None,
        dt_bias=(draw.normal(heads, scale=0.5) if softplus else draw.uniform(0.05, 0.5, heads)) if bias else None,
        initial_states=draw.normal(batch, heads, p, n) if initial else None,
    )
    limited = limit != (0.0, float("inf"))

    def by_chunks(x, dt, a, b, c, d=None, z=None, dt_bias=None):
        # ssd_chunk_scan_combined_ref computes the final state and drops it; keep what state_passing_ref returned.
        kept = []

        def passing(*args, **kwargs):
            kept.append(ssd_combined_state_passing(*args, **kwargs))
            return kept[-1]

        with mock.patch.object(ssd_combined, "state_passing_ref", passing):
            y = ssd_combined.ssd_chunk_scan_combined_ref(x, dt, a, b, c, chunk, D=d, z=z, dt_bias=dt_bias,
                                                         dt_softplus=softplus)
        return {"y": y, "final_state": kept[0][1].unflatten(-1, (p, n))}

    def by_scan(x, dt, a, b, c, d=None, z=None, dt_bias=None):
        # ssd_selective_scan calls the CUDA selective_scan_fn; give it the published reference of that function instead.
        kept = []

        def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
            y, state = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=True)
            kept.append(state)
            return y

        with mock.patch("mamba_ssm.ops.selective_scan_interface.selective_scan_fn", scan):
            y = ssd_combined.ssd_selective_scan(x, dt, a, b, c, D=d, z=z, dt_bias=dt_bias, dt_softplus=softplus,
                                                dt_limit=limit)
        return {"y": y, "final_state": kept[0].unflatten(1, (heads, p))}

    def by_listing(x, dt, a, b, c, d=None, z=None, dt_bias=None, initial_states=None):
        # ssd_minimal_discrete has no bias, softplus, limit, D, z or groups; these are put around it in upstream's order.
        # One block of the whole sequence if the chunks do not divide it: the block length does not change the result.
        dt = dt if dt_bias is None else dt + dt_bias
        dt = F.softplus(dt) if softplus else dt
        dt = dt.clamp(min=limit[0], max=limit[1])
        spread = lambda m: m.repeat_interleave(heads // groups, dim=2)  # noqa: E731
        y, state = ssd_minimal_discrete(
            x * dt[..., None], a * dt, spread(b), spread(c), chunk if seqlen % chunk == 0 else seqlen,
            None if initial_states is None else initial_states[:, None])
        y = y if d is None else y + x * (d[:, None] if d.dim() == 1 else d)
        return {"y": y if z is None else y * F.silu(z), "final_state": state}

    def kernel(x, dt, a, b, c, d=None, z=None, dt_bias=None, initial_states=None):
        y, state = ssd_combined.mamba_chunk_scan_combined(
            x, dt, a, b, c, chunk, D=d, z=z, dt_bias=dt_bias, initial_states=initial_states, dt_softplus=softplus,
            dt_limit=limit, return_final_states=True)
        return {"y": y, "final_state": state}

    able = [] if initial or limited or seqlen % chunk != 0 or strong else [
        (by_chunks, "mamba_ssm.ops.triton.ssd_combined.ssd_chunk_scan_combined_ref")]
    able += [] if initial else [
        (by_scan, "mamba_ssm.ops.triton.ssd_combined.ssd_selective_scan over selective_scan_ref")]
    able += [(by_listing, "mamba_ssm.modules.ssd_minimal.ssd_minimal_discrete, with bias, softplus, limit, D and z around it")]
    emit("ssd", case, draw, inputs,
         {"chunk_size": str(chunk), "dt_softplus": flag(softplus), "dt_limit": f"{limit[0]},{limit[1]}", "d_kind": d,
          "ngroups": str(groups)},
         able[0][0], lambda **kw: recurrences.ssd(**kw, dt_softplus=softplus, dt_limit=limit),
         producer=able[0][1], version=MAMBA, others=[function for function, _ in able[1:]], kernel=kernel)


ssd_combined_state_passing = ssd_combined.state_passing_ref


def ssd():
    ssd_case("minimal", batch=1, seqlen=4, heads=1, p=2, n=2, chunk=2)
    ssd_case("all_options", heads=4, groups=2, d="head", z=True, bias=True, softplus=True, limit=(0.2, 0.6), initial=True)
    ssd_case("all_options_ragged", seqlen=11, d="head_dim", z=True, bias=True, softplus=True, limit=(0.2, 0.6),
             initial=True)
    ssd_case("model_options", d="head", bias=True, softplus=True)
    ssd_case("model_options_with_z", d="head", z=True, bias=True, softplus=True)
    ssd_case("d_head", d="head")
    ssd_case("d_head_dim", d="head_dim")
    ssd_case("z_only", z=True)
    ssd_case("softplus_only", softplus=True)
    ssd_case("bias_without_softplus", bias=True)
    ssd_case("one_chunk", seqlen=6, chunk=6, bias=True, softplus=True)
    ssd_case("chunk_1", seqlen=5, chunk=1, bias=True, softplus=True)
    ssd_case("chunk_3", seqlen=12, chunk=3, bias=True, softplus=True)
    ssd_case("chunk_longer_than_sequence", seqlen=5, chunk=8, d="head", bias=True, softplus=True)
    ssd_case("ragged", seqlen=7, chunk=4, d="head", z=True, bias=True, softplus=True)
    ssd_case("groups_2", heads=4, groups=2, bias=True, softplus=True)
    ssd_case("groups_equal_heads", heads=3, groups=3, bias=True, softplus=True)
    ssd_case("headdim_1_state_1", p=1, n=1, bias=True, softplus=True)
    ssd_case("headdim_5_state_7", batch=1, p=5, n=7, bias=True, softplus=True)
    ssd_case("headdim_8_state_16", batch=1, seqlen=20, p=8, n=16, chunk=8, d="head", bias=True, softplus=True)
    ssd_case("dt_limit", limit=(0.3, 0.7))
    ssd_case("dt_limit_softplus_bias", bias=True, softplus=True, limit=(0.2, 0.5), d="head", z=True)
    ssd_case("dt_limit_ragged", seqlen=9, softplus=True, limit=(0.2, 0.5))
    ssd_case("initial_states", initial=True)
    ssd_case("initial_states_ragged", seqlen=7, initial=True, bias=True, softplus=True)
    ssd_case("initial_states_groups", heads=4, groups=2, initial=True, d="head", z=True, bias=True, softplus=True)
    ssd_case("length_1", seqlen=1, d="head", z=True, bias=True, softplus=True)
    ssd_case("length_1_initial_states", seqlen=1, initial=True, d="head", z=True, bias=True, softplus=True)
    ssd_case("length_70", batch=1, seqlen=70, p=2, n=3, chunk=16, d="head", bias=True, softplus=True)
    ssd_case("strong_decay", strong=True, bias=True, softplus=True)
    ssd_case("half_inputs", seqlen=16, p=4, n=8, d="head", z=True, bias=True, softplus=True, grid="half")
    ssd_packed_case("packed", [[0] * 5 + [1] + [2] * 3 + [3] * 8], cu_seqlens=[0, 5, 6, 9, 17])
    ssd_packed_case("packed_groups", [[0] * 4 + [1] * 4 + [2] * 9], heads=4, groups=2, cu_seqlens=[0, 4, 8, 17])
    ssd_packed_case("packed_initial_states", [[0] * 7 + [1] * 2 + [2] * 4], initial=True)
    ssd_packed_case("packed_padding", [[-1, -1, 0, 0, 0, 1, 1, 1], [2, 2, 2, 2, -1, 3, 3, 3]], initial=True)


def ssd_packed_case(case, seq_idx, *, heads=2, p=3, groups=1, n=5, chunk=4, initial=False, cu_seqlens=None):
    """Sequences behind one another: references run on each alone; the kernel takes `seq_idx` and `cu_seqlens`."""
    draw = Draw("ssd", case, "f32")
    seq_idx = np.array(seq_idx, dtype=np.int64)
    batch, seqlen = seq_idx.shape
    inputs = only(
        x=draw.normal(batch, seqlen, heads, p),
        dt=draw.normal(batch, seqlen, heads, mean=-1),
        a=draw.round(-np.exp(draw.normal(heads, scale=0.7))),
        b=draw.normal(batch, seqlen, groups, n),
        c=draw.normal(batch, seqlen, groups, n),
        d=draw.normal(heads),
        z=draw.normal(batch, seqlen, heads, p),
        dt_bias=draw.normal(heads, scale=0.5),
        initial_states=draw.normal(len(sequences(seq_idx)), heads, p, n) if initial else None,
    )
    packed = ("x", "dt", "b", "c", "z")

    def listing(x, dt, a, b, c, d, z, dt_bias, initial_states=None):
        spread = lambda m: m.repeat_interleave(heads // groups, dim=2)  # noqa: E731
        dt = F.softplus(dt + dt_bias)
        y, state = ssd_minimal_discrete(x * dt[..., None], a * dt, spread(b), spread(c), x.shape[1],
                                        None if initial_states is None else initial_states[:, None])
        return {"y": (y + x * d[:, None]) * F.silu(z), "final_state": state}

    def reference(**inputs):
        y, state = one_by_one(listing, seq_idx, 1, "x", packed, inputs, torch)
        return {"y": y, "final_state": state}

    def recurrence(**inputs):
        alone = lambda **part: recurrences.ssd(**part, dt_softplus=True, dt_limit=(0.0, float("inf")))  # noqa: E731
        y, state = one_by_one(alone, seq_idx, 1, "x", packed, inputs, np)
        return {"y": y, "final_state": state}

    def kernel(x, dt, a, b, c, d, z, dt_bias):
        y, state = ssd_combined.mamba_chunk_scan_combined(
            x, dt, a, b, c, chunk, D=d, z=z, dt_bias=dt_bias, dt_softplus=True,
            seq_idx=torch.tensor(seq_idx, dtype=torch.int32), return_varlen_states=True,
            cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))
        return {"y": y, "final_state": state}

    emit("ssd", case, draw, inputs,
         {"chunk_size": str(chunk), "dt_softplus": "true", "dt_limit": "0.0,inf", "d_kind": "head", "ngroups": str(groups)},
         reference, recurrence, version=MAMBA, kernel=kernel if cu_seqlens else None, extra={"seq_idx": seq_idx},
         producer="mamba_ssm.modules.ssd_minimal.ssd_minimal_discrete on each sequence, with bias, softplus, D and z around it")


# -------------------------------------------------------------------------------------------- selective_state_update


def update_case(case, *, batch=2, heads=None, dim=4, n=3, groups=1, d=True, z=True, bias=True, softplus=True,
                tied=False, grid="f32"):
    draw = Draw("selective_state_update", case, grid)
    head = () if heads is None else (heads,)
    group = () if heads is None else (groups,)
    spread = lambda m, *shape: np.ascontiguousarray(np.broadcast_to(m, shape))  # noqa: E731
    one = (1,) if tied else (dim,)  # tied: one value per head, as Mamba-2 has it, repeated to the full shape
    inputs = only(
        state=draw.normal(batch, *head, dim, n),
        x=draw.normal(batch, *head, dim),
        dt=spread(draw.normal(batch, *head, *one, mean=-1) if softplus else draw.uniform(0.05, 1, batch, *head, *one),
                  batch, *head, dim),
        a=spread(draw.round(-np.exp(draw.normal(*head, *one, 1 if tied else n))), *head, dim, n),
        b=draw.normal(batch, *group, n),
        c=draw.normal(batch, *group, n),
        d=spread(draw.normal(*head, *one), *head, dim) if d else None,
        z=draw.normal(batch, *head, dim) if z else None,
        dt_bias=spread(draw.normal(*head, *one, scale=0.5) if softplus else draw.uniform(0.05, 0.5, *head, *one),
                       *head, dim) if bias else None,
    )

    def reference(state, x, dt, a, b, c, d=None, z=None, dt_bias=None):
        state = state.clone()
        y = state_update_module.selective_state_update_ref(state, x, dt, a, b, c, d, z, dt_bias, softplus)
        return {"y": y, "state": state}

    def kernel(state, x, dt, a, b, c, d=None, z=None, dt_bias=None):
        # The published launcher fails without D or dt_bias, so absent ones are zeros. Tied values are views of stride 0,
        # which is what sends the launcher down its path for Mamba-2.
        state = state.clone()
        d = torch.zeros(a.shape[:-1]) if d is None else d
        dt_bias = torch.zeros(a.shape[:-1]) if dt_bias is None else dt_bias
        if tied:
            dt, dt_bias, a = dt[..., :1].expand(dt.shape), dt_bias[..., :1].expand(d.shape), a[..., :1, :1].expand(a.shape)
        y = state_update_module.selective_state_update(state, x, dt, a, b, c, d, z, dt_bias, softplus)
        return {"y": y, "state": state}

    emit("selective_state_update", case, draw, inputs,
         {"dt_softplus": flag(softplus), "form": "channels" if heads is None else "heads", "ngroups": str(groups),
          "tied": flag(tied)},
         reference, lambda **kw: recurrences.selective_state_update(**kw, dt_softplus=softplus),
         producer="mamba_ssm.ops.triton.selective_state_update.selective_state_update_ref", version=MAMBA,
         kernel=kernel, differentiable=False)


def selective_state_update():
    none = dict(d=False, z=False, bias=False, softplus=False)
    update_case("channels_minimal", **none)
    update_case("channels_all_options", dim=5, n=4)
    update_case("channels_softplus_only", **{**none, "softplus": True})
    update_case("channels_bias_without_softplus", **{**none, "bias": True})
    update_case("channels_d_only", **{**none, "d": True})
    update_case("channels_z_only", **{**none, "z": True})
    update_case("channels_state_1", n=1)
    update_case("channels_dim_17_state_16", dim=17, n=16)
    update_case("channels_half_inputs", dim=8, n=8, grid="half")
    update_case("heads_minimal", heads=2, **none)
    update_case("heads_all_options", heads=2, dim=3, n=5)
    update_case("heads_groups_2", heads=4, groups=2)
    update_case("heads_groups_equal_heads", heads=3, groups=3)
    update_case("heads_groups_2_softplus_only", heads=4, groups=2, **{**none, "softplus": True})
    update_case("heads_tied", heads=4, groups=2, dim=8, n=16, z=False, tied=True)
    update_case("heads_tied_with_z", heads=2, dim=3, n=5, tied=True)
    update_case("heads_half_inputs", heads=4, groups=2, dim=8, n=8, grid="half")


# ----------------------------------------------------------------------------------------------------- causal_conv1d


def conv_case(case, *, batch=2, dim=3, seqlen=7, width=4, bias=True, initial=False, activation="silu", grid="f32"):
    draw = Draw("causal_conv1d", case, grid)
    inputs = only(
        x=draw.normal(batch, dim, seqlen),
        weight=draw.normal(dim, width, scale=0.6),
        bias=draw.normal(dim, scale=0.5) if bias else None,
        initial_states=draw.normal(batch, dim, width - 1) if initial else None,
    )

    def reference(x, weight, bias=None, initial_states=None):
        y, states = causal_conv1d_ref(x, weight, bias, initial_states, return_final_states=True,
                                      activation=None if activation == "none" else activation)
        return {"y": y, "final_states": states}

    emit("causal_conv1d", case, draw, inputs, {"activation": activation, "width": str(width)},
         reference, lambda **kw: recurrences.causal_conv1d(**kw, activation=activation),
         producer="causal_conv1d.causal_conv1d_interface.causal_conv1d_ref", version=CONV)


def conv_packed_case(case, seq_idx, *, dim=3, width=4, bias=True, initial=False, activation="silu"):
    """`y` by the reference with `seq_idx` where that can, windows by the reference on each sequence alone."""
    draw = Draw("causal_conv1d", case, "f32")
    seq_idx = np.array(seq_idx, dtype=np.int64)
    batch, seqlen = seq_idx.shape
    inputs = only(
        x=draw.normal(batch, dim, seqlen),
        weight=draw.normal(dim, width, scale=0.6),
        bias=draw.normal(dim, scale=0.5) if bias else None,
        initial_states=draw.normal(len(sequences(seq_idx)), dim, width - 1) if initial else None,
    )
    upstream_activation = None if activation == "none" else activation

    def alone(x, weight, bias=None, initial_states=None):
        y, states = causal_conv1d_ref(x, weight, bias, initial_states, return_final_states=True,
                                      activation=upstream_activation)
        return {"y": y, "final_states": states}

    def each_alone(**inputs):
        y, states = one_by_one(alone, seq_idx, 2, "x", ("x",), inputs, torch)
        return {"y": y, "final_states": states}

    def at_once(**inputs):
        # A reference with `seq_idx` has one initial state a row.
        y = causal_conv1d_ref(**inputs, activation=upstream_activation, seq_idx=torch.tensor(seq_idx))
        return {"y": y, "final_states": each_alone(**inputs)["final_states"]}

    def recurrence(**inputs):
        one = lambda **part: recurrences.causal_conv1d(**part, activation=activation)  # noqa: E731
        y, states = one_by_one(one, seq_idx, 2, "x", ("x",), inputs, np)
        return {"y": y, "final_states": states}

    emit("causal_conv1d", case, draw, inputs, {"activation": activation, "width": str(width)},
         each_alone if initial else at_once, recurrence, version=CONV, others=() if initial else [each_alone],
         producer="causal_conv1d.causal_conv1d_interface.causal_conv1d_ref"
         + (" on each sequence" if initial else " with seq_idx; windows: on each sequence"),
         extra={"seq_idx": seq_idx})


def causal_conv1d():
    conv_case("minimal", batch=1, dim=1, seqlen=3, width=2, bias=False, activation="none")
    conv_case("width_2_silu", width=2)
    conv_case("width_3_silu", width=3)
    conv_case("width_4_silu", width=4)
    conv_case("width_4_none", activation="none")
    conv_case("width_3_none_no_bias", width=3, bias=False, activation="none")
    conv_case("width_4_silu_no_bias", bias=False)
    conv_case("initial_states_silu", initial=True)
    conv_case("initial_states_none_no_bias", initial=True, bias=False, activation="none")
    conv_case("initial_states_width_2", initial=True, width=2)
    conv_case("initial_states_width_3", initial=True, width=3)
    conv_case("shorter_than_width", seqlen=2)
    conv_case("shorter_than_width_initial_states", seqlen=2, initial=True)
    conv_case("length_1", seqlen=1)
    conv_case("length_1_initial_states", seqlen=1, initial=True)
    conv_case("length_3_equals_window", seqlen=3)
    conv_case("length_70", batch=1, dim=5, seqlen=70)
    conv_case("dim_17", dim=17, seqlen=9)
    conv_case("half_inputs", dim=8, seqlen=17, initial=True, grid="half")
    conv_packed_case("packed", [[0] * 5 + [1] + [2] * 2 + [3] * 6])
    conv_packed_case("packed_width_2_none_no_bias", [[4] * 3 + [1] * 4], width=2, bias=False, activation="none")
    conv_packed_case("packed_padding", [[-1, 0, 0, 0, 1, 1, -1, -1], [2, 2, 2, 2, 2, 2, 3, -1]])
    conv_packed_case("packed_initial_states", [[0, 0, 0, 1, 2, 2, 2, 2, 2]], initial=True)


def conv_update_case(case, *, batch=2, dim=3, seqlen=None, width=4, state_len=None, bias=True, activation="silu",
                     grid="f32"):
    draw = Draw("causal_conv1d_update", case, grid)
    state_len = width - 1 if state_len is None else state_len
    inputs = only(
        x=draw.normal(batch, dim) if seqlen is None else draw.normal(batch, dim, seqlen),
        conv_state=draw.normal(batch, dim, state_len),
        weight=draw.normal(dim, width, scale=0.6),
        bias=draw.normal(dim, scale=0.5) if bias else None,
    )

    def reference(x, conv_state, weight, bias=None):
        conv_state = conv_state.clone()
        y = causal_conv1d_update_ref(x, conv_state, weight, bias, None if activation == "none" else activation)
        return {"y": y, "conv_state": conv_state}

    emit("causal_conv1d_update", case, draw, inputs,
         {"activation": activation, "width": str(width), "state_len": str(state_len)},
         reference, lambda **kw: recurrences.causal_conv1d_update(**kw, activation=activation),
         producer="causal_conv1d.causal_conv1d_interface.causal_conv1d_update_ref", version=CONV, differentiable=False)


def causal_conv1d_update():
    conv_update_case("token_silu")
    conv_update_case("token_none_no_bias", bias=False, activation="none")
    conv_update_case("token_width_2", width=2)
    conv_update_case("token_width_3", width=3)
    conv_update_case("tokens_1", seqlen=1)
    conv_update_case("tokens_2", seqlen=2)
    conv_update_case("tokens_5_longer_than_window", seqlen=5)
    conv_update_case("dim_17", dim=17)
    conv_update_case("state_of_full_width", state_len=4)
    conv_update_case("half_inputs", dim=8, grid="half")


# --------------------------------------------------------------------------------------------------------------- norm


def norm_case(case, kind, *, shape=(2, 3, 6), eps="1e-5", bias=False, residual=False, prenorm=False, parallel=False,
              rowscale=False, grid="f32"):
    """layer_norm_ref and rms_norm_ref, which have no gate."""
    draw = Draw("norm", case, grid)
    width = shape[-1]
    inputs = only(
        x=draw.normal(*shape),
        weight=draw.normal(width, mean=1, scale=0.4),
        bias=draw.normal(width, scale=0.5) if bias else None,
        residual=draw.normal(*shape) if residual else None,
        x1=draw.normal(*shape) if parallel else None,
        weight1=draw.normal(width, mean=1, scale=0.4) if parallel else None,
        bias1=draw.normal(width, scale=0.5) if parallel and bias else None,
        rowscale=draw.uniform(0.5, 2, *shape[:-1]) if rowscale else None,
    )
    published = {"layer_norm": layer_norm.layer_norm_ref, "rms_norm": layer_norm.rms_norm_ref}[kind]
    names = ["y"] + (["y1"] if parallel else []) + (["residual"] if prenorm else [])

    def outputs(out):
        return dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))

    def reference(x, weight, bias=None, **kw):
        return outputs(published(x, weight, bias, **kw, eps=float(eps), prenorm=prenorm))

    def kernel(x, weight, bias=None, rowscale=None, **kw):
        function = {"layer_norm": layer_norm.layer_norm_fn, "rms_norm": layer_norm.rms_norm_fn}[kind]
        out = outputs(function(x, weight, bias, **kw, rowscale=rowscale, eps=float(eps), prenorm=prenorm))
        return {name: value.reshape(shape) for name, value in out.items()}

    emit("norm", case, draw, inputs,
         {"kind": kind, "eps": eps, "prenorm": flag(prenorm), "group_size": "none", "norm_before_gate": "none"},
         reference,
         lambda **kw: recurrences.norm(**kw, centred=kind == "layer_norm", eps=float(eps), group_size=None,
                                       norm_before_gate=True, prenorm=prenorm),
         # The kernels give rowscale no gradient.
         producer=f"mamba_ssm.ops.triton.layer_norm.{kind}_ref", version=MAMBA, kernel=None if rowscale else kernel)


def gated_norm_case(case, kind, *, shape=(2, 3, 8), eps="1e-5", bias=False, z=True, group_size=None,
                    norm_before_gate=True, grid="f32"):
    """rms_norm_ref of layernorm_gated.py; for layer norm, which has no reference there, PyTorch's layer_norm in its place."""
    draw = Draw("norm", case, grid)
    width = shape[-1]
    inputs = only(
        x=draw.normal(*shape),
        weight=draw.normal(width, mean=1, scale=0.4),
        bias=draw.normal(width, scale=0.5) if bias else None,
        z=draw.normal(*shape) if z else None,
    )

    def rms(x, weight, bias=None, z=None):
        return {"y": layernorm_gated.rms_norm_ref(x, weight, bias, z=z, eps=float(eps), group_size=group_size,
                                                  norm_before_gate=norm_before_gate)}

    def layer(x, weight, bias=None, z=None):
        if z is not None and not norm_before_gate:
            x = x * F.silu(z)
        size = group_size or width
        y = F.layer_norm(x.unflatten(-1, (-1, size)), (size,), eps=float(eps)).flatten(-2) * weight
        y = y if bias is None else y + bias
        return {"y": y * F.silu(z) if z is not None and norm_before_gate else y}

    def kernel(x, weight, bias=None, z=None):
        return {"y": layernorm_gated.layernorm_fn(x, weight, bias, z=z, eps=float(eps), group_size=group_size,
                                                  norm_before_gate=norm_before_gate, is_rms_norm=kind == "rms_norm_gated")}

    emit("norm", case, draw, inputs,
         {"kind": kind, "eps": eps, "prenorm": "false", "group_size": str(group_size or "none"),
          "norm_before_gate": flag(norm_before_gate)},
         {"rms_norm_gated": rms, "layer_norm_gated": layer}[kind],
         lambda **kw: recurrences.norm(**kw, centred=kind == "layer_norm_gated", eps=float(eps), group_size=group_size,
                                       norm_before_gate=norm_before_gate, prenorm=False),
         producer={"rms_norm_gated": "mamba_ssm.ops.triton.layernorm_gated.rms_norm_ref",
                   "layer_norm_gated": "torch.nn.functional.layer_norm by groups, gated as in "
                                       "mamba_ssm.ops.triton.layernorm_gated.layernorm_fn"}[kind],
         version=MAMBA, kernel=kernel)


def norm():
    norm_case("rms_norm", "rms_norm")
    norm_case("rms_norm_bias", "rms_norm", bias=True)
    norm_case("rms_norm_eps_1e-2", "rms_norm", eps="1e-2")
    norm_case("rms_norm_residual", "rms_norm", residual=True)
    norm_case("rms_norm_residual_prenorm", "rms_norm", residual=True, prenorm=True)
    norm_case("rms_norm_prenorm", "rms_norm", prenorm=True)
    norm_case("rms_norm_width_1", "rms_norm", shape=(3, 1))
    norm_case("rms_norm_width_17", "rms_norm", shape=(4, 17), residual=True, prenorm=True)
    norm_case("rms_norm_width_70", "rms_norm", shape=(3, 70))
    norm_case("rms_norm_half_inputs", "rms_norm", shape=(4, 16), residual=True, prenorm=True, grid="half")
    norm_case("layer_norm", "layer_norm", bias=True)
    norm_case("layer_norm_no_bias", "layer_norm")
    norm_case("layer_norm_residual_prenorm", "layer_norm", bias=True, residual=True, prenorm=True)
    norm_case("layer_norm_width_17", "layer_norm", shape=(4, 17), bias=True)
    norm_case("layer_norm_rowscale", "layer_norm", bias=True, residual=True, prenorm=True, rowscale=True)
    norm_case("layer_norm_parallel", "layer_norm", bias=True, residual=True, prenorm=True, parallel=True)
    norm_case("rms_norm_parallel", "rms_norm", residual=True, prenorm=True, parallel=True)

    gated_norm_case("rms_norm_gated_after", "rms_norm_gated", norm_before_gate=True)
    gated_norm_case("rms_norm_gated_before", "rms_norm_gated", norm_before_gate=False)
    gated_norm_case("rms_norm_gated_after_groups_2", "rms_norm_gated", group_size=4, norm_before_gate=True)
    gated_norm_case("rms_norm_gated_before_groups_2", "rms_norm_gated", group_size=4, norm_before_gate=False)
    gated_norm_case("rms_norm_gated_before_groups_4", "rms_norm_gated", group_size=2, norm_before_gate=False)
    gated_norm_case("rms_norm_gated_before_bias", "rms_norm_gated", bias=True, group_size=4, norm_before_gate=False)
    gated_norm_case("rms_norm_gated_after_bias", "rms_norm_gated", bias=True, norm_before_gate=True)
    gated_norm_case("rms_norm_gated_before_eps_1e-2", "rms_norm_gated", eps="1e-2", norm_before_gate=False)
    gated_norm_case("rms_norm_gated_no_z_groups_2", "rms_norm_gated", z=False, group_size=4)
    gated_norm_case("rms_norm_gated_width_51_groups_3", "rms_norm_gated", shape=(3, 51), group_size=17,
                    norm_before_gate=False)
    gated_norm_case("rms_norm_gated_half_inputs", "rms_norm_gated", shape=(4, 16), norm_before_gate=False, grid="half")
    gated_norm_case("layer_norm_gated_after", "layer_norm_gated", bias=True, norm_before_gate=True)
    gated_norm_case("layer_norm_gated_before", "layer_norm_gated", bias=True, norm_before_gate=False)
    gated_norm_case("layer_norm_gated_after_groups_2", "layer_norm_gated", bias=True, group_size=4, norm_before_gate=True)
    gated_norm_case("layer_norm_gated_before_groups_2", "layer_norm_gated", bias=True, group_size=4,
                    norm_before_gate=False)


def main():
    parser = argparse.ArgumentParser(description="Makes goldens/ops.")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--skip-kernels", action="store_true", help="do not check against the interpreted Triton kernels")
    parser.parse_args(namespace=arguments)
    for op in (selective_scan, ssd, selective_state_update, causal_conv1d, causal_conv1d_update, norm):
        op()
        for path in (GOLDENS / "ops" / op.__name__).glob("*.safetensors"):  # cases that no longer exist
            if arguments.op is None and not path.stem.startswith("upstream_"):
                if f"{op.__name__}/{path.stem}" not in written:
                    path.unlink()
        count = sum(context.startswith(op.__name__ + "/") for context in written)
        print(f"{op.__name__}: {count} cases")
    print("worst agreement:", ", ".join(f"{what} {error:.1e}" for what, error in worst.items()))


if __name__ == "__main__":
    main()
