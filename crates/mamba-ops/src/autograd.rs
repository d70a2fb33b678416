//! Differentiable functions of many inputs and many outputs on top of candle's custom ops.
//!
//! A candle custom op takes at most three tensors and returns one. [`apply`] hides that: it runs the fused
//! forward once, then builds a graph of one-element *token* tensors that carries only the dependencies,
//!
//! ```text
//! token ─Join(x0,x1)─ token ─Join(x2,x3)─ … ─Compute─ token ─┬─Extract(0)─ output 0
//!                                                             └─Extract(1)─ output 1
//! ```
//!
//! so no tensor is copied or packed. Candle visits the graph in reverse: every `Extract` leaves the gradient of
//! its output with the node, `Compute` runs the fused backward once, every `Join` hands two gradients on.
//! If no input tracks gradients there is no graph and no cost.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, bail,
};

/// An output of a fused forward: contiguous storage and its shape.
pub type Output = (Storage, Shape);

/// What a fused forward returns.
pub struct Forward<const O: usize> {
    /// The outputs, in the order in which [`apply`] returns them.
    pub outputs: [Output; O],
    /// Whatever the backward pass wants to find again.
    pub saved: Vec<Tensor>,
}

/// A differentiable function of `I` inputs and `O` outputs.
///
/// Inputs come in fixed slots; an absent optional input is an empty slot.
pub trait FusedFn<const I: usize, const O: usize>: Send + Sync + 'static {
    /// The name for error messages.
    const NAME: &'static str;

    /// Computes the outputs; with `tracked` also what [`backward`](Self::backward) needs. Inputs are detached.
    fn forward(&self, inputs: &[Option<Tensor>; I], tracked: bool) -> Result<Forward<O>>;

    /// Computes the gradient of each slot `i` with `needs[i]`; `grads[j]` is `None` where the loss does not use
    /// output `j`. May be called more than once for one forward.
    fn backward(
        &self,
        inputs: &[Option<Tensor>; I],
        needs: &[bool; I],
        saved: &[Tensor],
        grads: &[Option<Tensor>; O],
    ) -> Result<[Option<Tensor>; I]>;
}

/// Runs `f` on the inputs and, if any of them tracks gradients, links the outputs into candle's graph.
///
/// # Errors
/// If the forward fails, or later in `backward()` if `f` leaves out the gradient of a tracked input.
pub fn apply<F, const I: usize, const O: usize>(f: F, inputs: &[Option<&Tensor>; I]) -> Result<[Tensor; O]>
where
    F: FusedFn<I, O>,
{
    let outputs = apply_function(Box::new(Fixed::<F, I, O>(f)), inputs)?;
    outputs.try_into().or_else(|_| bail!("{}: lost an output", F::NAME))
}

/// A [`FusedFn`] whose numbers of inputs and outputs are known only at run time.
pub(crate) trait Function: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    /// The outputs and what is saved.
    fn forward(&self, inputs: &[Option<Tensor>], tracked: bool) -> Result<(Vec<Output>, Vec<Tensor>)>;
    fn backward(
        &self,
        inputs: &[Option<Tensor>],
        needs: &[bool],
        saved: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>>;
}

pub(crate) struct Fixed<F, const I: usize, const O: usize>(pub(crate) F);

impl<F: FusedFn<I, O>, const I: usize, const O: usize> Function for Fixed<F, I, O> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn forward(&self, inputs: &[Option<Tensor>], tracked: bool) -> Result<(Vec<Output>, Vec<Tensor>)> {
        let Forward { outputs, saved } = self.0.forward(fixed(F::NAME, inputs)?, tracked)?;
        Ok((outputs.into(), saved))
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>],
        needs: &[bool],
        saved: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let (inputs, needs) = (fixed(F::NAME, inputs)?, fixed(F::NAME, needs)?);
        Ok(self.0.backward(inputs, needs, saved, fixed(F::NAME, grads)?)?.into())
    }
}

fn fixed<'a, T, const N: usize>(name: &str, slots: &'a [T]) -> Result<&'a [T; N]> {
    slots.try_into().or_else(|_| bail!("{name}: {} slots, expected {N}", slots.len()))
}

/// As [`apply`].
pub(crate) fn apply_function(f: Box<dyn Function>, inputs: &[Option<&Tensor>]) -> Result<Vec<Tensor>> {
    let needs: Vec<bool> = inputs.iter().map(|x| x.is_some_and(needs_gradient)).collect();
    let detached: Vec<Option<Tensor>> = inputs.iter().map(|x| x.map(Tensor::detach)).collect();
    let tracked: Vec<(usize, &Tensor)> =
        inputs.iter().enumerate().filter(|(i, _)| needs[*i]).filter_map(|(i, x)| Some((i, (*x)?))).collect();
    let (outputs, saved) = f.forward(&detached, !tracked.is_empty())?;
    let Some((_, first)) = tracked.first() else {
        return Ok(outputs.into_iter().map(Tensor::from).collect());
    };
    let mut token = Tensor::zeros(TOKEN_LEN, DType::F32, first.device())?;
    let pending = Pending { grads: vec![None; outputs.len()], input_grads: vec![None; inputs.len()] };
    let node = Arc::new(Node { f, inputs: detached, needs, saved, pending: Mutex::new(pending) });
    for pair in tracked.chunks(2) {
        let ((i, x), (j, y)) = (pair[0], pair[pair.len() - 1]);
        token = token.apply_op3(x, y, Join(node.clone(), i, j))?;
    }
    let token = token.apply_op1(Compute(node.clone()))?;
    outputs
        .into_iter()
        .enumerate()
        .map(|(i, output)| token.apply_op1(Extract(node.clone(), i, Mutex::new(Some(output)))))
        .collect()
}

/// Whether an input takes part in the graph.
pub(crate) fn needs_gradient(x: &Tensor) -> bool {
    x.track_op() && x.dtype().is_float()
}

/// Runs candle's backward from `outputs` with the given gradients; none if no output tracks.
pub(crate) fn backward_from(
    name: &'static str,
    outputs: &[Tensor],
    grads: &[Option<Tensor>],
) -> Result<Option<GradStore>> {
    let mut sum: Option<Tensor> = None;
    for (output, grad) in outputs.iter().zip(grads) {
        if let (true, Some(grad)) = (needs_gradient(output) && output.elem_count() > 0, grad) {
            let token = output.apply_op1(Seed(name, grad.clone()))?;
            sum = Some(match sum {
                Some(sum) => (sum + token)?,
                None => token,
            });
        }
    }
    sum.map(|sum| sum.backward()).transpose()
}

const TOKEN_LEN: usize = 1;

struct Node {
    f: Box<dyn Function>,
    inputs: Vec<Option<Tensor>>,
    needs: Vec<bool>,
    saved: Vec<Tensor>,
    pending: Mutex<Pending>,
}

/// Gradients on their way through one backward pass.
struct Pending {
    grads: Vec<Option<Tensor>>,
    input_grads: Vec<Option<Tensor>>,
}

impl Node {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cpu_token() -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(vec![0.0; TOKEN_LEN]), Shape::from(TOKEN_LEN)))
}

#[cfg(feature = "cuda")]
pub(crate) fn cuda_token(like: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let zeros = like.device.alloc_zeros::<f32>(TOKEN_LEN)?;
    Ok((CudaStorage::wrap_cuda_slice(zeros, like.device.clone()), Shape::from(TOKEN_LEN)))
}

#[cfg(not(feature = "cuda"))]
pub(crate) fn cuda_token(_: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    bail!("mamba-ops was built without the feature `cuda`")
}

/// Links two tracked inputs; an odd last one is linked twice, its gradient handed on once.
struct Join(Arc<Node>, usize, usize);

impl CustomOp3 for Join {
    fn name(&self) -> &'static str {
        self.0.f.name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        cpu_token()
    }

    fn cuda_fwd(
        &self,
        token: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda_token(token)
    }

    fn bwd(
        &self,
        token: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut pending = self.0.pending();
        let first = pending.input_grads[self.1].take();
        let second = if self.2 == self.1 { None } else { pending.input_grads[self.2].take() };
        Ok((token.track_op().then(|| grad.clone()), first, second))
    }
}

struct Compute(Arc<Node>);

impl CustomOp1 for Compute {
    fn name(&self) -> &'static str {
        self.0.f.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        cpu_token()
    }

    fn cuda_fwd(&self, token: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda_token(token)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let node = &self.0;
        let grads = {
            let mut pending = node.pending();
            let count = pending.grads.len();
            std::mem::replace(&mut pending.grads, vec![None; count])
        };
        let mut input_grads = node.f.backward(&node.inputs, &node.needs, &node.saved, &grads)?;
        if input_grads.len() != node.needs.len() {
            bail!("{}: {} gradients, expected {}", self.name(), input_grads.len(), node.needs.len())
        }
        for (i, (grad, need)) in input_grads.iter_mut().zip(&node.needs).enumerate() {
            *grad = match (need, grad.take()) {
                (true, None) => bail!("{}: no gradient for the tracked input in slot {i}", self.name()),
                (true, Some(grad)) => Some(grad.detach()),
                (false, _) => None,
            };
        }
        node.pending().input_grads = input_grads;
        Ok(Some(grad.clone()))
    }
}

struct Extract(Arc<Node>, usize, Mutex<Option<Output>>);

impl Extract {
    fn take(&self) -> Option<Output> {
        self.2.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl CustomOp1 for Extract {
    fn name(&self) -> &'static str {
        self.0.f.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.take() {
            Some((Storage::Cpu(storage), shape)) => Ok((storage, shape)),
            _ => bail!("{}: output {} is not on the device of its inputs", self.name(), self.1),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.take() {
            Some((Storage::Cuda(storage), shape)) => Ok((storage, shape)),
            _ => bail!("{}: output {} is not on the device of its inputs", self.name(), self.1),
        }
    }

    fn bwd(&self, token: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.pending().grads[self.1] = Some(grad.detach());
        Ok(Some(token.zeros_like()?))
    }
}

/// A token whose backward is a given gradient, whatever arrives: `sum(x · gradient)` without the product.
struct Seed(&'static str, Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        cpu_token()
    }

    fn cuda_fwd(&self, x: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda_token(x)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.1.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// `(a·b, a + c)` with optional `c`; remembers nothing.
    struct Toy;

    impl FusedFn<3, 2> for Toy {
        const NAME: &'static str = "toy";

        fn forward(&self, inputs: &[Option<Tensor>; 3], _: bool) -> Result<Forward<2>> {
            let read = |i: usize| inputs[i].as_ref().map(|x| x.to_vec1::<f32>()).transpose();
            let (Some(a), Some(b)) = (read(0)?, read(1)?) else { bail!("toy: missing input") };
            let c = read(2)?.unwrap_or(vec![0.0; a.len()]);
            let product = a.iter().zip(&b).map(|(a, b)| a * b).collect::<Vec<_>>();
            let sum = a.iter().zip(&c).map(|(a, c)| a + c).collect::<Vec<_>>();
            let shape = Shape::from(a.len());
            let outputs = [product, sum].map(|v| (Storage::Cpu(CpuStorage::F32(v)), shape.clone()));
            Ok(Forward { outputs, saved: vec![] })
        }

        fn backward(
            &self,
            inputs: &[Option<Tensor>; 3],
            needs: &[bool; 3],
            _: &[Tensor],
            grads: &[Option<Tensor>; 2],
        ) -> Result<[Option<Tensor>; 3]> {
            let (Some(a), Some(b)) = (&inputs[0], &inputs[1]) else { bail!("toy: missing input") };
            let zero = a.zeros_like()?;
            let g0 = grads[0].as_ref().unwrap_or(&zero);
            let g1 = grads[1].as_ref().unwrap_or(&zero);
            let [n0, n1, n2] = *needs;
            Ok([n0.then_some(((g0 * b)? + g1)?), n1.then_some((g0 * a)?), n2.then(|| g1.clone())])
        }
    }

    fn tensor(values: [f32; 2]) -> Tensor {
        Tensor::new(&values, &Device::Cpu).unwrap()
    }

    #[test]
    fn gradients_for_every_mask_of_tracked_inputs() -> Result<()> {
        let values = [[2.0, 3.0], [5.0, 7.0], [11.0, 13.0]];
        for mask in 0..8usize {
            let vars = values.map(|v| Var::from_tensor(&tensor(v)).unwrap());
            let inputs: Vec<Tensor> = (0..3)
                .map(|i| if mask & (1 << i) != 0 { vars[i].as_tensor().clone() } else { vars[i].detach() })
                .collect();
            let outputs = apply(Toy, &[Some(&inputs[0]), Some(&inputs[1]), Some(&inputs[2])])?;
            assert_eq!(outputs[0].track_op(), mask != 0);
            if mask == 0 {
                continue;
            }
            let loss = (outputs[0].sum_all()? + (&outputs[1] * 2.0)?.sum_all()?)?;
            for _ in 0..2 {
                let grads = loss.backward()?;
                let want = [[7.0f32, 9.0], [2.0, 3.0], [2.0, 2.0]];
                for i in 0..3 {
                    let got = grads.get(vars[i].as_tensor()).map(|g| g.to_vec1::<f32>().unwrap());
                    assert_eq!(
                        got,
                        (mask & (1 << i) != 0).then(|| want[i].to_vec()),
                        "mask {mask} input {i}"
                    );
                }
            }
        }
        Ok(())
    }

    #[test]
    fn same_tensor_in_two_slots_and_an_unused_output() -> Result<()> {
        let a = Var::from_tensor(&tensor([2.0, 3.0]))?;
        let outputs = apply(Toy, &[Some(a.as_tensor()), Some(a.as_tensor()), None])?;
        let grads = outputs[0].sum_all()?.backward()?;
        let got = grads.get(a.as_tensor()).map(|g| g.to_vec1::<f32>()).transpose()?;
        assert_eq!(got, Some(vec![4.0, 6.0]));
        Ok(())
    }

    #[test]
    fn gradients_flow_through_intermediate_tensors() -> Result<()> {
        let a = Var::from_tensor(&tensor([2.0, 3.0]))?;
        let twice = (a.as_tensor() * 2.0)?;
        let outputs = apply(Toy, &[Some(&twice), Some(&tensor([1.0, 1.0])), None])?;
        let grads = (outputs[0].sum_all()? + outputs[1].sum_all()?)?.backward()?;
        let got = grads.get(a.as_tensor()).map(|g| g.to_vec1::<f32>()).transpose()?;
        assert_eq!(got, Some(vec![4.0, 4.0]));
        Ok(())
    }
}
