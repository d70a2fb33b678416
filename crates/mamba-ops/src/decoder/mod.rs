//! One token of a whole stack of layers on a GPU: [`Decoder`], with three (Mamba-2) or four (Mamba-1) launches a layer, two or three
//! more for norms and the convolution where more than two sequences meet weights of 16 bits, and nothing to allocate but the
//! logits.
//!
//! Decoding a few sequences is bound by reading the weights once, and, with one kernel an operation, by launching kernels.
//! So the decoder has kernels for what stands between two matrices too: a norm is computed where the product after it
//! needs it, the convolution where the product before it ends. From the second token on they are launched as one CUDA graph;
//! on GPUs of compute capability 9.0 and later each also asks for its weights while the one before it still runs.
//!
//! Its twin is the same stack put together from [`norm`](crate::norm()), [`linear`](crate::linear()),
//! [`causal_conv1d_update`](crate::causal_conv1d_update) and [`selective_state_update`](crate::selective_state_update()), as
//! `mamba-model` does on a CPU. Between kernels activations are `f32`, but for the inputs of products of more than two sequences
//! with weights of 16 bits, so results are closer to those of `f32` than where each operation rounds.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{Result, Tensor, bail};

use crate::norm::NormKind;

pub(crate) const OP: &str = "decoder";

/// The most sequences that a [`Decoder`] reads a token of at once.
pub const MAX_BATCH: usize = 64;

/// The same where weights are `f32`, which tensor cores would round.
pub const MAX_BATCH_F32: usize = 8;

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

/// A matrix as checkpoints store it, `y = x Wᵀ + bias`.
#[derive(Debug, Clone)]
pub struct Product {
    /// `(outputs, inputs)`.
    pub weight: Tensor,
    /// `(outputs)`.
    pub bias: Option<Tensor>,
}

/// A depthwise causal convolution, with silu behind it.
#[derive(Debug, Clone)]
pub struct Conv {
    /// `(channels, width)`.
    pub weight: Tensor,
    /// `(channels)`.
    pub bias: Option<Tensor>,
}

/// A block of Mamba: `in_proj` gives `[x | z]`, `x_proj` of the convolved `x` gives `[Δ | B | C]`.
#[derive(Debug, Clone)]
pub struct Mamba1 {
    /// `(2·d_inner, d_model)`.
    pub in_proj: Product,
    /// Over `x`.
    pub conv: Conv,
    /// `(dt_rank + 2·d_state, d_inner)`.
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
    /// `(d_model, d_inner)`.
    pub out_proj: Product,
}

/// A block of Mamba-2: `in_proj` gives `[z | x | B | C | Δ]`.
#[derive(Debug, Clone)]
pub struct Mamba2 {
    /// `(2·d_inner + 2·ngroups·d_state + nheads, d_model)`.
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
    /// `(d_model, d_inner)`.
    pub out_proj: Product,
}

/// What a layer adds to the residual stream.
#[derive(Debug, Clone)]
pub enum Mixer {
    /// A block of Mamba.
    Mamba1(Mamba1),
    /// A block of Mamba-2.
    Mamba2(Mamba2),
}

/// `x + mixer(norm(x))`.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Over the residual stream.
    pub norm: Norm,
    /// What is added.
    pub mixer: Mixer,
}

/// A language model: embedding, layers, norm, head. Matrices and embedding share a dtype.
#[derive(Debug, Clone)]
pub struct Stack {
    /// `(vocabulary, d_model)`.
    pub embedding: Tensor,
    /// In order.
    pub layers: Vec<Layer>,
    /// Before the head.
    pub norm_f: Norm,
    /// `(logits, d_model)`.
    pub head: Tensor,
}

/// What a layer remembers, changed in place: contiguous and `f32`.
#[derive(Debug, Clone, Copy)]
pub struct State<'a> {
    /// The last inputs of the convolution, `(batch, channels, width - 1)`.
    pub conv: &'a Tensor,
    /// `(batch, d_inner, d_state)` or `(batch, nheads, headdim, d_state)`.
    pub ssm: &'a Tensor,
}

/// Reads one token of each of a few sequences through a [`Stack`] on a GPU, changing the states of its layers in place.
///
/// For each sequence and layer: `x ← x + mixer(norm(x))`, beginning with the embedding of its token; then
/// `logits = head · norm_f(x)`. There are no gradients. Weights are f32, f16 or bf16 as they are stored; everything else is f32.
///
/// After the first token whose states lie where those of the token before lay, all layers are one CUDA graph. With the
/// environment variable `MAMBA_CUDA_GRAPHS=0`, or where the driver does not capture, the kernels are launched one by one.
///
/// Source: the inference of Gu and Dao, *Mamba* (2023), §3.3 and Dao and Gu, *Transformers are SSMs* (2024), §7; mamba_ssm's
/// `Mamba.step` and `Mamba2.step`.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::NormKind;
/// use mamba_ops::decoder::{Decoder, Norm, Stack};
///
/// let device = Device::cuda_if_available(0)?;
/// let norm = Norm { kind: NormKind::Rms, weight: Tensor::ones(8, DType::F32, &device)?, bias: None, eps: 1e-5 };
/// let embedding = Tensor::randn(0f32, 1.0, (50, 8), &device)?;
/// let stack = Stack { head: embedding.clone(), embedding, layers: vec![], norm_f: norm };
/// match Decoder::new(stack, 1)? {
///     Some(mut decoder) => {
///         let logits = decoder.step(&Tensor::new(&[3u32], &device)?, &[])?;
///         assert_eq!(logits.dims(), [1, 50]);
///     }
///     None => println!("the plain operations are for this device"),
/// }
/// # Ok::<_, candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Decoder(imp::Decoder);

#[cfg(feature = "cuda")]
use cuda as imp;

#[cfg(not(feature = "cuda"))]
mod imp {
    /// Without the feature there is none.
    #[derive(Debug)]
    pub(super) enum Decoder {}
}

impl Decoder {
    /// A decoder for batches of `batch` sequences, or none where the plain operations are what there is: not on a GPU, built
    /// without the feature `cuda`, more than [`MAX_BATCH`] sequences ([`MAX_BATCH_F32`] if weights are `f32`), an odd size or dtype, or weights that are trained.
    ///
    /// # Errors
    /// If weights do not fit one another, or the GPU is out of memory.
    pub fn new(stack: Stack, batch: usize) -> Result<Option<Self>> {
        #[cfg(feature = "cuda")]
        return Ok(cuda::Decoder::new(stack, batch)?.map(Self));
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (stack, batch);
            Ok(None)
        }
    }

    /// Another decoder for as many sequences, whose weights are the same tensors: for states that go their own way.
    ///
    /// # Errors
    /// If the GPU is out of memory.
    pub fn fork(&self) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return self.0.fork().map(Self);
        #[cfg(not(feature = "cuda"))]
        match self.0 {}
    }

    /// Reads a token of each sequence, `ids` `(batch)` on the GPU; the logits, `(batch, logits)` in the dtype of the weights.
    /// An id past the vocabulary gives NaN.
    ///
    /// # Errors
    /// If ids or states are not of the shapes that belong to the stack, or a kernel does not launch.
    pub fn step(&mut self, ids: &Tensor, states: &[State]) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        return self.0.step(ids, states);
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (ids, states);
            match self.0 {}
        }
    }
}

/// Checks a shape.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn expect(name: &str, x: &Tensor, expected: &[usize]) -> Result<()> {
    if x.dims() != expected {
        bail!("{OP}: {name} has shape {:?}, expected {expected:?}", x.dims());
    }
    Ok(())
}
