//! Between tensors in GPU memory and the kernels that work on them: pointers, outputs, launches. The twin of
//! [`host`](crate::host), there with the feature `cuda`.
//!
//! An op's `cuda.rs` asks for [`pointers`] to its inputs, makes its outputs by [`Gpu::buffer`] and launches [`Kernel`]s, whose
//! arguments are one `#[repr(C)]` struct that the `.cu` file has too. Everything is enqueued on candle's stream and nothing
//! waits, so a CUDA graph can capture an op.

mod gemm;
mod graph;
mod launch;
mod pieces;
mod table;

use std::cell::Cell;
use std::mem::size_of;
use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUmemPool_attribute_enum, cuDeviceGetDefaultMemPool, cuMemPoolSetAttribute,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop, result,
};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor,
    bail,
};
use half::{bf16, f16};

pub(crate) use self::gemm::{Factor, Gemm};
pub(crate) use self::graph::Graph;
pub(crate) use self::launch::{Arguments, Kernel, Launch, Module, module};
pub(crate) use self::pieces::Cut;
pub(crate) use self::table::{Table, Tables};
use crate::autograd::Output;
use crate::packing::Packing;

/// A tensor as kernels see it: where its elements start, and their dtype. `Any` in `elem.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pointer {
    /// 0 if there is no tensor.
    pub(crate) address: u64,
    dtype: u64,
}

const _: () = assert!(size_of::<Pointer>() == 16);

impl Pointer {
    pub(crate) const NULL: Self = Self { address: 0, dtype: 0 };

    fn new(address: u64, dtype: DType) -> Result<Self> {
        // As `enum Dtype` in `elem.cuh`.
        let dtype = match dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            DType::F64 => 3,
            DType::U32 => 4,
            DType::I64 => 5,
            DType::I32 => 6,
            other => bail!("no kernel reads {}", other.as_str()),
        };
        Ok(Self { address, dtype })
    }

    pub(crate) fn is_f32(self) -> bool {
        self.dtype == 0
    }

    /// The pointer to an element of this dtype further on; of no tensor, none.
    pub(crate) fn offset(self, elements: usize, dtype: DType) -> Self {
        let bytes = (elements * dtype.size_in_bytes()) as u64;
        Self { address: if self.address == 0 { 0 } else { self.address + bytes }, ..self }
    }
}

/// The GPU that an op runs on, and candle's stream there.
pub(crate) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

/// Hands `f` pointers to the elements of the tensors, in row-major order: views that are not are copied first. The pointers are
/// good until `f` returns, which is when its launches are on the stream.
pub(crate) fn pointers<const N: usize, R>(
    op: &'static str,
    tensors: [Option<&Tensor>; N],
    f: impl FnOnce(&Gpu, [Pointer; N]) -> Result<R>,
) -> Result<R> {
    let mut all = [const { None }; N];
    for (slot, x) in all.iter_mut().zip(tensors) {
        *slot = contiguous(x)?;
    }
    views(op, all.each_ref().map(Option::as_ref), f)
}

/// The elements in row-major order; of an empty tensor, of which nothing is read, as they are.
pub(crate) fn contiguous(x: Option<&Tensor>) -> Result<Option<Tensor>> {
    x.map(|x| if x.elem_count() == 0 { Ok(x.clone()) } else { x.contiguous() }).transpose()
}

/// From one row to the next, in elements, of a tensor whose rows are whole and evenly apart.
pub(crate) fn row_stride(x: &Tensor) -> Option<usize> {
    let (columns, rows) = x.dims().split_last()?;
    let (one, strides) = x.stride().split_last()?;
    if *columns > 1 && *one != 1 {
        return None;
    }
    // Of axes with one element the stride does not matter.
    let mut axes = rows.iter().zip(strides).rev().filter(|(n, _)| **n != 1);
    let Some((&n, &stride)) = axes.next() else { return Some(*columns) };
    let mut expected = n * stride;
    for (&n, &outer) in axes {
        if outer != expected {
            return None;
        }
        expected *= n;
    }
    Some(stride)
}

/// As [`pointers`], but to the first elements of views as they lie in memory, for kernels that take strides.
pub(crate) fn views<const N: usize, R>(
    op: &'static str,
    tensors: [Option<&Tensor>; N],
    f: impl FnOnce(&Gpu, [Pointer; N]) -> Result<R>,
) -> Result<R> {
    let gpu = Gpu::of(op, &tensors)?;
    let guards = tensors.map(|x| x.filter(|x| x.elem_count() > 0).map(Tensor::storage_and_layout));
    let mut pointers = [Pointer::NULL; N];
    // Dropped after the launches: on several streams, others then wait for our reads.
    let mut reads = Vec::with_capacity(N);
    for (pointer, guard) in pointers.iter_mut().zip(&guards) {
        let Some((storage, layout)) = guard else { continue };
        let Storage::Cuda(storage) = &**storage else {
            bail!("{op}: an input is not on the GPU of the others")
        };
        let (start, read) = address(storage, &gpu.stream)?;
        let offset = layout.start_offset() * storage.dtype().size_in_bytes();
        *pointer = Pointer::new(start + offset as u64, storage.dtype())?;
        reads.push(read);
    }
    let result = f(&gpu, pointers);
    drop(reads);
    result
}

/// Runs `f` on the slice of a storage, whatever its dtype.
macro_rules! with_slice {
    ($slice:expr, $x:ident => $body:expr) => {
        match $slice {
            CudaStorageSlice::F32($x) => $body,
            CudaStorageSlice::F16($x) => $body,
            CudaStorageSlice::BF16($x) => $body,
            CudaStorageSlice::F64($x) => $body,
            CudaStorageSlice::U32($x) => $body,
            CudaStorageSlice::I64($x) => $body,
            CudaStorageSlice::I32($x) => $body,
            _ => bail!("no kernel takes such a dtype"),
        }
    };
}

fn address<'a>(storage: &'a CudaStorage, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    Ok(with_slice!(&storage.slice, x => x.device_ptr(stream)))
}

fn address_mut<'a>(storage: &'a mut CudaStorage, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
    Ok(with_slice!(&mut storage.slice, x => x.device_ptr_mut(stream)))
}

impl Gpu {
    /// That of the first tensor there, be it empty.
    pub(crate) fn of(op: &str, tensors: &[Option<&Tensor>]) -> Result<Self> {
        let device = tensors.iter().flatten().find_map(|x| match x.device() {
            Device::Cuda(device) => Some(device.clone()),
            _ => None,
        });
        let Some(device) = device else { bail!("{op}: no input is on a GPU") };
        Ok(Self { stream: device.cuda_stream(), device })
    }

    /// A buffer of `len` elements that kernels fill.
    pub(crate) fn buffer(&self, dtype: DType, len: usize) -> Result<Buffer> {
        let storage = match dtype {
            DType::F32 => self.storage::<f32>(len),
            DType::F16 => self.storage::<f16>(len),
            DType::BF16 => self.storage::<bf16>(len),
            DType::F64 => self.storage::<f64>(len),
            DType::U32 => self.storage::<u32>(len),
            DType::I64 => self.storage::<i64>(len),
            other => bail!("no kernel fills a buffer of {}", other.as_str()),
        }?;
        let (address, _) = address(&storage, &self.stream)?;
        let pointer = Pointer::new(address, dtype)?;
        Ok(Buffer { storage, pointer, stream: self.stream.clone() })
    }

    /// A buffer of zeros.
    pub(crate) fn zeros(&self, dtype: DType, len: usize) -> Result<Buffer> {
        let mut buffer = self.buffer(dtype, len)?;
        {
            let (address, _write) = address_mut(&mut buffer.storage, &self.stream)?;
            let (bytes, stream) = (len * dtype.size_in_bytes(), self.stream.cu_stream());
            // SAFETY: within the buffer.
            unsafe { result::memset_d8_async(address, 0, bytes, stream) }.w()?;
        }
        Ok(buffer)
    }

    /// Writes numbers into a buffer of them from a place on, after everything enqueued.
    pub(crate) fn write(&self, buffer: &mut Buffer, from: usize, numbers: &[i64]) -> Result<()> {
        let slice = match &mut buffer.storage.slice {
            CudaStorageSlice::I64(slice) => slice,
            _ => bail!("a buffer is not of i64"),
        };
        let Some(mut part) = slice.try_slice_mut(from..from + numbers.len()) else {
            bail!("{} numbers do not fit into a buffer from {from} on", numbers.len())
        };
        self.stream.memcpy_htod(numbers, &mut part).w()
    }

    /// Whether there are several streams, whose work on a tensor waits for each other's only where each says what it uses.
    pub(crate) fn has_several_streams(&self) -> bool {
        self.stream.context().is_managing_stream_synchronization()
    }

    /// Room for an output with an axis of tokens, of which kernels write all but the padding.
    pub(crate) fn room(&self, dtype: DType, len: usize, packing: &Packing) -> Result<Buffer> {
        if packing.has_padding() { self.zeros(dtype, len) } else { self.buffer(dtype, len) }
    }

    /// A buffer in the dtype of `like` with room for its elements, if `needed`.
    pub(crate) fn buffer_like(&self, like: Option<&Tensor>, needed: bool) -> Result<Option<Buffer>> {
        like.filter(|_| needed).map(|x| self.buffer(x.dtype(), x.elem_count())).transpose()
    }

    fn storage<T: CudaDType + DeviceRepr>(&self, len: usize) -> Result<CudaStorage> {
        // The driver gives no memory of 0 bytes.
        // SAFETY: kernels write every element before any is read.
        let mut slice: CudaSlice<T> = unsafe { self.device.alloc(len.max(1)) }?;
        if poisoned() {
            let bytes = slice.num_bytes();
            let (address, _write) = slice.device_ptr_mut(&self.stream);
            // SAFETY: within the buffer; all ones are a NaN in each dtype.
            unsafe { result::memset_d8_async(address, 0xff, bytes, self.stream.cu_stream()) }.w()?;
        }
        Ok(CudaStorage::wrap_cuda_slice(slice, self.device.clone()))
    }

    /// How many multiprocessors there are to fill.
    pub(crate) fn multiprocessors(&self) -> usize {
        multiprocessors(&self.device)
    }

    /// The bytes of shared memory that a block can have.
    pub(crate) fn shared_memory(&self) -> usize {
        shared_memory(&self.device)
    }
}

/// A buffer on the GPU that becomes an output once the kernels that fill it are on the stream.
pub(crate) struct Buffer {
    storage: CudaStorage,
    pointer: Pointer,
    stream: Arc<CudaStream>,
}

impl Buffer {
    pub(crate) fn pointer(&self) -> Pointer {
        self.pointer
    }

    /// The buffer as an output of a fused function.
    pub(crate) fn output(mut self, shape: impl Into<Shape>) -> Result<Output> {
        // On several streams, others wait for the write that this records.
        drop(address_mut(&mut self.storage, &self.stream)?);
        Ok((Storage::Cuda(self.storage), shape.into()))
    }

    /// As [`output`](Self::output), as a tensor without a graph.
    pub(crate) fn tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        Ok(Tensor::from(self.output(shape)?))
    }
}

/// A parameter for kernels that read `f32`, contiguous. An empty one is not read, and candle launches no kernel of 0 blocks to
/// convert it.
pub(crate) fn parameter(x: &Tensor) -> Result<Tensor> {
    if x.elem_count() == 0 { Ok(x.clone()) } else { x.to_dtype(DType::F32)?.contiguous() }
}

/// The pointer to a buffer that may be absent.
pub(crate) fn pointer(buffer: &Option<Buffer>) -> Pointer {
    buffer.as_ref().map_or(Pointer::NULL, Buffer::pointer)
}

/// The gradients that were made, each in the shape of its input.
pub(crate) fn gradients<const I: usize>(
    inputs: &[Option<Tensor>; I],
    buffers: [Option<Buffer>; I],
) -> Result<[Option<Tensor>; I]> {
    let mut grads = [const { None }; I];
    for ((grad, input), buffer) in grads.iter_mut().zip(inputs).zip(buffers) {
        if let (Some(input), Some(buffer)) = (input, buffer) {
            *grad = Some(buffer.tensor(input.shape().clone())?);
        }
    }
    Ok(grads)
}

/// See [`keep_freed_memory`](crate::keep_freed_memory).
pub(crate) fn keep_freed_memory(device: &CudaDevice) -> Result<()> {
    if !device.cuda_stream().context().has_async_alloc() {
        return Ok(()); // there is no pool: what is freed is given back at once
    }
    let (mut pool, mut threshold) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: the device is that of a context; the attribute is a u64, which is read before the call returns.
    unsafe {
        cuDeviceGetDefaultMemPool(&mut pool, device.cuda_stream().context().cu_device()).result().w()?;
        let attribute = CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result().w()
    }
}

/// How many multiprocessors there are to fill.
pub(crate) fn multiprocessors(device: &CudaDevice) -> usize {
    attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 1)
}

/// The bytes of shared memory that a block can have.
pub(crate) fn shared_memory(device: &CudaDevice) -> usize {
    attribute(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 48 << 10)
}

fn attribute(device: &CudaDevice, attribute: CUdevice_attribute, default: usize) -> usize {
    let value = device.cuda_stream().context().attribute(attribute);
    value.ok().and_then(|value| usize::try_from(value).ok()).filter(|&value| value > 0).unwrap_or(default)
}

/// An extent as kernels take it.
pub(crate) fn int(op: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).or_else(|_| bail!("{op}: an extent of {n} is more than the kernels take"))
}

/// Lets `f` launch kernels that change a contiguous `f32` tensor in place, given its address; every clone of it sees the change.
pub(crate) fn modify<T>(op: &'static str, state: &Tensor, f: impl FnOnce(u64) -> Result<T>) -> Result<T> {
    if state.dtype() != DType::F32 {
        bail!("{op}: the state must be contiguous f32 to be updated in place")
    }
    modify_any(op, state, |state| f(state.address))
}

/// As [`modify`], of any dtype.
pub(crate) fn modify_any<T>(
    op: &'static str,
    state: &Tensor,
    f: impl FnOnce(Pointer) -> Result<T>,
) -> Result<T> {
    if state.elem_count() == 0 {
        return f(Pointer::NULL); // candle refuses to visit it: its strides are 0
    }
    let pending = Modify { op, f: Cell::new(Some(f)), result: Cell::new(None) };
    state.inplace_op1(&pending)?;
    pending.result.take().map_or_else(|| bail!("{op}: the state was not visited"), Ok)
}

struct Modify<F, T> {
    op: &'static str,
    f: Cell<Option<F>>,
    result: Cell<Option<T>>,
}

impl<T, F: FnOnce(Pointer) -> Result<T>> InplaceOp1 for Modify<F, T> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("{}: the state is in CPU memory, the inputs are not", self.op)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        if !layout.is_contiguous() {
            bail!("{}: the state must be contiguous to be updated in place", self.op)
        }
        let (stream, dtype) = (storage.device.cuda_stream(), storage.dtype());
        let (start, _write) = address_mut(storage, &stream)?;
        let pointer = Pointer::new(start, dtype)?.offset(layout.start_offset(), dtype);
        self.result.set(self.f.take().map(|f| f(pointer)).transpose()?);
        Ok(())
    }
}

/// Whether buffers start as NaN, so that what a kernel forgets is seen: in debug builds, or with `MAMBA_POISON=1`.
fn poisoned() -> bool {
    static POISONED: OnceLock<bool> = OnceLock::new();
    cfg!(debug_assertions) || *POISONED.get_or_init(|| std::env::var("MAMBA_POISON").is_ok_and(|v| v == "1"))
}
