//! A model whose parameters are variables.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use mamba_model::config::ModelConfig;
use mamba_model::{Model, Recompute};

use crate::parameters::{Parameter, Parameters};
use crate::{Error, Result};

/// A model and those of its parameters that are trained.
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
/// use mamba_train::TrainableModel;
///
/// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let start = Model::random(&config, 1, &Device::Cpu)?;
/// let everything = TrainableModel::new(&start, DType::BF16)?;
/// assert_eq!(everything.parameters().len(), start.parameters().len());
/// let norms = TrainableModel::only(&start, DType::F32, |name| name.contains("norm"))?;
/// assert_eq!(norms.parameters().len(), 3);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TrainableModel {
    model: Model,
    parameters: Parameters,
}

impl TrainableModel {
    /// Starts from the values of `source`, which stays as it is. The model computes in `dtype`; what is trained keeps the
    /// precision of `source`, and at least `f32`.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new(source: &Model, dtype: DType) -> Result<Self> {
        Self::only(source, dtype, |_| true)
    }

    /// The same, training only the parameters whose names `trained` accepts: the others are constants without gradients.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn only(source: &Model, dtype: DType, trained: impl Fn(&str) -> bool) -> Result<Self> {
        let values = source.parameters().iter().cloned().collect();
        Self::build(source.config(), values, dtype, source.device(), trained)
    }

    /// Over values by canonical name.
    pub(crate) fn build(
        config: &ModelConfig,
        values: HashMap<String, Tensor>,
        dtype: DType,
        device: &Device,
        trained: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let trained = values.keys().filter(|name| trained(name)).cloned().collect();
        let vars = Arc::new(Vars { values, trained, made: Mutex::default() });
        let weights = VarBuilder::from_backend(Box::new(Shared(vars.clone())), dtype, device.clone());
        let model = Model::new(config, weights)?;
        let made = std::mem::take(&mut *vars.made.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Self { model, parameters: Parameters::new(made.into_values().collect())? })
    }

    /// Computes a part of the model again in `backward()`; see [`Recompute`].
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Self { model: self.model.with_recompute(recompute), ..self }
    }

    /// Leaves out elements of the embedding and of what each branch adds while training, and never in a
    /// [`view`](Self::view) or [`snapshot`](Self::snapshot); see [`Model::with_dropout`]. Part `i` of step `s` of a
    /// [`Trainer`](crate::Trainer) draws the masks of pass `65536 s + i`, so that a training that is resumed draws those of
    /// one that was not interrupted.
    ///
    /// # Errors
    /// If `rate` is not from 0 to less than 1.
    pub fn with_dropout(self, rate: f64, seed: u64) -> Result<Self> {
        Ok(Self { model: self.model.with_dropout(rate, seed)?, ..self })
    }

    /// The model, which sees each change of the parameters at once.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What is trained.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The model as it is now, without variables, on the same memory: to evaluate, or to generate from, before the next step.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn view(&self) -> Result<Model> {
        let values = self.model.parameters().iter().map(|(name, x)| (name.clone(), x.detach())).collect();
        let weights = VarBuilder::from_tensors(values, self.model.dtype(), self.model.device());
        Ok(Model::new(self.model.config(), weights)?)
    }

    /// A copy of the model as it is now, without variables, in `dtype`, from the full precision: to save.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn snapshot(&self, dtype: DType) -> Result<Model> {
        let value = |(name, tensor): &(String, Tensor)| {
            let full = self.parameters.get(name).map_or(tensor, Parameter::value);
            Ok((name.clone(), full.detach().copy()?))
        };
        let values = self.model.parameters().iter().map(value).collect::<Result<HashMap<_, _>>>()?;
        let weights = VarBuilder::from_tensors(values, dtype, self.model.device());
        Ok(Model::new(self.model.config(), weights)?)
    }
}

/// Gives a model its parameters in the dtypes that it asks for, and notes which variables it made.
struct Vars {
    values: HashMap<String, Tensor>,
    trained: std::collections::HashSet<String>,
    made: Mutex<BTreeMap<String, Parameter>>,
}

struct Shared(Arc<Vars>);

impl Vars {
    fn value(&self, name: &str) -> Result<&Tensor> {
        self.values.get(name).ok_or_else(|| Error::State(format!("no value for the parameter `{name}`")))
    }

    fn get(&self, shape: &Shape, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let value = self.value(name)?;
        if value.shape() != shape {
            let (got, expected) = (value.dims(), shape.dims());
            return Err(Error::State(format!("`{name}` has shape {got:?}, expected {expected:?}")));
        }
        let converted = value.to_device(device)?.to_dtype(dtype)?.detach();
        if !self.trained.contains(name) {
            return Ok(converted);
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parameter) = made.get(name) {
            return Ok(parameter.var().as_tensor().clone());
        }
        // A copy: training changes it in place.
        let var = Var::from_tensor(&converted.copy()?.contiguous()?)?;
        let parameter = Parameter::new(name.to_owned(), var, &value.to_device(device)?)?;
        let tensor = parameter.var().as_tensor().clone();
        made.insert(name.to_owned(), parameter);
        Ok(tensor)
    }
}

impl SimpleBackend for Shared {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.0.get(&shape, name, dtype, device).map_err(candle_core::Error::wrap)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let value = self.0.value(name).map_err(candle_core::Error::wrap)?;
        value.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.values.contains_key(name)
    }
}
