//! Memory for time: a function whose intermediate results are forgotten and computed again in `backward()`.

use candle_core::backend::BackendStorage;
use candle_core::{Result, Storage, Tensor, Var, bail};

use crate::autograd::{self, Function, Output};
use crate::part::Part;

/// Runs `f` and, if an input tracks gradients, links its outputs into candle's graph as one node that keeps nothing but
/// the inputs; `backward()` runs `f` again, this time with a graph, and differentiates that.
///
/// `(y_1, …) = f(x_1, …)`: the numbers and gradients are those of `f(inputs)`, the memory that the graph holds on to
/// between forward and backward is that of the inputs and outputs alone, at the price of a second forward. A layer of
/// a model, its parameters among the inputs, is what this is for.
///
/// # Inputs
/// Whatever `f` reads and shall have a gradient must be in `inputs`, parameters too: `f` gets tensors of the same values
/// in the same order and must use these. A tracked tensor that `f` captures instead would lose its gradient; that is an
/// error here, and never a silent cut. `f` must give the same outputs each time: no random numbers (dropout, say), no
/// state that it changes. No input may be changed in place before `backward()`.
/// # Gradients
/// For every floating input, through every output; 0 where an output does not depend on it. Without tracked inputs there
/// is no graph and nothing is kept.
/// # Errors
/// If `f` fails, or an output tracks gradients although `f` was given no input that does; in `backward()`, if `f` fails
/// then or changes its number of outputs. `name` is that of the function in these errors.
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use mamba_ops::checkpoint;
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let weight = Var::new(&[[3f32], [4.0]], &Device::Cpu)?;
/// let outputs = checkpoint("layer", &[&x, &weight], |inputs| {
///     let hidden = inputs[0].matmul(&inputs[1])?; // not kept
///     Ok(vec![hidden.sqr()?])
/// })?;
/// let grads = outputs[0].sum_all()?.backward()?;
/// let grad = grads.get(&weight).map(|grad| grad.to_vec2::<f32>()).transpose()?;
/// assert_eq!(grad, Some(vec![vec![22.0], vec![44.0]]));
/// // Captured, the weight would get no gradient:
/// let captured = weight.as_tensor().clone();
/// assert!(checkpoint("layer", &[&x], move |inputs| Ok(vec![inputs[0].matmul(&captured)?])).is_err());
/// # Ok(()) }
/// ```
/// # Source
/// Chen et al., 2016, "Training deep nets with sublinear memory cost"; `torch.utils.checkpoint`.
pub fn checkpoint<F>(name: &'static str, inputs: &[&Tensor], f: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    let slots: Vec<Option<&Tensor>> = inputs.iter().map(|x| Some(*x)).collect();
    with_slots(name, &slots, move |slots| f(&slots.iter().flatten().cloned().collect::<Vec<_>>()))
}

/// As [`checkpoint`], for a function of optional inputs.
pub(crate) fn with_slots<F>(name: &'static str, inputs: &[Option<&Tensor>], f: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Option<Tensor>]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    if !inputs.iter().flatten().any(|x| autograd::needs_gradient(x)) {
        let detached: Vec<Option<Tensor>> = inputs.iter().map(|x| x.map(Tensor::detach)).collect();
        return untracked(name, f(&detached)?);
    }
    // A variable can be differentiated by as it is, where other tensors are copied; each only once, or the slots would
    // share a gradient.
    let mut variables: Vec<Option<Tensor>> = vec![];
    for x in inputs {
        let fresh = |x: &&Tensor| x.is_variable() && variables.iter().flatten().all(|v| v.id() != x.id());
        variables.push(x.filter(fresh).cloned());
    }
    autograd::apply_function(Box::new(Checkpoint { name, f, variables }), inputs)
}

/// `f` as a part of a fused block, by candle's graph; it gives nothing where a required input is missing.
pub(crate) fn part<F, const I: usize, const O: usize>(
    name: &'static str,
    inputs: &[Option<&Tensor>; I],
    tracked: bool,
    f: F,
) -> Result<(Part, [Tensor; O])>
where
    F: Fn([Option<&Tensor>; I]) -> Result<Option<[Tensor; O]>> + Send + Sync + 'static,
{
    let f = move |inputs: &[Option<Tensor>]| {
        let mut slots = [None; I];
        slots.iter_mut().zip(inputs).for_each(|(slot, x)| *slot = x.as_ref());
        match f(slots)? {
            Some(outputs) => Ok(outputs.into()),
            None => bail!("{name}: a required input is missing"),
        }
    };
    Part::run(Box::new(Checkpoint { name, f, variables: vec![None; I] }), inputs, tracked)
}

/// The outputs, or an error if one of them tracks gradients.
fn untracked(name: &'static str, outputs: Vec<Tensor>) -> Result<Vec<Tensor>> {
    match outputs.iter().position(Tensor::track_op) {
        None => Ok(outputs),
        Some(i) => bail!(
            "{name}: output {i} depends on a tracked tensor that is not among the inputs, whose gradient would be \
             lost; expected every parameter as an input"
        ),
    }
}

struct Checkpoint<F> {
    name: &'static str,
    f: F,
    /// The inputs that are variables.
    variables: Vec<Option<Tensor>>,
}

impl<F> Function for Checkpoint<F>
where
    F: Fn(&[Option<Tensor>]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn forward(&self, inputs: &[Option<Tensor>], _tracked: bool) -> Result<(Vec<Output>, Vec<Tensor>)> {
        let outputs = untracked(self.name, (self.f)(inputs)?)?;
        let outputs = outputs.iter().map(storage).collect::<Result<_>>()?;
        Ok((outputs, vec![]))
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>],
        needs: &[bool],
        _saved: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        // An empty input has an empty gradient, and candle's backward panics on some empty tensors.
        let leaf = |(i, x): (usize, &Option<Tensor>)| match (x, &self.variables[i]) {
            (Some(x), variable) if needs[i] && x.elem_count() > 0 => match variable {
                Some(variable) => Ok(Some(variable.clone())),
                None => Ok(Some(Var::from_tensor(x)?.into_inner())),
            },
            (x, _) => Ok(x.clone()),
        };
        let leaves: Vec<Option<Tensor>> = inputs.iter().enumerate().map(leaf).collect::<Result<_>>()?;
        let outputs = (self.f)(&leaves)?;
        if outputs.len() != grads.len() {
            let (name, now, before) = (self.name, outputs.len(), grads.len());
            bail!("{name}: gave {now} outputs in backward, expected {before} as in forward")
        }
        let mut store = autograd::backward_from(self.name, &outputs, grads)?;
        let gradient = |(i, leaf): (usize, Option<Tensor>)| match leaf {
            Some(leaf) if needs[i] => match store.as_mut().and_then(|store| store.remove(&leaf)) {
                Some(grad) => Ok(Some(grad)),
                None => Ok(Some(leaf.detach().zeros_like()?)),
            },
            _ => Ok(None),
        };
        leaves.into_iter().enumerate().map(gradient).collect()
    }
}

/// The elements of a tensor in contiguous storage of their own: it may be a view of an input.
pub(crate) fn storage(x: &Tensor) -> Result<Output> {
    if x.elem_count() == 0 {
        // A GPU has no memory of 0 bytes: an element that the shape does not reach.
        let (storage, _) = storage(&Tensor::zeros(1, x.dtype(), x.device())?)?;
        return Ok((storage, x.shape().clone()));
    }
    let (storage, layout) = x.storage_and_layout();
    let copy = match &*storage {
        Storage::Cpu(storage) => Storage::Cpu(storage.to_dtype(layout, x.dtype())?),
        Storage::Cuda(storage) => Storage::Cuda(storage.to_dtype(layout, x.dtype())?),
        Storage::Metal(storage) => Storage::Metal(storage.to_dtype(layout, x.dtype())?),
    };
    Ok((copy, x.shape().clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn normal(shape: &[usize]) -> Tensor {
        Tensor::randn(0f64, 1.0, shape, &Device::Cpu).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let gap = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        gap.max(0).unwrap().to_dtype(DType::F64).unwrap().to_scalar().unwrap()
    }

    /// Three outputs of three inputs; the last depends on one of them only, the middle one is a view.
    fn layer(x: &[Tensor]) -> Result<Vec<Tensor>> {
        let hidden = x[0].matmul(&x[1])?.tanh()?;
        Ok(vec![hidden.broadcast_add(&x[2])?.sqr()?, hidden.narrow(1, 1, 2)?.t()?, x[2].exp()?])
    }

    #[test]
    fn equals_what_it_wraps() -> Result<()> {
        let values = [normal(&[4, 3]), normal(&[3, 5]), normal(&[5])];
        for mask in 0..8usize {
            let vars = values.clone().map(|x| Var::from_tensor(&x).unwrap());
            // Intermediate tensors, not variables.
            let inputs: Vec<Tensor> = vars
                .iter()
                .enumerate()
                .map(|(i, var)| if mask & (1 << i) != 0 { var.as_tensor().clone() } else { var.detach() })
                .map(|x| (x * 1.5).unwrap())
                .collect();
            let refs: Vec<&Tensor> = inputs.iter().collect();
            let got = checkpoint("layer", &refs, layer)?;
            let want = layer(&inputs)?;
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(difference(got, want), 0.0);
                assert_eq!(got.track_op(), mask != 0);
            }
            if mask == 0 {
                continue;
            }
            for used in 1..8usize {
                let loss = |outputs: &[Tensor]| -> Result<Tensor> {
                    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu)?;
                    for (j, output) in outputs.iter().enumerate().filter(|(j, _)| used & (1 << j) != 0) {
                        sum = (sum + (output.sin()?.sum_all()? * (j + 1) as f64)?)?;
                    }
                    Ok(sum)
                };
                let (got, want) = (loss(&got)?, loss(&want)?);
                if !want.track_op() {
                    continue;
                }
                let (got, want) = (got.backward()?, want.backward()?);
                for (i, var) in vars.iter().enumerate() {
                    match (got.get(var), want.get(var)) {
                        (Some(got), Some(want)) => {
                            assert!(difference(got, want) < 1e-14, "{mask} {used} {i}")
                        }
                        (Some(got), None) => assert_eq!(difference(got, &var.zeros_like()?), 0.0),
                        (None, want) => assert!(want.is_none() && mask & (1 << i) == 0, "{mask} {used} {i}"),
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn variables_are_differentiated_by_once_each() -> Result<()> {
        let x = Var::new(&[2f64, 3.0], &Device::Cpu)?;
        let outputs = checkpoint("square", &[&x, &x], |x| Ok(vec![(&x[0] * &x[1])?]))?;
        for _ in 0..2 {
            let grads = outputs[0].sum_all()?.backward()?;
            let grad = grads.get(&x).map(|grad| grad.to_vec1::<f64>()).transpose()?;
            assert_eq!(grad, Some(vec![4.0, 6.0]));
        }
        // An input passed on as it is, within another checkpoint.
        let nested = checkpoint("outer", &[&x], |x| checkpoint("inner", &[&x[0]], |x| Ok(x.to_vec())))?;
        let grads = (nested[0].sqr()?.sum_all()?).backward()?;
        assert_eq!(grads.get(&x).map(|grad| grad.to_vec1::<f64>()).transpose()?, Some(vec![4.0, 6.0]));
        Ok(())
    }

    #[test]
    fn captured_tensors_are_no_silent_cut() -> Result<()> {
        let (x, weight) = (Var::new(&[2f64], &Device::Cpu)?, Var::new(&[3f64], &Device::Cpu)?);
        for input in [x.as_tensor().clone(), x.detach()] {
            let captured = weight.as_tensor().clone();
            let f = move |x: &[Tensor]| Ok(vec![x[0].clone(), (&x[0] * &captured)?]);
            let error = checkpoint("layer", &[&input], f).unwrap_err().to_string();
            assert!(error.contains("layer: output 1 depends on a tracked tensor"), "{error}");
            // Detached on purpose, it is a constant.
            let captured = weight.detach();
            assert!(checkpoint("layer", &[&input], move |x| Ok(vec![(&x[0] * &captured)?])).is_ok());
        }
        Ok(())
    }

    #[test]
    fn errors_in_forward_and_backward() -> Result<()> {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let x = Var::new(&[2f64], &Device::Cpu)?;
        let error = checkpoint("layer", &[&x], |_| bail!("not today")).unwrap_err().to_string();
        assert!(error.contains("not today"), "{error}");
        let calls = AtomicUsize::new(1);
        let fickle = move |x: &[Tensor]| Ok(vec![x[0].clone(); calls.fetch_add(1, Ordering::Relaxed)]);
        let outputs = checkpoint("fickle", &[&x], fickle)?;
        let error = outputs[0].backward().map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("fickle: gave 2 outputs in backward, expected 1"), "{error}");
        Ok(())
    }
}
