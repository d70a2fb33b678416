//! What is trained: variables by name, each with its value in full precision.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;

use crate::{Error, Result};

/// A variable that a model computes with, and its value in at least `f32`, which the optimizer changes.
///
/// For a variable in `f32` or `f64` both are the same; for `f16` and `bf16` the variable is the rounded value.
#[derive(Debug, Clone)]
pub struct Parameter {
    name: String,
    var: Var,
    master: Var,
}

impl Parameter {
    /// A parameter with the value of `value`, which has at least the precision of `var`.
    pub(crate) fn new(name: String, var: Var, value: &Tensor) -> Result<Self> {
        let master = match var.dtype() {
            DType::F32 | DType::F64 => var.clone(),
            _ => Var::from_tensor(&value.to_dtype(DType::F32)?.detach().copy()?)?,
        };
        Ok(Self { name, var, master })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the model computes with.
    pub fn var(&self) -> &Var {
        &self.var
    }

    /// The value in full precision, `f32` (`f64` if the variable is).
    pub fn value(&self) -> &Tensor {
        &self.master
    }

    /// Gives the parameter another value.
    ///
    /// # Errors
    /// If the shape is another one.
    pub fn set(&self, value: &Tensor) -> Result<()> {
        self.master
            .set(&value.to_dtype(self.master.dtype())?.to_device(self.master.device())?.contiguous()?)?;
        self.publish()
    }

    /// Rounds the value to what the model computes with.
    pub(crate) fn publish(&self) -> Result<()> {
        if self.var.dtype() != self.master.dtype() {
            self.var.set(&self.master.detach().to_dtype(self.var.dtype())?)?;
        }
        Ok(())
    }

    /// What the model computes with, where that is another tensor than the value.
    pub(crate) fn rounded(&self) -> Option<&Tensor> {
        (self.var.dtype() != self.master.dtype()).then(|| self.var.as_tensor())
    }
}

/// Parameters in the order of their names, so that everything that is summed over them is the same in every run.
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{Init, VarMap};
/// use mamba_train::Parameters;
///
/// let vars = VarMap::new();
/// for name in ["b", "a"] {
///     vars.get(3, name, Init::Const(1.0), DType::F32, &Device::Cpu)?;
/// }
/// let parameters = Parameters::from_varmap(&vars)?;
/// let names: Vec<&str> = parameters.iter().map(|p| p.name()).collect();
/// assert_eq!(names, ["a", "b"]);
/// assert_eq!(parameters.elements(), 6);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Parameters(Vec<Parameter>);

impl Parameters {
    /// Takes variables by name.
    ///
    /// # Errors
    /// If two have the same name, or the device is out of memory.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, Var)>) -> Result<Self> {
        let parameters = vars.into_iter().map(|(name, var)| {
            let value = var.as_tensor().clone();
            Parameter::new(name, var, &value)
        });
        Self::new(parameters.collect::<Result<_>>()?)
    }

    /// Takes the variables of a [`VarMap`].
    ///
    /// # Errors
    /// As [`from_vars`](Self::from_vars).
    pub fn from_varmap(vars: &VarMap) -> Result<Self> {
        let vars = vars.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::from_vars(vars.iter().map(|(name, var)| (name.clone(), var.clone())))
    }

    pub(crate) fn new(mut parameters: Vec<Parameter>) -> Result<Self> {
        parameters.sort_by(|a, b| a.name.cmp(&b.name));
        match parameters.windows(2).find(|pair| pair[0].name == pair[1].name) {
            Some(pair) => Err(Error::State(format!("two parameters have the name `{}`", pair[0].name))),
            None => Ok(Self(parameters)),
        }
    }

    /// All of them in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.0.iter()
    }

    /// The one of this name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        let place = self.0.binary_search_by(|parameter| parameter.name.as_str().cmp(name));
        place.ok().map(|i| &self.0[i])
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many numbers they hold.
    pub fn elements(&self) -> usize {
        self.0.iter().map(|parameter| parameter.var.elem_count()).sum()
    }

    /// Copies of all values by name.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        self.0.iter().map(|p| Ok((p.name.clone(), p.value().detach().copy()?))).collect()
    }
}

impl<'a> IntoIterator for &'a Parameters {
    type Item = &'a Parameter;
    type IntoIter = std::slice::Iter<'a, Parameter>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
