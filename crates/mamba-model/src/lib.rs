//! Mamba models on [candle](candle_core): blocks, configuration, inference cache, checkpoints.
//!
//! From a folder of weights to logits:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use mamba_model::{Model, checkpoint::LocalDir};
//!
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/mamba2-shakespeare");
//! let model = Model::from_pretrained(&LocalDir::new(folder)?, DType::F32, &Device::Cpu)?;
//! let mut cache = model.new_cache(1)?;
//!
//! // A prompt at once, then token by token. The cache is all that is remembered, and does not grow.
//! let prompt = Tensor::new(&[[50u32, 47, 45, 37]], &Device::Cpu)?;
//! let mut logits = model.prefill(&prompt, &mut cache)?;
//! for _ in 0..3 {
//!     let likeliest = logits.argmax(1)?;
//!     logits = model.step(&likeliest, &mut cache)?;
//! }
//! assert_eq!(cache.position(), 7);
//! assert_eq!(logits.dims(), [1, model.config().vocab_size]);
//! # Ok::<_, mamba_model::Error>(())
//! ```
//!
//! With `checkpoint::HubBuilder` in the place of [`LocalDir`](checkpoint::LocalDir), the files come from the Hugging Face Hub.
//!
//! # A family is data
//! A [model](config::ModelConfig) is a list of layers, a [layer](config::LayerSpec) a list of residual branches, a
//! [branch](config::BranchSpec) a norm and a sum of [mixers](config::MixerSpec). A [family](families::Family) says how its
//! published files spell that, and nothing else knows families.
//!
//! # How fast
//! On a CPU, set `CANDLE_BARRIER_POOL_SPIN_LIMIT=0` in the environment, or first of all in `main`, before any other thread: candle keeps a
//! pool of threads beside rayon's whose idle ones spin, and starve those that work. A library cannot set it for you.
//!
//! # Training
//! [`Model::new`] over a `VarMap` gives a model whose parameters are `Var`s; its logits are differentiable.
//! [`Initializer`] draws the initial values that the published code draws.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};
//! use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
//! use mamba_model::Model;
//!
//! let mixer = Mamba1Config { d_state: 4, ..Mamba1Config::new(16) };
//! let config = ModelConfig::uniform(12, 16, 2, MixerSpec::Mamba1(mixer));
//! let vars = VarMap::new();
//! for (name, value) in Model::random(&config, 1, &Device::Cpu)?.parameters() {
//!     vars.data().lock().unwrap().insert(name.clone(), Var::from_tensor(value)?);
//! }
//! let model = Model::new(&config, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
//!
//! let text = Tensor::new(&[[1u32, 5, 9, 2, 6, 1, 5, 9, 2, 6, 1, 5]], &Device::Cpu)?;
//! let (inputs, targets) = (text.narrow(1, 0, 11)?, text.narrow(1, 1, 11)?.squeeze(0)?);
//! let loss = || Ok::<_, mamba_model::Error>(cross_entropy(&model.forward(&inputs, None)?.squeeze(0)?, &targets)?);
//! let before = loss()?.to_scalar::<f32>()?;
//! let mut optimizer = AdamW::new(vars.all_vars(), ParamsAdamW { lr: 1e-2, ..Default::default() })?;
//! for _ in 0..20 {
//!     optimizer.backward_step(&loss()?)?;
//! }
//! assert!(loss()?.to_scalar::<f32>()? < 0.5 * before);
//! # Ok::<_, mamba_model::Error>(())
//! ```

mod adapter;
mod atomic_file;
mod batch;
mod cache;
pub mod checkpoint;
mod classifier;
pub mod config;
mod dropout;
pub mod error;
pub mod families;
mod fingerprint;
mod init;
mod layer;
mod linear;
mod mixers;
mod model;
mod params;
mod save;
mod save_gguf;
mod shared_block;

pub use atomic_file::{AtomicFile, write_atomically};
pub use batch::Batch;
pub use cache::InferenceCache;
pub use classifier::{Pooling, SequenceClassifier};
pub use error::{Error, Result};
pub use init::{InitConfig, Initializer};
pub use layer::Recompute;
pub use model::Model;
