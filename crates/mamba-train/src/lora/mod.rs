//! Low-rank adaptation: small factors are trained beside matrices that stay as they are.

mod peft;

use std::collections::{BTreeSet, HashMap};

use candle_core::{DType, Tensor};
use mamba_model::Model;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use crate::error::require;
use crate::patterns::matches;
use crate::trainable::TrainableModel;
use crate::{Error, Result};

pub use peft::{load_adapter, save_adapter};

/// What [`TrainableModel::lora`] trains.
///
/// `W x` becomes `W x + s B A x` with `A` of shape `(rank, in)`, `B` of `(out, rank)`, and `s = alpha / rank`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rows of `A`.
    pub rank: usize,
    /// Sets the scale.
    pub alpha: f64,
    /// `s = alpha / √rank` instead: the scale that keeps large ranks stable.
    pub rank_stabilized: bool,
    /// Trains the length of each row of the changed matrix too (DoRA); for projections, not for the embedding.
    pub dora: bool,
    /// Modules that get factors, by the end of their names (`in_proj`, `x_proj`, `dt_proj`, `out_proj`, `conv1d`, `embedding`,
    /// `lm_head`, those of attention and MLPs), or by patterns with `*`.
    pub targets: Vec<String>,
    /// Parameters that are trained as they are, by the end of their names (`A_log`, `D`, `dt_bias`), or by patterns.
    pub train: Vec<String>,
}

impl Default for LoraConfig {
    /// Rank 8 and alpha 16 for the projections in and out, which every kind of block has.
    fn default() -> Self {
        let targets = ["in_proj", "out_proj"].map(str::to_owned).to_vec();
        Self { rank: 8, alpha: 16.0, rank_stabilized: false, dora: false, targets, train: vec![] }
    }
}

impl LoraConfig {
    /// What the product of the factors is multiplied with.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }
}

/// Whether a target means a name: it is its end, from a dot on, or a pattern for all of it.
fn means(target: &str, name: &str) -> bool {
    let end = name.strip_suffix(target).is_some_and(|head| head.is_empty() || head.ends_with('.'));
    end || target.contains('*') && matches(target, name)
}

/// A weight that may get factors.
#[derive(Debug)]
struct Module<'a> {
    /// Its canonical name.
    name: String,
    kind: Kind,
    weight: &'a Tensor,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// `(out, in)`.
    Linear,
    /// `(channels, 1, width)`.
    Convolution,
    /// `(rows, dim)`.
    Embedding,
}

impl Module<'_> {
    /// Rows and columns of what the factors multiply to.
    fn extents(&self) -> (usize, usize) {
        let dims = self.weight.dims();
        match self.kind {
            Kind::Linear => (dims[0], dims[1]),
            Kind::Convolution => (dims[0], dims[2]),
            Kind::Embedding => (dims[1], dims[0]),
        }
    }

    /// The names of the two factors.
    fn factors(&self) -> [String; 2] {
        let name = &self.name;
        match self.kind {
            Kind::Embedding => ["A", "B"].map(|factor| format!("{name}.lora_embedding_{factor}")),
            _ => ["A", "B"].map(|factor| format!("{name}.lora_{factor}.weight")),
        }
    }

    fn magnitude(&self) -> String {
        format!("{}.lora_magnitude_vector", self.name)
    }

    fn scale(&self) -> String {
        format!("{}.lora_scale", self.name)
    }
}

/// Every weight of a model that may get factors.
fn modules(model: &Model) -> Vec<Module<'_>> {
    let mut modules = vec![];
    for (name, weight) in model.parameters() {
        let Some(name) = name.strip_suffix(".weight") else { continue };
        let kind = match weight.dims() {
            _ if name.contains(".lora_") => continue,
            [_, _] if name == "embedding" => Kind::Embedding,
            [_, _] => Kind::Linear,
            [_, 1, _] => Kind::Convolution,
            _ => continue,
        };
        modules.push(Module { name: name.to_owned(), kind, weight });
    }
    if model.config().tie_embeddings {
        let table = modules.iter().find(|module| module.kind == Kind::Embedding).map(|module| module.weight);
        modules.extend(table.map(|weight| Module { name: "lm_head".into(), kind: Kind::Linear, weight }));
    }
    modules
}

impl TrainableModel {
    /// Starts from `source` with factors beside the targets of `config`, `B` zero and `A` random by `seed`, so that the first
    /// output is that of `source`. Everything else is frozen: it has no gradient and no state, and keeps its bits.
    ///
    /// # Errors
    /// If a target matches nothing, an option cannot be, or `source` has adapters already.
    ///
    /// # Example
    /// ```
    /// use candle_core::{DType, Device};
    /// use mamba_model::Model;
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    /// use mamba_train::{LoraConfig, TrainableModel};
    ///
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
    /// let base = Model::random(&config, 1, &Device::Cpu)?;
    /// let lora = LoraConfig {
    ///     targets: ["in_proj", "x_proj", "out_proj"].map(str::to_owned).to_vec(),
    ///     train: vec!["A_log".into()],
    ///     ..LoraConfig::default()
    /// };
    /// let model = TrainableModel::lora(&base, &lora, DType::F32, 0)?;
    /// assert_eq!(model.parameters().len(), 2 * (3 * 2 + 1));
    /// let missing = LoraConfig { targets: vec!["q_proj".into()], ..lora };
    /// let error = TrainableModel::lora(&base, &missing, DType::F32, 0).unwrap_err();
    /// assert!(error.to_string().starts_with("adapter: the target `q_proj` matches nothing"));
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    /// # Source
    /// Hu et al., 2021, "LoRA"; Kalajdzievski, 2023, "A rank stabilization scaling factor"; Liu et al., 2024, "DoRA".
    pub fn lora(source: &Model, config: &LoraConfig, dtype: DType, seed: u64) -> Result<Self> {
        require(config.rank > 0, "rank", || "is 0, expected at least 1".into())?;
        require(config.alpha.is_finite(), "alpha", || format!("is {}, expected a number", config.alpha))?;
        if source.has_adapters() {
            return Err(Error::Adapter("the model has adapters already: train those, or merge them".into()));
        }
        let mut values: HashMap<String, Tensor> = source.parameters().iter().cloned().collect();
        let names: Vec<&str> = source.parameters().iter().map(|(name, _)| name.as_str()).collect();
        let mut trained = chosen("parameter to train", &config.train, &names)?;
        let modules = modules(source);
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        let targets = chosen("target", &config.targets, &names)?;
        if targets.is_empty() && trained.is_empty() {
            return Err(Error::Adapter("there are no targets".into()));
        }
        for module in modules.iter().filter(|module| targets.contains(&module.name)) {
            for (name, value) in new_factors(module, config, seed)? {
                if name != module.scale() {
                    trained.insert(name.clone());
                }
                values.insert(name, value.to_device(source.device())?);
            }
        }
        Self::build(source.config(), values, dtype, source.device(), |name| trained.contains(name))
    }
}

/// The names that some target means; each target must mean one.
fn chosen(what: &str, targets: &[String], names: &[&str]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for target in targets {
        let meant: Vec<&&str> = names.iter().filter(|name| means(target, name)).collect();
        if meant.is_empty() {
            let mut ends: Vec<&str> = names.iter().filter_map(|name| name.rsplit('.').next()).collect();
            ends.sort();
            ends.dedup();
            let known = ends.join(", ");
            return Err(Error::Adapter(format!("the {what} `{target}` matches nothing; there are {known}")));
        }
        found.extend(meant.into_iter().map(|name| (*name).to_owned()));
    }
    Ok(found)
}

/// Scale, factors and magnitude of a module before training, in `f32` (`f64` for a weight of `f64`).
fn new_factors(module: &Module, config: &LoraConfig, seed: u64) -> Result<Vec<(String, Tensor)>> {
    let device = candle_core::Device::Cpu;
    let wide = if module.weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let ((rows, columns), rank) = (module.extents(), config.rank);
    let [a, b] = module.factors();
    let mut random = ChaCha12Rng::seed_from_u64(seed ^ hash(&module.name));
    let mut uniform = |count: usize, bound: f64| -> Vec<f64> {
        (0..count).map(|_| bound * (2.0 * random.random::<f64>() - 1.0)).collect()
    };
    // Of an embedding `A` is 0 and `B` random with a variance of 1, as PEFT has it: whatever is looked up begins with 0.
    let (of_a, of_b) = match module.kind {
        Kind::Embedding => (vec![0.0; rank * columns], uniform(rows * rank, 3f64.sqrt())),
        _ => (uniform(rank * columns, 1.0 / (columns as f64).sqrt()), vec![0.0; rows * rank]),
    };
    let tensor = |values: Vec<f64>, shape: (usize, usize)| -> Result<Tensor> {
        Ok(Tensor::from_vec(values, shape, &device)?.to_dtype(wide)?)
    };
    let scale = Tensor::new(config.scale(), &device)?.to_dtype(wide)?;
    let mut made =
        vec![(a, tensor(of_a, (rank, columns))?), (b, tensor(of_b, (rows, rank))?), (module.scale(), scale)];
    if config.dora && module.kind != Kind::Embedding {
        let lengths = module.weight.to_dtype(wide)?.reshape((rows, columns))?.sqr()?.sum(1)?.sqrt()?;
        made.push((module.magnitude(), lengths.detach()));
    }
    Ok(made)
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_ends_or_patterns() {
        let name = "layers.0.0.mamba1.in_proj";
        assert!(means("in_proj", name) && means("mamba1.in_proj", name) && means("layers.*.in_proj", name));
        assert!(!means("proj", name) && !means("in_pro", name) && !means("layers.0", name));
    }
}
