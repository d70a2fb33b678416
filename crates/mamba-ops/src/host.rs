//! Between tensors in CPU memory and the `f32` slices that kernels work on, and the threads they run on.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};
use parking_lot::RwLockReadGuard;
use rayon::prelude::*;

use crate::args::share_storage;
use crate::autograd::Output;
use crate::simd::half::{narrow, narrow_bf16, widen, widen_bf16};

/// The elements of a CPU tensor as a contiguous `f32` slice: borrowed if that is what they are, else converted.
pub(crate) struct HostSlice<'a>(Source<'a>);

enum Source<'a> {
    Borrowed { storage: RwLockReadGuard<'a, Storage>, start: usize, end: usize },
    Owned(Vec<f32>),
}

/// Reads a tensor; `name` is for the error if it is not in CPU memory.
pub(crate) fn read<'a>(name: &'static str, x: &'a Tensor) -> Result<HostSlice<'a>> {
    if x.elem_count() == 0 {
        return Ok(HostSlice(Source::Owned(vec![]))); // an empty view may begin past the end of its storage
    }
    if x.dtype() == DType::F32 {
        let (storage, layout) = x.storage_and_layout();
        if let (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) =
            (&*storage, layout.contiguous_offsets())
        {
            return Ok(HostSlice(Source::Borrowed { storage, start, end }));
        }
    }
    if !x.device().is_cpu() {
        bail!("`{name}` is not in CPU memory")
    }
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("`{name}` is not in CPU memory")
    };
    let mut out = uninit(end - start);
    match storage {
        CpuStorage::F32(v) => out.copy_from_slice(&v[start..end]),
        CpuStorage::F16(v) => convert(&v[start..end], &mut out, widen),
        CpuStorage::BF16(v) => convert(&v[start..end], &mut out, widen_bf16),
        CpuStorage::F64(v) => convert(&v[start..end], &mut out, |src, dst| {
            dst.iter_mut().zip(src).for_each(|(d, s)| *d = *s as f32);
        }),
        _ => bail!("`{name}` has dtype {}, expected a floating one", x.dtype().as_str()),
    }
    Ok(HostSlice(Source::Owned(out)))
}

/// Reads an optional tensor.
pub(crate) fn read_opt<'a>(name: &'static str, x: Option<&'a Tensor>) -> Result<Option<HostSlice<'a>>> {
    x.map(|x| read(name, x)).transpose()
}

impl Deref for HostSlice<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Source::Owned(values) => values,
            Source::Borrowed { storage, start, end } => match &**storage {
                Storage::Cpu(CpuStorage::F32(values)) => &values[*start..*end],
                _ => &[], // `read` borrows f32 in CPU memory only
            },
        }
    }
}

/// The elements of a contiguous CPU tensor in the dtype in which they are stored, borrowed.
pub(crate) struct Stored<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    start: usize,
    end: usize,
}

/// A slice of one of the dtypes that kernels read.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// Borrows the elements of a tensor; nothing if they are not contiguous, not in CPU memory, or of another dtype.
pub(crate) fn stored(x: &Tensor) -> Option<Stored<'_>> {
    let (storage, layout) = x.storage_and_layout();
    let (start, end) = layout.contiguous_offsets()?;
    let stored = Stored { storage, start, end };
    stored.values().is_some().then_some(stored)
}

impl Stored<'_> {
    /// The elements; there are some of whatever [`stored`] gave.
    pub(crate) fn values(&self) -> Option<Values<'_>> {
        let range = self.start..self.end;
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => values.get(range).map(Values::F32),
            Storage::Cpu(CpuStorage::F16(values)) => values.get(range).map(Values::F16),
            Storage::Cpu(CpuStorage::BF16(values)) => values.get(range).map(Values::BF16),
            _ => None,
        }
    }
}

/// A tensor of f32, f16 or bf16 with copies of `f32` values, rounded once.
pub(crate) fn copied(values: &[f32], shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    fn halves<T: Copy>(zero: T, values: &[f32], f: fn(&[f32], &mut [T])) -> Vec<T> {
        let mut out = vec![zero; values.len()];
        f(values, &mut out);
        out
    }
    let storage = match dtype {
        DType::F16 => CpuStorage::F16(halves(f16::ZERO, values, narrow)),
        DType::BF16 => CpuStorage::BF16(halves(bf16::ZERO, values, narrow_bf16)),
        _ => return tensor(values.to_vec(), shape, dtype),
    };
    Ok(Tensor::from((Storage::Cpu(storage), shape.into())))
}

/// Makes an output of the given dtype from `f32` values, rounding once.
pub(crate) fn output(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Output> {
    let storage = match dtype {
        DType::F32 => CpuStorage::F32(values),
        DType::F16 => {
            let mut out = unfilled(values.len(), f16::NAN);
            convert(&values, &mut out, narrow);
            CpuStorage::F16(out)
        }
        DType::BF16 => {
            let mut out = unfilled(values.len(), bf16::NAN);
            convert(&values, &mut out, narrow_bf16);
            CpuStorage::BF16(out)
        }
        DType::F64 => CpuStorage::F64(values.into_iter().map(f64::from).collect()),
        other => bail!("no output of dtype {}", other.as_str()),
    };
    Ok((Storage::Cpu(storage), shape.into()))
}

/// As [`output`], as a tensor without a graph.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::from(output(values, shape, dtype)?))
}

/// The tensor in a slot that a fused function requires.
pub(crate) fn slot<'a, const I: usize>(
    op: &'static str,
    inputs: &'a [Option<Tensor>; I],
    index: usize,
) -> Result<&'a Tensor> {
    inputs[index].as_ref().map_or_else(|| bail!("{op}: the input in slot {index} is missing"), Ok)
}

/// Reads the tensor in a slot that a fused function requires.
pub(crate) fn read_slot<'a, const I: usize>(
    op: &'static str,
    inputs: &'a [Option<Tensor>; I],
    index: usize,
) -> Result<HostSlice<'a>> {
    read(op, slot(op, inputs, index)?)
}

/// The gradients that are needed, each in the shape and dtype of its input.
pub(crate) fn gradients<const I: usize>(
    inputs: &[Option<Tensor>; I],
    needs: &[bool; I],
    values: [Vec<f32>; I],
) -> Result<[Option<Tensor>; I]> {
    let mut grads = [const { None }; I];
    for (i, values) in values.into_iter().enumerate() {
        if let (true, Some(x)) = (needs[i], &inputs[i]) {
            grads[i] = Some(tensor(values, x.shape().clone(), x.dtype())?);
        }
    }
    Ok(grads)
}

fn convert<S: Sync, D: Send>(src: &[S], dst: &mut [D], f: impl Fn(&[S], &mut [D]) + Sync) {
    const CHUNK: usize = 1 << 14;
    if src.len() <= CHUNK {
        return f(src, dst);
    }
    src.par_chunks(CHUNK).zip(dst.par_chunks_mut(CHUNK)).for_each(|(src, dst)| f(src, dst));
}

/// A buffer that a kernel overwrites in full: NaN in debug builds, so that what it forgets is seen.
pub(crate) fn uninit(len: usize) -> Vec<f32> {
    unfilled(len, f32::NAN)
}

/// A buffer of floating numbers of some type that is overwritten in full: filled in debug builds only.
#[allow(clippy::uninit_vec)] // as candle does; filling a buffer costs as much as a light kernel
fn unfilled<T: WithDType>(len: usize, fill: T) -> Vec<T> {
    if cfg!(debug_assertions) {
        return vec![fill; len];
    }
    let mut buffer = Vec::with_capacity(len);
    #[cfg(target_os = "linux")]
    ask_for_huge_pages(&mut buffer);
    // SAFETY: within the capacity. Every bit pattern is a number, kernels write before they read, and the debug build above would
    // show what they forget; what the language strictly wants, `MaybeUninit`, candle's storage does not take.
    unsafe { buffer.set_len(len) };
    buffer
}

/// Advises the kernel to back a large buffer by huge pages. The first touch of every page is a fault: with pages of 4 KiB
/// that takes longer than a convolution or a norm over the whole buffer.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(buffer: &mut Vec<T>) {
    const LARGE: usize = 4 << 20;
    const PAGE: usize = 1 << 16; // a multiple of every size that small pages have
    let (start, len) = (buffer.as_mut_ptr().cast::<u8>(), size_of::<T>() * buffer.capacity());
    if len < LARGE {
        return;
    }
    let skipped = start.addr().next_multiple_of(PAGE) - start.addr();
    let whole = (len - skipped) / PAGE * PAGE;
    // SAFETY: whole pages within the buffer. The advice does not change what is in them; if it is refused, nothing changes.
    unsafe { libc::madvise(start.wrapping_add(skipped).cast(), whole, libc::MADV_HUGEPAGE) };
}

/// The sum of the rows of a matrix, added in their order.
pub(crate) fn add_rows(values: &[f32], columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; columns];
    for row in values.chunks_exact(columns.max(1)) {
        out.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
    out
}

/// A `(rows, columns)` matrix as `(columns, rows)`, or each of several that follow one another.
pub(crate) fn transposed(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    // Square pieces, of which both sides stay in cache.
    const PIECE: usize = 16;
    let mut out = uninit(x.len());
    let len = (rows * columns).max(1);
    for (x, out) in x.chunks_exact(len).zip(out.chunks_exact_mut(len)) {
        for first in (0..rows).step_by(PIECE) {
            let last = rows.min(first + PIECE);
            for (column, out) in out.chunks_exact_mut(rows).enumerate() {
                let values = x[first * columns + column..].iter().step_by(columns);
                out[first..last].iter_mut().zip(values).for_each(|(out, value)| *out = *value);
            }
        }
    }
    out
}

/// Lets `f` change the elements of a contiguous `f32` tensor in place; every clone of the tensor sees it.
pub(crate) fn modify<T>(
    op: &'static str,
    state: &Tensor,
    f: impl FnOnce(&mut [f32]) -> Result<T>,
) -> Result<T> {
    if state.elem_count() == 0 {
        return f(&mut []); // candle refuses to visit it: its strides are 0
    }
    let pending = Modify { op, f: Cell::new(Some(f)), result: Cell::new(None) };
    state.inplace_op1(&pending)?;
    pending.result.take().map_or_else(|| bail!("{op}: the state was not visited"), Ok)
}

/// Overwrites a state by another tensor; every clone of it sees that.
pub(crate) fn replace(state: &Tensor, next: &Tensor) -> Result<()> {
    if state.elem_count() == 0 || share_storage(state, next) {
        return Ok(()); // nothing to change: without tokens, the next state is the state
    }
    state.slice_set(&next.contiguous()?, 0, 0)
}

/// Overwrites elements of a contiguous tensor of f32, f16 or bf16, from the one at `at` on; every clone of the tensor sees it.
pub(crate) fn write(op: &'static str, x: &Tensor, at: usize, values: &[f32]) -> Result<()> {
    x.inplace_op1(&Write { op, at, values })
}

struct Write<'a> {
    op: &'static str,
    at: usize,
    values: &'a [f32],
}

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Self { op, at, values } = *self;
        let fits = |(start, end): &(usize, usize)| at + values.len() <= end - start;
        let Some((start, _)) = layout.contiguous_offsets().filter(fits) else {
            bail!("{op}: what is written does not fit, or the tensor is not contiguous")
        };
        let range = start + at..start + at + values.len();
        match storage {
            CpuStorage::F32(to) => to[range].copy_from_slice(values),
            CpuStorage::F16(to) => narrow(values, &mut to[range]),
            CpuStorage::BF16(to) => narrow_bf16(values, &mut to[range]),
            _ => bail!("{op}: what is written to is not f32, f16 or bf16"),
        }
        Ok(())
    }
}

struct Modify<F, T> {
    op: &'static str,
    f: Cell<Option<F>>,
    result: Cell<Option<T>>,
}

impl<T, F: FnOnce(&mut [f32]) -> Result<T>> InplaceOp1 for Modify<F, T> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("{}: the state must be contiguous f32 to be updated in place", self.op)
        };
        self.result.set(self.f.take().map(|f| f(&mut values[start..end])).transpose()?);
        Ok(())
    }
}

/// Runs `f(0), …, f(count - 1)`, over threads if `operations` in all are worth waking them.
///
/// What each index does must not depend on the others, so results do not depend on the number of threads.
pub(crate) fn parallel(count: usize, operations: usize, f: impl Fn(usize) + Sync + Send) {
    const WORTH_WAKING_THREADS: usize = 1 << 16;
    if count <= 1 || operations < WORTH_WAKING_THREADS {
        (0..count).for_each(f)
    } else {
        (0..count).into_par_iter().for_each(f)
    }
}

/// Runs `f` on one of the threads that [`parallel`] uses: what it runs in parallel is then handed over without waking anybody that waits
/// for all of it.
pub(crate) fn on_threads<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// A mutable slice that threads write in disjoint pieces which no `chunks_mut` describes, such as columns.
pub(crate) struct SharedMut<'a> {
    start: *mut f32,
    len: usize,
    _slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, which may be sent; `get` puts disjointness on its callers.
unsafe impl Send for SharedMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// The piece `[offset, offset + len)`.
    ///
    /// # Safety
    /// No two pieces that overlap may be alive at once.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn get(&self, offset: usize, len: usize) -> &mut [f32] {
        assert!(offset <= self.len && len <= self.len - offset, "piece outside the slice");
        // SAFETY: within the slice by the assertion, not aliased by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn reads_views_of_every_dtype() -> Result<()> {
        let x = Tensor::arange(0f32, 12.0, &Device::Cpu)?.reshape((3, 4))?;
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let x = x.to_dtype(dtype)?;
            assert_eq!(read("x", &x.narrow(0, 1, 1)?)?[..], [4.0, 5.0, 6.0, 7.0]);
            assert_eq!(read("x", &x.t()?.narrow(0, 1, 1)?)?[..], [1.0, 5.0, 9.0]);
        }
        assert!(read("x", &x.to_dtype(DType::U32)?).is_err());
        Ok(())
    }

    #[test]
    fn outputs_round_once() -> Result<()> {
        let values = vec![1.0f32, 1.003_906_2, 2.5];
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let got = tensor(values.clone(), 3, dtype)?;
            let want = Tensor::new(values.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
            assert_eq!(got.dtype(), dtype);
            assert_eq!(
                got.to_dtype(DType::F64)?.to_vec1::<f64>()?,
                want.to_dtype(DType::F64)?.to_vec1::<f64>()?
            );
        }
        Ok(())
    }

    #[test]
    fn transposes() {
        assert_eq!(transposed(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(transposed(&[], 0, 3), [0.0; 0]);
    }
}
