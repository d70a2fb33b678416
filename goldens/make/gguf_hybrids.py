"""Makes goldens/gguf/<name>.gguf of the hybrids in goldens/models, and of FalconMamba, with the `gguf` package of llama.cpp.

Run: python gguf_hybrids.py, after transformers_hybrids.py

Their logits are those of goldens/models/<name>/io.safetensors. Keys are those of llama.cpp's converter, names come from the table of
the `gguf` package, and tensors are changed as the converter does it: A = -exp(A_log), convolutions without their middle axis, A and
D of Mamba-2 with an axis more, the gated norm in groups, experts stacked, gates apart from what they gate, queries and keys of
Granite and Bamba turned for pairs of neighbours, the multipliers of Falcon-H1 in the weights.
"""

import sys

for name in ("mamba_ssm", "causal_conv1d", "mambapy", "kernels"):
    sys.modules[name] = None  # importing it raises ImportError

import upstream  # noqa: E402, F401  before torch: it sets the environment

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from gguf_files import GOLDENS  # noqa: E402

ARCH = gguf.MODEL_ARCH
ATTENTION = ("attention", "full_attention")


def permute(weights, heads):
    """For rotary embeddings of neighbouring pairs instead of halves."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def common(writer, config, context=2**20):
    """What every converter writes. `context` is the number that we write: models here have no limit."""
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_epsilon", None) or config.norm_eps)


def heads(writer, config, kinds):
    """Heads, of keys layer by layer; `kinds` are the types of layers, or None where all have attention."""
    writer.add_head_count(config.num_attention_heads)
    kv = config.num_key_value_heads
    writer.add_head_count_kv(kv if kinds is None else [kv if kind in ATTENTION else 0 for kind in kinds])


def rope(writer, config):
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    elif parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    else:
        assert parameters["rope_type"] == "default", parameters


def mamba2(writer, d_inner, d_state, d_conv, heads, groups):
    writer.add_ssm_conv_kernel(d_conv)
    writer.add_ssm_inner_size(d_inner)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_group_count(groups)


def changed(name, tensor, groups):
    """What all converters do to a tensor."""
    if name.endswith("A_log"):
        tensor = -torch.exp(tensor)
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        tensor = tensor.squeeze(1)
    if groups and name.endswith(("A_log", ".D")):
        tensor = tensor.reshape(-1, 1)
    if groups and name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        tensor = tensor.reshape(groups, -1)
    return tensor


def stacked(state, prefix, parts):
    """Takes single experts out of `state`, stacked."""
    count = len({key.removeprefix(prefix + ".").split(".")[0] for key in state if key.startswith(prefix + ".")})
    return {part: torch.stack([state.pop(f"{prefix}.{e}.{part}.weight") for e in range(count)]) for part in parts}


def make(name, arch, keys, convert=lambda config, state: state):
    folder, path = GOLDENS / "models" / name, GOLDENS / "gguf" / f"{name}.gguf"
    config = transformers.AutoConfig.from_pretrained(folder)
    state = {key: value.float() for key, value in safetensors.torch.load_file(folder / "model.safetensors").items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    groups = keys(writer, config)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in convert(config, state).items():
        asked = key.removesuffix("dt_bias") + "dt_proj.bias" if key.endswith("dt_bias") else key
        target = asked if asked.startswith("blk.") else table.get_name(asked, try_suffixes=(".weight", ".bias"))
        assert target is not None, key
        writer.add_tensor(target, np.ascontiguousarray(changed(key, value, groups).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path.name}: {path.stat().st_size} bytes")


def falcon_mamba(name):
    def keys(writer, config):
        common(writer, config)
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_ssm_dt_b_c_rms(True)

    make(name, ARCH.MAMBA, keys)


def jamba(name):
    def keys(writer, config):
        common(writer, config)
        kinds = ["attention" if i % config.attn_layer_period == config.attn_layer_offset else "mamba" for i in range(config.num_hidden_layers)]
        heads(writer, config, kinds)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_ssm_conv_kernel(config.mamba_d_conv)
        writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
        writer.add_ssm_state_size(config.mamba_d_state)
        writer.add_ssm_time_step_rank(config.mamba_dt_rank)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)

    def convert(config, state):
        out = {}
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}.feed_forward.experts"
            if any(key.startswith(prefix) for key in state):
                parts = stacked(state, prefix, ["gate_proj", "up_proj", "down_proj"])
                out |= {f"model.layers.{layer}.mlp.experts.{part}.weight": value for part, value in parts.items()}
        return out | state

    make(name, ARCH.JAMBA, keys, convert)


def turned(config, key, value):
    if key.endswith(("q_proj.weight", "q_proj.bias")):
        return permute(value, config.num_attention_heads)
    if key.endswith(("k_proj.weight", "k_proj.bias")):
        return permute(value, config.num_key_value_heads)
    return value


def granite(name):
    def keys(writer, config):
        common(writer, config)
        kinds = [{"linear_attention": "mamba", "full_attention": "attention"}.get(kind, kind) for kind in config.layer_types]
        heads(writer, config, kinds)
        mamba2(writer, config.mamba_expand * config.hidden_size, config.mamba_d_state, config.mamba_d_conv, config.mamba_n_heads,
               config.mamba_n_groups)
        writer.add_vocab_size(config.vocab_size)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        turns = config.position_embedding_type == "rope"
        writer.add_rope_scaling_finetuned(turns)
        if turns:
            writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
            rope(writer, config)
        if config.num_local_experts:
            writer.add_feed_forward_length(config.intermediate_size)
            writer.add_expert_count(config.num_local_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
        else:
            writer.add_feed_forward_length(config.shared_intermediate_size)
        return config.mamba_n_groups

    def convert(config, state):
        out, shared = {}, "_shexp" if config.num_local_experts else ""
        for key, value in state.items():
            layer = f"blk.{key.split('.')[2]}" if ".layers." in key else ""
            if key.endswith("shared_mlp.input_linear.weight"):
                out[f"{layer}.ffn_gate{shared}.weight"], out[f"{layer}.ffn_up{shared}.weight"] = value.chunk(2)
            elif key.endswith("shared_mlp.output_linear.weight"):
                out[f"{layer}.ffn_down{shared}.weight"] = value
            elif key.endswith("block_sparse_moe.input_linear.weight"):
                out[f"{layer}.ffn_gate_exps.weight"], out[f"{layer}.ffn_up_exps.weight"] = value.chunk(2, dim=1)
            else:
                out[key] = turned(config, key, value)
        return out

    make(name, ARCH.GRANITE_HYBRID, keys, convert)


def bamba(name):
    def keys(writer, config):
        common(writer, config)
        heads(writer, config, ["attention" if i in config.attn_layer_indices else "mamba" for i in range(config.num_hidden_layers)])
        mamba2(writer, config.mamba_expand * config.hidden_size, config.mamba_d_state, config.mamba_d_conv, config.mamba_n_heads,
               config.mamba_n_groups)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_rope_scaling_finetuned(True)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads // 2)
        rope(writer, config)
        return config.mamba_n_groups

    make(name, ARCH.GRANITE_HYBRID, keys, lambda config, state: {key: turned(config, key, value) for key, value in state.items()})


def falcon_h1(name):
    def keys(writer, config):
        common(writer, config)
        heads(writer, config, None)
        mamba2(writer, config.mamba_d_ssm, config.mamba_d_state, config.mamba_d_conv, config.mamba_n_heads, config.mamba_n_groups)
        writer.add_vocab_size(config.vocab_size)
        writer.add_feed_forward_length(config.intermediate_size)
        headdim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(headdim)
        writer.add_value_length(headdim)
        rope(writer, config)
        return config.mamba_n_groups

    def convert(config, state):
        inner, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
        widths = [inner, inner, states, states, config.mamba_n_heads]
        segments = torch.cat([torch.full((width,), value) for width, value in zip(widths, config.ssm_multipliers)])
        factors = {"feed_forward.down_proj": config.mlp_multipliers[1], "feed_forward.gate_proj": config.mlp_multipliers[0],
                   "k_proj": config.key_multiplier * config.attention_in_multiplier, "q_proj": config.attention_in_multiplier,
                   "v_proj": config.attention_in_multiplier, "o_proj": config.attention_out_multiplier,
                   "mamba.out_proj": config.ssm_out_multiplier, "lm_head": config.lm_head_multiplier,
                   "embed_tokens": config.embedding_multiplier}
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        out = {}
        for key, value in state.items():
            if key.endswith("mamba.in_proj.weight"):
                value = value * config.ssm_in_multiplier * segments[:, None]
            if key.endswith("mamba.in_proj.bias"):
                value = value * segments  # the converter knows no biases
            for part, factor in factors.items():
                if key.endswith((f".{part}.weight", f"{part}.weight")) and (part != "o_proj" or "self_attn" in key):
                    value = value * factor
            out[key] = value
        return out

    make(name, ARCH.FALCON_H1, keys, convert)


def nemotron(name):
    def keys(writer, config):
        common(writer, config)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        kinds = config.layers_block_type
        heads(writer, config, kinds)
        mamba2(writer, config.mamba_num_heads * config.mamba_head_dim, config.ssm_state_size, config.conv_kernel, config.mamba_num_heads,
               config.n_groups)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        widths = {"mlp": config.intermediate_size, "moe": config.moe_intermediate_size}
        writer.add_feed_forward_length([widths.get(kind, 0) for kind in kinds])
        if "moe" in kinds:
            writer.add_expert_count(config.n_routed_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_shared_count(config.n_shared_experts)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
            writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
            writer.add_expert_weights_norm(config.norm_topk_prob)
            writer.add_expert_weights_scale(config.routed_scaling_factor)
            writer.add_expert_group_count(config.n_group)
            writer.add_expert_group_used_count(config.topk_group)
        return config.n_groups

    def convert(config, state):
        out = {}
        for layer in range(config.num_hidden_layers):
            prefix = f"backbone.layers.{layer}.mixer"
            if any(key.startswith(f"{prefix}.experts") for key in state):
                for part, value in stacked(state, f"{prefix}.experts", ["up_proj", "down_proj"]).items():
                    out[f"model.layers.{layer}.mlp.experts.{part}.weight"] = value
                out[f"blk.{layer}.exp_probs_b.bias"] = state.pop(f"{prefix}.gate.e_score_correction_bias")
        return out | state

    moe = "moe" in transformers.AutoConfig.from_pretrained(GOLDENS / "models" / name).layers_block_type
    make(name, ARCH.NEMOTRON_H_MOE if moe else ARCH.NEMOTRON_H, keys, convert)


def lfm2(name):
    def keys(writer, config):
        common(writer, config)
        heads(writer, config, config.layer_types)
        rope(writer, config)
        writer.add_vocab_size(config.vocab_size)
        writer.add_shortconv_l_cache(config.conv_L_cache)
        width = config.intermediate_size
        if config.block_auto_adjust_ff_dim:
            width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
            width = config.block_multiple_of * (-(-width // config.block_multiple_of))
        writer.add_feed_forward_length(width)

    make(name, ARCH.LFM2, keys)


def main():
    falcon_mamba("falcon_mamba_tied")
    jamba("jamba")
    granite("granitemoehybrid")
    granite("granitemoehybrid_dense_rope")
    bamba("bamba")
    nemotron("nemotron_h")
    nemotron("nemotron_h_moe")
    falcon_h1("falcon_h1")
    falcon_h1("falcon_h1_gate_norm")
    lfm2("lfm2")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
