//! The names of tensors, which are the same in all architectures but for a few.

/// A map with rows of an architecture's own, and those that all share.
macro_rules! names {
    ($($own:expr),* $(,)?) => {
        $crate::checkpoint::NameMap::new(&[
            $($own,)*
            ("embedding", "token_embd"),
            ("lm_head", "output"),
            ("layers.{l}.0.norm", "blk.{l}.attn_norm"),
            ("layers.{l}.1.norm", "blk.{l}.ffn_norm"),
            ("layers.{l}.{b}.mamba1.in_proj", "blk.{l}.ssm_in"),
            ("layers.{l}.{b}.mamba1.conv1d", "blk.{l}.ssm_conv1d"),
            ("layers.{l}.{b}.mamba1.x_proj", "blk.{l}.ssm_x"),
            ("layers.{l}.{b}.mamba1.dt_proj", "blk.{l}.ssm_dt"),
            ("layers.{l}.{b}.mamba1.dt_norm", "blk.{l}.ssm_dt_norm"),
            ("layers.{l}.{b}.mamba1.b_norm", "blk.{l}.ssm_b_norm"),
            ("layers.{l}.{b}.mamba1.c_norm", "blk.{l}.ssm_c_norm"),
            ("layers.{l}.{b}.mamba1.A_log", "blk.{l}.ssm_a"),
            ("layers.{l}.{b}.mamba1.D", "blk.{l}.ssm_d"),
            ("layers.{l}.{b}.mamba1.out_proj", "blk.{l}.ssm_out"),
            ("layers.{l}.{b}.mamba2.in_proj", "blk.{l}.ssm_in"),
            ("layers.{l}.{b}.mamba2.conv1d", "blk.{l}.ssm_conv1d"),
            ("layers.{l}.{b}.mamba2.dt_bias", "blk.{l}.ssm_dt.bias"),
            ("layers.{l}.{b}.mamba2.A_log", "blk.{l}.ssm_a"),
            ("layers.{l}.{b}.mamba2.D", "blk.{l}.ssm_d"),
            ("layers.{l}.{b}.mamba2.norm", "blk.{l}.ssm_norm"),
            ("layers.{l}.{b}.mamba2.out_proj", "blk.{l}.ssm_out"),
            ("layers.{l}.{b}.attention.q_proj", "blk.{l}.attn_q"),
            ("layers.{l}.{b}.attention.k_proj", "blk.{l}.attn_k"),
            ("layers.{l}.{b}.attention.v_proj", "blk.{l}.attn_v"),
            ("layers.{l}.{b}.attention.o_proj", "blk.{l}.attn_output"),
            ("layers.{l}.{b}.attention.q_norm", "blk.{l}.attn_q_norm"),
            ("layers.{l}.{b}.attention.k_norm", "blk.{l}.attn_k_norm"),
            ("layers.{l}.{b}.short_conv.in_proj", "blk.{l}.shortconv.in_proj"),
            ("layers.{l}.{b}.short_conv.conv1d", "blk.{l}.shortconv.conv"),
            ("layers.{l}.{b}.short_conv.out_proj", "blk.{l}.shortconv.out_proj"),
            ("layers.{l}.{b}.mlp.gate_proj", "blk.{l}.ffn_gate"),
            ("layers.{l}.{b}.mlp.up_proj", "blk.{l}.ffn_up"),
            ("layers.{l}.{b}.mlp.gate_up_proj", "blk.{l}.ffn_gate"),
            ("layers.{l}.{b}.mlp.down_proj", "blk.{l}.ffn_down"),
            ("layers.{l}.{b}.moe.router", "blk.{l}.ffn_gate_inp"),
            ("layers.{l}.{b}.moe.router.correction_bias", "blk.{l}.exp_probs_b.bias"),
            ("layers.{l}.{b}.moe.experts.{e}.gate_proj", "blk.{l}.ffn_gate_exps"),
            ("layers.{l}.{b}.moe.experts.{e}.up_proj", "blk.{l}.ffn_up_exps"),
            ("layers.{l}.{b}.moe.experts.{e}.down_proj", "blk.{l}.ffn_down_exps"),
            ("layers.{l}.{b}.moe.experts.gate_up_proj", "blk.{l}.ffn_gate_exps.weight"),
            ("layers.{l}.{b}.moe.experts.down_proj", "blk.{l}.ffn_down_exps.weight"),
            ("layers.{l}.{b}.moe.shared.gate_proj", "blk.{l}.ffn_gate_shexp"),
            ("layers.{l}.{b}.moe.shared.up_proj", "blk.{l}.ffn_up_shexp"),
            ("layers.{l}.{b}.moe.shared.gate_up_proj", "blk.{l}.ffn_gate_shexp"),
            ("layers.{l}.{b}.moe.shared.down_proj", "blk.{l}.ffn_down_shexp"),
            ("layers.{l}.{b}.moe.latent_in", "blk.{l}.ffn_latent_down"),
            ("layers.{l}.{b}.moe.latent_out", "blk.{l}.ffn_latent_up"),
        ])
    };
}
pub(super) use names;
