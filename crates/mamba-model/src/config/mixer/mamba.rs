//! The state space blocks.

use super::{finite, positive, require};
use crate::Result;

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
    /// RMSNorms of dt, B and C before they are used, as in FalconMamba and Jamba.
    pub dt_bc_norm: Option<DtBcNorm>,
    /// Heads with projections to dt, B and C of their own, and `x` and `z` channel by channel in turn, as in Zamba; the
    /// plain block if absent.
    pub nheads: Option<usize>,
}

/// The RMSNorms of dt (before its projection), B and C.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DtBcNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// Whether they have weights.
    pub weights: bool,
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
    /// Whether the projection in has a bias.
    pub in_bias: bool,
    /// Whether the projection out has a bias.
    pub out_bias: bool,
    /// The gated RMSNorm before the projection out; without it the gate is applied alone.
    pub norm: Option<GatedNorm>,
    /// Whether the skip connection `D` has a value a channel rather than a head.
    pub d_has_headdim: bool,
    /// Bounds of the step size after its softplus.
    pub dt_limit: (f64, f64),
    /// Tokens that are computed at once; the result does not depend on it.
    pub chunk_size: usize,
    /// Whether the state before the first token is a parameter rather than 0.
    pub learnable_init_states: bool,
    /// What the input is multiplied by.
    pub input_scale: f64,
    /// What `z`, `x`, `B`, `C` and `dt` are multiplied by when they come out of the projection.
    pub zxbcdt_scales: [f64; 5],
}

/// The gated RMSNorm of a Mamba-2 block, over groups of `d_ssm / ngroups` channels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// `norm(x) · silu(z)` rather than `norm(x · silu(z))`.
    pub before_gate: bool,
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
            dt_bc_norm: None,
            nheads: None,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        positive("d_inner", self.d_inner)?;
        positive("d_state", self.d_state)?;
        positive("d_conv", self.d_conv)?;
        positive("dt_rank", self.dt_rank)?;
        let nheads = self.nheads.unwrap_or(1);
        require(nheads > 0 && self.d_inner.is_multiple_of(nheads), "nheads", || {
            format!("is {nheads}, expected a divisor of d_inner {}", self.d_inner)
        })?;
        require(nheads == 1 || self.dt_bc_norm.is_none(), "dt_bc_norm", || {
            "is given for a block of heads, which has none".into()
        })
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
            in_bias: false,
            out_bias: false,
            norm: Some(GatedNorm { eps: 1e-5, before_gate: false }),
            d_has_headdim: false,
            dt_limit: (0.0, f64::INFINITY),
            chunk_size: 256,
            learnable_init_states: false,
            input_scale: 1.0,
            zxbcdt_scales: [1.0; 5],
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

    pub(super) fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("d_ssm", self.d_ssm),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("headdim", self.headdim),
            ("ngroups", self.ngroups),
            ("chunk_size", self.chunk_size),
        ] {
            positive(field, value)?;
        }
        let (d_ssm, headdim) = (self.d_ssm, self.headdim);
        require(d_ssm <= self.d_inner, "d_ssm", || {
            format!("is {d_ssm}, expected at most d_inner {}", self.d_inner)
        })?;
        require(d_ssm % headdim == 0, "headdim", || {
            format!("is {headdim}, expected a divisor of d_ssm {d_ssm}")
        })?;
        let (nheads, ngroups) = (self.nheads(), self.ngroups);
        require(nheads % ngroups == 0, "ngroups", || {
            format!("is {ngroups}, expected a divisor of the {nheads} heads")
        })?;
        let (low, high) = self.dt_limit;
        require(low >= 0.0 && low <= high, "dt_limit", || {
            format!("is ({low}, {high}), expected 0 ≤ low ≤ high")
        })?;
        finite("input_scale", self.input_scale)?;
        self.zxbcdt_scales.iter().try_for_each(|scale| finite("zxbcdt_scales", *scale))
    }
}
