//! What a GGUF file says about its model, and the blocks that all architectures describe in the same words.

use serde_json::Value as Json;

use crate::config::{
    AttentionConfig, Fields, GatedNorm, Mamba1Config, Mamba2Config, MlpConfig, ModelConfig, MoeConfig, Rope,
    RopeScaling, RouterConfig,
};
use crate::{Error, Result};

/// The shape of a tensor by its name in the file, if there is such a tensor.
pub(super) type Shapes<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// What a GGUF file says about its model.
pub(super) struct Described<'a> {
    /// Where the file is, for messages.
    pub origin: &'a str,
    /// The keys below the name of the architecture.
    pub fields: Fields<'a>,
    /// The tensors; some options show in them alone.
    pub shapes: Shapes<'a>,
}

impl Described<'_> {
    /// Whether a layer has a tensor.
    pub fn has(&self, l: usize, tensor: &str) -> bool {
        (self.shapes)(&format!("blk.{l}.{tensor}")).is_some()
    }

    /// The rows of a matrix, or of each of several that are stacked.
    pub fn rows(&self, tensor: &str) -> Result<usize> {
        match (self.shapes)(tensor).as_deref() {
            Some([.., rows, _]) => Ok(*rows),
            Some([_]) => Ok(1),
            _ => Err(Error::NoSuchTensor { origin: self.origin.into(), tensor: format!("`{tensor}`") }),
        }
    }

    /// A count that is one for all layers, or one of a list.
    fn of_layer(&self, field: &str, l: usize) -> Result<usize> {
        let Some(Json::Array(values)) = self.fields.get(field) else { return self.fields.usize(field) };
        let value = values.get(l).ok_or_else(|| {
            self.fields.error(field, format!("has {} values, expected one for layer {l}", values.len()))
        })?;
        let small = value.as_u64().filter(|n| *n < 1 << 31);
        let count = small.ok_or_else(|| self.fields.error(field, format!("has {value} for layer {l}")))?;
        Ok(count as usize)
    }

    /// How many of the last layers are heads that predict further tokens, which models do without.
    pub fn predicting_layers(&self) -> Result<usize> {
        self.fields.usize_or("nextn_predict_layers", 0)
    }

    /// The Mamba-1 block of a layer.
    pub fn mamba1(&self, config: &ModelConfig, l: usize) -> Result<Mamba1Config> {
        Ok(Mamba1Config {
            d_inner: self.fields.usize("ssm.inner_size")?,
            d_state: self.fields.usize("ssm.state_size")?,
            d_conv: self.fields.usize("ssm.conv_kernel")?,
            dt_rank: self.fields.usize("ssm.time_step_rank")?,
            conv_bias: self.has(l, "ssm_conv1d.bias"),
            proj_bias: self.has(l, "ssm_in.bias"),
            ..Mamba1Config::new(config.d_model)
        })
    }

    /// The Mamba-2 block of a layer, with the usual norm.
    pub fn mamba2(&self, config: &ModelConfig, l: usize) -> Result<Mamba2Config> {
        let d_inner = self.fields.usize("ssm.inner_size")?;
        // The number of heads, whatever it is called.
        let nheads = self.fields.usize("ssm.time_step_rank")?;
        if nheads == 0 || !d_inner.is_multiple_of(nheads) {
            let message = format!("is {nheads}, expected a divisor of ssm.inner_size {d_inner}");
            return Err(self.fields.error("ssm.time_step_rank", message));
        }
        Ok(Mamba2Config {
            d_inner,
            d_ssm: d_inner,
            d_state: self.fields.usize("ssm.state_size")?,
            d_conv: self.fields.usize("ssm.conv_kernel")?,
            headdim: d_inner / nheads,
            ngroups: self.fields.usize_opt("ssm.group_count")?.unwrap_or(1),
            conv_bias: self.has(l, "ssm_conv1d.bias"),
            in_bias: self.has(l, "ssm_in.bias"),
            out_bias: self.has(l, "ssm_out.bias"),
            norm: Some(GatedNorm { eps: config.norm_eps, before_gate: false }),
            ..Mamba2Config::new(config.d_model)
        })
    }

    /// The attention of a layer, without a rotary embedding; `None` if the layer has no heads of keys.
    pub fn attention(&self, config: &ModelConfig, l: usize) -> Result<Option<AttentionConfig>> {
        let heads = self.of_layer("attention.head_count", l)?;
        let heads_kv = self.of_layer("attention.head_count_kv", l)?;
        if heads == 0 || heads_kv == 0 {
            return Ok(None);
        }
        let headdim = self.fields.usize_opt("attention.key_length")?.unwrap_or(config.d_model / heads);
        if let Some(other) = self.fields.usize_opt("attention.value_length")?.filter(|n| *n != headdim) {
            let message = format!("is {other}, expected attention.key_length {headdim}");
            return Err(self.fields.error("attention.value_length", message));
        }
        let usual = AttentionConfig::new(heads, heads_kv, headdim);
        let softmax_scale = match self.fields.f64_or("attention.scale", 0.0)? {
            0.0 => usual.softmax_scale,
            scale => scale,
        };
        Ok(Some(AttentionConfig {
            qkv_bias: self.has(l, "attn_q.bias"),
            out_bias: self.has(l, "attn_output.bias"),
            softmax_scale,
            ..usual
        }))
    }

    /// The attention of a layer that must have it.
    pub fn required_attention(&self, config: &ModelConfig, l: usize) -> Result<AttentionConfig> {
        self.attention(config, l)?.ok_or_else(|| {
            let message = format!("has no heads for layer {l}, which has attention");
            self.fields.error("attention.head_count_kv", message)
        })
    }

    /// Whether a rotary embedding leaves some channels of heads as they are.
    pub fn turns_in_part(&self, config: &ModelConfig) -> Result<bool> {
        let Some(dim) = self.fields.usize_opt("rope.dimension_count")? else { return Ok(false) };
        let mut attention = (0..config.layers.len()).map(|l| self.attention(config, l));
        let first = attention.find_map(Result::transpose).transpose()?;
        Ok(first.is_some_and(|c| dim != c.headdim))
    }

    /// The rotary embedding of heads of this size.
    pub fn rope(&self, headdim: usize) -> Result<Rope> {
        let fields = &self.fields;
        let dim = fields.usize_opt("rope.dimension_count")?.unwrap_or(headdim);
        let factor = fields.f64_or("rope.scaling.factor", 1.0)?;
        let kind = fields.str_opt("rope.scaling.type")?;
        let scaling = match kind.as_deref().unwrap_or("linear") {
            "none" => RopeScaling::None,
            "linear" if factor == 1.0 || factor == 0.0 => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor },
            "yarn" => self.yarn(factor)?,
            other => {
                let message = format!("is \"{other}\", expected none, linear or yarn");
                return Err(fields.error("rope.scaling.type", message));
            }
        };
        Ok(Rope { scaling, ..Rope::new(dim, fields.f64_or("rope.freq_base", 1e4)?) })
    }

    fn yarn(&self, factor: f64) -> Result<RopeScaling> {
        let fields = &self.fields;
        for field in
            ["rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"]
        {
            let value = fields.f64_or(field, 1.0)?;
            if value != 1.0 {
                return Err(fields.error(field, format!("is {value}, which is not supported")));
            }
        }
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: fields.f64_or("rope.scaling.yarn_beta_fast", 32.0)?,
            beta_slow: fields.f64_or("rope.scaling.yarn_beta_slow", 1.0)?,
            original_context: fields.usize("rope.scaling.original_context_length")? as f64,
            attention_factor: if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 },
            truncate: true,
        })
    }

    /// The multilayer perceptron of a layer whose projection up is `tensor`, of the kind of `like`.
    pub fn mlp(&self, l: usize, tensor: &str, like: &MlpConfig) -> Result<MlpConfig> {
        Ok(MlpConfig {
            d_hidden: self.rows(&format!("blk.{l}.{tensor}.weight"))?,
            bias: self.has(l, &format!("{tensor}.bias")),
            ..like.clone()
        })
    }

    /// The experts of a layer, of the kind of `like`; `None` if it has none.
    pub fn experts(&self, l: usize, like: &MlpConfig, router: RouterConfig) -> Result<Option<MoeConfig>> {
        if !self.has(l, "ffn_gate_inp.weight") {
            return Ok(None);
        }
        let shared = self.has(l, "ffn_up_shexp.weight").then(|| self.mlp(l, "ffn_up_shexp", like));
        let latent = format!("blk.{l}.ffn_latent_down.weight");
        let latent = (self.shapes)(&latent).map(|_| self.rows(&latent));
        Ok(Some(MoeConfig {
            experts: self.fields.usize("expert_count")?,
            top_k: self.fields.usize("expert_used_count")?,
            expert: self.mlp(l, "ffn_up_exps", like)?,
            stacked: false,
            router,
            shared: shared.transpose()?,
            d_latent: latent.transpose()?,
            latent_bias: self.has(l, "ffn_latent_down.bias"),
        }))
    }
}
