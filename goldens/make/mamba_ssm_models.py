"""Makes goldens/models/ss_*: tiny random checkpoints in the state-spaces format, with the options the published ones lack.

Run: python mamba_ssm_models.py [name ...]

The models are mamba_ssm's own MambaLMHeadModel, on the CPU: each CUDA or Triton function that the modules call is replaced by
the reference function that the same package (or causal_conv1d, or flash_attn) publishes for it. Learned initial states are known to
its class Mamba2Simple alone, which takes the place of Mamba2 for them. Parameters, `io.safetensors` and checks are
as in transformers_models.py. Steps are left out, and `step_logits` in the metadata says why, where mamba_ssm's own step is
not the model's forward.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
import zlib
from unittest import mock

import upstream  # before torch: it sets the environment

import numpy as np
import torch
import torch.nn.functional as F
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from flash_attn.layers import rotary
from mamba_ssm.models import mixer_seq_simple
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.modules import block, mamba2, mamba2_simple, mamba_simple, mha
from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton import layer_norm, layernorm_gated
from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
from mamba_ssm.utils.generation import InferenceParams

import bfloat16
import golden_file

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"
VERSION = upstream.version("mamba_ssm", "causal_conv1d", "torch")
ROTARY_VERSION = upstream.version("mamba_ssm", "causal_conv1d", "flash_attn", "torch")
LENGTH = 23
LIMIT = 300 * 1024


# ----------------------------------------------------------------- the published references, by the kernels' signatures


def norm(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False, **rest):
    # As the kernels: computed in float32, whatever x is, and so is the residual if asked for.
    assert all(value is None or value is False or value == 0 for value in rest.values()), rest
    reference = layer_norm.rms_norm_ref if is_rms_norm else layer_norm.layer_norm_ref
    y, total = reference(x, weight, bias, residual=residual, eps=eps, prenorm=True, upcast=True)
    return (y, total if residual_in_fp32 else total.to(x.dtype)) if prenorm else y


def rms_norm(*args, **kwargs):
    return norm(*args, **kwargs, is_rms_norm=True)


def gated_rms_norm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    return layernorm_gated.rms_norm_ref(x, weight, bias, z, eps, group_size, norm_before_gate)


def conv(x, weight, bias=None, seq_idx=None, activation=None):
    return causal_conv1d_ref(x, weight, bias, seq_idx=seq_idx, activation=activation)


def chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, dt_softplus=False, seq_idx=None,
               cu_seqlens=None, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False):
    # The listing of the paper, with bias, softplus, limit, groups, D and z around it, as ops.py checks it against the kernel.
    assert seq_idx is None and cu_seqlens is None and not return_varlen_states
    dtype, (x, dt, A, B, C) = x.dtype, (m.float() for m in (x, dt, A, B, C))  # as the kernels, which round once
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], dim=2) for m in (B, C))
    length = chunk_size if x.shape[1] % chunk_size == 0 else x.shape[1]
    first = None if initial_states is None else initial_states.float()[:, None]
    y, state = ssd_minimal_discrete(x * dt[..., None], A * dt, B, C, length, first)
    y = y if D is None else y + x * (D[:, None] if D.dim() == 1 else D)
    y = (y if z is None else y * F.silu(z.float())).to(dtype)
    return (y, state) if return_final_states else y


def turned(x, cos, sin, interleaved=False, seqlen_offsets=0, **_):
    here = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
    return rotary.apply_rotary_emb_torch(x, cos[here], sin[here], interleaved)


def turned_keys(kv, *args, **kwargs):
    return torch.stack([turned(kv[:, :, 0], *args, **kwargs), kv[:, :, 1]], dim=2)


@contextlib.contextmanager
def references():
    """Within it, the modules of mamba_ssm call nothing but references."""
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.multiple(mamba_simple, causal_conv1d_fn=conv, causal_conv1d_update=causal_conv1d_update_ref,
                                selective_scan_fn=selective_scan_ref, selective_state_update=selective_state_update_ref),
            mock.patch.multiple(mamba2, causal_conv1d_fn=conv, causal_conv1d_update=causal_conv1d_update_ref,
                                mamba_chunk_scan_combined=chunk_scan, selective_state_update=selective_state_update_ref),
            mock.patch.multiple(mamba2_simple, causal_conv1d_fn=conv, mamba_chunk_scan_combined=chunk_scan),
            mock.patch.multiple(mha, causal_conv1d_fn=conv, causal_conv1d_update=causal_conv1d_update_ref,
                                flash_attn_with_kvcache=None),
            mock.patch.multiple(rotary, apply_rotary_emb_func=turned, apply_rotary_emb_kv_=turned_keys),
            mock.patch.object(layer_norm, "rms_norm_fn", rms_norm),
            mock.patch.object(layernorm_gated, "rmsnorm_fn", gated_rms_norm),
            mock.patch.object(block, "layer_norm_fn", norm),
            mock.patch.object(mixer_seq_simple, "layer_norm_fn", norm),
        ):
            stack.enter_context(patch)
        yield


# ------------------------------------------------------------------------------------------------------------- the models


def randomize(model, rng):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape, leaf = tuple(parameter.shape), name.split(".")[-1]
            normal = rng.standard_normal(shape)
            if leaf == "A_log":
                values = np.log(rng.uniform(0.5, 8, shape))
            elif leaf == "D":
                values = 1 + 0.5 * normal
            elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
                values = np.log(np.expm1(np.exp(rng.uniform(np.log(0.01), np.log(0.5), shape))))
            elif "norm" in name:
                values = (1 if leaf == "weight" else 0) + 0.3 * normal
            elif name.endswith("conv1d.weight"):
                values = 0.5 * normal
            elif leaf == "bias":
                values = 0.3 * normal
            elif "embedding" in name:
                values = normal
            else:
                values = normal / np.sqrt(shape[-1])
            parameter.copy_(torch.tensor(values))


@torch.no_grad()
def answers(model, ids, prefill):
    """Logits of one forward; of the prefill; of the steps, or why there are none."""
    logits = bfloat16.numpy(model(ids).logits)
    params = InferenceParams(max_seqlen=ids.shape[1], max_batch_size=ids.shape[0])
    first = model(ids[:, :prefill], inference_params=params).logits
    params.seqlen_offset = prefill
    stepped = []
    for position in range(prefill, ids.shape[1]):
        try:
            stepped.append(model(ids[:, position : position + 1], inference_params=params).logits)
        except AssertionError as error:
            return logits, bfloat16.numpy(first), error
        params.seqlen_offset += 1
    return logits, bfloat16.numpy(first), bfloat16.numpy(torch.cat(stepped, dim=1))


def relative(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


class Mamba2Simple(mamba2_simple.Mamba2Simple):
    """For a model that hands its cache down, which this class knows nothing of."""

    def forward(self, u, inference_params=None):
        assert inference_params is None or inference_params.seqlen_offset == 0, "no steps"
        return super().forward(u)


def classes(folder):
    """Within it, models are made of the class that knows the options of a configuration."""
    return classes_of(json.loads((folder / "config.json").read_text()).get("ssm_cfg", {}))


def classes_of(ssm_cfg):
    simple = ssm_cfg.get("learnable_init_states", False)
    return mock.patch.object(mixer_seq_simple, "Mamba2", Mamba2Simple) if simple else contextlib.nullcontext()


def build(config, dtype):
    with classes_of(config.ssm_cfg):
        model = mixer_seq_simple.MambaLMHeadModel(config, device="cpu", dtype=dtype).eval()
    for layer in model.backbone.layers:  # the fused paths of the two mixers have no reference with all options
        layer.mixer.use_mem_eff_path = layer.mixer.use_fast_path = False
    return model


def record(name, prefill, *, steps=None, **config):
    seed = zlib.crc32(f"models/{name}".encode())
    rng = np.random.Generator(np.random.PCG64(seed))
    config = MambaConfig(**(dict(d_model=24, n_layer=2, vocab_size=61) | config))
    model = build(config, torch.float32)
    randomize(model, rng)
    ids = torch.tensor(rng.integers(0, config.vocab_size, (2, LENGTH)))
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    with references():
        single = answers(model, ids, prefill)
        with upstream.float64():
            logits, prefix, stepped = answers(model.double(), ids, prefill)
    assert logits.dtype == np.float64
    assert relative(single[0], logits) < 1e-4, (name, relative(single[0], logits))
    assert relative(prefix, logits[:, :prefill]) < 1e-10, (name, relative(prefix, logits[:, :prefill]))
    failed = isinstance(stepped, AssertionError) or relative(stepped, logits[:, prefill:]) > 1e-2
    assert failed == (steps is not None), name
    if not failed:
        assert relative(stepped, logits[:, prefill:]) < 1e-10, (name, relative(stepped, logits[:, prefill:]))
        assert relative(single[2], stepped) < 1e-4, (name, relative(single[2], stepped))

    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.float()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    tensors = {"input_ids": ids.numpy(), "logits": logits.astype(np.float32)}
    if steps is None:
        tensors["step_logits"] = stepped.astype(np.float32)
    metadata = {
        "producer": "mamba_ssm MambaLMHeadModel over its reference functions, float64",
        "producer_version": ROTARY_VERSION if config.attn_cfg.get("rotary_emb_dim") else VERSION,
        "seed": str(seed), "prefill": str(prefill),
        "step_logits": "after prefill, one id at a time with the cache" if steps is None else steps,
    }
    golden_file.write(folder / "io.safetensors", tensors, metadata)
    half = build(config, torch.bfloat16)
    half.load_state_dict(weights)
    with references():
        rounding = bfloat16.record(folder, model, half, lambda *ask: answers(*ask)[::2], metadata, stepped=steps is None)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= LIMIT, (name, size)
    print(f"{name}: {size} bytes, {rounding}, float32 off by {relative(single[0], logits):.1e}, largest logit {np.abs(logits).max():.1f}, "
          f"logits {logits.shape}")


def make(name, *args, **kwargs):
    if not sys.argv[1:] or name in sys.argv[1:]:
        record(name, *args, **kwargs)


def main():
    make("ss_mamba1_options", 7, ssm_cfg={"layer": "Mamba1", "d_state": 5, "d_conv": 3, "dt_rank": 3, "conv_bias": False,
                                          "bias": True, "expand": 3})
    make("ss_mamba1_layer_norm_mlp", 2, ssm_cfg={}, rms_norm=False, d_intermediate=8, tie_embeddings=False, vocab_size=64,
         residual_in_fp32=False, fused_add_norm=False, d_model=20, n_layer=1)
    make("ss_mamba2_options", 7, ssm_cfg={
        "layer": "Mamba2", "d_state": 6, "headdim": 6, "ngroups": 2, "chunk_size": 8, "d_conv": 3, "bias": True,
        "conv_bias": False, "norm_before_gate": True})
    make("ss_mamba2_partial_ssm", 1, ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 6, "chunk_size": 8, "d_ssm": 24},
         tie_embeddings=False)
    make("ss_mamba2_no_norm", 2, ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 12, "ngroups": 4, "chunk_size": 8,
                                          "rmsnorm": False})
    make("ss_mamba2_d_has_hdim", 7, ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 6, "chunk_size": 8,
                                             "D_has_hdim": True},
         steps="left out: Mamba2.step of mamba_ssm fails with D_has_hdim")
    make("ss_mamba2_dt_limit", 7, ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 6, "ngroups": 2, "chunk_size": 8,
                                           "dt_limit": [0.02, 0.08]},
         steps="left out: Mamba2.step of mamba_ssm does not apply dt_limit")
    make("ss_mamba2_init_states", 7, ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 6, "chunk_size": 8,
                                              "learnable_init_states": True},
         steps="left out: Mamba2Simple of mamba_ssm has no step")
    make("ss_mamba2_attention", 7, n_layer=3, attn_layer_idx=[1], attn_cfg={
        "num_heads": 4, "num_heads_kv": 2, "head_dim": 5, "causal": True, "d_conv": 4, "qkv_proj_bias": False,
        "out_proj_bias": False, "rotary_emb_dim": 0},
        ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 6, "chunk_size": 8},
        steps="left out: without flash_attn, MHA of mamba_ssm lets a step see the first position only, and its prefill keeps "
              "the convolved values where the step wants the inputs")
    make("ss_mamba1_attention_mlp", 7, n_layer=2, attn_layer_idx=[0], d_model=12, attn_cfg={
        "num_heads": 4, "num_heads_kv": 1, "head_dim": 6, "mlp_dim": 200, "causal": True, "softmax_scale": 0.7},
        ssm_cfg={"d_state": 4, "dt_rank": 2}, tie_embeddings=False, vocab_size=40,
        steps="left out: without flash_attn, MHA of mamba_ssm lets a step see the first position only")
    # As the published hybrid, state-spaces/mamba2attn-2.7b, half of each head turns.
    make("ss_mamba2_rotary", 7, n_layer=3, attn_layer_idx=[1], attn_cfg={
        "causal": True, "d_conv": 4, "head_dim": 8, "num_heads": 3, "out_proj_bias": False, "qkv_proj_bias": False,
        "rotary_emb_dim": 4}, ssm_cfg={"layer": "Mamba2", "d_state": 6, "headdim": 6, "chunk_size": 8},
        steps="left out: as of ss_mamba2_attention")
    make("ss_mamba1_rotary_interleaved", 7, n_layer=2, attn_layer_idx=[1], d_model=12, attn_cfg={
        "num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "causal": True, "rotary_emb_dim": 6, "rotary_emb_base": 50.0,
        "rotary_emb_interleaved": True}, ssm_cfg={"d_state": 4, "dt_rank": 2}, vocab_size=40,
        steps="left out: without flash_attn, MHA of mamba_ssm lets a step see the first position only")


if __name__ == "__main__":
    main()
