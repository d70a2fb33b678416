//! What families do to a tensor before they store it, and how that is undone.

use candle_core::{DType, Shape, Tensor};

use crate::Result;

/// How a tensor of a model is kept in files, if not as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As it is.
    Same,
    /// Without its axes of length 1, as GGUF has convolutions.
    Squeezed,
    /// A vector as a matrix with rows of one element.
    Column,
    /// A vector as a matrix with this many rows.
    Rows(usize),
    /// `-exp(x)` in `f32` instead of `x`: the decays of a state rather than their logarithms.
    Decay,
    /// Both of the last, for a vector.
    DecayColumn,
}

/// How a family keeps the tensors of a model, by their canonical names.
pub(crate) type Forms = Box<dyn Fn(&str) -> Form + Send + Sync>;

impl Form {
    /// The shape in a file of a tensor of this shape.
    pub fn shape_in_file(self, shape: &[usize]) -> Vec<usize> {
        match self {
            Self::Same | Self::Decay => shape.to_vec(),
            Self::Squeezed => without_ones(shape),
            Self::Column | Self::DecayColumn => vec![shape.iter().product(), 1],
            Self::Rows(rows) => vec![rows, shape.iter().product::<usize>() / rows.max(1)],
        }
    }

    /// The tensor of a model, of this shape and type; `file` gives that of the file in the type that it is asked for.
    pub fn read(
        self,
        file: impl FnOnce(DType) -> Result<Tensor>,
        shape: &Shape,
        dtype: DType,
    ) -> Result<Tensor> {
        let tensor = match self {
            // In f64, so that A comes back to the bit in all but rare cases.
            Self::Decay | Self::DecayColumn => file(DType::F64)?.neg()?.log()?.to_dtype(dtype)?,
            _ => file(dtype)?,
        };
        Ok(if tensor.shape() == shape { tensor } else { tensor.reshape(shape)? })
    }

    /// The tensor of a file for one of a model.
    pub fn write(self, tensor: &Tensor) -> Result<Tensor> {
        let shape = self.shape_in_file(tensor.dims());
        let tensor = match self {
            Self::Decay | Self::DecayColumn => {
                tensor.to_dtype(DType::F64)?.exp()?.neg()?.to_dtype(DType::F32)?
            }
            _ => tensor.clone(),
        };
        Ok(tensor.reshape(shape)?)
    }
}

/// A shape without its axes of length 1.
pub(super) fn without_ones(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().filter(|dim| *dim != 1).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let x = Tensor::new(&[0.5f32, -1.25, 3.0, 0.0, 2.0, 1.0], &Device::Cpu).unwrap();
        for (form, shape, in_file) in [
            (Form::Same, vec![2, 3], vec![2, 3]),
            (Form::Squeezed, vec![2, 1, 3], vec![2, 3]),
            (Form::Column, vec![6], vec![6, 1]),
            (Form::Rows(2), vec![6], vec![2, 3]),
            (Form::Decay, vec![3, 2], vec![3, 2]),
            (Form::DecayColumn, vec![6], vec![6, 1]),
        ] {
            let model = x.reshape(shape).unwrap();
            let file = form.write(&model).unwrap();
            assert_eq!(file.dims(), in_file, "{form:?}");
            let back = form.read(|dtype| Ok(file.to_dtype(dtype)?), model.shape(), DType::F32).unwrap();
            assert_eq!(back.dims(), model.dims(), "{form:?}");
            let gap = (back - model).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(gap.to_scalar::<f32>().unwrap() < 1e-6, "{form:?}");
        }
    }
}
