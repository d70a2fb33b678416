//! Ops of state space models for [candle](candle_core), forward and backward.
//!
//! | op | what it computes |
//! |---|---|
//! | [`causal_conv1d`](fn@causal_conv1d) | a depthwise convolution over the last few tokens, with SiLU |
//! | [`selective_scan`](fn@selective_scan) | the recurrence of Mamba: `h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t h_t + D u_t` |
//! | [`ssd_chunk_scan`] | that of Mamba-2, one decay a head, by chunks of matrix products |
//! | [`norm`](fn@norm) | RMSNorm and layer norm with the residual stream, a gate and groups, in one pass |
//! | [`linear`](fn@linear) | the product with a weight matrix as checkpoints store it, at the speed of memory for few rows |
//! | [`embedding`](fn@embedding) | the rows of a table, with gradients added up in one order |
//! | [`dropout`](fn@dropout) | elements left out at random, by a mask that is drawn again instead of kept |
//! | [`linear_cross_entropy`](fn@linear_cross_entropy) | the loss of a language model from its hidden states, without the logits of all tokens |
//! | [`attention`](fn@attention) | softmax attention over keys and values in blocks, never holding a matrix of scores |
//! | [`causal_conv1d_update`], [`selective_state_update`](fn@selective_state_update) | one decoding step, changing its state in place |
//! | [`argmax`], [`sample`](fn@sample) | the likeliest token of logits, or one drawn with temperature, top-k, top-p and min-p |
//! | [`mamba1_inner`], [`mamba2_split_conv1d_scan`] | a block between its projections, which keeps only its inputs for `backward()` |
//! | [`checkpoint()`] | the same for any function, a layer of a model for one |
//!
//! An op takes one struct with named fields, since ten tensors in a row are easily swapped; options are set by struct
//! update from its `new`:
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use mamba_ops::{SequenceLayout, SelectiveScan, selective_scan};
//! # fn main() -> candle_core::Result<()> {
//! let (batch, seqlen, dim, d_state) = (1, 12, 8, 4);
//! let u = Var::randn(0f32, 1.0, (batch, seqlen, dim), &Device::Cpu)?;
//! let delta = Tensor::rand(0f32, 0.1, (batch, seqlen, dim), &Device::Cpu)?;
//! let a = Tensor::rand(-4f32, -1.0, (dim, d_state), &Device::Cpu)?;
//! let b = Tensor::randn(0f32, 1.0, (batch, seqlen, d_state), &Device::Cpu)?;
//! let c = Tensor::randn(0f32, 1.0, (batch, seqlen, d_state), &Device::Cpu)?;
//! let output = selective_scan(&SelectiveScan {
//!     delta_softplus: true,
//!     layout: SequenceLayout::ChannelsLast,
//!     ..SelectiveScan::new(&u, &delta, &a, &b, &c)
//! })?;
//! // Gradients flow through both outputs, as in any candle graph.
//! let loss = (output.y.sqr()?.mean_all()? + output.final_state.sqr()?.mean_all()?)?;
//! assert!(loss.backward()?.get(&u).is_some());
//! # Ok(()) }
//! ```
//!
//! # The alphabet
//! Shapes are written with these names everywhere, and checked by them:
//!
//! | name | also | meaning |
//! |---|---|---|
//! | `batch` | b | sequences |
//! | `seqlen` | l | tokens of a sequence |
//! | `d_model` | | width of the residual stream |
//! | `dim` | d, `d_inner` | channels of the scan or convolution |
//! | `d_state` | n | states a channel |
//! | `width` | `d_conv` | tokens that the convolution sees |
//! | `nheads`, `headdim` | h, p | heads of Mamba-2, channels a head |
//! | `ngroups` | g | groups of channels or heads that share `B` and `C` |
//! | `chunk_size` | c | tokens that Mamba-2 computes at once |
//!
//! # What holds for every op
//! - Activations are f32, f16 or bf16; arithmetic and states are f32. In f64, and where there are no kernels of ours, an op
//!   runs its reference: plain tensor operations, right and slow.
//! - With the feature `cuda`, tensors on a GPU go to kernels for it, embedded as machine code; the README says which ops have
//!   them. An op enqueues its kernels and never waits, so that a CUDA graph can capture it.
//! - The gradient of every input exists, through every output. An op without a backward refuses inputs that track.
//! - A state that comes out may go in again: a sequence can be cut anywhere.
//! - Sequences of different lengths may share a batch: [`Packing`] says where each of them lies. Decoding steps may take
//!   their states from a pool: [`StateIndices`] says which.
//! - The same inputs give the same bits, whatever the number of threads. [`simd::Isa`] says which instructions run.
//! - Inputs may be strided. Wrong ones are errors that name op, argument, what came and what was expected.
//!
//! A new op follows the others: see `CONTRIBUTING.md`; [`autograd::FusedFn`] is what it implements.

mod argmax;
mod args;
pub mod attention;
pub mod autograd;
pub mod causal_conv1d;
mod checkpoint;
pub mod decoder;
#[cfg(feature = "cuda")]
mod device;
pub mod dropout;
pub mod embedding;
mod host;
mod layout;
pub mod linear;
pub mod linear_cross_entropy;
mod mamba1_inner;
mod mamba2_split_conv1d_scan;
mod memory_pool;
pub mod norm;
pub mod optimizer;
mod packing;
mod part;
mod projection;
mod reference;
pub mod sample;
pub mod selective_scan;
pub mod selective_state_update;
pub mod simd;
pub mod ssd;
mod state_indices;

pub use argmax::argmax;
pub use attention::{Attention, attention};
pub use causal_conv1d::{
    CausalConv1d, CausalConv1dOutput, CausalConv1dUpdate, causal_conv1d, causal_conv1d_update,
};
pub use checkpoint::checkpoint;
pub use dropout::{Dropout, dropout};
pub use embedding::{Embedding, embedding};
pub use layout::{Activation, SequenceLayout};
pub use linear::{Linear, linear};
pub use linear_cross_entropy::{LinearCrossEntropy, linear_cross_entropy};
pub use mamba1_inner::{Mamba1Inner, Mamba1InnerOutput, mamba1_inner};
pub use mamba2_split_conv1d_scan::{
    GatedRmsNorm, Mamba2SplitConv1dScan, Mamba2SplitConv1dScanOutput, mamba2_split_conv1d_scan,
};
pub use memory_pool::keep_freed_memory;
pub use norm::{Norm, NormKind, NormOutput, norm};
pub use optimizer::{AdamWUpdate, adamw_update, sum_of_squares};
pub use packing::{PackedSequence, Packing};
pub use sample::{Draw, NO_TOKEN, Sample, sample};
pub use selective_scan::{SelectiveScan, SelectiveScanOutput, selective_scan};
pub use selective_state_update::{SelectiveStateUpdate, selective_state_update};
pub use ssd::{SsdChunkScan, SsdChunkScanOutput, ssd_chunk_scan};
pub use state_indices::StateIndices;
