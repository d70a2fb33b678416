//! Multilayer perceptrons, alone and as experts.

use super::{finite, positive, require};
use crate::Result;

/// Sizes and options of a multilayer perceptron.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// Width between the projections.
    pub d_hidden: usize,
    /// What is between them.
    pub activation: MlpActivation,
    /// Whether there is a gate, and how the matrices are stored.
    pub layout: MlpLayout,
    /// Whether the projections have biases.
    pub bias: bool,
    /// What the gate is multiplied by before its activation.
    pub gate_scale: f64,
}

/// The nonlinearity of a multilayer perceptron.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpActivation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)`, with the error function.
    Gelu,
    /// The same by its approximation with the hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)²`.
    Relu2,
}

/// The matrices of a multilayer perceptron.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpLayout {
    /// `down(act(up(x)))`.
    Plain,
    /// `down(act(gate(x)) · up(x))`, three matrices.
    Gated,
    /// The same with one matrix for `[gate | up]`.
    GateUp,
    /// The same with one matrix for `[up | gate]`.
    UpGate,
}

/// Sizes and options of a mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// How many experts there are.
    pub experts: usize,
    /// How many each token takes.
    pub top_k: usize,
    /// One expert.
    pub expert: MlpConfig,
    /// Whether the matrices of all experts are stored as one tensor.
    pub stacked: bool,
    /// How a token finds its experts.
    pub router: RouterConfig,
    /// An expert that every token takes besides.
    pub shared: Option<MlpConfig>,
    /// Width to which the input of the experts is projected, and from which their output is; `d_model` if absent.
    pub d_latent: Option<usize>,
    /// Whether those projections have biases.
    pub latent_bias: bool,
}

/// How a token finds its experts, and how much each of them counts.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterConfig {
    /// What is made of the scores of a token.
    pub score: RouterScore,
    /// Whether a bias is added to the scores for the choice, though not for the weights.
    pub correction_bias: bool,
    /// Groups of neighbouring experts, of which the best are found first, by the sum of their two best experts.
    pub ngroups: usize,
    /// Groups that a token may choose from.
    pub top_groups: usize,
    /// Whether the weights of the chosen experts are made to add up to 1.
    pub normalize: bool,
    /// What weights are multiplied by at last.
    pub scale: f64,
}

/// What is made of the scores of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScore {
    /// A softmax over all experts.
    Softmax,
    /// A sigmoid for each expert.
    Sigmoid,
}

impl MlpConfig {
    /// Gated by SiLU, with three matrices and no biases.
    pub fn new(d_hidden: usize) -> Self {
        let (activation, layout) = (MlpActivation::Silu, MlpLayout::Gated);
        Self { d_hidden, activation, layout, bias: false, gate_scale: 1.0 }
    }

    pub(super) fn validate(&self) -> Result<()> {
        positive("d_hidden", self.d_hidden)?;
        finite("gate_scale", self.gate_scale)
    }
}

impl RouterConfig {
    /// A softmax over all experts whose chosen weights are left as they are.
    pub fn softmax() -> Self {
        Self {
            score: RouterScore::Softmax,
            correction_bias: false,
            ngroups: 1,
            top_groups: 1,
            normalize: false,
            scale: 1.0,
        }
    }
}

impl MoeConfig {
    pub(super) fn validate(&self) -> Result<()> {
        positive("experts", self.experts)?;
        self.expert.validate()?;
        self.shared.as_ref().map_or(Ok(()), MlpConfig::validate)?;
        if let Some(d_latent) = self.d_latent {
            positive("d_latent", d_latent)?;
        }
        let RouterConfig { ngroups, top_groups, scale, .. } = self.router;
        let experts = self.experts;
        require(ngroups > 0 && experts.is_multiple_of(ngroups), "router.ngroups", || {
            format!("is {ngroups}, expected a divisor of the {experts} experts")
        })?;
        require((1..=ngroups).contains(&top_groups), "router.top_groups", || {
            format!("is {top_groups}, expected 1 to ngroups {ngroups}")
        })?;
        let available = experts / ngroups * top_groups;
        require((1..=available).contains(&self.top_k), "top_k", || {
            format!("is {}, expected 1 to {available} experts", self.top_k)
        })?;
        let unsupported = self.stacked && (self.expert.bias || self.expert.layout == MlpLayout::Gated);
        require(!unsupported, "stacked", || {
            "is true for experts of three matrices or with biases, which are stored one by one".into()
        })?;
        finite("router.scale", scale)
    }
}
