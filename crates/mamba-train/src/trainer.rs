//! One optimizer step after another.

use std::sync::Arc;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::adamw::{AdamW, AdamWOptions};
use crate::data::{Batch, Batching, Dataset, Share};
use crate::ema::Ema;
use crate::error::require;
use crate::gradients::Gradients;
use crate::loss::language_model_loss;
use crate::parallel::{Alone, Collective};
use crate::schedule::Schedule;
use crate::trainable::TrainableModel;
use crate::{Error, Result};

/// Options of a [`Trainer`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// The learning rate of each step.
    pub schedule: Schedule,
    /// The optimizer.
    pub optimizer: AdamWOptions,
    /// Gradients with a norm above this are scaled down to it; 0 for no limit.
    pub clip_norm: f64,
    /// How much of the moving average of the parameters stays each step; none if absent.
    pub ema: Option<f64>,
}

impl Default for TrainOptions {
    /// The defaults of the parts, and a norm of at most 1.
    fn default() -> Self {
        let (schedule, optimizer) = (Schedule::default(), AdamWOptions::default());
        Self { schedule, optimizer, clip_norm: 1.0, ema: None }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct StepReport {
    /// Its number; the first is 1.
    pub step: usize,
    /// The mean over all predictions, in nats, before the step.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// The norm of the gradients before they were clipped.
    pub grad_norm: f64,
    /// Predictions.
    pub tokens: usize,
    /// Whether the parameters stayed as they were, since a gradient was not a number.
    pub skipped: bool,
}

/// Trains a language model.
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
/// use mamba_train::data::Batch;
/// use mamba_train::{Schedule, TrainOptions, TrainableModel, Trainer};
///
/// let mixer = Mamba1Config { d_state: 4, ..Mamba1Config::new(16) };
/// let config = ModelConfig::uniform(10, 16, 2, MixerSpec::Mamba1(mixer));
/// let model = TrainableModel::new(&Model::random(&config, 1, &Device::Cpu)?, DType::F32)?;
/// let schedule = Schedule { lr: 1e-2, warmup: 5, steps: 30, ..Schedule::default() };
/// let mut trainer = Trainer::new(model, TrainOptions { schedule, ..TrainOptions::default() })?;
/// let batch = Batch::padded(&[vec![1, 5, 9, 2, 6, 1, 5, 9, 2, 6, 1, 5]], &Device::Cpu)?;
/// let first = trainer.step(std::slice::from_ref(&batch))?.loss;
/// for _ in 1..30 {
///     trainer.step(std::slice::from_ref(&batch))?;
/// }
/// assert!(trainer.step(&[batch])?.loss < 0.5 * first);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Trainer {
    pub(crate) model: TrainableModel,
    pub(crate) optimizer: AdamW,
    pub(crate) ema: Option<Ema>,
    pub(crate) options: TrainOptions,
    pub(crate) step: usize,
    pub(crate) collective: Arc<dyn Collective>,
}

impl Trainer {
    /// A trainer before its first step. The process keeps from now on what memory it frees: see
    /// [`mamba_ops::keep_freed_memory`].
    ///
    /// # Errors
    /// If an option cannot be, there is nothing to train, or the device is out of memory.
    pub fn new(model: TrainableModel, options: TrainOptions) -> Result<Self> {
        options.schedule.check()?;
        let clip = options.clip_norm;
        require(clip >= 0.0, "clip_norm", || format!("is {clip}, expected at least 0"))?;
        if model.parameters().is_empty() {
            return Err(Error::State("no parameter is trained".into()));
        }
        mamba_ops::keep_freed_memory(model.model().device())?;
        let optimizer = AdamW::new(model.parameters(), options.optimizer.clone())?;
        let ema = options.ema.map(|decay| Ema::new(model.parameters(), decay)).transpose()?;
        Ok(Self { model, optimizer, ema, options, step: 0, collective: Arc::new(Alone) })
    }

    /// Trains together with other processes, each of which made its trainer alike and calls the same functions: steps are those
    /// of all batches together, and everything begins as it is in rank 0. See [`parallel`](crate::parallel).
    ///
    /// # Errors
    /// If they do not train the same, or one of them is gone.
    pub fn parallel(mut self, collective: Arc<dyn Collective>) -> Result<Self> {
        self.collective = collective;
        self.require_same_options()?;
        self.take_state_of_first()?;
        self.require_same_model()?;
        Ok(self)
    }

    /// The processes that train together; one [`Alone`] if nothing else was said.
    pub fn collective(&self) -> &dyn Collective {
        &*self.collective
    }

    /// The part of every batch that this process is to [read](crate::data::Batches::share).
    pub fn share(&self) -> Share {
        Share { rank: self.collective.rank(), of: self.collective.world_size() }
    }

    /// The model.
    pub fn model(&self) -> &TrainableModel {
        &self.model
    }

    /// The options.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Steps so far.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// Whether the schedule is at its end.
    pub fn is_finished(&self) -> bool {
        self.step >= self.options.schedule.steps
    }

    /// One step over one batch in several parts, whose gradients are added: the same as over all rows at once. Several
    /// processes each bring parts of their own, which may have nothing to predict, and add the gradients of all.
    ///
    /// # Errors
    /// If there is nothing to predict, a token is out of range, the device is out of memory, or another process is gone.
    pub fn step(&mut self, parts: &[Batch]) -> Result<StepReport> {
        let here: usize = parts.iter().map(|part| part.count).sum();
        let tokens = self.collective.sum(&[here as f64])?[0] as usize;
        if tokens == 0 {
            return Err(Error::Data("a batch without predictions".into()));
        }
        let (mut gradients, mut losses) = (Gradients::default(), vec![]);
        let (rank, ranks) = (self.collective.rank(), self.collective.world_size());
        for (i, part) in parts.iter().enumerate().filter(|(_, part)| part.count > 0) {
            // Masks of its own for each part of each process.
            self.model.model().seek_dropout(((self.step as u64) << 16) + (i * ranks + rank) as u64);
            let mean = (language_model_loss(self.model.model(), part)? / tokens as f64)?;
            gradients.add(Gradients::of(&mean, self.model.parameters())?)?;
            losses.push(mean.detach());
        }
        // Read at last: a GPU is waited for once.
        let mut loss = 0.0;
        for mean in losses {
            loss += mean.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        }
        // Before clipping, so that all processes clip, and skip, alike.
        let gradients_of_all = gradients.all_reduce(self.model.parameters(), &*self.collective)?;
        let (mut gradients, loss) = (gradients_of_all, self.collective.sum(&[loss])?[0]);
        let lr = self.options.schedule.at(self.step);
        let grad_norm = match self.options.clip_norm {
            0.0 => gradients.norm()?,
            limit => gradients.clip(limit)?,
        };
        let skipped = !(loss.is_finite() && grad_norm.is_finite());
        if !skipped {
            self.optimizer.step(&gradients, lr)?;
            if let Some(ema) = &mut self.ema {
                ema.update(self.model.parameters())?;
            }
        }
        self.step += 1;
        Ok(StepReport { step: self.step, loss, lr, grad_norm, tokens, skipped })
    }

    /// The mean loss over `data`, of the moving average if there is one, over its first `batches` batches at most. Several
    /// processes share the work, and all have the result.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate(&mut self, data: &Dataset, batching: Batching, batches: usize) -> Result<f64> {
        self.with_average(|trainer| {
            let model = trainer.model.view()?;
            let (mut sum, mut count) = (0.0, 0);
            for part in data.in_order_share(batching, trainer.share(), model.device())?.take(batches) {
                let part = part?;
                if part.count == 0 {
                    continue;
                }
                sum += language_model_loss(&model, &part)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                count += part.count;
            }
            let all = trainer.collective.sum(&[sum, count as f64])?;
            if all[1] == 0.0 {
                return Err(Error::Data("nothing to evaluate".into()));
            }
            Ok(all[0] / all[1])
        })
    }

    /// Lets `f` see the moving average in the place of the parameters, if there is one.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn with_average<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let Some(mut ema) = self.ema.take() else { return f(self) };
        ema.swap(self.model.parameters())?;
        let result = f(self);
        ema.swap(self.model.parameters())?;
        self.ema = Some(ema);
        result
    }
}
