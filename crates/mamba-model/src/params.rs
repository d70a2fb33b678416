//! Where a model's modules get their parameters, and the list of them that stays with the model.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;

use crate::Result;

/// A place in the tree of parameters. Everything that is read through it is also noted under its canonical name.
#[derive(Clone)]
pub(crate) struct Params<'a> {
    weights: VarBuilder<'a>,
    noted: Rc<RefCell<Vec<(String, Tensor)>>>,
}

impl<'a> Params<'a> {
    pub(crate) fn new(weights: VarBuilder<'a>) -> Self {
        Self { weights, noted: Rc::default() }
    }

    /// The place below this one.
    pub(crate) fn at(&self, name: impl ToString) -> Self {
        Self { weights: self.weights.pp(name), noted: self.noted.clone() }
    }

    /// Where the parameters are.
    pub(crate) fn device(&self) -> &Device {
        self.weights.device()
    }

    /// The parameter `name`, in the dtype of the model.
    pub(crate) fn get(&self, shape: impl Into<Shape>, name: &str) -> Result<Tensor> {
        self.read(shape.into(), name, self.weights.dtype())
    }

    /// The parameter `name`, in `f32` whatever the dtype of the model: what the state depends on exponentially.
    pub(crate) fn get_f32(&self, shape: impl Into<Shape>, name: &str) -> Result<Tensor> {
        let dtype = if self.weights.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        self.read(shape.into(), name, dtype)
    }

    /// The parameter `name` if `wanted`.
    pub(crate) fn get_if(&self, wanted: bool, shape: impl Into<Shape>, name: &str) -> Result<Option<Tensor>> {
        wanted.then(|| self.get(shape, name)).transpose()
    }

    /// An extent of the parameter `name`, if there is such a parameter.
    pub(crate) fn extent_if_present(&self, name: &str, axis: usize) -> Result<Option<usize>> {
        // `VarBuilder::zeros` says that it has whatever it is asked for, and knows the shape of nothing.
        let has_anything = self.weights.contains_tensor("a name that no parameter has");
        match self.weights.contains_tensor(name) && !has_anything {
            true => Ok(Some(self.weights.get_unchecked(name)?.dim(axis)?)),
            false => Ok(None),
        }
    }

    fn read(&self, shape: Shape, name: &str, dtype: DType) -> Result<Tensor> {
        let tensor = self.weights.get_with_hints_dtype(shape, name, candle_nn::Init::Const(0.0), dtype)?;
        let prefix = self.weights.prefix();
        let full = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        self.noted.borrow_mut().push((full, tensor.clone()));
        Ok(tensor)
    }

    /// The dtype of the model.
    pub(crate) fn dtype(&self) -> DType {
        self.weights.dtype()
    }

    /// How many parameters were read so far.
    pub(crate) fn count(&self) -> usize {
        self.noted.borrow().len()
    }

    /// The name of this place.
    pub(crate) fn prefix(&self) -> String {
        self.weights.prefix()
    }

    /// Everything that was read so far, by canonical name.
    pub(crate) fn noted(&self) -> Vec<(String, Tensor)> {
        self.noted.borrow().clone()
    }
}
