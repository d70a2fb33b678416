//! Initial values as the published code draws them, from a seed, for training from scratch and for benchmarks.

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use crate::adapter::is_adapter;
use crate::config::ModelConfig;

/// Bounds of the initial step size, and its floor.
const DT_MIN: f64 = 1e-3;
const DT_MAX: f64 = 1e-1;
const DT_FLOOR: f64 = 1e-4;
/// Bounds of `-A` of Mamba-2.
const A_RANGE: (f64, f64) = (1.0, 16.0);
/// Standard deviation of the embedding.
const EMBEDDING_STD: f64 = 0.02;

/// Makes up each parameter by its name and shape. Values depend on the seed and the name, not on the order.
///
/// `A_log` is `ln(1), ln(2), …` over the states of Mamba-1 and the logarithm of a uniform number a head of Mamba-2;
/// `dt_bias` is the inverse softplus of a log-uniform step size; `D` and norms are 1; matrices are uniform in
/// `±1/√fan_in`, those that write into the residual stream divided by the root of the number of branches.
///
/// # Source
/// `_init_weights` and the constructors of `Mamba` and `Mamba2` in state-spaces/mamba.
#[derive(Debug)]
pub struct Initializer {
    seed: u64,
    branches: usize,
}

impl Initializer {
    /// For a model of this configuration.
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        Self { seed, branches: config.layers.iter().map(|layer| layer.branches.len()).sum() }
    }

    fn values(&self, name: &str, shape: &[usize]) -> Vec<f64> {
        let mut random = ChaCha12Rng::seed_from_u64(self.seed ^ hash(name));
        let count: usize = shape.iter().product();
        let mut draw = |low: f64, high: f64| low + (high - low) * random.random::<f64>();
        let (parent, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        let module = parent.rsplit('.').next().unwrap_or_default();
        match (module, leaf) {
            (_, "A_log") if shape.len() > 1 => {
                (0..count).map(|i| ((i % shape[shape.len() - 1] + 1) as f64).ln()).collect()
            }
            (_, "A_log") => (0..count).map(|_| draw(A_RANGE.0, A_RANGE.1).ln()).collect(),
            (_, "D") => vec![1.0; count],
            (_, "dt_bias") | ("dt_proj", "bias") => {
                let step = || draw(DT_MIN.ln(), DT_MAX.ln()).exp().max(DT_FLOOR);
                std::iter::repeat_with(step).take(count).map(inverse_softplus).collect()
            }
            (norm, "weight") if norm.contains("norm") => vec![1.0; count],
            ("embedding", _) => {
                let mut normal = || {
                    let (u, v) = (draw(f64::MIN_POSITIVE, 1.0), draw(0.0, std::f64::consts::TAU));
                    (-2.0 * u.ln()).sqrt() * v.cos() * EMBEDDING_STD
                };
                (0..count).map(|_| normal()).collect()
            }
            ("conv1d", "bias") => (0..count).map(|_| draw(-0.5, 0.5)).collect(),
            (_, "bias" | "correction_bias" | "init_states") => vec![0.0; count],
            _ => {
                // Matrices of several experts or heads stand behind each other.
                let fan_in = match shape {
                    [_, _, columns] if module != "conv1d" => *columns,
                    [_, rest @ ..] => rest.iter().product(),
                    [] => 1,
                };
                let fan_in = fan_in.max(1) as f64;
                let residual = matches!(module, "out_proj" | "o_proj" | "down_proj" | "latent_out");
                let scale = if residual { (self.branches.max(1) as f64).sqrt() } else { 1.0 };
                let bound = 1.0 / (fan_in.sqrt() * scale);
                (0..count).map(|_| draw(-bound, bound)).collect()
            }
        }
    }
}

/// `x` with `softplus(x) = y`.
fn inverse_softplus(y: f64) -> f64 {
    y + (-(-y).exp_m1()).ln()
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl SimpleBackend for Initializer {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let values: Vec<f32> = self.values(name, shape.dims()).into_iter().map(|v| v as f32).collect();
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("init: the shape of `{name}` must be given")
    }

    /// Whatever is asked for, but no adapters.
    fn contains_tensor(&self, name: &str) -> bool {
        !is_adapter(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Mamba2Config, MixerSpec};

    fn make(name: &str, shape: &[usize]) -> Vec<f64> {
        let config = ModelConfig::uniform(10, 8, 4, MixerSpec::Mamba2(Mamba2Config::new(8)));
        Initializer::new(&config, 7).values(name, shape)
    }

    #[test]
    fn distributions() {
        let softplus = |x: f64| x.exp().ln_1p();
        let steps: Vec<f64> = make("layers.0.0.mamba2.dt_bias", &[4000]).into_iter().map(softplus).collect();
        assert!(steps.iter().all(|s| (DT_MIN * 0.999..=DT_MAX * 1.001).contains(s)));
        // Log-uniform: half of them below the geometric mean.
        let below = steps.iter().filter(|s| **s < (DT_MIN * DT_MAX).sqrt()).count();
        assert!((1850..2150).contains(&below), "{below}");
        let a: Vec<f64> = make("layers.0.0.mamba2.A_log", &[4000]).into_iter().map(f64::exp).collect();
        assert!(a.iter().all(|a| (0.999..=16.001).contains(a)));
        let mean = a.iter().sum::<f64>() / 4000.0;
        assert!((8.2..8.8).contains(&mean), "{mean}");
        // The floor counts for tiny ranges only; every value goes through softplus to a step size again.
        assert!((softplus(inverse_softplus(DT_FLOOR)) / DT_FLOOR - 1.0).abs() < 1e-9);
        assert_eq!(make("layers.0.0.mamba1.A_log", &[2, 3])[3..], [1f64.ln(), 2f64.ln(), 3f64.ln()]);
        assert_eq!(make("layers.0.0.mamba1.D", &[3]), [1.0; 3]);
        let bound = |values: Vec<f64>| values.into_iter().fold(0.0f64, |m, v| m.max(v.abs()));
        assert!((0.09..=0.1).contains(&bound(make("layers.0.0.mamba1.in_proj.weight", &[50, 100]))));
        // Four layers write into the residual stream: half the bound.
        assert!((0.045..=0.05).contains(&bound(make("layers.0.0.mamba1.out_proj.weight", &[50, 100]))));
        // A filter of a depthwise convolution sees its width alone.
        for name in ["layers.0.0.mamba2.conv1d.weight", "layers.0.0.mamba2.conv1d.bias"] {
            let values = make(name, if name.ends_with("bias") { &[300] } else { &[300, 1, 4] });
            let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
            assert!((0.47..=0.5).contains(&bound(values)) && (0.075..0.092).contains(&variance), "{name}");
        }
        let embedding = make("embedding.weight", &[100, 40]);
        let variance = embedding.iter().map(|v| v * v).sum::<f64>() / 4000.0;
        assert!((0.019..0.021).contains(&variance.sqrt()), "{variance}");
    }

    #[test]
    fn a_name_gives_its_values_in_any_order() {
        assert_eq!(make("x.weight", &[2, 2]), make("x.weight", &[2, 2]));
        assert_ne!(make("x.weight", &[2, 2]), make("y.weight", &[2, 2]));
    }
}
