//! What a model is made of, as data: a list of layers, each a list of residual branches, each a sum of mixers.

mod json;
mod mixer;

use std::path::Path;

pub use json::Fields;
pub use mamba_ops::NormKind;
pub use mixer::{
    AttentionConfig, DtBcNorm, GatedNorm, Mamba1Config, Mamba2Config, MixerSpec, MlpActivation, MlpConfig,
    MlpLayout, MoeConfig, PackedAttention, Rope, RopeScaling, RouterConfig, RouterScore, ShortConvConfig,
};

use crate::{Error, Result};

/// A whole model.
///
/// # Example
/// ```
/// use mamba_model::config::{Mamba2Config, MixerSpec, ModelConfig};
/// let mixer = MixerSpec::Mamba2(Mamba2Config::new(64));
/// let config = ModelConfig::uniform(100, 64, 4, mixer);
/// assert_eq!(config.layers.len(), 4);
/// config.validate()?;
/// # Ok::<_, mamba_model::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Rows of the embedding and of the head: `vocab_size` rounded up. The additional ones are never given out.
    pub padded_vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// The layers, from the embedding to the head.
    pub layers: Vec<LayerSpec>,
    /// The kind of norm before each branch and before the head.
    pub norm: NormKind,
    /// Added to the variance in those norms.
    pub norm_eps: f64,
    /// Whether the residual stream stays `f32` in a model of another dtype.
    pub residual_in_f32: bool,
    /// Whether there is a head: a model without one gives hidden states and no logits.
    pub has_head: bool,
    /// Whether the head is the embedding.
    pub tie_embeddings: bool,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// What embeddings are multiplied by.
    pub embedding_scale: f64,
    /// What logits are multiplied by.
    pub logits_scale: f64,
    /// Blocks that several layers use, as in Zamba; most models have none.
    pub shared_blocks: Vec<SharedBlockSpec>,
}

/// One layer: its branches, one after another.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// The shared block whose output, through a projection of this layer, is added to what the norm of the first branch
    /// reads, though not to the residual stream.
    pub shared: Option<SharedBlockUse>,
    /// Each adds its output to the residual stream.
    pub branches: Vec<BranchSpec>,
}

/// A residual branch: `x + Σ scale · mixer(norm(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct BranchSpec {
    /// All read the same normalised input; their outputs are multiplied by these scales and added.
    pub mixers: Vec<(f64, MixerSpec)>,
}

/// A transformer block without residuals: `mlp(norm(attention(norm([stream | embedding]))))`.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedBlockSpec {
    /// Reads `2 · d_model`, gives `d_model`.
    pub attention: AttentionConfig,
    /// Reads and gives `d_model`.
    pub mlp: MlpConfig,
    /// Rank of the adapters that each use of the block adds to its queries, keys and values; none if absent.
    pub attention_adapter_rank: Option<usize>,
    /// Rank of the adapter that each use of the block adds to the matrix `[gate | up]`; none if absent.
    pub mlp_adapter_rank: Option<usize>,
}

/// A use of a shared block by a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedBlockUse {
    /// Which of [`ModelConfig::shared_blocks`].
    pub block: usize,
    /// Which adapters: the number of such layers before this one.
    pub adapter: usize,
}

impl LayerSpec {
    /// A layer whose branches hold one mixer each.
    pub fn new(mixers: impl IntoIterator<Item = MixerSpec>) -> Self {
        let branches = mixers.into_iter().map(|mixer| BranchSpec { mixers: vec![(1.0, mixer)] });
        Self { shared: None, branches: branches.collect() }
    }

    /// The same with every output multiplied.
    pub fn scaled(mut self, scale: f64) -> Self {
        for (factor, _) in self.branches.iter_mut().flat_map(|branch| &mut branch.mixers) {
            *factor *= scale;
        }
        self
    }
}

impl ModelConfig {
    /// A model of `n_layer` equal layers with one mixer each, with the published defaults: RMSNorm with eps 1e-5,
    /// residual stream in `f32`, a head that is the embedding.
    pub fn uniform(vocab_size: usize, d_model: usize, n_layer: usize, mixer: MixerSpec) -> Self {
        Self::of_layers(vocab_size, d_model, vec![LayerSpec::new([mixer]); n_layer])
    }

    /// A model of any layers, with the same defaults.
    pub fn of_layers(vocab_size: usize, d_model: usize, layers: impl IntoIterator<Item = LayerSpec>) -> Self {
        Self {
            vocab_size,
            padded_vocab_size: vocab_size,
            d_model,
            layers: layers.into_iter().collect(),
            norm: NormKind::Rms,
            norm_eps: 1e-5,
            residual_in_f32: true,
            has_head: true,
            tie_embeddings: true,
            eos_token_ids: vec![],
            embedding_scale: 1.0,
            logits_scale: 1.0,
            shared_blocks: vec![],
        }
    }

    /// Reads a `config.json` of any family that this crate knows.
    ///
    /// # Errors
    /// If the file cannot be read, is not JSON, lacks a field or has one that cannot be, or names an unknown
    /// `model_type`; the error names file and field.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Ok(crate::families::parse(&text, Some(path))?.0)
    }

    /// The same from the text of a `config.json`.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    ///
    /// # Example
    /// ```
    /// use mamba_model::config::ModelConfig;
    /// let config = ModelConfig::from_json(
    ///     r#"{"model_type": "mamba2", "hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16,
    ///         "n_groups": 1, "num_hidden_layers": 2, "vocab_size": 100, "time_step_limit": [0.0, Infinity]}"#,
    /// )?;
    /// assert_eq!((config.d_model, config.layers.len()), (64, 2));
    /// let error = ModelConfig::from_json(r#"{"model_type": "mamba2"}"#).unwrap_err();
    /// assert_eq!(error.to_string(), "config: `hidden_size` is missing");
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn from_json(text: &str) -> Result<Self> {
        Ok(crate::families::parse(text, None)?.0)
    }

    /// Checks what the shapes of tensors depend on.
    ///
    /// # Errors
    /// Names the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        let bad = |field: &str, message: String| Error::Config { file: None, field: field.into(), message };
        let positive = |field: &str, value: usize| match value {
            0 => Err(bad(field, "is 0, expected at least 1".into())),
            _ => Ok(()),
        };
        positive("vocab_size", self.vocab_size)?;
        positive("d_model", self.d_model)?;
        if self.padded_vocab_size < self.vocab_size {
            let message =
                format!("is {}, expected at least vocab_size {}", self.padded_vocab_size, self.vocab_size);
            return Err(bad("padded_vocab_size", message));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(bad("norm_eps", format!("is {}, expected a finite number from 0", self.norm_eps)));
        }
        for (field, scale) in [("embedding_scale", self.embedding_scale), ("logits_scale", self.logits_scale)]
        {
            if !scale.is_finite() {
                return Err(bad(field, format!("is {scale}, expected a finite number")));
            }
        }
        for block in &self.shared_blocks {
            MixerSpec::Attention(block.attention.clone()).validate()?;
            MixerSpec::Mlp(block.mlp.clone()).validate()?;
            if block.mlp_adapter_rank.is_some() && block.mlp.layout != MlpLayout::GateUp {
                return Err(bad(
                    "mlp_adapter_rank",
                    "is given for an MLP without a matrix [gate | up]".into(),
                ));
            }
            if block.attention_adapter_rank.is_some() && block.attention.packed.is_some() {
                return Err(bad("attention_adapter_rank", "is given for packed projections".into()));
            }
        }
        for layer in &self.layers {
            let count = self.shared_blocks.len();
            if let Some(SharedBlockUse { block, .. }) = layer.shared.filter(|shared| shared.block >= count) {
                return Err(bad("shared", format!("is block {block}, expected one of {count}")));
            }
            if layer.shared.is_some() && layer.branches.is_empty() {
                return Err(bad("shared", "is given for a layer without branches".into()));
            }
        }
        self.mixers().try_for_each(MixerSpec::validate)
    }

    /// The mixers of all branches, without shared blocks.
    pub(crate) fn mixers(&self) -> impl Iterator<Item = &MixerSpec> {
        self.layers
            .iter()
            .flat_map(|layer| &layer.branches)
            .flat_map(|branch| &branch.mixers)
            .map(|(_, mixer)| mixer)
    }
}
