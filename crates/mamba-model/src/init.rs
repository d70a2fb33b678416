//! Initial values as the published code draws them, from a seed, for training from scratch and for benchmarks.

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use crate::Result;
use crate::adapter::is_adapter;
use crate::config::{Fields, ModelConfig};

/// By what initial values are drawn, beside the shapes of a [`ModelConfig`], which they do not change.
#[derive(Debug, Clone, PartialEq)]
pub struct InitConfig {
    /// Bounds of the step size.
    pub dt_range: (f64, f64),
    /// The least step size.
    pub dt_floor: f64,
    /// What the matrix from `dt` to the channels of Mamba-1 is multiplied by.
    pub dt_scale: f64,
    /// Bounds of `-A` of Mamba-2.
    pub a_range: (f64, f64),
    /// Bound of the filters of Mamba-2's convolution; one over the root of their width if absent.
    pub conv_bound: Option<f64>,
    /// Standard deviation of the embedding.
    pub embedding_std: f64,
}

/// As published.
impl Default for InitConfig {
    fn default() -> Self {
        Self {
            dt_range: (1e-3, 1e-1),
            dt_floor: 1e-4,
            dt_scale: 1.0,
            a_range: (1.0, 16.0),
            conv_bound: None,
            embedding_std: 0.02,
        }
    }
}

impl InitConfig {
    /// Reads what a `config.json` says of initial values: `dt_min`, `dt_max`, `dt_init_floor`, `dt_scale`, `A_init_range` and
    /// `conv_init` in the `ssm_cfg` of state-spaces; `time_step_min`, `time_step_max`, `time_step_floor`, `time_step_scale` in a
    /// configuration of transformers.
    ///
    /// # Errors
    /// If the text is not a JSON object, or a field is no number or pair of numbers that can be drawn by.
    ///
    /// # Example
    /// ```
    /// use mamba_model::InitConfig;
    ///
    /// let init = InitConfig::from_json(r#"{"d_model": 64, "ssm_cfg": {"layer": "Mamba2", "conv_init": 0.1, "dt_max": 0.2}}"#)?;
    /// assert_eq!((init.conv_bound, init.dt_range), (Some(0.1), (0.001, 0.2)));
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn from_json(text: &str) -> Result<Self> {
        let fields = Fields::parse(text, None)?;
        let of_transformers = fields.str_opt("model_type")?.is_some();
        let (fields, [low, high, floor, scale]) = match of_transformers {
            true => (fields, ["time_step_min", "time_step_max", "time_step_floor", "time_step_scale"]),
            false => (fields.object("ssm_cfg")?, ["dt_min", "dt_max", "dt_init_floor", "dt_scale"]),
        };
        let positive = |field: &str, default: f64| match fields.f64_or(field, default)? {
            value if value > 0.0 && value.is_finite() => Ok(value),
            value => Err(fields.error(field, format!("is {value}, expected a positive number"))),
        };
        let usual = Self::default();
        let (a_low, a_high) = fields.range_or("A_init_range", usual.a_range)?;
        if !(0.0 < a_low && a_low <= a_high && a_high.is_finite()) {
            let message = format!("is [{a_low}, {a_high}], expected 0 < low ≤ high");
            return Err(fields.error("A_init_range", message));
        }
        let dt_range = (positive(low, usual.dt_range.0)?, positive(high, usual.dt_range.1)?);
        if dt_range.0 > dt_range.1 {
            return Err(fields.error(low, format!("is {}, above {high} {}", dt_range.0, dt_range.1)));
        }
        Ok(Self {
            dt_range,
            dt_floor: positive(floor, usual.dt_floor)?,
            dt_scale: positive(scale, usual.dt_scale)?,
            a_range: (a_low, a_high),
            conv_bound: fields.get("conv_init").map(|_| positive("conv_init", 0.0)).transpose()?,
            ..usual
        })
    }
}

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
    init: InitConfig,
}

impl Initializer {
    /// For a model of this configuration, with the published distributions.
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        let branches = config.layers.iter().map(|layer| layer.branches.len()).sum();
        Self { seed, branches, init: InitConfig::default() }
    }

    /// The same with other distributions.
    ///
    /// # Example
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_nn::VarBuilder;
    /// use mamba_model::{InitConfig, Initializer, Model};
    /// use mamba_model::config::{Mamba2Config, MixerSpec, ModelConfig};
    ///
    /// let mixer = Mamba2Config { d_state: 16, headdim: 8, ..Mamba2Config::new(16) };
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba2(mixer));
    /// let init = InitConfig { conv_bound: Some(0.1), ..Default::default() };
    /// let initializer = Initializer::new(&config, 0).with_init(init);
    /// let model = Model::new(&config, VarBuilder::from_backend(Box::new(initializer), DType::F32, Device::Cpu))?;
    /// let (_, filters) = model.parameters().iter().find(|(name, _)| name.ends_with("conv1d.weight")).unwrap();
    /// assert!(filters.abs()?.max_all()?.to_scalar::<f32>()? <= 0.1);
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn with_init(self, init: InitConfig) -> Self {
        Self { init, ..self }
    }

    fn values(&self, name: &str, shape: &[usize]) -> Vec<f64> {
        let mut random = ChaCha12Rng::seed_from_u64(self.seed ^ hash(name));
        let count: usize = shape.iter().product();
        let InitConfig { dt_range, dt_floor, dt_scale, a_range, conv_bound, embedding_std } = self.init;
        let mut draw = |low: f64, high: f64| low + (high - low) * random.random::<f64>();
        let (parent, leaf) = name.rsplit_once('.').unwrap_or(("", name));
        let module = parent.rsplit('.').next().unwrap_or_default();
        match (module, leaf) {
            (_, "A_log") if shape.len() > 1 => {
                (0..count).map(|i| ((i % shape[shape.len() - 1] + 1) as f64).ln()).collect()
            }
            (_, "A_log") => (0..count).map(|_| draw(a_range.0, a_range.1).ln()).collect(),
            (_, "D") => vec![1.0; count],
            (_, "dt_bias") | ("dt_proj", "bias") => {
                let step = || draw(dt_range.0.ln(), dt_range.1.ln()).exp().max(dt_floor);
                std::iter::repeat_with(step).take(count).map(inverse_softplus).collect()
            }
            (norm, "weight") if norm.contains("norm") => vec![1.0; count],
            ("embedding", _) => {
                let mut normal = || {
                    let (u, v) = (draw(f64::MIN_POSITIVE, 1.0), draw(0.0, std::f64::consts::TAU));
                    (-2.0 * u.ln()).sqrt() * v.cos() * embedding_std
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
                let bound = match (module, conv_bound) {
                    ("conv1d", Some(bound)) if parent.ends_with("mamba2.conv1d") => bound,
                    ("dt_proj", _) => dt_scale / fan_in.sqrt(),
                    _ => 1.0 / (fan_in.sqrt() * scale),
                };
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

    /// What a configuration of either kind says is what is drawn by.
    #[test]
    fn distributions_of_configurations() {
        let of = |text: &str| InitConfig::from_json(text).unwrap();
        let usual = InitConfig::default();
        assert_eq!(of("{}"), usual);
        assert_eq!(of(r#"{"model_type": "mamba2", "ssm_cfg": {"conv_init": 0.5}}"#), usual);
        let state_spaces =
            of(r#"{"ssm_cfg": {"conv_init": 0.25, "A_init_range": [2, 3], "dt_min": 0.01, "dt_max": 0.02,
                                             "dt_init_floor": 0.015, "dt_scale": 0.5}}"#);
        let expected = InitConfig {
            dt_range: (0.01, 0.02),
            dt_floor: 0.015,
            dt_scale: 0.5,
            a_range: (2.0, 3.0),
            conv_bound: Some(0.25),
            ..usual.clone()
        };
        assert_eq!(state_spaces, expected);
        let text = r#"{"model_type": "mamba2", "time_step_min": 0.01, "time_step_max": 0.02, "time_step_floor": 0.015,
                       "time_step_scale": 0.5}"#;
        assert_eq!(of(text), InitConfig { a_range: usual.a_range, conv_bound: None, ..expected.clone() });

        let config = ModelConfig::uniform(10, 8, 4, MixerSpec::Mamba2(Mamba2Config::new(8)));
        let make = |name: &str, shape: &[usize]| {
            Initializer::new(&config, 7).with_init(expected.clone()).values(name, shape)
        };
        let range = |values: Vec<f64>| {
            values.into_iter().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)))
        };
        let within = |got: (f64, f64), want: (f64, f64)| {
            let slack = 0.02 * (want.1 - want.0);
            assert!(got.0 >= want.0 - 1e-9 && got.1 <= want.1 + 1e-9, "{got:?} leaves {want:?}");
            assert!(got.0 <= want.0 + slack && got.1 >= want.1 - slack, "{got:?} does not fill {want:?}");
        };
        within(range(make("layers.0.0.mamba2.conv1d.weight", &[500, 1, 4])), (-0.25, 0.25));
        within(range(make("layers.0.0.mamba1.conv1d.weight", &[500, 1, 4])), (-0.5, 0.5));
        within(range(make("layers.0.0.mamba1.dt_proj.weight", &[500, 4])), (-0.25, 0.25));
        within(
            range(make("layers.0.0.mamba2.A_log", &[2000]).into_iter().map(f64::exp).collect()),
            (2.0, 3.0),
        );
        let step = |x: f64| x.exp().ln_1p();
        within(
            range(make("layers.0.0.mamba2.dt_bias", &[2000]).into_iter().map(step).collect()),
            (0.015, 0.02),
        );

        for (bad, field) in [
            (r#"{"ssm_cfg": {"conv_init": 0}}"#, "ssm_cfg.conv_init"),
            (r#"{"ssm_cfg": {"A_init_range": [0, 16]}}"#, "ssm_cfg.A_init_range"),
            (r#"{"ssm_cfg": {"A_init_range": [3, 2]}}"#, "ssm_cfg.A_init_range"),
            (r#"{"ssm_cfg": {"dt_min": 0.5}}"#, "ssm_cfg.dt_min"),
            (r#"{"model_type": "mamba", "time_step_floor": -1}"#, "time_step_floor"),
        ] {
            let error = InitConfig::from_json(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}` is ")), "{error}");
        }
    }

    #[test]
    fn distributions() {
        let InitConfig { dt_range: (dt_min, dt_max), dt_floor, .. } = InitConfig::default();
        let softplus = |x: f64| x.exp().ln_1p();
        let steps: Vec<f64> = make("layers.0.0.mamba2.dt_bias", &[4000]).into_iter().map(softplus).collect();
        assert!(steps.iter().all(|s| (dt_min * 0.999..=dt_max * 1.001).contains(s)));
        // Log-uniform: half of them below the geometric mean.
        let below = steps.iter().filter(|s| **s < (dt_min * dt_max).sqrt()).count();
        assert!((1850..2150).contains(&below), "{below}");
        let a: Vec<f64> = make("layers.0.0.mamba2.A_log", &[4000]).into_iter().map(f64::exp).collect();
        assert!(a.iter().all(|a| (0.999..=16.001).contains(a)));
        let mean = a.iter().sum::<f64>() / 4000.0;
        assert!((8.2..8.8).contains(&mean), "{mean}");
        // The floor counts for tiny ranges only; every value goes through softplus to a step size again.
        assert!((softplus(inverse_softplus(dt_floor)) / dt_floor - 1.0).abs() < 1e-9);
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
