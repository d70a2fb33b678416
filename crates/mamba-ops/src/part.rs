//! What fused blocks are made of: functions that run as parts of another one, and the block itself as a node of candle's graph.

use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

use crate::autograd::{Fixed, Forward, Function, FusedFn, Output, cuda_token};
use crate::projection::project;

/// A function that ran outside of candle's graph, as a part of a fused one, which asks it for its gradients.
///
/// Candle adds each gradient to zeros that it makes for that; here nothing is added but what has two terms.
pub(crate) struct Part {
    f: Box<dyn Function>,
    inputs: Vec<Option<Tensor>>,
    saved: Vec<Tensor>,
}

impl Part {
    /// The part and its outputs; `tracked` if its gradients will be asked for.
    pub(crate) fn run<const O: usize>(
        f: Box<dyn Function>,
        inputs: &[Option<&Tensor>],
        tracked: bool,
    ) -> Result<(Self, [Tensor; O])> {
        let inputs: Vec<Option<Tensor>> = inputs.iter().map(|x| x.map(Tensor::detach)).collect();
        let (outputs, saved) = f.forward(&inputs, tracked)?;
        let outputs: Vec<Tensor> = outputs.into_iter().map(Tensor::from).collect();
        match outputs.try_into() {
            Ok(outputs) => Ok((Self { f, inputs, saved }, outputs)),
            Err(outputs) => bail!("{}: {} outputs, expected {O}", f.name(), outputs.len()),
        }
    }

    /// As [`run`](Self::run), of a fused function.
    pub(crate) fn fused<F: FusedFn<I, O>, const I: usize, const O: usize>(
        f: F,
        inputs: &[Option<&Tensor>; I],
        tracked: bool,
    ) -> Result<(Self, [Tensor; O])> {
        Self::run(Box::new(Fixed::<F, I, O>(f)), inputs, tracked)
    }

    /// The gradients that are needed, by slot.
    pub(crate) fn backward<const I: usize>(
        &self,
        needs: [bool; I],
        grads: &[Option<Tensor>],
    ) -> Result<[Option<Tensor>; I]> {
        let gradients = self.f.backward(&self.inputs, &needs, &self.saved, grads)?;
        let gradients = gradients.into_iter().map(|grad| grad.map(|grad| grad.detach()));
        match gradients.collect::<Vec<_>>().try_into() {
            Ok(gradients) => Ok(gradients),
            Err(gradients) => {
                bail!("{}: {} gradients, expected {I}", self.f.name(), gradients.len())
            }
        }
    }
}

/// The storage of a tensor that was made just now, without a copy; nothing else may hold on to it, for it is empty afterwards.
pub(crate) fn take(x: &Tensor) -> Result<Output> {
    let taken = Take(Mutex::new(None));
    // An empty tensor cannot be visited; a copy of nothing costs nothing.
    let whole = x.is_contiguous() && x.layout().start_offset() == 0 && x.elem_count() > 0;
    if !whole {
        return crate::checkpoint::storage(x);
    }
    x.inplace_op1(&taken)?;
    match taken.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(storage) => Ok((storage, x.shape().clone())),
        None => crate::checkpoint::storage(x),
    }
}

struct Take(Mutex<Option<Storage>>);

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let taken = std::mem::replace(storage, CpuStorage::F32(vec![]));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Storage::Cpu(taken));
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        let (nothing, _) = cuda_token(storage)?;
        let taken = std::mem::replace(storage, nothing);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Storage::Cuda(taken));
        Ok(())
    }
}

/// A block of parts: `y` and two final states of `I` inputs, one of which may be a last projection.
pub(crate) trait Block<const I: usize>: Send + Sync + 'static {
    const NAME: &'static str;
    /// The slot of the last projection.
    const OUT_PROJ: usize;
    /// What lies between the inputs and the last projection. It holds `y` only where there is one: else `y` is an output,
    /// which has its storage for itself.
    type Between: Send + Sync + 'static;

    /// What lies between, with what is projected and the final states; `tracked` if gradients will be asked for.
    fn run(&self, inputs: &[Option<Tensor>; I], tracked: bool) -> Result<(Self::Between, [Tensor; 3])>;

    /// The chain rule over the parts.
    fn gradients(
        &self,
        between: &Self::Between,
        inputs: &[Option<Tensor>; I],
        needs: &[bool; I],
        grads: &[Option<Tensor>; 3],
    ) -> Result<[Option<Tensor>; I]>;
}

/// A block as a node of the graph, which computes what lies between again in `backward()` or keeps it.
pub(crate) struct BlockNode<B: Block<I>, const I: usize> {
    block: B,
    /// None if it is computed again.
    kept: Option<OnceLock<B::Between>>,
}

impl<B: Block<I>, const I: usize> BlockNode<B, I> {
    pub(crate) fn new(block: B, recompute: bool) -> Self {
        Self { block, kept: (!recompute).then(OnceLock::new) }
    }
}

impl<B: Block<I>, const I: usize> FusedFn<I, 3> for BlockNode<B, I> {
    const NAME: &'static str = B::NAME;

    fn forward(&self, inputs: &[Option<Tensor>; I], tracked: bool) -> Result<Forward<3>> {
        let keep = self.kept.as_ref().filter(|_| tracked);
        let (between, [y, conv_state, ssm_state]) = self.block.run(inputs, keep.is_some())?;
        let y = match &inputs[B::OUT_PROJ] {
            Some(weight) => project(&y, weight)?,
            None => y,
        };
        if let Some(keep) = keep {
            keep.get_or_init(|| between);
        }
        Ok(Forward { outputs: [take(&y)?, take(&conv_state)?, take(&ssm_state)?], saved: vec![] })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; I],
        needs: &[bool; I],
        _saved: &[Tensor],
        grads: &[Option<Tensor>; 3],
    ) -> Result<[Option<Tensor>; I]> {
        match self.kept.as_ref().and_then(OnceLock::get) {
            Some(between) => self.block.gradients(between, inputs, needs, grads),
            None => self.block.gradients(&self.block.run(inputs, true)?.0, inputs, needs, grads),
        }
    }
}
