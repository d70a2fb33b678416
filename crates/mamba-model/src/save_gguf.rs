//! Writes models as GGUF files.

mod outgoing;

use std::collections::HashMap;
use std::path::Path;

use self::outgoing::Outgoing;
use crate::checkpoint::gguf::{Array, GgmlType, Metadata, TensorSpec, Value, Writer};
use crate::families::gguf;
use crate::{Error, Model, Result};

impl Model {
    /// Writes the model as one GGUF file, in the layout of llama.cpp, holding one tensor beside the model at a time.
    ///
    /// Matrices are stored as `kind`, everything else as `F32`: vectors, convolutions and what the state depends on. As
    /// in llama.cpp, a matrix whose rows are no whole blocks of `kind` takes a simpler type, in the end `F16`, and the
    /// matrix that chooses between experts stays `F32`. The multipliers of Falcon-H1 go into its weights.
    /// `extra` are further keys, above all those of a tokenizer; a vocabulary shorter than the embedding is filled up. The
    /// tokens that end a text take the keys for them that `extra` leaves free, and there are three: of a text, a turn and
    /// a message.
    /// `report` is told of each tensor when it is written.
    ///
    /// # Errors
    /// If no architecture of GGUF has words for the configuration, the model has adapters, `kind` is none of
    /// [`GgmlType::of_weights`], `extra` has a key that describes the model, or the file cannot be written.
    ///
    /// # Example
    /// ```
    /// use candle_core::{DType, Device};
    /// use mamba_model::checkpoint::{LocalDir, gguf::{GgmlType, Metadata}};
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    /// use mamba_model::Model;
    ///
    /// let config = ModelConfig::uniform(50, 32, 2, MixerSpec::Mamba1(Mamba1Config::new(32)));
    /// let model = Model::random(&config, 0, &Device::Cpu)?;
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("model.gguf");
    /// let mut quantized = 0;
    /// model.save_gguf(&path, GgmlType::Q8_0, Metadata::default(), |tensor| {
    ///     quantized += usize::from(tensor.kind == GgmlType::Q8_0);
    /// })?;
    /// assert_eq!(quantized, 7); // the embedding, and in_proj, x_proj, out_proj of two layers; dt_proj has rank 2
    /// let again = Model::from_pretrained(&LocalDir::new(&path)?, DType::F32, &Device::Cpu)?;
    /// assert_eq!(again.config(), model.config());
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_gguf(
        &self,
        path: impl AsRef<Path>,
        kind: GgmlType,
        extra: Metadata,
        mut report: impl FnMut(&TensorSpec),
    ) -> Result<()> {
        if !GgmlType::of_weights().any(|known| known == kind) {
            let known: Vec<_> = GgmlType::of_weights().map(GgmlType::name).collect();
            return Err(Error::Input(format!("`kind` is {kind}, expected one of {}", known.join(", "))));
        }
        self.require_no_adapters()?;
        let config = self.config();
        let shapes = |architecture| {
            let tensors = Outgoing::all(self, architecture).into_iter();
            let shapes: HashMap<_, _> = tensors.map(|tensor| (tensor.name, tensor.shape)).collect();
            move |name: &str| shapes.get(name).cloned()
        };
        let (architecture, mut metadata) = gguf::describe(config, shapes).ok_or_else(|| Error::Config {
            file: None,
            field: "layers".into(),
            message: "is a combination that no architecture of GGUF has words for".into(),
        })?;
        if let Some(number) = kind.file_type() {
            metadata.set("general.file_type", Value::U32(number));
        }
        if kind.block_size() > 1 {
            metadata.set("general.quantization_version", Value::U32(2));
        }
        let own = format!("{}.", architecture.name);
        for (key, value) in extra.iter() {
            if key.starts_with(&own) || metadata.set(key, value.clone()).is_some() {
                return Err(Error::Input(format!("`extra` has `{key}`, which the model itself says")));
            }
        }
        gguf::set_ends(&mut metadata, &config.eos_token_ids);
        fill_up(&mut metadata, architecture.name, config.padded_vocab_size);
        let tensors = Outgoing::all(self, architecture);
        let spec = |tensor: &Outgoing| TensorSpec {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            kind: if tensor.is_matrix { fitting(kind, &tensor.shape) } else { GgmlType::F32 },
        };
        let specs: Vec<_> = tensors.iter().map(spec).collect();
        let mut writer = Writer::create(path, &metadata, specs.clone())?;
        for (tensor, spec) in tensors.iter().zip(&specs) {
            writer.write(&tensor.values()?)?;
            report(spec);
        }
        writer.finish()
    }
}

/// The type for rows of this length: the wanted one, or the one that llama.cpp takes in its place.
fn fitting(kind: GgmlType, shape: &[usize]) -> GgmlType {
    let fits = |kind: GgmlType| shape.last().is_some_and(|row| row.is_multiple_of(kind.block_size()));
    let simpler = match kind {
        GgmlType::Q2_K | GgmlType::Q3_K => GgmlType::Q4_0,
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        _ => GgmlType::F16,
    };
    match (fits(kind), fits(simpler)) {
        (true, _) => kind,
        (false, true) => simpler,
        (false, false) => GgmlType::F16,
    }
}

/// Gives the vocabulary as many tokens as the embedding has rows, which llama.cpp asks for. The number of tokens then
/// follows from their types.
fn fill_up(metadata: &mut Metadata, architecture: &str, rows: usize) {
    const NORMAL: i32 = 1;
    const UNUSED: i32 = 5;
    let Some(tokens) = metadata.strings("tokenizer.ggml.tokens") else { return };
    let mut tokens = tokens.to_vec();
    let key = "tokenizer.ggml.token_type";
    // What is no number of a type says as little as a type that is missing.
    let kind = |kind: Value| kind.as_u64().and_then(|kind| kind.try_into().ok()).unwrap_or(NORMAL);
    let mut kinds: Vec<i32> = metadata.array(key).into_iter().flat_map(Array::iter).map(kind).collect();
    kinds.resize(tokens.len(), NORMAL);
    for id in tokens.len()..rows {
        tokens.push(format!("[PAD{id}]"));
        kinds.push(UNUSED);
    }
    if tokens.len() == rows {
        metadata.set(format!("{architecture}.vocab_size"), Value::U32(rows as u32));
    }
    metadata.set("tokenizer.ggml.tokens", Array::String(tokens));
    metadata.set(key, Array::I32(kinds));
}
