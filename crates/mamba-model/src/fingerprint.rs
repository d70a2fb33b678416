//! What tells one model from another.

use std::fmt::Write;

use candle_core::{DType, Tensor};
use sha2::{Digest, Sha256};

use crate::config::ModelConfig;
use crate::{Model, Result};

/// How many elements of each parameter are looked at.
const SAMPLES: usize = 64;

impl Model {
    /// A name for this model, in hexadecimal: what is kept for a model can say which one it belongs to.
    ///
    /// The SHA-256 of the configuration, but for the tokens that end a text, and, for each parameter, of its name, its shape, its dtype
    /// and 64 of its elements, evenly spread. So it takes milliseconds, and tells apart models of one size, ones that were fine-tuned as a
    /// whole from their base, the same weights in different dtypes, and the same weights with another scale, limit, window or rotary
    /// embedding. What is hashed of a configuration is all of it as this version of the crate describes it: a version with other
    /// fields has other names. A model that was loaded or made at random computes it once; one over the
    /// tensors of a caller, who may change them, each time.
    ///
    /// # Errors
    /// If candle cannot read the parameters.
    ///
    /// # Example
    /// ```
    /// use candle_core::Device;
    /// use mamba_model::Model;
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    ///
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
    /// let [one, same, other] = [0, 0, 1].map(|seed| Model::random(&config, seed, &Device::Cpu));
    /// let (one, same, other) = (one?.fingerprint()?, same?.fingerprint()?, other?.fingerprint()?);
    /// assert!(one == same && one != other);
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn fingerprint(&self) -> Result<String> {
        let Some(known) = &self.fingerprint else { return self.compute_fingerprint() };
        if let Some(text) = known.get() {
            return Ok(text.clone());
        }
        let text = self.compute_fingerprint()?;
        Ok(known.get_or_init(|| text).clone())
    }

    fn compute_fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let config = ModelConfig { eos_token_ids: Vec::new(), ..self.config().clone() };
        hash.update(format!("{config:?}\n"));
        for (name, x) in self.parameters() {
            hash.update(format!("{name} {:?} {}\n", x.dims(), x.dtype().as_str()));
            for value in samples(x)? {
                hash.update(value.to_le_bytes());
            }
        }
        let mut text = String::new();
        for byte in hash.finalize() {
            let _ = write!(text, "{byte:02x}"); // a string takes everything
        }
        Ok(text)
    }
}

/// Elements of a tensor, evenly spread, exactly.
fn samples(x: &Tensor) -> Result<Vec<f64>> {
    let n = x.elem_count();
    let count = n.min(SAMPLES);
    let places: Vec<i64> = (0..count).map(|i| (i as u128 * n as u128 / count as u128) as i64).collect();
    let places = Tensor::from_vec(places, count, x.device())?;
    Ok(x.detach().flatten_all()?.index_select(&places, 0)?.to_dtype(DType::F64)?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::{VarBuilder, VarMap};

    use super::*;
    use crate::config::{AttentionConfig, LayerSpec, Mamba1Config, Mamba2Config, MixerSpec, Rope};

    /// Of a model that is being trained, it is that of the weights as they are now.
    #[test]
    fn follows_the_weights_of_a_caller() {
        let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
        let variables = VarMap::new();
        let builder = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let model = Model::new(&config, builder).unwrap();
        let before = model.fingerprint().unwrap();
        assert_eq!(model.fingerprint().unwrap(), before);
        for var in variables.all_vars() {
            var.set(&(var.as_tensor() + 1.0).unwrap()).unwrap();
        }
        assert_ne!(model.fingerprint().unwrap(), before);
    }

    /// The same weights under another configuration are another model, where a state means something else.
    #[test]
    fn tells_configurations_apart() {
        let mamba2 = || Mamba2Config { d_state: 16, headdim: 8, ..Mamba2Config::new(16) };
        let attention = || AttentionConfig {
            rope: Some(Rope::new(8, 1e4)),
            window: Some(64),
            ..AttentionConfig::new(2, 2, 8)
        };
        let config = |mamba2, attention| {
            let mixers = [MixerSpec::Mamba2(mamba2), MixerSpec::Attention(attention)];
            ModelConfig::of_layers(50, 16, mixers.map(|mixer| LayerSpec::new([mixer])))
        };
        let base = config(mamba2(), attention());
        let of = |config: &ModelConfig| Model::random(config, 0, &Device::Cpu).unwrap();
        let model = of(&base);
        let others = [
            config(Mamba2Config { dt_limit: (0.0, 0.5), ..mamba2() }, attention()),
            config(Mamba2Config { zxbcdt_scales: [1.0, 1.0, 1.0, 1.0, 0.5], ..mamba2() }, attention()),
            config(mamba2(), AttentionConfig { rope: Some(Rope::new(8, 1e6)), ..attention() }),
            config(mamba2(), AttentionConfig { window: Some(63), ..attention() }),
            config(mamba2(), AttentionConfig { softmax_scale: 0.125, ..attention() }),
            ModelConfig { norm_eps: 1e-6, ..base.clone() },
            ModelConfig { embedding_scale: 2.0, ..base.clone() },
            ModelConfig { logits_scale: 2.0, ..base.clone() },
        ];
        let mut seen = vec![model.fingerprint().unwrap()];
        for other in &others {
            let other = of(other);
            for ((name, x), (same_name, y)) in model.parameters().iter().zip(other.parameters()) {
                assert_eq!(
                    (name, samples(x).unwrap()),
                    (same_name, samples(y).unwrap()),
                    "the weights are the same"
                );
            }
            seen.push(other.fingerprint().unwrap());
        }
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 1 + others.len());
        // At which tokens a text ends is no matter of states.
        let ends = of(&ModelConfig { eos_token_ids: vec![3], ..base });
        assert_eq!(ends.fingerprint().unwrap(), model.fingerprint().unwrap());
    }

    #[test]
    fn is_kept_where_nobody_else_has_the_weights() {
        let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
        let model = Model::random(&config, 0, &Device::Cpu).unwrap();
        let text = model.fingerprint().unwrap();
        assert_eq!(text, model.compute_fingerprint().unwrap());
        assert_eq!(model.fingerprint.as_ref().and_then(|known| known.get()), Some(&text));
    }
}
