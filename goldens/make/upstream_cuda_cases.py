"""Turns stored results of the published CUDA kernels into goldens/ops/<op>/upstream_cuda_<case>.safetensors.

Run: python upstream_cuda_cases.py PATH/mamba_reference_cases.json

The JSON holds inputs, outputs and gradients of mamba_ssm at the commit named in its `meta`, run on a GPU. Not all of it can
be used, and no option is recorded; both were found out by recomputing. So every tensor written here is first compared with
the published Python reference in float64, at the tolerance written to the file.

Files have the tensors of ops.py, in the dtype of the JSON. Gradients are of the sum of the outputs whose `cot.` is ones.
`tolerance` (outputs) and `tolerance_grad` bound max|error| / max(1, max|value|) of the stored numbers themselves; a test adds
what its own arithmetic needs. Left out, since they do not follow the recurrence:
- selective_scan `complex_A_packed_BC` (complex A), `grouped_time_varying` (3 channels in 2 groups, NaN); of `full` every
  gradient but those of D and z (NaN), and the last state: the CUDA kernel leaves B out of its state when B is constant;
- ssd: every head with A > 0, where the Triton kernels clamp exp(min(x, 0)); with it `combined_varlen`, and the gradients
  of B and C, which sum over heads; chunk_scan_*, whose inputs come from such heads.
"""

import argparse
import json
import pathlib

import upstream  # before torch: it sets the environment

import numpy as np
import torch
import torch.nn.functional as F
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton import layer_norm, layernorm_gated
from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
from mamba_ssm.ops.triton.ssd_chunk_state import chunk_state_ref
from mamba_ssm.ops.triton.ssd_state_passing import state_passing_ref

import golden_file

GOLDENS = pathlib.Path(__file__).resolve().parent.parent


def array(entry):
    return np.array(entry["data"], dtype=np.float64).reshape(entry["shape"])


def store(values, dtype):
    if dtype == "bfloat16":
        return golden_file.BFloat16(values)
    kept = values.astype(dtype)
    assert np.array_equal(kept.astype(np.float64), values), f"not exact in {dtype}"
    return kept


class Cases:
    def __init__(self, path):
        self.document = json.loads(pathlib.Path(path).read_text())
        meta = self.document["meta"]
        self.version = f"mamba_ssm {meta['mamba_commit']}, torch {meta['torch']}, cuda {meta['cuda']}"

    def emit(self, op, case, source, inputs, outputs, reference, options, *, gradients=None, summed=None,
             tolerance, tolerance_grad=None):
        """`inputs`, `outputs`, `gradients`: our name to (values, dtype). `summed`: outputs in the gradient's loss."""
        gradients = gradients or {}
        summed = list(outputs) if summed is None else summed
        leaves = {name: torch.tensor(values, requires_grad=name in gradients) for name, (values, _) in inputs.items()}
        with upstream.float64():
            computed = reference(**leaves)
        tensors, worst = {f"in.{name}": store(*value) for name, value in inputs.items()}, [0.0, 0.0]
        for name, (values, dtype) in outputs.items():
            worst[0] = max(worst[0], self.check(case, name, computed[name].detach().numpy(), values, tolerance))
            tensors[f"out.{name}"] = store(values, dtype)
        if gradients:
            grads = torch.autograd.grad(sum(computed[name].sum() for name in summed), [leaves[n] for n in gradients])
            for (name, (values, dtype)), grad in zip(gradients.items(), grads):
                worst[1] = max(worst[1], self.check(case, name, grad.numpy(), values, tolerance_grad))
                tensors[f"grad.{name}"] = store(values, dtype)
            for name in outputs:
                tensors[f"cot.{name}"] = np.full(outputs[name][0].shape, float(name in summed), np.float32)
        metadata = {"op": op, "case": f"upstream_cuda_{case}", "producer": f"mamba_ssm CUDA and Triton kernels: {source}",
                    "producer_version": self.version, "seed": "fixed by the JSON", "input_grid": "as stored",
                    "gradient_of": "sum(out * cot)" if gradients else "none", "tolerance": tolerance}
        metadata |= {"tolerance_grad": tolerance_grad} if gradients else {}
        golden_file.write(GOLDENS / "ops" / op / f"upstream_cuda_{case}.safetensors", tensors, metadata | options, 64 * 1024)
        print(f"{op}/upstream_cuda_{case}: off by {worst[0]:.1e}, gradients {worst[1]:.1e}")

    @staticmethod
    def check(case, name, computed, stored, tolerance):
        assert computed.shape == stored.shape, (case, name, computed.shape, stored.shape)
        error = np.abs(computed - stored).max() / max(1.0, np.abs(stored).max())
        assert error <= float(tolerance), f"{case}: {name}: {error:.2e}"
        return error

    def read(self, group, case, part, names, change=None):
        """The tensors of one part under our names, as (values, dtype)."""
        entries, change = self.document[group][case][part], change or (lambda name, values: values)
        return {ours: (change(ours, array(entries[theirs])), entries[theirs]["dtype"]) for theirs, ours in names.items()
                if theirs in entries}


def selective_scan(cases):
    names = {"u": "u", "delta": "delta", "A": "a", "B": "b", "C": "c", "D": "d", "z": "z", "delta_bias": "delta_bias"}
    grouped = lambda name, values: values[:, None] if name in "bc" and values.ndim == 3 else values  # noqa: E731
    # 16-bit outputs are half a unit off; the gradients of 16-bit inputs are rounded on the way too.
    for case, softplus, tolerance, tolerance_grad in (
        ("minimal", False, "1.1e-5", "6e-5"), ("minimal_fp16", False, "5e-4", "5e-4"),
        ("minimal_bf16", False, "2e-3", "4e-3"), ("time_varying_3d", True, "1.1e-5", "6e-5"),
        ("full", True, "1.4e-6", "1.4e-6"),
    ):
        def reference(u, delta, a, b, c, d=None, z=None, delta_bias=None):
            return {"y": selective_scan_ref(u, delta, a, b, c, d, z, delta_bias, softplus)}

        kept = {"D": "d", "z": "z"} if case == "full" else names
        inputs = cases.read("selective_scan", case, "inputs", names, grouped)
        kind = {name: "constant" if inputs[name][0].ndim == 2 else "varying" for name in "bc"}
        cases.emit("selective_scan", case, f"selective_scan.{case}", inputs,
                   cases.read("selective_scan", case, "outputs", {"y": "y"}), reference,
                   {"delta_softplus": str(softplus).lower(), "b_kind": kind["b"], "c_kind": kind["c"], "ngroups": "1"},
                   gradients=cases.read("selective_scan", case, "gradients", kept, grouped),
                   tolerance=tolerance, tolerance_grad=tolerance_grad)


def causal_conv1d(cases):
    names = {"x": "x", "weight": "weight", "bias": "bias"}
    for case, activation, channels_last in (("channels_first_silu", "silu", False), ("channels_last_identity", "none", True)):
        first = lambda name, values: values.transpose(0, 2, 1) if channels_last and name in "xy" else values  # noqa: E731

        def reference(x, weight, bias=None):
            return {"y": causal_conv1d_ref(x, weight, bias, activation=None if activation == "none" else activation)}

        cases.emit("causal_conv1d", case, f"dw_causal_conv.{case}",
                   cases.read("dw_causal_conv", case, "inputs", names, first),
                   cases.read("dw_causal_conv", case, "outputs", {"y": "y"}, first), reference,
                   {"activation": activation, "width": "4"},
                   gradients=cases.read("dw_causal_conv", case, "gradients", names, first),
                   tolerance="2e-7", tolerance_grad="1e-6")


def norm(cases):
    names = {"x": "x", "w": "weight", "b": "bias", "residual": "residual", "z": "z", "x1": "x1", "w1": "weight1",
             "b1": "bias1", "rowscale": "rowscale"}
    eps = 1e-6  # the kernels' default, which the JSON does not say
    common = {"eps": "1e-6", "group_size": "none", "norm_before_gate": "none", "prenorm": "false"}
    rows = lambda name, values: (values.reshape(2, 4) if name == "rowscale"  # noqa: E731
                                 else values.reshape(2, 4, 6) if values.shape == (8, 6) else values)

    def read(case, part, which):
        return cases.read("layer_norms", case, part, which, rows)

    for gate, norm_before_gate, theirs in (("after", True, "y_norm_before"), ("before", False, "y_norm_after")):
        def gated(x, weight, bias, z):
            return {"y": layernorm_gated.rms_norm_ref(x, weight, bias, z=z, eps=eps, norm_before_gate=norm_before_gate)}

        cases.emit("norm", f"rms_norm_gated_{gate}", f"layer_norms.gated_rms_norm, {theirs}",
                   read("gated_rms_norm", "inputs", names), read("gated_rms_norm", "outputs", {theirs: "y"}), gated,
                   common | {"kind": "rms_norm_gated", "norm_before_gate": str(norm_before_gate).lower()}, tolerance="3e-7")

    def rms(x, weight):
        return {"y": layer_norm.rms_norm_ref(x, weight, None, eps=eps)}

    def prenorm(x, weight, bias, residual):
        return dict(zip(("y", "residual"), layer_norm.layer_norm_ref(x, weight, bias, residual, eps=eps, prenorm=True)))

    def dual(x, weight, bias, x1, weight1, bias1):
        out = layer_norm.layer_norm_ref(x, weight, bias, x1=x1, weight1=weight1, bias1=bias1, eps=eps)
        return dict(zip(("y", "y1"), out))

    mask = read("layer_norm_dropout_rowscale", "outputs", {"dropout_mask": "dropout_mask"})

    def dropout(x, weight, bias, residual, rowscale, dropout_mask):
        return {"y": layer_norm.layer_norm_ref(x, weight, bias, residual, eps=eps, dropout_p=0.1, rowscale=rowscale,
                                               dropout_mask=dropout_mask.bool())}

    for case, ours, reference, options, outputs, extra, summed in (
        ("rms_norm", "rms_norm", rms, {"kind": "rms_norm"}, {"y": "y"}, {}, None),
        ("layer_norm_prenorm", "layer_norm_residual_prenorm", prenorm, {"kind": "layer_norm", "prenorm": "true"},
         {"y": "y", "residual_out": "residual"}, {}, ["y"]),
        ("layer_norm_dual_branch", "layer_norm_parallel", dual, {"kind": "layer_norm"}, {"y": "y", "y1": "y1"}, {}, None),
        ("layer_norm_dropout_rowscale", "layer_norm_dropout_rowscale", dropout,
         {"kind": "layer_norm", "dropout_p": "0.1"}, {"y": "y"}, mask, None),
    ):
        inputs = read(case, "inputs", names)
        grads = read(case, "gradients", names)
        cases.emit("norm", ours, f"layer_norms.{case}", inputs | extra, read(case, "outputs", outputs), reference,
                   common | options, gradients=grads, summed=summed, tolerance="3e-7", tolerance_grad="1e-6")


def selective_state_update(cases):
    names = {"state": "state", "x": "x", "dt": "dt", "A": "a", "B": "b", "C": "c", "D": "d", "z": "z", "dt_bias": "dt_bias"}
    for case, softplus, form in (("baseline_full", True, "channels"), ("grouped", False, "heads")):
        def reference(state, x, dt, a, b, c, d=None, z=None, dt_bias=None):
            state = state.clone()
            y = selective_state_update_ref(state, x, dt, a, b, c, d, z, dt_bias, softplus)
            return {"y": y, "state": state}

        cases.emit("selective_state_update", case, f"selective_state_update.{case}",
                   cases.read("selective_state_update", case, "inputs", names),
                   cases.read("selective_state_update", case, "outputs", {"y": "y", "updated_state": "state"}), reference,
                   {"dt_softplus": str(softplus).lower(), "form": form, "tied": "false",
                    "ngroups": "1" if form == "channels" else "2"}, tolerance="4e-6")


def ssd_stages(cases):
    group, chunk = "ssd_components", 3
    for case, softplus, low, high in (("chunk_cumsum", True, 0.0, float("inf")), ("chunk_cumsum_clamped", False, 0.01, 1.0)):
        def cumsum(dt, a, dt_bias=None):  # the first lines of ssd_chunk_scan_combined_ref, with the limit
            dt = dt if dt_bias is None else dt + dt_bias
            dt = (F.softplus(dt) if softplus else dt).clamp(low, high)
            dt = dt.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)
            return {"dt": dt, "da_cumsum": (dt * a[:, None, None]).cumsum(-1)}

        cases.emit("ssd_chunk_cumsum", case, f"{group}.{case}",
                   cases.read(group, case, "inputs", {"dt": "dt", "A": "a", "dt_bias": "dt_bias"}),
                   cases.read(group, case, "outputs", {"dt_out": "dt", "dA_cumsum": "da_cumsum"}), cumsum,
                   {"chunk_size": "3", "dt_softplus": str(softplus).lower(), "dt_limit": f"{low},{high}"}, tolerance="5e-7")

    def passing(states, da_chunk_last):
        passed, final = state_passing_ref(states.flatten(3), da_chunk_last)
        return {"states": passed.unflatten(-1, states.shape[3:]), "final_states": final.unflatten(-1, states.shape[3:])}

    names = {"states": "states", "dA_last": "da_chunk_last"}
    whole = lambda name, values: (values.reshape(2, 2, 3, 4) if name == "final_states"  # noqa: E731
                                  else values.reshape(2, 2, 2, 3, 4) if name == "states" else values)
    cases.emit("ssd_state_passing", "state_passing", f"{group}.state_passing",
               cases.read(group, "state_passing", "inputs", names, whole),
               cases.read(group, "state_passing", "outputs", {"states_passed": "states", "final_states": "final_states"},
                          whole), passing, {}, gradients=cases.read(group, "state_passing", "gradients", names, whole),
               summed=["states"], tolerance="5e-7", tolerance_grad="5e-7")

    def head_0(name, values):
        axis = {"x": 2, "states": 2, "dt": 1, "da_cumsum": 1}.get(name)
        return values if axis is None else values.take([0], axis)

    names = {"B": "b", "x": "x", "dt": "dt", "dA_cumsum": "da_cumsum"}
    cases.emit("ssd_chunk_state", "chunk_state_head_0", f"{group}.chunk_state, head 0",
               cases.read(group, "chunk_state", "inputs", names, head_0),
               cases.read(group, "chunk_state", "outputs", {"states": "states"}, head_0),
               lambda b, x, dt, da_cumsum: {"states": chunk_state_ref(b, x, dt, da_cumsum)}, {"chunk_size": "3"},
               gradients={name: value for name, value in
                          cases.read(group, "chunk_state", "gradients", names, head_0).items() if name != "b"},
               tolerance="2.5e-3", tolerance_grad="2.5e-3")

    for case in ("basic", "grouped", "causal_seq"):
        def bmm(a, b, seq_idx=None):
            a, b = (m.unflatten(1, (-1, chunk)) for m in (a, b))
            if a.dim() == 4:
                out = torch.einsum("bcln,bcsn->bcls", a, b)
            else:
                out = torch.einsum("bclgn,bcsgn->bcgls", a, b)
            if seq_idx is not None:
                seq_idx = seq_idx.unflatten(1, (-1, chunk))
                out = out * (seq_idx[..., :, None] == seq_idx[..., None, :])
            return {"out": out}

        cases.emit("ssd_bmm", case, f"ssd_bmm.{case}",
                   cases.read("ssd_bmm", case, "inputs", {"a": "a", "b": "b", "seq_idx": "seq_idx"}),
                   cases.read("ssd_bmm", case, "outputs", {"out": "out"}), bmm, {"chunk_size": "3"}, tolerance="4e-3")


def ssd(cases):
    names = {"X": "x", "dt": "dt", "A": "a", "B": "b", "C": "c", "D": "d", "z": "z", "dt_bias": "dt_bias",
             "initial_states": "initial_states"}
    chunk = cases.document["ssd_combined"]["combined_full"]["inputs"]["chunk_size"]

    def head_0(name, values):
        axis = {"x": 2, "y": 2, "z": 2, "dt": 2, "a": 0, "d": 0, "dt_bias": 0, "initial_states": 1, "final_state": 1}.get(name)
        return values if axis is None else values.take([0], axis)

    def reference(x, dt, a, b, c, d, z, dt_bias, initial_states):
        dt = F.softplus(dt + dt_bias)
        y, state = ssd_minimal_discrete(x * dt[..., None], a * dt, b, c, chunk, initial_states[:, None])
        return {"y": (y + x * d) * F.silu(z), "final_state": state}

    grads = cases.read("ssd_combined", "combined_full", "gradients", names, head_0)
    cases.emit("ssd", "combined_full_head_0", "ssd_combined.combined_full, head 0",
               cases.read("ssd_combined", "combined_full", "inputs", names, head_0),
               cases.read("ssd_combined", "combined_full", "outputs", {"y": "y", "final_states": "final_state"}, head_0),
               reference, {"chunk_size": str(chunk), "dt_softplus": "true", "dt_limit": "0.0,inf", "d_kind": "head_dim",
                           "ngroups": "1"},
               gradients={name: value for name, value in grads.items() if name not in "bc"}, summed=["y"],
               tolerance="7e-3", tolerance_grad="7e-3")


def swiglu(cases):
    def reference(xy):
        first, second = xy.chunk(2, dim=-1)
        return {"y": F.silu(first) * second}

    cases.emit("swiglu", "swiglu", "swiglu.swiglu", cases.read("swiglu", "swiglu", "inputs", {"xy": "xy"}),
               cases.read("swiglu", "swiglu", "outputs", {"y": "y"}), reference, {},
               gradients=cases.read("swiglu", "swiglu", "gradients", {"xy": "xy"}), tolerance="1e-7",
               tolerance_grad="1e-6")


def main():
    parser = argparse.ArgumentParser(description="Makes goldens/ops/*/upstream_cuda_*.")
    parser.add_argument("json", help="mamba_reference_cases.json")
    cases = Cases(parser.parse_args().json)
    for make in (selective_scan, causal_conv1d, norm, selective_state_update, ssd_stages, ssd, swiglu):
        make(cases)


if __name__ == "__main__":
    main()
