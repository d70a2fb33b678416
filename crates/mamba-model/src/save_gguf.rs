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
    /// `extra` are further keys, above all those of a tokenizer; a vocabulary shorter than the embedding is filled up.
    /// `report` is told of each tensor when it is written.
    ///
    /// # Errors
    /// If no architecture of GGUF has words for the configuration, `kind` cannot be written, or the file cannot be
    /// written.
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
        if let Some(number) = file_type(kind) {
            metadata.set("general.file_type", Value::U32(number));
        }
        if kind.block_size() > 1 {
            metadata.set("general.quantization_version", Value::U32(2));
        }
        for (key, value) in extra.iter() {
            metadata.set(key, value.clone());
        }
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

/// llama.cpp's number for a file whose matrices are mostly of a type.
fn file_type(kind: GgmlType) -> Option<u32> {
    Some(match kind {
        GgmlType::F32 => 0,
        GgmlType::F16 => 1,
        GgmlType::Q4_0 => 2,
        GgmlType::Q4_1 => 3,
        GgmlType::Q8_0 => 7,
        GgmlType::Q5_0 => 8,
        GgmlType::Q5_1 => 9,
        GgmlType::Q2_K => 10,
        GgmlType::Q3_K => 11,
        GgmlType::Q4_K => 14,
        GgmlType::Q5_K => 16,
        GgmlType::Q6_K => 18,
        GgmlType::BF16 => 32,
        _ => return None,
    })
}

/// Gives the vocabulary as many tokens as the embedding has rows, which llama.cpp asks for. The number of tokens then
/// follows from their types.
fn fill_up(metadata: &mut Metadata, architecture: &str, rows: usize) {
    const NORMAL: i32 = 1;
    const UNUSED: i32 = 5;
    let Some(tokens) = metadata.strings("tokenizer.ggml.tokens") else { return };
    let mut tokens = tokens.to_vec();
    let key = "tokenizer.ggml.token_type";
    let kinds = metadata.array(key).map(|kinds| kinds.iter().filter_map(|kind| kind.as_u64()));
    let mut kinds: Vec<i32> = kinds.into_iter().flatten().map(|kind| kind as i32).collect();
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
