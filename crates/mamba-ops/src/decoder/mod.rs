//! One token of a whole stack of layers: [`Decoder`].
//!
//! Decoding a few sequences is bound by reading the weights once, and, operation by operation, by what stands between them. So whatever can
//! is done where a product ends, or where the next one begins, and nothing is allocated but the logits (and, by attention on the CPU, its result).
//!
//! On the CPU threads divide the outputs of each product; the one that has just written some of them goes on with the step of the convolution,
//! the step of the states with the gate, or the sum with the residual stream. A row gives the same bits alone as among others, on any number
//! of threads.
//!
//! On a GPU there are three launches for a block of Mamba-2, attention, an MLP or a short
//! convolution and four for one of Mamba-1, one or two more for norms where more than two sequences meet weights of 16 bits. From the second
//! token on they are launched as one CUDA graph, which
//! keys and values do not outgrow: where they lie, and how many there are, is read from GPU memory. On GPUs of compute capability 9.0 and
//! later each kernel also asks for its weights while the one before it still runs.
//!
//! Its twin is the same stack put together from [`norm`](crate::norm()), [`linear`](crate::linear()),
//! [`causal_conv1d_update`](crate::causal_conv1d_update), [`selective_state_update`](crate::selective_state_update()) and
//! [`attention`](crate::attention()), as `mamba-model` reads prompts. Between products activations are `f32`, but, on a GPU, for the inputs of products of more than two sequences
//! with weights of 16 bits, so results are closer to those of `f32` than where each operation rounds.

mod check;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod prepared;
mod stack;
mod states;

use candle_core::{Result, Tensor, bail};

pub use self::stack::{
    Attention, Conv, KeysValues, Layer, LowRank, Mamba1, Mamba2, Mixer, Mlp, MlpActivation, MlpLayout, Norm,
    Product, Rotary, Shared, ShortConv, Stack, State,
};

pub(crate) const OP: &str = "decoder";

/// The most sequences that a [`Decoder`] reads a token of at once.
pub const MAX_BATCH: usize = 64;

/// The same on a GPU where weights are `f32`, which tensor cores would round.
pub const MAX_BATCH_F32: usize = 8;

/// Tokens of a block of keys and values.
pub const BLOCK: usize = 256;

/// Reads one token of each of a few sequences through a [`Stack`], changing the states of its layers in place.
///
/// For each sequence and layer: `x ← x + Σ scale · mixer(norm(x))`, beginning with the embedding of its token; then
/// `logits = head · norm_f(x)`. There are no gradients. Weights are f32, f16 or bf16 as they are stored, and so are keys and values;
/// everything else is f32. Experts, learned first states and Mamba-1 with heads are not among what there is: see [`Mixer`].
///
/// On a GPU, after the first token whose states lie where those of the token before lay, all layers are one CUDA graph; of keys and values this
/// holds wherever they lie, and it is made anew each time the longest sequence has become twice as long. With the environment variable `MAMBA_CUDA_GRAPHS=0`, or where the driver does not capture, the kernels are launched one by one.
///
/// Source: the inference of Gu and Dao, *Mamba* (2023), §3.3 and Dao and Gu, *Transformers are SSMs* (2024), §7; mamba_ssm's
/// `Mamba.step` and `Mamba2.step`.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::NormKind;
/// use mamba_ops::decoder::{Decoder, Norm, Product, Stack};
///
/// let device = Device::Cpu;
/// let norm = Norm { kind: NormKind::Rms, weight: Tensor::ones(8, DType::F32, &device)?, bias: None, eps: 1e-5 };
/// let embedding = Tensor::randn(0f32, 1.0, (50, 8), &device)?;
/// let head = Product::new(embedding.clone());
/// let stack = Stack { embedding, embedding_scale: 1.0, layers: vec![], norm_f: norm, head };
/// if let Some(mut decoder) = Decoder::new(stack, 1)? {
///     let logits = decoder.step(&Tensor::new(&[3u32], &device)?, &[0], &[])?;
///     assert_eq!(logits.dims(), [1, 50]);
/// }
/// # Ok::<_, candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Decoder(Imp);

#[derive(Debug)]
enum Imp {
    Cpu(Box<cpu::Decoder>),
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::Decoder>),
}

impl Decoder {
    /// A decoder for batches of `batch` sequences, or none where the plain operations are what there is: more than [`MAX_BATCH`] sequences
    /// ([`MAX_BATCH_F32`] on a GPU if weights are `f32`), an odd dtype, weights that are trained or, on a GPU, an odd size.
    ///
    /// # Errors
    /// If weights do not fit one another, or the device is out of memory.
    pub fn new(stack: Stack, batch: usize) -> Result<Option<Self>> {
        #[cfg(feature = "cuda")]
        if stack.embedding.device().is_cuda() {
            return Ok(cuda::Decoder::new(stack, batch)?.map(|decoder| Self(Imp::Cuda(Box::new(decoder)))));
        }
        Ok(cpu::Decoder::new(&stack, batch)?.map(|decoder| Self(Imp::Cpu(Box::new(decoder)))))
    }

    /// Another decoder for as many sequences, whose weights are the same tensors: for states that go their own way.
    ///
    /// # Errors
    /// If the GPU is out of memory.
    pub fn fork(&self) -> Result<Self> {
        match &self.0 {
            Imp::Cpu(decoder) => Ok(Self(Imp::Cpu(Box::new(decoder.fork())))),
            #[cfg(feature = "cuda")]
            Imp::Cuda(decoder) => Ok(Self(Imp::Cuda(Box::new(decoder.fork()?)))),
        }
    }

    /// Reads a token of each sequence, `ids` `(batch)` where the weights are; the logits, `(batch, logits)` in the dtype of the weights.
    /// An id past the vocabulary gives NaN. `positions` are how many tokens each sequence has read before; `states` are
    /// of all mixers in order, that of a shared block's attention before those of its layer. Keys and values are written behind those
    /// that are there.
    ///
    /// # Errors
    /// If ids or states are not of the shapes that belong to the stack, or a kernel does not launch.
    pub fn step(&mut self, ids: &Tensor, positions: &[usize], states: &[State]) -> Result<Tensor> {
        match &mut self.0 {
            Imp::Cpu(decoder) => decoder.step(ids, positions, states),
            #[cfg(feature = "cuda")]
            Imp::Cuda(decoder) => decoder.step(ids, positions, states),
        }
    }
}

/// Checks a shape.
fn expect(name: &str, x: &Tensor, expected: &[usize]) -> Result<()> {
    if x.dims() != expected {
        bail!("{OP}: {name} has shape {:?}, expected {expected:?}", x.dims());
    }
    Ok(())
}
