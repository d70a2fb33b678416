//! The whole model: embedding, layers, norm, head.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use mamba_ops::Embedding;
use mamba_ops::decoder::{Decoder, Product, Stack};

use crate::adapter::LowRank;
use crate::batch::{Batch, Sequences};
use crate::cache::{self, InferenceCache};
use crate::checkpoint::{Checkpoint, Form, Forms, ModelSource, NameMap};
use crate::config::{Fields, ModelConfig};
use crate::dropout::Dropout;
use crate::init::Initializer;
use crate::layer::{Layer, Recompute, Stream, StreamNorm, Training};
use crate::linear::Linear;
use crate::mixers::scaled;
use crate::params::Params;
use crate::save::GENERATION_CONFIG;
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
    config: Arc<ModelConfig>,
    embedding: Tensor,
    embedding_adapter: Option<LowRank>,
    recompute: Recompute,
    dropout: Option<Dropout>,
    layers: Vec<Layer>,
    norm_f: StreamNorm,
    lm_head: Option<Linear>,
    parameters: Vec<(String, Tensor)>,
    /// The sizes that a cache must have.
    cache_sizes: String,
    /// By which a cache knows the model that it keeps a decoder of.
    identity: Arc<()>,
    /// What [`fingerprint`](Self::fingerprint) found, if nobody else has the tensors.
    pub(crate) fingerprint: Option<OnceLock<String>>,
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
        let config = Arc::new(config.clone());
        let params = Params::new(weights);
        let vocabulary = (config.padded_vocab_size, config.d_model);
        let embedding = params.at("embedding").get(vocabulary, "weight")?;
        let embedding_adapter =
            LowRank::of_embedding(&params.at("embedding"), config.padded_vocab_size, config.d_model)?;
        let mut blocks = vec![None; config.shared_blocks.len()];
        let layers = config.layers.iter().enumerate();
        let layers =
            layers.map(|(l, layer)| Layer::new(layer, &config, &params.at("layers").at(l), &mut blocks));
        let layers = layers.collect::<Result<_>>()?;
        let norm_f = StreamNorm::new(&config, &params.at("norm_f"))?;
        let lm_head = match (config.has_head, config.tie_embeddings) {
            (false, _) => None,
            (true, true) => Some(embedding.clone()),
            (true, false) => Some(params.at("lm_head").get(vocabulary, "weight")?),
        };
        let lm_head = lm_head.map(|head| -> Result<Linear> {
            // Ids past the vocabulary exist for alignment only: they get no logits.
            let adapter = LowRank::find(&params.at("lm_head"), config.padded_vocab_size, config.d_model)?;
            let adapter = adapter.map(|adapter| adapter.narrowed(config.vocab_size)).transpose()?;
            Ok(Linear::from_weight(head.narrow(0, 0, config.vocab_size)?).with_adapter(adapter))
        });
        let lm_head = lm_head.transpose()?;
        let parameters = params.noted();
        let cache_sizes = cache::fingerprint(&config);
        Ok(Self {
            config,
            embedding,
            embedding_adapter,
            recompute: Recompute::default(),
            dropout: None,
            layers,
            norm_f,
            lm_head,
            parameters,
            cache_sizes,
            identity: Arc::default(),
            fingerprint: None,
        })
    }

    /// Loads a published checkpoint: `config.json` says which family it is of, and the weights are safetensors or
    /// torch files, whole or in shards; or a GGUF file is all there is, and its weights are dequantized one by one.
    /// `dtype` is that of the model; `A_log`, `D` and `dt_bias` are always `f32`. It takes the memory of the model and of one
    /// tensor.
    ///
    /// A head that the configuration ties to the embedding is one of its own if the file has both and they differ, as in
    /// transformers. What transformers saves of a class without a head, such as `Mamba2Model`, gives
    /// [`hidden_states`](Self::hidden_states) alone, unless the head is the embedding.
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
            let families::gguf::Parsed { config, architecture, names } =
                families::gguf::parse(&checkpoint, metadata)?;
            let described = config.clone();
            let forms = Box::new(move |name: &str| (architecture.form)(&described, name));
            return Self::load(config, "its own keys", &checkpoint, names, forms, dtype, device);
        }
        let path = source.require("config.json")?;
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let (mut config, family) = families::parse(&text, Some(&path))?;
        if family.model_type.is_none()
            && config.eos_token_ids.is_empty()
            && let Some(path) = source.file(GENERATION_CONFIG)?
        {
            let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
            config.eos_token_ids = Fields::parse(&text, Some(&path))?.ids("eos_token_id")?;
        }
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
        let stored = |canonical| names.resolve(canonical, |name| checkpoint.contains(name));
        if let Some(head) = stored("lm_head.weight") {
            config.has_head = true;
            if let (true, Some(embedding)) = (config.tie_embeddings, stored("embedding.weight")) {
                config.tie_embeddings = checkpoint.same(&head, &embedding)?;
            }
        }
        if config.tie_embeddings {
            names = names.with_tied_head();
        }
        let model = Self::new(&config, checkpoint.clone().var_builder_with(names, forms, dtype, device))?;
        let coverage = checkpoint.coverage(&names);
        if !coverage.is_complete() {
            let message = format!("does not fit {described}: {coverage}");
            return Err(Error::Checkpoint { file: checkpoint.origin().into(), message });
        }
        Ok(Self { fingerprint: Some(OnceLock::new()), ..model })
    }

    /// A model with random weights, initialised as the published code does, from a seed; `f32`.
    ///
    /// # Errors
    /// If the configuration cannot be.
    pub fn random(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        let initializer = Initializer::new(config, seed);
        let weights = VarBuilder::from_backend(Box::new(initializer), DType::F32, device.clone());
        Ok(Self { fingerprint: Some(OnceLock::new()), ..Self::new(config, weights)? })
    }

    /// The same model, which computes a part of itself again in `backward()`: see [`Recompute`]. Numbers do not change.
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Self { recompute, ..self }
    }

    /// The same model, which leaves out elements of the embedding and of what each branch adds to the stream with probability
    /// `rate`, and scales the others by `1 / (1 - rate)`, in every pass without a cache: for training alone. The first pass
    /// draws the masks of number 0 of `seed`, the next ones those that follow; see [`dropout`](fn@mamba_ops::dropout) for
    /// what a mask depends on.
    ///
    /// # Errors
    /// If `rate` is not from 0 to less than 1.
    pub fn with_dropout(self, rate: f64, seed: u64) -> Result<Self> {
        Ok(Self { dropout: Dropout::new(rate, seed)?, ..self })
    }

    /// The next pass draws the masks of this number, and not of the one that follows the last pass. Numbers go up to 2^48.
    pub fn seek_dropout(&self, pass: u64) {
        if let Some(dropout) = &self.dropout {
            dropout.seek(pass);
        }
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

    /// The matrix that [`forward`](Self::forward) multiplies the [`hidden_states`](Self::hidden_states) with,
    /// `(vocab_size, d_model)`: for losses that never form the logits of a whole batch.
    ///
    /// # Errors
    /// If the model has no head, or the device is out of memory.
    pub fn head_weight(&self) -> Result<Tensor> {
        self.head()?.weight()
    }

    fn head(&self) -> Result<&Linear> {
        let missing = || Error::Input("the model has no head, and gives hidden states alone".into());
        self.lm_head.as_ref().ok_or_else(missing)
    }

    /// An empty cache for `batch` sequences.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new_cache(&self, batch: usize) -> Result<InferenceCache> {
        InferenceCache::new(&self.config, batch, self.dtype(), self.device())
    }

    /// Logits of every position, `(batch, seqlen, vocab_size)`, for ids, `(batch, seqlen)`, or another [`Batch`]; goes on
    /// from `cache` and leaves it after the last token, if given one. Differentiable if the model was built from `Var`s.
    ///
    /// # Errors
    /// If an id is out of range, the cache does not fit the model and the batch, or the model has no head.
    pub fn forward<'a>(
        &self,
        input: impl Into<Batch<'a>>,
        cache: Option<&mut InferenceCache>,
    ) -> Result<Tensor> {
        self.head()?; // before the cache has moved on
        self.logits(&self.hidden_states(input, cache)?)
    }

    /// What the head sees, `(batch, seqlen, d_model)`: the output of the last norm, 0 in padding. Otherwise as
    /// [`forward`](Self::forward).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn hidden_states<'a>(
        &self,
        input: impl Into<Batch<'a>>,
        cache: Option<&mut InferenceCache>,
    ) -> Result<Tensor> {
        let batch = input.into();
        let (hidden, _) = self.hidden_states_of_tokens(&batch, cache)?;
        batch.restore(&hidden)
    }

    /// Reads a prompt, `(batch, seqlen)` or another [`Batch`], and gives the logits of the last token of each sequence,
    /// `(batch, vocab_size)`.
    ///
    /// # Errors
    /// If a prompt is empty; otherwise as [`forward`](Self::forward).
    pub fn prefill<'a>(&self, input: impl Into<Batch<'a>>, cache: &mut InferenceCache) -> Result<Tensor> {
        self.head()?;
        let batch = input.into();
        let (_, sequences) = batch.tokens()?;
        let last = sequences.last_tokens()?;
        let (hidden, _) = self.hidden_states_of_tokens(&batch, Some(cache))?;
        let count = last.len();
        let last = Tensor::from_vec(last, count, hidden.device())?;
        self.logits(&hidden.flatten(0, 1)?.index_select(&last, 0)?)
    }

    /// Reads one token a sequence, `(batch,)`, changing the cache in place; the logits, `(batch, vocab_size)`.
    ///
    /// All layers go through a [`Decoder`] for batches it takes, which the cache keeps; on a GPU an id out of range gives logits of
    /// NaN. Models with experts, adapters that are not merged, Mamba-1 with heads (Zamba), a bypass beside Mamba-2 or learned first states are
    /// read operation by operation.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn step(&self, ids: &Tensor, cache: &mut InferenceCache) -> Result<Tensor> {
        if ids.dims() == [cache.batch()] {
            let mut sequences = Batch::from(&ids.unsqueeze(1)?).tokens()?.1;
            cache.check(&self.cache_sizes, &mut sequences)?;
            let ids = if ids.dtype() == DType::U8 { ids.to_dtype(DType::U32)? } else { ids.clone() };
            let ids = ids.to_device(self.device())?;
            self.check_tokens(&ids)?;
            let made = |batch| self.decoder(batch);
            if let Some(logits) = cache.decode(&self.identity, made, &ids, self.dtype())? {
                cache.advance(&sequences);
                return Ok(logits);
            }
        }
        self.prefill(&ids.unsqueeze(1)?, cache)
    }

    /// A decoder of the same function, if there is one.
    fn decoder(&self, batch: usize) -> Result<Option<Decoder>> {
        let layers: Option<Vec<_>> = self.layers.iter().map(Layer::decoder).collect::<Result<_>>()?;
        let (Some(layers), Some(head), None) = (layers, self.head()?.decoder(), &self.embedding_adapter)
        else {
            return Ok(None);
        };
        let stack = Stack {
            // Ids past the vocabulary exist for alignment only.
            embedding: self.embedding.narrow(0, 0, self.config.vocab_size)?,
            embedding_scale: self.config.embedding_scale,
            layers: layers.into_iter().flatten().collect(),
            norm_f: self.norm_f.decoder(),
            head: Product { scale: self.config.logits_scale, ..head },
        };
        Ok(Decoder::new(stack, batch)?)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        scaled(self.head()?.forward(hidden)?, self.config.logits_scale)
    }

    /// Hidden states of the tokens alone, and how they lie.
    pub(crate) fn hidden_states_of_tokens(
        &self,
        batch: &Batch,
        cache: Option<&mut InferenceCache>,
    ) -> Result<(Tensor, Sequences)> {
        let (tokens, mut sequences) = batch.tokens()?;
        self.check_tokens(&tokens)?;
        if let Some(cache) = &cache {
            cache.check(&self.cache_sizes, &mut sequences)?;
        }
        let (rows, seqlen) = sequences.shape();
        if rows * seqlen == 0 {
            // Nothing is read, and candle cannot take parts of nothing.
            let shape = (rows, seqlen, self.config.d_model);
            return Ok((Tensor::zeros(shape, self.dtype(), self.device())?, sequences));
        }
        let mut embedding = match tokens.dtype().is_float() {
            true => tokens.reshape((rows, seqlen, self.config.d_model))?.to_dtype(self.dtype())?,
            false => self.embed(&tokens.reshape((rows, seqlen))?)?,
        };
        embedding = scaled(embedding, self.config.embedding_scale)?;
        let dropout = self.dropout.as_ref().filter(|_| cache.is_none());
        let mut masks = dropout.map(Dropout::next_pass);
        if let Some(masks) = &mut masks {
            embedding = masks.next(1).of(0).apply(&embedding)?;
        }
        let mut stream = Stream { update: embedding.clone(), residual: None };
        match cache {
            None => {
                for layer in &self.layers {
                    let states = &mut std::iter::empty();
                    let masks = masks.as_mut().map(|masks| masks.next(layer.len()));
                    let training = Training { recompute: self.recompute, masks };
                    stream = layer.forward(stream, &embedding, &sequences, states, training)?;
                }
            }
            Some(cache) => {
                let mut states = cache.states_mut();
                for layer in &self.layers {
                    let training = Training::default();
                    stream = layer.forward(stream, &embedding, &sequences, &mut states, training)?;
                }
                drop(states);
                cache.advance(&sequences);
            }
        }
        Ok((self.norm_f.forward(&stream)?.0, sequences))
    }

    /// The rows of the table, `(batch, seqlen, d_model)`.
    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let embedding = mamba_ops::embedding(&Embedding::new(ids, &self.embedding))?;
        match &self.embedding_adapter {
            Some(adapter) => adapter.embed(ids, embedding),
            None => Ok(embedding),
        }
    }

    fn check_tokens(&self, ids: &Tensor) -> Result<()> {
        if ids.dtype().is_float() {
            let (got, d_model) = (ids.dim(1)?, self.config.d_model);
            let fits = got == d_model;
            let message = || format!("embeddings have {got} channels, expected d_model {d_model}");
            return if fits { Ok(()) } else { Err(Error::Input(message())) };
        }
        // A synchronisation on a GPU, where the gather checks on its own.
        if ids.device().is_cpu() {
            let vocab_size = self.config.vocab_size as i64;
            for id in ids.to_dtype(DType::I64)?.to_vec1::<i64>()? {
                if !(0..vocab_size).contains(&id) {
                    return Err(Error::Input(format!("token id {id}, expected 0 to {}", vocab_size - 1)));
                }
            }
        }
        Ok(())
    }
}
