//! What a decoder is made of: layers and their weights.

use candle_core::{Result, Tensor};

use crate::norm::NormKind;

/// A norm, and what it is learned with.
#[derive(Debug, Clone)]
pub struct Norm {
    /// Layer norm or RMSNorm.
    pub kind: NormKind,
    /// `(width)`.
    pub weight: Tensor,
    /// `(width)`.
    pub bias: Option<Tensor>,
    /// Added to the variance or mean square.
    pub eps: f64,
}

/// Matrices as checkpoints store them, whose outputs stand one after another: `y = (scale · x Wᵀ + bias) ⊙ scales`.
#[derive(Debug, Clone)]
pub struct Product {
    /// One to three of `(outputs, inputs)`.
    pub weights: Vec<Tensor>,
    /// `(outputs)` of all.
    pub bias: Option<Tensor>,
    /// What the input is multiplied by.
    pub scale: f64,
    /// What outputs are multiplied by, `(outputs)` of all.
    pub scales: Option<Tensor>,
}

impl Product {
    /// One matrix alone.
    pub fn new(weight: Tensor) -> Self {
        Self::of(vec![weight])
    }

    /// Several, one after another.
    pub fn of(weights: Vec<Tensor>) -> Self {
        Self { weights, bias: None, scale: 1.0, scales: None }
    }

    /// Of all matrices.
    pub(super) fn outputs(&self) -> Result<usize> {
        self.weights.iter().map(|weight| weight.dim(0)).sum()
    }

    pub(super) fn inputs(&self) -> Result<usize> {
        self.weights.first().map_or(Ok(0), |weight| weight.dim(1))
    }
}

/// A depthwise causal convolution.
#[derive(Debug, Clone)]
pub struct Conv {
    /// `(channels, width)`.
    pub weight: Tensor,
    /// `(channels)`.
    pub bias: Option<Tensor>,
    /// Whether there is silu behind it.
    pub silu: bool,
}

/// A block of Mamba: `in_proj` gives `[x | z]`, `x_proj` of the convolved `x` gives `[Δ | B | C]`.
#[derive(Debug, Clone)]
pub struct Mamba1 {
    /// To `2·d_inner`.
    pub in_proj: Product,
    /// Over `x`.
    pub conv: Conv,
    /// To `dt_rank + 2·d_state`, from `d_inner`.
    pub x_proj: Product,
    /// `eps` and the weights, if any, of RMSNorms of `Δ`, `B` and `C`.
    pub dt_bc_norms: Option<(f64, [Option<Tensor>; 3])>,
    /// `(d_inner, dt_rank)`.
    pub dt_proj: Tensor,
    /// `(d_inner)`, `f32`.
    pub dt_bias: Tensor,
    /// `(d_inner, d_state)`, `f32`, negative.
    pub a: Tensor,
    /// `(d_inner)`, `f32`.
    pub d: Tensor,
    /// From `d_inner`.
    pub out_proj: Product,
}

/// A block of Mamba-2: `in_proj` gives `[z | x | B | C | Δ]`.
#[derive(Debug, Clone)]
pub struct Mamba2 {
    /// To `2·d_inner + 2·ngroups·d_state + nheads`.
    pub in_proj: Product,
    /// Over `[x | B | C]`.
    pub conv: Conv,
    /// `(nheads)`, `f32`.
    pub dt_bias: Tensor,
    /// The bounds of `Δ`.
    pub dt_limit: (f64, f64),
    /// `(nheads)`, `f32`, negative.
    pub a: Tensor,
    /// `(nheads)` or `(d_inner)`, `f32`.
    pub d: Tensor,
    /// Groups of heads that share `B` and `C`, and of channels that the gated norm is of.
    pub ngroups: usize,
    /// Channels of a head.
    pub headdim: usize,
    /// States of a channel.
    pub d_state: usize,
    /// The gated RMSNorm before `out_proj`; without one, `y·silu(z)`.
    pub norm: Option<Norm>,
    /// `norm(y)·silu(z)` rather than `norm(y·silu(z))`.
    pub norm_before_gate: bool,
    /// From `d_inner`.
    pub out_proj: Product,
}

/// Softmax attention over all tokens read, or the last of them.
#[derive(Debug, Clone)]
pub struct Attention {
    /// To `[q | k | v]` and, behind it, the two halves `[up | gate]` of an MLP beside the attention, if there is one.
    pub qkv: Product,
    /// Over `[q | k | v]`.
    pub conv: Option<Conv>,
    /// Heads of queries.
    pub nheads: usize,
    /// Heads of keys and values, each for `nheads / nheads_kv` neighbouring heads of queries.
    pub nheads_kv: usize,
    /// Channels of a head.
    pub headdim: usize,
    /// What scores are multiplied by.
    pub softmax_scale: f64,
    /// What keys are multiplied by.
    pub key_scale: f64,
    /// How many keys, up to its own, a token sees; all if absent.
    pub window: Option<usize>,
    /// `eps` and the weights, `(headdim)`, of RMSNorms of each head of queries and of keys.
    pub qk_norms: Option<(f64, [Tensor; 2])>,
    /// How queries and keys are turned by their positions.
    pub rotary: Option<Rotary>,
    /// Channels of the MLP beside the attention, `up · silu(gate)`; 0 if there is none.
    pub mlp: usize,
    /// From `[attention | MLP]`.
    pub out_proj: Product,
}

impl Attention {
    /// Heads of queries, keys and values.
    pub(super) fn heads(&self) -> [usize; 3] {
        [self.nheads, self.nheads_kv, self.nheads_kv]
    }
}

/// A rotary embedding of the first channels of each head, in pairs.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// By what angle each pair turns from one position to the next, `(pairs)`, `f64`.
    pub frequencies: Tensor,
    /// Whether a pair are neighbours; else they are as far apart as there are pairs.
    pub interleaved: bool,
    /// What the result is multiplied by.
    pub factor: f64,
}

/// A multilayer perceptron: `down(f(scale · gate) · up)`, or `down(f(up))`.
#[derive(Debug, Clone)]
pub struct Mlp {
    /// To gate and up, or to up alone.
    pub up: Product,
    /// Which of them stands first.
    pub layout: MlpLayout,
    /// `f`.
    pub activation: MlpActivation,
    /// What the gate is multiplied by.
    pub gate_scale: f64,
    /// From the width between.
    pub down: Product,
}

/// What the first product of an [`Mlp`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpLayout {
    /// What the activation is of, and nothing else.
    Plain,
    /// `[gate | up]`.
    GateUp,
    /// `[up | gate]`.
    UpGate,
}

/// The nonlinearity of an [`Mlp`].
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

/// A gated short convolution: `out_proj(C · conv(B · x))` with `[B | C | x]` from `in_proj`.
#[derive(Debug, Clone)]
pub struct ShortConv {
    /// To three times the channels.
    pub in_proj: Product,
    /// Without silu.
    pub conv: Conv,
    /// From the channels.
    pub out_proj: Product,
}

/// What a layer adds to the residual stream.
#[derive(Debug, Clone)]
pub enum Mixer {
    /// A block of Mamba.
    Mamba1(Mamba1),
    /// A block of Mamba-2.
    Mamba2(Mamba2),
    /// Attention.
    Attention(Attention),
    /// A multilayer perceptron.
    Mlp(Mlp),
    /// A gated short convolution.
    ShortConv(ShortConv),
}

/// `x + Σ scale · mixer(norm(x))`; the norm may be of `x` and what a block gives that several layers share.
#[derive(Debug, Clone)]
pub struct Layer {
    /// What the norm reads besides `x`.
    pub shared: Option<Shared>,
    /// Over the residual stream.
    pub norm: Norm,
    /// What is added, one or two of them.
    pub mixers: Vec<(f64, Mixer)>,
}

/// A transformer block without residuals, `linear(mlp(norm2(attention(norm([stream | embedding])))))`.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Of `2·d_model` channels.
    pub norm: Norm,
    /// From `2·d_model` channels to `d_model`.
    pub attention: Attention,
    /// What this use of the block adds to queries, keys and values.
    pub qkv_adapters: Option<[LowRank; 3]>,
    /// Of `d_model` channels.
    pub norm2: Norm,
    /// Of `d_model` channels.
    pub mlp: Mlp,
    /// What this use of the block adds to the first product of the MLP.
    pub mlp_adapter: Option<LowRank>,
    /// Of this use of the block.
    pub linear: Tensor,
}

/// A matrix as a product of two narrow ones.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `(rank, inputs)`.
    pub down: Tensor,
    /// `(outputs, rank)`.
    pub up: Tensor,
}

/// A language model: embedding, layers, norm, head. Matrices and embedding share a dtype.
#[derive(Debug, Clone)]
pub struct Stack {
    /// `(vocabulary, d_model)`.
    pub embedding: Tensor,
    /// What embeddings are multiplied by.
    pub embedding_scale: f64,
    /// In order.
    pub layers: Vec<Layer>,
    /// Before the head.
    pub norm_f: Norm,
    /// To the logits.
    pub head: Product,
}

/// What a mixer remembers; what it does not have is absent.
#[derive(Debug, Clone, Default)]
pub struct State<'a> {
    /// The last inputs of the convolution, `(batch, channels, width - 1)`; changed in place, contiguous and `f32`.
    pub conv: Option<&'a Tensor>,
    /// `(batch, d_inner, d_state)` or `(batch, nheads, headdim, d_state)`; the same.
    pub ssm: Option<&'a Tensor>,
    /// Keys and values of each sequence.
    pub kv: Vec<KeysValues<'a>>,
}

/// Keys and values of a sequence, in blocks: all but the last are full, and the last has room for the new token.
#[derive(Debug, Clone, Default)]
pub struct KeysValues<'a> {
    /// How many tokens there are.
    pub len: usize,
    /// Keys and values, each `(1, BLOCK, nheads_kv, headdim)` with [`BLOCK`](super::BLOCK) tokens, contiguous and in the dtype of the weights.
    pub blocks: Vec<[&'a Tensor; 2]>,
}
