//! One training on several processes, on the GPUs of one machine or of many, or on CPUs: data parallelism.
//!
//! Every process has the whole model and reads its [share](crate::data::Batches::share) of each batch. The gradients of all
//! shares are [added](crate::Gradients::all_reduce), so that all processes make the same optimizer step: that of one process
//! over the whole batch, but for the rounding of the sums. The order of the data belongs to the seed, not to the number of
//! processes, so a training may go on with more or fewer of them than it began with. (Dropout draws other masks then.)
//!
//! A process learns what it is from the environment ([`World::from_env`]), as `torchrun`, Slurm and Kubernetes set it, and
//! finds the others by [`connect`]. A [`Collective`] is what they do together:
//!
//! | | between | carries |
//! |---|---|---|
//! | [`Alone`] | one process | |
//! | [`Ring`] | any machines, over TCP | tensors on any device, through the CPU |
//! | `Nccl`, with the feature `cuda` | NVIDIA GPUs | tensors on a GPU; what is on the CPU goes over a ring |
//!
//! # Example
//! Two processes, here as threads, train on one text:
//! ```
//! use std::sync::Arc;
//! use candle_core::{DType, Device};
//! use mamba_model::{Model, config::{Mamba2Config, MixerSpec, ModelConfig}};
//! use mamba_train::{TrainOptions, TrainableModel, Trainer, data::{Batching, Dataset, TokenWriter}};
//! use mamba_train::parallel::{Collective, Ring};
//!
//! # let folder = tempfile::tempdir()?;
//! let mut writer = TokenWriter::create(folder.path().join("text.tokens"))?;
//! writer.push(&(0..400).map(|i| i * i % 7).collect::<Vec<u32>>())?;
//! let data = Dataset::new(Arc::new(writer.finish()?), 0..400, 16)?;
//! let mixer = Mamba2Config { d_state: 8, headdim: 8, ..Mamba2Config::new(16) };
//! let config = ModelConfig::uniform(7, 16, 1, MixerSpec::Mamba2(mixer));
//!
//! let train = |ring: Ring| -> mamba_train::Result<f64> {
//!     let model = TrainableModel::new(&Model::random(&config, 1, &Device::Cpu)?, DType::F32)?;
//!     let mut trainer = Trainer::new(model, TrainOptions::default())?.parallel(Arc::new(ring))?;
//!     let mut batches = data.shuffled(Batching::Packed { tokens: 64 }, 0)?.share(trainer.share());
//!     Ok(trainer.step(&[batches.next_batch(&Device::Cpu)?])?.loss)
//! };
//! let losses: Vec<f64> = std::thread::scope(|scope| {
//!     let ranks: Vec<_> = Ring::threads(2)?.into_iter().map(|ring| scope.spawn(|| train(ring))).collect();
//!     ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<mamba_train::Result<_>>()
//! })?;
//! assert_eq!(losses[0], losses[1]);
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! # Failure
//! A process that ends, or does not answer in time, makes the next call fail in all others, which say who it was; none waits
//! for ever. What was saved last is where the training goes on.

mod collective;
#[cfg(feature = "cuda")]
mod nccl;
mod reduce;
mod rendezvous;
mod ring;
mod same;
mod world;

use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;

use crate::{Error, Result};

pub use collective::{Alone, Collective, on_first};
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub use ring::Ring;
pub use world::World;

/// What tensors go over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// NCCL for a GPU, TCP for a CPU.
    #[default]
    Auto,
    /// NVIDIA's library; for GPUs.
    Nccl,
    /// TCP; also for GPUs, through the CPU.
    Tcp,
}

/// How long processes wait for each other if nothing else is said: while one of them writes a checkpoint, say.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// Finds the other processes of a training whose tensors are on `device`, and waits until all are there.
///
/// # Errors
/// If one does not come within `timeout`, or is another program; if NCCL is asked for and cannot be loaded or used.
pub fn connect(
    world: &World,
    backend: Backend,
    device: &Device,
    timeout: Duration,
) -> Result<Arc<dyn Collective>> {
    let ring = Ring::connect(world, timeout)?;
    let backend = match backend {
        Backend::Auto if device.is_cuda() => Backend::Nccl,
        Backend::Auto => Backend::Tcp,
        chosen => chosen,
    };
    ring.agree("the backend", &format!("{backend:?}"))?;
    match backend {
        Backend::Nccl => over_nccl(ring, device, timeout),
        _ => Ok(Arc::new(ring)),
    }
}

#[cfg(feature = "cuda")]
fn over_nccl(ring: Ring, device: &Device, timeout: Duration) -> Result<Arc<dyn Collective>> {
    Ok(Arc::new(Nccl::new(ring, device, timeout)?))
}

#[cfg(not(feature = "cuda"))]
fn over_nccl(_: Ring, _: &Device, _: Duration) -> Result<Arc<dyn Collective>> {
    Err(Error::Parallel("NCCL needs a program that was built with the feature `cuda`".into()))
}

/// An error of this process, which is `rank` of `world_size`.
fn failed(rank: usize, world_size: usize, message: impl std::fmt::Display) -> Error {
    Error::Parallel(format!("rank {rank} of {world_size}: {message}"))
}
