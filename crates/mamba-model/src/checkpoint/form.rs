//! What families do to a tensor before they store it, and how that is undone.

use candle_core::{DType, Shape, Tensor};

use crate::{Error, Result};

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
    /// As one of several that are stacked along a first axis.
    Expert {
        /// Which one.
        index: usize,
        /// Of how many.
        count: usize,
    },
    /// As two tensors: the first half of the rows under the name with `gate`, the second under that with `up`.
    GateUp,
    /// With the rows of each of so many heads in another order, in which the two halves take turns.
    Turned {
        /// How many heads.
        heads: usize,
    },
}

/// How a family keeps the tensors of a model, by their canonical names.
pub(crate) type Forms = Box<dyn Fn(&str) -> Form + Send + Sync>;

impl Form {
    /// The shape in a file of a tensor of this shape.
    pub fn shape_in_file(self, shape: &[usize]) -> Vec<usize> {
        match self {
            Self::Same | Self::Decay | Self::Turned { .. } => shape.to_vec(),
            Self::GateUp => {
                let mut half = shape.to_vec();
                if let Some(rows) = half.get_mut(rows_axis(shape)) {
                    *rows /= 2;
                }
                half
            }
            Self::Squeezed => without_ones(shape),
            Self::Expert { count, .. } => [&[count], shape].concat(),
            Self::Column | Self::DecayColumn => vec![shape.iter().product(), 1],
            Self::Rows(rows) => vec![rows, shape.iter().product::<usize>() / rows.max(1)],
        }
    }

    /// The names under which a file keeps the tensor, the first of which is this one.
    pub fn names(self, name: String) -> Vec<String> {
        match self {
            Self::GateUp => vec![name.clone(), name.replacen("gate", "up", 1)],
            _ => vec![name],
        }
    }

    /// Whether the values are those of a matrix that a file may keep in any type.
    pub fn keeps_matrices(self) -> bool {
        matches!(self, Self::Same | Self::Expert { .. } | Self::GateUp | Self::Turned { .. })
    }

    /// The tensor of a model, of this shape and type; `file` gives one of the file by its name in the type that it is
    /// asked for, or a part of so many of it.
    pub fn read(
        self,
        names: &[String],
        file: impl Fn(&str, DType, Option<(usize, usize)>) -> Result<Tensor>,
        shape: &Shape,
        dtype: DType,
    ) -> Result<Tensor> {
        let [first, others @ ..] = names else { return Err(Error::Input("a tensor without a name".into())) };
        let tensor = match self {
            Self::Decay | Self::DecayColumn => logarithms(file(first, DType::F32, None)?)?.to_dtype(dtype)?,
            Self::Expert { index, count } => file(first, dtype, Some((index, count)))?,
            Self::Turned { heads } => turned(&file(first, dtype, None)?, heads, |half| (half, 2))?,
            Self::GateUp => {
                let (axis, half) = (rows_axis(shape.dims()), self.shape_in_file(shape.dims()));
                let part = file(first, dtype, None)?.reshape(half.as_slice())?;
                let whole = Tensor::zeros(shape, dtype, part.device())?;
                whole.slice_set(&part, axis, 0)?;
                drop(part); // there is never more than one beside the whole
                for (place, name) in others.iter().enumerate() {
                    let part = file(name, dtype, None)?.reshape(half.as_slice())?;
                    whole.slice_set(&part, axis, (place + 1) * half[axis])?;
                }
                whole
            }
            _ => file(first, dtype, None)?,
        };
        Ok(if tensor.shape() == shape { tensor } else { tensor.reshape(shape)? })
    }

    /// The tensor that a file keeps under one of its [`names`](Self::names), of one of a model, or of all that are stacked.
    pub fn write(self, tensors: &[Tensor], place: usize) -> Result<Tensor> {
        let [tensor, ..] = tensors else { return Ok(Tensor::stack(tensors, 0)?) };
        let shape = self.shape_in_file(tensor.dims());
        let tensor = match self {
            Self::Expert { .. } => Tensor::stack(tensors, 0)?,
            Self::GateUp => {
                let axis = rows_axis(tensor.dims());
                tensor.narrow(axis, place * shape[axis], shape[axis])?
            }
            Self::Turned { heads } => turned(tensor, heads, |half| (2, half))?,
            // As models do it.
            Self::Decay | Self::DecayColumn => tensor.to_dtype(DType::F32)?.exp()?.neg()?,
            _ => tensor.clone(),
        };
        Ok(tensor.reshape(shape)?)
    }
}

/// Logarithms of values with the sign turned, all `f32`, of which `exp` in `f32` gives the same values to the bit, if there are such.
fn logarithms(negative: Tensor) -> Result<Tensor> {
    // `exp` is not always rounded to the nearest: look from the value itself outwards, as far as half a unit in its last place.
    const STEP: f64 = 1.0 / (1 << 27) as f64;
    let steps = [0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8].map(f64::from);
    let log = |negative: f32| {
        let x = -f64::from(negative);
        let mut logs = steps.into_iter().map(|step| (x * (1.0 + step * STEP)).ln() as f32);
        logs.find(|log| log.exp() == -negative).unwrap_or(x.ln() as f32)
    };
    let (shape, device) = (negative.shape().clone(), negative.device().clone());
    let mut values = negative.flatten_all()?.to_vec1::<f32>()?;
    drop(negative); // what is made of it takes its place
    values.iter_mut().for_each(|value| *value = log(*value));
    Ok(Tensor::from_vec(values, shape, &device)?)
}

/// The axis of a matrix, of a stack of them or of a vector along which its outputs lie.
fn rows_axis(shape: &[usize]) -> usize {
    shape.len().saturating_sub(2)
}

/// The rows of each head, as a matrix of which `sides` gives the shape by the half of their number, transposed.
fn turned(tensor: &Tensor, heads: usize, sides: impl Fn(usize) -> (usize, usize)) -> Result<Tensor> {
    let rows = tensor.dim(0)?;
    let (a, b) = sides(rows / heads.max(1) / 2);
    let rest = tensor.elem_count() / rows.max(1);
    Ok(tensor.reshape((heads, a, b, rest))?.transpose(1, 2)?.reshape(tensor.shape())?)
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
        let x = Tensor::new(&[0.5f32, -1.25, 3.0, 0.0, 2.0, 1.0, 7.0, -4.0], &Device::Cpu).unwrap();
        for (form, shape, in_file) in [
            (Form::Same, vec![2, 4], vec![2, 4]),
            (Form::Squeezed, vec![2, 1, 4], vec![2, 4]),
            (Form::Column, vec![8], vec![8, 1]),
            (Form::Rows(2), vec![8], vec![2, 4]),
            (Form::Decay, vec![4, 2], vec![4, 2]),
            (Form::DecayColumn, vec![8], vec![8, 1]),
            (Form::Turned { heads: 2 }, vec![8, 1], vec![8, 1]),
            (Form::Turned { heads: 1 }, vec![8], vec![8]),
            (Form::GateUp, vec![4, 2], vec![2, 2]),
            (Form::GateUp, vec![2, 2, 2], vec![2, 1, 2]),
        ] {
            let model = x.reshape(shape).unwrap();
            let names = form.names("blk.0.ffn_gate.weight".into());
            let write = |place| form.write(std::slice::from_ref(&model), place).unwrap();
            let files: Vec<_> = (0..names.len()).map(write).collect();
            assert_eq!(files[0].dims(), in_file, "{form:?}");
            assert_eq!(form.shape_in_file(model.dims()), in_file, "{form:?}");
            let file = |name: &str, dtype, _: Option<_>| {
                let place = names.iter().position(|other| other == name).unwrap();
                Ok(files[place].to_dtype(dtype)?)
            };
            let back = form.read(&names, file, model.shape(), DType::F32).unwrap();
            assert_eq!(back.dims(), model.dims(), "{form:?}");
            let gap = (back - model).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(gap.to_scalar::<f32>().unwrap() < 1e-6, "{form:?}");
        }
    }

    #[test]
    fn rows_of_a_head_take_turns() {
        let x = Tensor::arange(0f32, 8., &Device::Cpu).unwrap();
        let file = Form::Turned { heads: 2 }.write(&[x], 0).unwrap();
        assert_eq!(file.to_vec1::<f32>().unwrap(), [0., 2., 1., 3., 4., 6., 5., 7.]);
        assert_eq!(Form::GateUp.names("blk.7.ffn_gate_exps.weight".into())[1], "blk.7.ffn_up_exps.weight");
    }

    #[test]
    fn experts_are_stacked() {
        let [a, b] = [0f32, 4.]
            .map(|from| Tensor::arange(from, from + 4., &Device::Cpu).unwrap().reshape((2, 2)).unwrap());
        let form = Form::Expert { index: 1, count: 2 };
        let file = form.write(&[a, b.clone()], 0).unwrap();
        assert_eq!((file.dims(), form.shape_in_file(b.dims())), ([2, 2, 2].as_slice(), vec![2, 2, 2]));
        let part = |_: &str, dtype: DType, part: Option<(usize, usize)>| {
            assert_eq!(part, Some((1, 2)));
            Ok(file.get(1)?.to_dtype(dtype)?)
        };
        let back = form.read(&["x".into()], part, b.shape(), DType::F32).unwrap();
        assert_eq!(back.to_vec2::<f32>().unwrap(), b.to_vec2::<f32>().unwrap());
    }
}
