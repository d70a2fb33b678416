//! The whole model: embedding, layers, norm, head.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use crate::cache::InferenceCache;
use crate::checkpoint::{Checkpoint, Form, Forms, ModelSource, NameMap};
use crate::config::ModelConfig;
use crate::init::Initializer;
use crate::layer::{Branch, Stream, StreamNorm};
use crate::linear::Linear;
use crate::params::Params;
use crate::{Error, Result, families};

/// A language model with its weights.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba2Config, MixerSpec, ModelConfig};
///
/// let mixer = Mamba2Config { d_state: 16, headdim: 8, ..Mamba2Config::new(16) };
/// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba2(mixer));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let ids = Tensor::new(&[[3u32, 1, 4, 1, 5]], &Device::Cpu)?;
/// let logits = model.forward(&ids, None)?;
/// assert_eq!(logits.dims(), [1, 5, 50]);
///
/// // The same, token by token.
/// let mut cache = model.new_cache(1)?;
/// model.prefill(&ids.narrow(1, 0, 4)?, &mut cache)?;
/// let last = model.step(&Tensor::new(&[5u32], &Device::Cpu)?, &mut cache)?;
/// let gap = (logits.narrow(1, 4, 1)?.squeeze(1)? - last)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(gap < 1e-4);
/// # Ok::<_, mamba_model::Error>(())
/// ```
pub struct Model {
    config: ModelConfig,
    embedding: Tensor,
    branches: Vec<Branch>,
    norm_f: StreamNorm,
    lm_head: Linear,
    parameters: Vec<(String, Tensor)>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .field("dtype", &self.dtype())
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Builds a model from parameters under canonical names, such as `layers.0.0.mamba2.in_proj.weight` (layer 0,
    /// branch 0); the model computes in the dtype of the builder. A `VarBuilder` over a `VarMap` gives a model to
    /// train.
    ///
    /// # Errors
    /// If the configuration cannot be, or a parameter is missing or has another shape.
    pub fn new(config: &ModelConfig, weights: VarBuilder) -> Result<Self> {
        config.validate()?;
        let params = Params::new(weights);
        let vocabulary = (config.padded_vocab_size, config.d_model);
        let embedding = params.at("embedding").get(vocabulary, "weight")?;
        let mut branches = vec![];
        for (l, layer) in config.layers.iter().enumerate() {
            for (b, branch) in layer.branches.iter().enumerate() {
                branches.push(Branch::new(branch, config, &params.at("layers").at(l).at(b))?);
            }
        }
        let norm_f = StreamNorm::new(config, &params.at("norm_f"))?;
        let head = match config.tie_embeddings {
            true => embedding.clone(),
            false => params.at("lm_head").get(vocabulary, "weight")?,
        };
        // Ids past the vocabulary exist for alignment only: they get no logits.
        let lm_head = Linear::from_weight(head.narrow(0, 0, config.vocab_size)?);
        let parameters = params.noted();
        Ok(Self { config: config.clone(), embedding, branches, norm_f, lm_head, parameters })
    }

    /// Loads a published checkpoint: `config.json` says which family it is of, and the weights are safetensors or
    /// torch files, whole or in shards; or a GGUF file is all there is, and its weights are dequantized one by one.
    /// `dtype` is that of the model; `A_log`, `D` and `dt_bias` are always `f32`.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the tensors are not exactly those of the configuration; the error names
    /// file and field or tensor.
    ///
    /// # Example
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use mamba_model::{Model, checkpoint::LocalDir};
    /// let model = Model::from_pretrained(&LocalDir::new("path/to/folder")?, DType::F32, &Device::Cpu)?;
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn from_pretrained(source: &dyn ModelSource, dtype: DType, device: &Device) -> Result<Self> {
        let checkpoint = Arc::new(Checkpoint::open(source)?);
        if let Some(metadata) = checkpoint.metadata() {
            let (config, architecture) = families::gguf::parse(&checkpoint, metadata)?;
            let described = config.clone();
            let forms = Box::new(move |name: &str| (architecture.form)(&described, name));
            return Self::load(config, "its own keys", &checkpoint, architecture.names, forms, dtype, device);
        }
        let path = source.require("config.json")?;
        let text = std::fs::read_to_string(&path).map_err(|e| Error::Io { path: path.clone(), source: e })?;
        let (config, family) = families::parse(&text, Some(&path))?;
        let described = path.display().to_string();
        Self::load(config, &described, &checkpoint, family.names, Box::new(|_| Form::Same), dtype, device)
    }

    /// Builds the model from a checkpoint, each tensor of which must be a part of it.
    fn load(
        mut config: ModelConfig,
        described: &str,
        checkpoint: &Arc<Checkpoint>,
        mut names: NameMap,
        forms: Forms,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if names.resolve("lm_head.weight", |name| checkpoint.contains(name)).is_none() {
            config.tie_embeddings = true; // what a file without a head means, whatever its configuration says
        }
        if config.tie_embeddings {
            names = names.with_unread(&["lm_head.weight"]);
        }
        let model = Self::new(&config, checkpoint.clone().var_builder_with(names, forms, dtype, device))?;
        let coverage = checkpoint.coverage(&names);
        if !coverage.is_complete() {
            let message = format!("does not fit {described}: {coverage}");
            return Err(Error::Checkpoint { file: checkpoint.origin().into(), message });
        }
        Ok(model)
    }

    /// A model with random weights, initialised as the published code does, from a seed; `f32`.
    ///
    /// # Errors
    /// If the configuration cannot be.
    pub fn random(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        let initializer = Initializer::new(config, seed);
        Self::new(config, VarBuilder::from_backend(Box::new(initializer), DType::F32, device.clone()))
    }

    /// What the model is made of.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Every parameter by canonical name, in the order of the model. A tied head is not listed again.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    /// An empty cache for `batch` sequences.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new_cache(&self, batch: usize) -> Result<InferenceCache> {
        InferenceCache::new(&self.config, batch, self.dtype(), self.device())
    }

    /// Logits of every position, `(batch, seqlen, vocab_size)`, for `ids`, `(batch, seqlen)`; goes on from `cache` and
    /// leaves it after the last token, if given one. Differentiable if the model was built from `Var`s.
    ///
    /// # Errors
    /// If an id is out of range, or the cache does not fit the model and the batch.
    pub fn forward(&self, ids: &Tensor, cache: Option<&mut InferenceCache>) -> Result<Tensor> {
        self.lm_head.forward(&self.hidden_states(ids, cache)?)
    }

    /// What the head sees, `(batch, seqlen, d_model)`: the output of the last norm. Otherwise as
    /// [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn hidden_states(&self, ids: &Tensor, cache: Option<&mut InferenceCache>) -> Result<Tensor> {
        let (batch, seqlen) = self.check_ids(ids)?;
        let mut states = vec![];
        let mut advance = None;
        if let Some(cache) = cache {
            let mixers =
                self.config.layers.iter().flat_map(|layer| &layer.branches).map(|b| b.mixers.len()).sum();
            cache.check(mixers, batch)?;
            let cache = advance.insert(cache);
            states.extend(cache.states_mut());
        }
        let embedded = self.embedding.index_select(&ids.flatten_all()?, 0)?;
        let update = embedded.reshape((batch, seqlen, self.config.d_model))?;
        let mut stream = Stream { update, residual: None };
        let mut states = states.into_iter().map(Some);
        for branch in &self.branches {
            stream = branch.forward(stream, &mut states)?;
        }
        drop(states);
        if let Some(cache) = advance {
            cache.advance(seqlen);
        }
        Ok(self.norm_f.forward(&stream)?.0)
    }

    /// Reads a prompt, `(batch, seqlen)`, and gives the logits of its last position, `(batch, vocab_size)`.
    ///
    /// # Errors
    /// If the prompt is empty; otherwise as [`forward`](Self::forward).
    pub fn prefill(&self, ids: &Tensor, cache: &mut InferenceCache) -> Result<Tensor> {
        let hidden = self.hidden_states(ids, Some(cache))?;
        match hidden.dim(1)? {
            0 => Err(Error::Input("the prompt is empty".into())),
            seqlen => self.lm_head.forward(&hidden.narrow(1, seqlen - 1, 1)?.squeeze(1)?.contiguous()?),
        }
    }

    /// Reads one token a sequence, `(batch,)`, changing the cache in place; the logits, `(batch, vocab_size)`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn step(&self, ids: &Tensor, cache: &mut InferenceCache) -> Result<Tensor> {
        self.prefill(&ids.unsqueeze(1)?, cache)
    }

    fn check_ids(&self, ids: &Tensor) -> Result<(usize, usize)> {
        let &[batch, seqlen] = ids.dims() else {
            return Err(Error::Input(format!("ids have shape {:?}, expected (batch, seqlen)", ids.dims())));
        };
        if !matches!(ids.dtype(), DType::U32 | DType::I64 | DType::U8) {
            return Err(Error::Input(format!(
                "ids have dtype {}, expected u32 or i64",
                ids.dtype().as_str()
            )));
        }
        // A synchronisation on a GPU, where the gather checks on its own.
        if ids.device().is_cpu() {
            let vocab_size = self.config.vocab_size as i64;
            for id in ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()? {
                if !(0..vocab_size).contains(&id) {
                    return Err(Error::Input(format!("token id {id}, expected 0 to {}", vocab_size - 1)));
                }
            }
        }
        Ok((batch, seqlen))
    }
}
