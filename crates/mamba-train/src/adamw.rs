//! Adam with decoupled weight decay, in groups of parameters.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use mamba_ops::{AdamWUpdate, adamw_update};
use serde::{Deserialize, Serialize};

use crate::error::require;
use crate::gradients::Gradients;
use crate::parameters::{Parameter, Parameters};
use crate::patterns::matches;
use crate::{Error, Result};

/// Options of [`AdamW`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWOptions {
    /// How much of the mean of gradients stays each step.
    pub beta1: f64,
    /// How much of the mean of their squares stays each step.
    pub beta2: f64,
    /// Added to the root of that mean.
    pub eps: f64,
    /// How much of a parameter goes each step, times the learning rate, where its group says nothing else.
    pub weight_decay: f64,
    /// Exceptions; the first group with a matching pattern counts.
    pub groups: Vec<ParameterGroup>,
}

/// Parameters that are trained otherwise than the rest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// Patterns of names; `*` stands for any text.
    pub names: Vec<String>,
    /// Factor of the learning rate.
    #[serde(default = "one")]
    pub lr_scale: f64,
    /// In the place of the general weight decay.
    #[serde(default)]
    pub weight_decay: Option<f64>,
}

fn one() -> f64 {
    1.0
}

/// Names of parameters that decay would harm: what decays or scales a state, norms, and biases.
pub const NO_WEIGHT_DECAY: [&str; 7] =
    ["*A_log", "*.D", "*dt_bias", "*norm.weight", "norm_f.weight", "*_norm.weight", "*bias"];

impl Default for AdamWOptions {
    /// The published recipe of Mamba: betas of 0.9 and 0.95, a weight decay of 0.1 but for [`NO_WEIGHT_DECAY`].
    fn default() -> Self {
        let names = NO_WEIGHT_DECAY.map(str::to_owned).to_vec();
        let exempt = ParameterGroup { names, lr_scale: 1.0, weight_decay: Some(0.0) };
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, groups: vec![exempt] }
    }
}

impl AdamWOptions {
    fn check(&self) -> Result<()> {
        let beta = |name, value: f64| {
            require((0.0..1.0).contains(&value), name, || format!("is {value}, expected 0 ≤ {name} < 1"))
        };
        beta("beta1", self.beta1)?;
        beta("beta2", self.beta2)?;
        require(self.eps >= 0.0, "eps", || format!("is {}, expected at least 0", self.eps))?;
        require(self.weight_decay >= 0.0, "weight_decay", || {
            format!("is {}, expected at least 0", self.weight_decay)
        })
    }

    /// Factor of the learning rate, and weight decay, of a parameter.
    fn of(&self, name: &str) -> (f64, f64) {
        let group = self.groups.iter().find(|group| group.names.iter().any(|p| matches(p, name)));
        match group {
            Some(group) => (group.lr_scale, group.weight_decay.unwrap_or(self.weight_decay)),
            None => (1.0, self.weight_decay),
        }
    }
}

/// Adam with decoupled weight decay; moments and updates are `f32` whatever the model computes in.
///
/// `m ← β₁ m + (1 - β₁) g`, `v ← β₂ v + (1 - β₂) g²`,
/// `p ← (1 - η λ) p - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)`.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use mamba_train::{AdamW, AdamWOptions, Gradients, Parameters};
///
/// let x = Var::new(&[1f32, -2.0], &Device::Cpu)?;
/// let parameters = Parameters::from_vars([("x".to_owned(), x.clone())])?;
/// let mut optimizer = AdamW::new(&parameters, AdamWOptions::default())?;
/// for _ in 0..100 {
///     let gradients = Gradients::of(&x.sqr()?.sum_all()?, &parameters)?;
///     optimizer.step(&gradients, 0.05)?;
/// }
/// assert!(x.abs()?.max_all()?.to_scalar::<f32>()? < 0.1);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
/// # Source
/// Loshchilov and Hutter, 2019; the order of operations is that of `torch.optim.AdamW`.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    steps: usize,
    slots: Vec<Slot>,
}

/// A parameter with its moments, `f32` (`f64` for a parameter of `f64`).
#[derive(Debug)]
struct Slot {
    parameter: Parameter,
    first: Tensor,
    second: Tensor,
    lr_scale: f64,
    weight_decay: f64,
    /// How often it had a gradient.
    steps: usize,
}

impl AdamW {
    /// An optimizer with empty moments.
    ///
    /// # Errors
    /// If an option cannot be, or the device is out of memory.
    pub fn new(parameters: &Parameters, options: AdamWOptions) -> Result<Self> {
        options.check()?;
        let slot = |parameter: &Parameter| {
            let (lr_scale, weight_decay) = options.of(parameter.name());
            let value = parameter.value();
            // Moments are changed in place: each needs storage of its own.
            let zeros = || Tensor::zeros(value.shape(), value.dtype(), value.device());
            let (first, second) = (zeros()?, zeros()?);
            Ok(Slot { parameter: parameter.clone(), first, second, lr_scale, weight_decay, steps: 0 })
        };
        let slots = parameters.iter().map(slot).collect::<Result<_>>()?;
        Ok(Self { options, steps: 0, slots })
    }

    /// The options.
    pub fn options(&self) -> &AdamWOptions {
        &self.options
    }

    /// Steps so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The weight decay of a parameter, if it is trained.
    pub fn weight_decay(&self, name: &str) -> Option<f64> {
        self.slots.iter().find(|slot| slot.parameter.name() == name).map(|slot| slot.weight_decay)
    }

    /// Changes all parameters that have a gradient, at a learning rate.
    ///
    /// # Errors
    /// If a gradient has another shape than its parameter.
    pub fn step(&mut self, gradients: &Gradients, lr: f64) -> Result<()> {
        self.steps += 1;
        for slot in &mut self.slots {
            let Some(grad) = gradients.get(slot.parameter.name()) else { continue };
            if grad.dims() != slot.first.dims() {
                let (name, got, expected) = (slot.parameter.name(), grad.dims(), slot.first.dims());
                let message = format!("the gradient of `{name}` has shape {got:?}, expected {expected:?}");
                return Err(Error::State(message));
            }
            slot.steps += 1;
            let rate = lr * slot.lr_scale;
            let AdamWOptions { beta1, beta2, eps, .. } = self.options;
            let Slot { parameter, first, second, weight_decay, steps, .. } = &*slot;
            adamw_update(&AdamWUpdate {
                rounded: parameter.rounded(),
                grad_scale: gradients.factor(),
                lr: rate,
                weight_decay: *weight_decay,
                beta1,
                beta2,
                eps,
                ..AdamWUpdate::new(parameter.value(), first, second, grad, *steps)
            })?;
        }
        Ok(())
    }

    /// The moments by name, and how often each parameter was updated: what [`load`](Self::load) takes.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for slot in &self.slots {
            let name = slot.parameter.name();
            state.insert(format!("exp_avg.{name}"), slot.first.copy()?);
            state.insert(format!("exp_avg_sq.{name}"), slot.second.copy()?);
            let steps = Tensor::new(slot.steps as i64, &candle_core::Device::Cpu)?;
            state.insert(format!("step.{name}"), steps);
        }
        Ok(state)
    }

    /// Goes on from a state that [`state`](Self::state) gave, after `steps` steps.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>, steps: usize) -> Result<()> {
        let find = |kind: &str, name: &str| {
            let key = format!("{kind}.{name}");
            state.get(&key).ok_or_else(|| Error::State(format!("no tensor `{key}`")))
        };
        for slot in &mut self.slots {
            let name = slot.parameter.name();
            for (kind, moment) in [("exp_avg", &mut slot.first), ("exp_avg_sq", &mut slot.second)] {
                let saved = find(kind, name)?;
                if saved.dims() != moment.dims() {
                    let (got, expected) = (saved.dims(), moment.dims());
                    let message = format!("`{kind}.{name}` has shape {got:?}, expected {expected:?}");
                    return Err(Error::State(message));
                }
                *moment = saved.to_dtype(moment.dtype())?.to_device(moment.device())?.copy()?;
            }
            slot.steps = find("step", name)?.to_dtype(DType::I64)?.to_scalar::<i64>()?.max(0) as usize;
        }
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// The pass over slices against plain tensor operations in f64.
    #[test]
    fn slices_equal_tensors() -> Result<()> {
        let values: Vec<f64> = (0..70_001).map(|i| ((i * 37 % 1001) as f64 - 500.0) / 300.0).collect();
        let start = Tensor::new(values, &Device::Cpu)?;
        let mut results = vec![];
        for dtype in [DType::F32, DType::F64] {
            let var = Var::from_tensor(&start.to_dtype(dtype)?)?;
            let parameters = Parameters::from_vars([("x".to_owned(), var.clone())])?;
            let mut optimizer = AdamW::new(&parameters, AdamWOptions::default())?;
            for step in 0..5 {
                let loss = (var.sin()? * (step + 1) as f64)?.sum_all()?;
                let mut gradients = Gradients::of(&loss, &parameters)?;
                gradients.clip(1.0)?;
                optimizer.step(&gradients, 0.1)?;
            }
            results.push(var.to_dtype(DType::F64)?);
        }
        let gap = (&results[0] - &results[1])?.abs()?.max_all()?.to_scalar::<f64>()?;
        let moved = (&results[1] - &start)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(gap < 1e-5 && moved > 0.1, "{gap} {moved}");
        Ok(())
    }

    #[test]
    fn decays_belong_to_matrices() {
        let options = AdamWOptions::default();
        for name in [
            "layers.0.0.mamba1.A_log",
            "layers.0.0.mamba2.D",
            "layers.0.0.mamba2.dt_bias",
            "layers.0.0.norm.weight",
            "layers.0.0.mamba2.norm.weight",
            "layers.0.0.mamba1.dt_norm.weight",
            "norm_f.weight",
            "norm_f.bias",
            "layers.0.0.mamba1.conv1d.bias",
            "layers.0.0.mamba1.dt_proj.bias",
        ] {
            assert_eq!(options.of(name), (1.0, 0.0), "{name}");
        }
        for name in
            ["embedding.weight", "layers.0.0.mamba1.in_proj.weight", "layers.0.0.mamba1.conv1d.weight"]
        {
            assert_eq!(options.of(name), (1.0, 0.1), "{name}");
        }
    }
}
