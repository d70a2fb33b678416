//! Vectors and labels of whole texts.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use crate::batch::{Batch, Sequences};
use crate::checkpoint::{Checkpoint, ModelSource};
use crate::config::ModelConfig;
use crate::linear::Linear;
use crate::params::Params;
use crate::{Error, Model, Result, families};

/// How one vector is made of those of all tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token, which has read all others: what transformers takes.
    #[default]
    Last,
    /// That of the first token.
    Cls,
    /// Their mean.
    Mean,
    /// The largest value of each channel.
    Max,
}

impl Model {
    /// One vector a text, `(batch, d_model)`, out of the [hidden states](Self::hidden_states) of its tokens.
    ///
    /// # Errors
    /// If a text is empty; otherwise as [`forward`](Self::forward).
    ///
    /// # Example
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use mamba_model::{Batch, Model, Pooling};
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    ///
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
    /// let model = Model::random(&config, 0, &Device::Cpu)?;
    /// let ids = Tensor::new(&[[3u32, 1, 4], [1, 5, 0]], &Device::Cpu)?;
    /// let vectors = model.pooled(Batch::right_padded(&ids, &[3, 2])?, Pooling::Mean)?;
    /// assert_eq!(vectors.dims(), [2, 16]);
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn pooled<'a>(&self, input: impl Into<Batch<'a>>, pooling: Pooling) -> Result<Tensor> {
        let (hidden, sequences) = self.hidden_states_of_tokens(&input.into(), None)?;
        pool(&hidden.flatten(0, 1)?, &sequences, pooling)
    }
}

/// `hidden`: `(tokens, d_model)`.
fn pool(hidden: &Tensor, sequences: &Sequences, pooling: Pooling) -> Result<Tensor> {
    let last = sequences.last_tokens()?;
    let rows = |rows: Vec<u32>| -> Result<Tensor> {
        let count = rows.len();
        Ok(hidden.index_select(&Tensor::from_vec(rows, count, hidden.device())?, 0)?)
    };
    let starts = last.iter().zip(&sequences.lengths).map(|(last, len)| last + 1 - *len as u32);
    let reduce = |f: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| -> Result<Tensor> {
        let row = |(start, len): (u32, &usize)| f(&hidden.narrow(0, start as usize, *len)?);
        let rows: Vec<Tensor> =
            starts.clone().zip(&sequences.lengths).map(row).collect::<candle_core::Result<_>>()?;
        Ok(Tensor::stack(&rows, 0)?)
    };
    match pooling {
        Pooling::Last => rows(last),
        Pooling::Cls => rows(starts.collect()),
        Pooling::Mean => reduce(&|x| x.mean(0)),
        Pooling::Max => reduce(&|x| x.max(0)),
    }
}

/// A model that gives each text a score a label.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use mamba_model::{Pooling, SequenceClassifier};
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let vars = VarMap::new();
/// let weights = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let classifier = SequenceClassifier::new(&config, 3, Pooling::Last, weights)?;
/// let ids = Tensor::new(&[[3u32, 1, 4], [1, 5, 9]], &Device::Cpu)?;
/// assert_eq!(classifier.forward(&ids)?.dims(), [2, 3]);
/// # Ok::<_, mamba_model::Error>(())
/// ```
#[derive(Debug)]
pub struct SequenceClassifier {
    model: Model,
    score: Linear,
    pooling: Pooling,
    parameters: Vec<(String, Tensor)>,
}

impl SequenceClassifier {
    /// From parameters under canonical names: those of the [`Model`], without a head, and `score.weight`,
    /// `(labels, d_model)`.
    ///
    /// # Errors
    /// If the configuration cannot be, or a parameter is missing or has another shape.
    pub fn new(config: &ModelConfig, labels: usize, pooling: Pooling, weights: VarBuilder) -> Result<Self> {
        let config = ModelConfig { has_head: false, ..config.clone() };
        let model = Model::new(&config, weights.clone())?;
        let params = Params::new(weights);
        let score = Linear::new(&params.at("score"), config.d_model, labels, false)?;
        let parameters = model.parameters().iter().cloned().chain(params.noted()).collect();
        Ok(Self { model, score, pooling, parameters })
    }

    /// Loads a `*ForSequenceClassification` checkpoint of transformers; the number of labels is that of the rows of
    /// `score.weight`.
    ///
    /// # Errors
    /// As [`Model::from_pretrained`].
    pub fn from_pretrained(
        source: &dyn ModelSource,
        pooling: Pooling,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let path = source
            .file("config.json")?
            .ok_or_else(|| Error::NoSuchFile { name: "config.json".into(), origin: source.describe() })?;
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let (config, family) = families::parse(&text, Some(&path))?;
        let checkpoint = Arc::new(Checkpoint::open(source)?);
        let name = family.names.resolve("score.weight", |name| checkpoint.contains(name));
        let labels = name.and_then(|name| Some(*checkpoint.info(&name)?.shape.first()?));
        let labels = labels.ok_or_else(|| Error::NoSuchTensor {
            origin: checkpoint.origin().to_string(),
            tensor: "`score.weight`".into(),
        })?;
        let classifier =
            Self::new(&config, labels, pooling, checkpoint.clone().var_builder(family.names, dtype, device))?;
        let coverage = checkpoint.coverage(&family.names);
        if !coverage.is_complete() {
            let message = format!("does not fit {}: {coverage}", path.display());
            return Err(Error::Checkpoint { file: checkpoint.origin().into(), message });
        }
        Ok(classifier)
    }

    /// Scores of each text, `(batch, labels)`, before any softmax. Differentiable if built from `Var`s.
    ///
    /// # Errors
    /// If a text is empty; otherwise as [`Model::forward`].
    pub fn forward<'a>(&self, input: impl Into<Batch<'a>>) -> Result<Tensor> {
        self.score.forward(&self.model.pooled(input, self.pooling)?)
    }

    /// The model below the scores.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Every parameter by canonical name.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }
}
