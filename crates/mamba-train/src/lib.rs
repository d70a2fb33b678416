//! Training and fine-tuning of the models of [`mamba_model`].
//!
//! | | |
//! |---|---|
//! | [`TrainableModel`] | a model whose parameters, or some of them, are variables |
//! | [`LoraConfig`] | low-rank factors beside frozen weights, in PEFT's format on disk |
//! | [`Trainer`] | loss, gradients, clipping, optimizer, moving average, state on disk |
//! | [`AdamW`], [`Schedule`], [`Gradients`], [`Ema`] | its parts, each of use with any candle model |
//! | [`data`] | text files to shuffled batches, in bounded memory, resumable anywhere |
//! | [`parallel`] | one training on several GPUs or machines |
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::{DType, Device};
//! use mamba_model::{Model, config::{Mamba2Config, MixerSpec, ModelConfig}};
//! use mamba_train::{Schedule, TrainOptions, TrainableModel, Trainer, data::{Batching, Dataset, TokenWriter}};
//!
//! # let folder = tempfile::tempdir()?;
//! let mut writer = TokenWriter::create(folder.path().join("text.tokens"))?;
//! writer.push(&(0..1000).map(|i| i * i % 7).collect::<Vec<u32>>())?; // or data::encode, from text files
//! let (training, validation) = Dataset::split(Arc::new(writer.finish()?), 32, 0.1)?;
//!
//! let mixer = Mamba2Config { d_state: 8, headdim: 8, ..Mamba2Config::new(16) };
//! let config = ModelConfig::uniform(7, 16, 2, MixerSpec::Mamba2(mixer));
//! let start = Model::random(&config, 1, &Device::Cpu)?;
//! let schedule = Schedule { lr: 1e-2, warmup: 2, steps: 10, ..Schedule::default() };
//! let mut trainer = Trainer::new(
//!     TrainableModel::new(&start, DType::F32)?,
//!     TrainOptions { schedule, ..TrainOptions::default() },
//! )?;
//! let batching = Batching::Packed { tokens: 4 * 32 };
//! let before = trainer.evaluate(&validation, batching, 10)?;
//! let mut batches = training.shuffled(batching, 0)?;
//! while !trainer.is_finished() {
//!     trainer.step(&[batches.next_batch(&Device::Cpu)?])?;
//! }
//! assert!(trainer.evaluate(&validation, batching, 10)? < before);
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! # The same bits
//! On the CPU a training is a function of its data, options and seed, whatever the number of threads; one that was saved
//! and resumed gives the bits of one that was not interrupted. Parameters are kept and summed over in the order of their
//! names, and sums over threads are formed per fixed piece.
//!
//! # Precision
//! The model may compute in `bf16`. What the optimizer changes is in `f32`, and so are its moments, accumulated gradients, the
//! softmax of the loss, and what the state depends on exponentially (`A_log`, `D`, `dt_bias`).

mod adamw;
pub mod data;
mod ema;
mod error;
mod gradients;
mod lora;
mod loss;
pub mod parallel;
mod parameters;
mod patterns;
pub mod record;
mod schedule;
mod slices;
mod state;
mod trainable;
mod trainer;

pub use adamw::{AdamW, AdamWOptions, NO_WEIGHT_DECAY, ParameterGroup};
pub use ema::Ema;
pub use error::{Error, Result};
pub use gradients::Gradients;
pub use lora::{LoraConfig, load_adapter, save_adapter};
pub use loss::language_model_loss;
pub use parameters::{Parameter, Parameters};
pub use schedule::{Decay, Schedule};
pub use state::{latest, prune};
pub use trainable::TrainableModel;
pub use trainer::{StepReport, TrainOptions, Trainer};
