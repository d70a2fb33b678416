//! The mixers that a branch may hold, and their sizes.

use crate::{Error, Result};

/// One mixer: what maps a sequence to a sequence within a branch.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub enum MixerSpec {
    /// The selective scan block of Mamba.
    Mamba1(Mamba1Config),
    /// The state space dual block of Mamba-2.
    Mamba2(Mamba2Config),
    /// A gated multilayer perceptron.
    Mlp(MlpConfig),
}

/// Sizes and options of a Mamba-1 block.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba1Config {
    /// Channels of the scan, `expand · d_model`.
    pub d_inner: usize,
    /// States a channel.
    pub d_state: usize,
    /// Width of the causal convolution.
    pub d_conv: usize,
    /// Rank of the projection that gives the step size.
    pub dt_rank: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether the projections in and out have biases.
    pub proj_bias: bool,
}

/// Sizes and options of a Mamba-2 block.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba2Config {
    /// Width of the block, `expand · d_model`.
    pub d_inner: usize,
    /// Channels that go through the state space model; the rest of `d_inner` is a gated bypass.
    pub d_ssm: usize,
    /// States a channel.
    pub d_state: usize,
    /// Width of the causal convolution.
    pub d_conv: usize,
    /// Channels a head.
    pub headdim: usize,
    /// Groups of heads that share `B` and `C`.
    pub ngroups: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether the projections in and out have biases.
    pub proj_bias: bool,
    /// The gated RMSNorm before the projection out; without it the gate is applied alone.
    pub norm: Option<GatedNorm>,
    /// Whether the skip connection `D` has a value a channel rather than a head.
    pub d_has_headdim: bool,
    /// Bounds of the step size after its softplus.
    pub dt_limit: (f64, f64),
    /// Tokens that are computed at once; the result does not depend on it.
    pub chunk_size: usize,
}

/// The gated RMSNorm of a Mamba-2 block, over groups of `d_ssm / ngroups` channels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// `norm(x) · silu(z)` rather than `norm(x · silu(z))`.
    pub before_gate: bool,
}

/// Sizes of a gated multilayer perceptron, `fc2(y · silu(gate))` with `(y, gate) = fc1(x)`.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// Width of `y` and of `gate`.
    pub d_hidden: usize,
    /// Whether the projections have biases.
    pub bias: bool,
}

impl Mamba1Config {
    /// The published defaults for a width of `d_model`: expand 2, 16 states, convolution over 4 tokens.
    pub fn new(d_model: usize) -> Self {
        Self {
            d_inner: 2 * d_model,
            d_state: 16,
            d_conv: 4,
            dt_rank: d_model.div_ceil(16),
            conv_bias: true,
            proj_bias: false,
        }
    }
}

impl Mamba2Config {
    /// The published defaults for a width of `d_model`: expand 2, 128 states, heads of 64, one group.
    pub fn new(d_model: usize) -> Self {
        Self {
            d_inner: 2 * d_model,
            d_ssm: 2 * d_model,
            d_state: 128,
            d_conv: 4,
            headdim: 64,
            ngroups: 1,
            conv_bias: true,
            proj_bias: false,
            norm: Some(GatedNorm { eps: 1e-5, before_gate: false }),
            d_has_headdim: false,
            dt_limit: (0.0, f64::INFINITY),
            chunk_size: 256,
        }
    }

    /// Heads of the state space model.
    pub fn nheads(&self) -> usize {
        self.d_ssm / self.headdim.max(1)
    }

    /// Channels of the convolution: x, B and C.
    pub fn conv_dim(&self) -> usize {
        self.d_ssm + 2 * self.ngroups * self.d_state
    }

    /// Channels of the gated bypass.
    pub(crate) fn d_bypass(&self) -> usize {
        self.d_inner.saturating_sub(self.d_ssm)
    }

    /// Width of the projection in: two halves of the bypass, z, then x, B, C, then dt.
    pub(crate) fn d_in_proj(&self) -> usize {
        2 * self.d_bypass() + self.d_ssm + self.conv_dim() + self.nheads()
    }
}

impl MixerSpec {
    pub(crate) fn validate(&self) -> Result<()> {
        let require = |holds: bool, field: &str, message: String| match holds {
            true => Ok(()),
            false => Err(Error::Config { file: None, field: field.into(), message }),
        };
        let positive = |field, value| require(value > 0, field, "is 0, expected at least 1".into());
        match self {
            Self::Mamba1(c) => {
                positive("d_inner", c.d_inner)?;
                positive("d_state", c.d_state)?;
                positive("d_conv", c.d_conv)?;
                positive("dt_rank", c.dt_rank)
            }
            Self::Mamba2(c) => {
                for (field, value) in [
                    ("d_ssm", c.d_ssm),
                    ("d_state", c.d_state),
                    ("d_conv", c.d_conv),
                    ("headdim", c.headdim),
                    ("ngroups", c.ngroups),
                    ("chunk_size", c.chunk_size),
                ] {
                    positive(field, value)?;
                }
                let (d_ssm, headdim) = (c.d_ssm, c.headdim);
                require(
                    d_ssm <= c.d_inner,
                    "d_ssm",
                    format!("is {d_ssm}, expected at most d_inner {}", c.d_inner),
                )?;
                require(
                    d_ssm % headdim == 0,
                    "headdim",
                    format!("is {headdim}, expected a divisor of d_ssm {d_ssm}"),
                )?;
                let (nheads, ngroups) = (c.nheads(), c.ngroups);
                let message = format!("is {ngroups}, expected a divisor of the {nheads} heads");
                require(nheads % ngroups == 0, "ngroups", message)?;
                let (low, high) = c.dt_limit;
                require(
                    low >= 0.0 && low <= high,
                    "dt_limit",
                    format!("is ({low}, {high}), expected 0 ≤ low ≤ high"),
                )
            }
            Self::Mlp(c) => positive("d_hidden", c.d_hidden),
        }
    }
}
