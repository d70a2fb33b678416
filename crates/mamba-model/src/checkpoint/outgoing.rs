//! Tensors on their way into files.

use candle_core::{DType, Device, Tensor};
use safetensors::View;

use super::TensorInfo;
use crate::Result;

/// A tensor that is to be written; converted when its turn comes, so that one at a time is there beside the model.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    /// What the file calls it.
    pub name: String,
    pub tensor: Tensor,
    /// The type that the file is to hold.
    pub dtype: DType,
}

impl Outgoing {
    /// What a checkpoint will say of it.
    pub fn info(&self) -> TensorInfo<'_> {
        TensorInfo { dtype: self.dtype, shape: self.tensor.dims() }
    }

    /// The bytes of its elements.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let tensor = self.tensor.to_dtype(self.dtype)?.to_device(&Device::Cpu)?;
        Ok(View::data(&tensor).into_owned())
    }
}
