//! The mixers that a branch may hold, and their sizes.

mod attention;
mod feed_forward;
mod mamba;

pub use attention::{AttentionConfig, PackedAttention, Rope, RopeScaling};
pub use feed_forward::{MlpActivation, MlpConfig, MlpLayout, MoeConfig, RouterConfig, RouterScore};
pub use mamba::{DtBcNorm, GatedNorm, Mamba1Config, Mamba2Config};

use crate::{Error, Result};

/// One mixer: what maps a sequence to a sequence within a branch.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub enum MixerSpec {
    /// The selective scan block of Mamba.
    Mamba1(Mamba1Config),
    /// The state space dual block of Mamba-2.
    Mamba2(Mamba2Config),
    /// Causal softmax attention.
    Attention(AttentionConfig),
    /// A gated convolution over a few tokens.
    ShortConv(ShortConvConfig),
    /// A multilayer perceptron.
    Mlp(MlpConfig),
    /// Several multilayer perceptrons, of which each token takes a few.
    Moe(MoeConfig),
}

/// Sizes of the gated short convolution of LFM2: `out(C · conv(B · x))` with `[B | C | x] = in(x)`, without a nonlinearity.
#[derive(Debug, Clone, PartialEq)]
pub struct ShortConvConfig {
    /// Width of the causal convolution.
    pub d_conv: usize,
    /// Whether the convolution and the projections have biases.
    pub bias: bool,
}

impl MixerSpec {
    /// Checks what the shapes of tensors depend on.
    pub(crate) fn validate(&self) -> Result<()> {
        match self {
            Self::Mamba1(c) => c.validate(),
            Self::Mamba2(c) => c.validate(),
            Self::Attention(c) => c.validate(),
            Self::ShortConv(c) => positive("d_conv", c.d_conv),
            Self::Mlp(c) => c.validate(),
            Self::Moe(c) => c.validate(),
        }
    }
}

fn require(holds: bool, field: &str, message: impl FnOnce() -> String) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::Config { file: None, field: field.into(), message: message() }),
    }
}

fn positive(field: &str, value: usize) -> Result<()> {
    require(value > 0, field, || "is 0, expected at least 1".into())
}

/// A multiplier that means something.
fn finite(field: &str, value: f64) -> Result<()> {
    require(value.is_finite(), field, || format!("is {value}, expected a finite number"))
}
