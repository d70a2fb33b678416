//! Elements of tensors in CPU memory as `f32` slices.

use std::cell::Cell;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor, bail};

use crate::Result;

/// Lets `f` read the elements of a tensor as contiguous `f32`.
pub(crate) fn read<T>(x: &Tensor, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let x = x.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => Err(candle_core::Error::Msg("a tensor is not in CPU memory".into()).into()),
    }
}

/// Lets `f` change the elements of a contiguous `f32` tensor; every clone of it sees that.
pub(crate) fn modify(x: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    if x.elem_count() == 0 {
        return f(&mut []); // candle refuses to visit it
    }
    let pending = Modify { f: Cell::new(Some(f)), result: Cell::new(Ok(())) };
    x.inplace_op1(&pending)?;
    pending.result.into_inner()
}

struct Modify<F> {
    f: Cell<Option<F>>,
    result: Cell<Result<()>>,
}

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Modify<F> {
    fn name(&self) -> &'static str {
        "modify"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("only contiguous f32 tensors are changed in place")
        };
        if let Some(f) = self.f.take() {
            self.result.set(f(&mut values[start..end]));
        }
        Ok(())
    }
}

/// Whether a tensor can be changed by [`modify`].
pub(crate) fn modifiable(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}
