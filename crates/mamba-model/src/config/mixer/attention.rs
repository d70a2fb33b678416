//! Attention and its rotary embedding.

use super::{finite, positive, require};
use crate::Result;

/// Sizes and options of softmax attention.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Heads of queries.
    pub nheads: usize,
    /// Heads of keys and values; each serves `nheads / nheads_kv` neighbouring heads of queries.
    pub nheads_kv: usize,
    /// Channels a head.
    pub headdim: usize,
    /// What scores are multiplied by before the softmax.
    pub softmax_scale: f64,
    /// How queries and keys are turned by their positions; without it positions are known from the other mixers alone.
    pub rope: Option<Rope>,
    /// How many keys, up to its own, a token sees; all if absent.
    pub window: Option<usize>,
    /// Added to the mean square in the RMSNorms of each head of queries and keys, if there are such norms.
    pub qk_norm_eps: Option<f64>,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the projection out has a bias.
    pub out_bias: bool,
    /// What the input is multiplied by.
    pub input_scale: f64,
    /// What keys are multiplied by.
    pub key_scale: f64,
    /// One matrix for queries, keys and values, with what state-spaces adds to them; three matrices if absent.
    pub packed: Option<PackedAttention>,
}

/// The block `MHA` of state-spaces: `[q | k | v | mlp]` from one projection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackedAttention {
    /// Width of the causal convolution over queries, keys and values, without a nonlinearity; none if 0.
    pub d_conv: usize,
    /// Width of a gated MLP beside the attention, `[up | gate]`; none if 0.
    pub d_mlp: usize,
}

/// A rotary embedding: pairs of channels are turned by an angle that grows with the position.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Channels of a head that turn, from the first.
    pub dim: usize,
    /// The pair `i` turns by `position / base^(2 i / dim)`.
    pub base: f64,
    /// Whether a pair are neighbours; else they are `dim / 2` apart.
    pub interleaved: bool,
    /// How angles are changed for texts longer than those of the training.
    pub scaling: RopeScaling,
}

/// How a rotary embedding is stretched.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// Every angle is divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// Slow angles are divided, fast ones stay, those between are mixed: that of Llama 3.
    Llama3 {
        /// What slow angles are divided by.
        factor: f64,
        /// Turns over the original context below which an angle is slow.
        low_freq_factor: f64,
        /// Turns over the original context above which an angle is fast.
        high_freq_factor: f64,
        /// The context of the training.
        original_context: f64,
    },
    /// The same with a linear ramp over pairs, and all multiplied by a factor: YaRN.
    Yarn {
        /// What slow angles are divided by.
        factor: f64,
        /// Turns over the original context above which an angle is fast.
        beta_fast: f64,
        /// Turns over the original context below which an angle is slow.
        beta_slow: f64,
        /// The context of the training.
        original_context: f64,
        /// What turned queries and keys are multiplied by.
        attention_factor: f64,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
    },
}

impl Rope {
    /// All of a head, in halves, not stretched.
    pub fn new(dim: usize, base: f64) -> Self {
        Self { dim, base, interleaved: false, scaling: RopeScaling::None }
    }
}

impl AttentionConfig {
    /// Without anything optional: a scale of `1 / √headdim`, no rotary embedding, no biases.
    pub fn new(nheads: usize, nheads_kv: usize, headdim: usize) -> Self {
        Self {
            nheads,
            nheads_kv,
            headdim,
            softmax_scale: (headdim.max(1) as f64).powf(-0.5),
            rope: None,
            window: None,
            qk_norm_eps: None,
            qkv_bias: false,
            out_bias: false,
            input_scale: 1.0,
            key_scale: 1.0,
            packed: None,
        }
    }

    /// Channels of queries, keys and values together.
    pub(crate) fn qkv_dim(&self) -> usize {
        (self.nheads + 2 * self.nheads_kv) * self.headdim
    }

    /// Width of the convolution over queries, keys and values; 0 if there is none.
    pub(crate) fn d_conv(&self) -> usize {
        self.packed.map_or(0, |packed| packed.d_conv)
    }

    pub(super) fn validate(&self) -> Result<()> {
        positive("nheads", self.nheads)?;
        positive("headdim", self.headdim)?;
        let (nheads, nheads_kv, headdim) = (self.nheads, self.nheads_kv, self.headdim);
        require(nheads_kv > 0 && nheads.is_multiple_of(nheads_kv), "nheads_kv", || {
            format!("is {nheads_kv}, expected a divisor of the {nheads} heads")
        })?;
        if let Some(window) = self.window {
            positive("window", window)?;
        }
        if let Some(Rope { dim, base, .. }) = self.rope {
            require(dim % 2 == 0 && dim <= headdim, "rope.dim", || {
                format!("is {dim}, expected an even number up to headdim {headdim}")
            })?;
            require(base > 0.0 && base.is_finite(), "rope.base", || {
                format!("is {base}, expected a positive number")
            })?;
        }
        let d_mlp = self.packed.map_or(0, |packed| packed.d_mlp);
        require(d_mlp.is_multiple_of(2), "d_mlp", || format!("is {d_mlp}, expected an even number"))?;
        finite("softmax_scale", self.softmax_scale)?;
        finite("input_scale", self.input_scale)?;
        finite("key_scale", self.key_scale)
    }
}
