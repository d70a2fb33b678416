//! Between tensors in GPU memory and the kernels that work on them: pointers, outputs, launches. The twin of
//! [`host`](crate::host), there with the feature `cuda`.
//!
//! An op's `cuda.rs` asks for [`pointers`] to its inputs, makes its outputs by [`Gpu::buffer`] and launches [`Kernel`]s, whose
//! arguments are one `#[repr(C)]` struct that the `.cu` file has too. Everything is enqueued on candle's stream and nothing
//! waits, so a CUDA graph can capture an op.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::size_of;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys as cublas;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUdevice_attribute, CUgraphInstantiate_flags, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchConfig, cuLaunchKernelEx,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PushKernelArg, SyncOnDrop, result,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor,
    bail,
};
use half::{bf16, f16};

use crate::autograd::Output;
use crate::packing::Packing;

/// The compiled kernels of an op: what `build.rs` made of its `.cu` file.
pub(crate) struct Module {
    pub(crate) name: &'static str,
    pub(crate) image: &'static [u8],
}

/// The module of `kernels/$name.cu`.
macro_rules! module {
    ($name:literal) => {
        $crate::device::Module {
            name: $name,
            image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),
        }
    };
}
pub(crate) use module;

impl Module {
    /// The image; for work on kernels, that of the folder `MAMBA_KERNELS`, so that nothing but the kernels is built anew.
    fn read(&self) -> Result<Vec<u8>> {
        match std::env::var_os("MAMBA_KERNELS") {
            Some(folder) => Ok(std::fs::read(Path::new(&folder).join(self.name).with_extension("fatbin"))?),
            None => Ok(self.image.to_vec()),
        }
    }
}

/// A kernel of a module: `name` and, where it is compiled for several, the dtype of its activations, as in `name_bf16`.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) module: &'static Module,
    pub(crate) name: &'static str,
    pub(crate) dtype: Option<DType>,
}

/// The shape of a launch: blocks, threads of each, and bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) blocks: [usize; 3],
    pub(crate) threads: [usize; 2],
    pub(crate) shared: usize,
}

/// `y = a b`, or added to `y`: a product of cuBLAS whose sums are f32, where `y` is f32 or as the factors.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    /// `(rows, inner)`.
    pub(crate) a: Factor,
    /// `(inner, columns)`.
    pub(crate) b: Factor,
    /// `(rows, columns)`, rows `y_stride` apart.
    pub(crate) y: Pointer,
    pub(crate) y_stride: usize,
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
    /// Of the factors: f32, f16 or bf16.
    pub(crate) dtype: DType,
    pub(crate) add: bool,
}

/// A factor of a product, in row-major order.
#[derive(Clone, Copy)]
pub(crate) struct Factor {
    pub(crate) address: u64,
    /// From row to row as they are stored.
    pub(crate) stride: usize,
    /// Whether rows and columns are stored the other way round.
    pub(crate) transposed: bool,
}

/// The arguments of a kernel, passed by value.
///
/// # Safety
/// The type is `#[repr(C)]`, without padding that matters, and equals the struct that the kernel takes.
pub(crate) unsafe trait Arguments: Copy {}

/// An [`Arguments`] as the driver takes it.
#[repr(transparent)]
struct ByValue<A>(A);

// SAFETY: `Arguments` is plain data that the kernel takes by value.
unsafe impl<A: Arguments> DeviceRepr for ByValue<A> {}

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
    let mut contiguous = [const { None }; N];
    for (slot, x) in contiguous.iter_mut().zip(tensors) {
        // Of an empty tensor nothing is read.
        *slot = x.filter(|x| x.elem_count() > 0).map(Tensor::contiguous).transpose()?;
    }
    let gpu = Gpu::of(op, &tensors)?;
    on(gpu, op, contiguous.each_ref().map(Option::as_ref), f)
}

/// As [`pointers`], but to the first elements of views as they lie in memory, for kernels that take strides.
pub(crate) fn views<const N: usize, R>(
    op: &'static str,
    tensors: [Option<&Tensor>; N],
    f: impl FnOnce(&Gpu, [Pointer; N]) -> Result<R>,
) -> Result<R> {
    on(Gpu::of(op, &tensors)?, op, tensors, f)
}

fn on<const N: usize, R>(
    gpu: Gpu,
    op: &'static str,
    tensors: [Option<&Tensor>; N],
    f: impl FnOnce(&Gpu, [Pointer; N]) -> Result<R>,
) -> Result<R> {
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

    /// How many blocks of a kernel the GPU runs at once.
    pub(crate) fn blocks_at_once(&self, kernel: Kernel, threads: [usize; 2], shared: usize) -> Result<usize> {
        let function = self.function(kernel, shared)?;
        let threads = (threads[0] * threads[1]) as u32;
        let blocks = function.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None).w()?;
        Ok(self.multiprocessors() * (blocks as usize).max(1))
    }

    /// Enqueues a kernel; nothing if the grid is empty.
    ///
    /// # Safety
    /// The addresses in `args` are of buffers as large as the kernel expects for the sizes in `args`.
    pub(crate) unsafe fn launch<A: Arguments>(&self, kernel: Kernel, launch: Launch, args: A) -> Result<()> {
        if launch.blocks.contains(&0) {
            return Ok(());
        }
        let function = self.function(kernel, launch.shared)?;
        let args = ByValue(args);
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(&args);
        // SAFETY: the arguments are of the kernel's type by `Arguments`, their addresses good by the contract of this function.
        match unsafe { builder.launch(launch.config()) } {
            Ok(_) => Ok(()),
            Err(e) => kernel.does_not_launch(launch, e),
        }
    }

    /// As [`launch`](Self::launch), of a kernel that waits for the kernels before it by itself: where the GPU can, it begins
    /// while they end.
    ///
    /// # Safety
    /// As [`launch`](Self::launch); and what the kernel touches before it waits, no kernel before it writes.
    pub(crate) unsafe fn launch_overlapping<A: Arguments>(
        &self,
        kernel: Kernel,
        launch: Launch,
        args: A,
    ) -> Result<()> {
        if launch.blocks.contains(&0) {
            return Ok(());
        }
        if !self.overlaps() {
            // SAFETY: the same contract.
            return unsafe { self.launch(kernel, launch, args) };
        }
        let function = self.function(kernel, launch.shared)?;
        let LaunchConfig { grid_dim, block_dim, shared_mem_bytes } = launch.config();
        let mut overlap = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: grid_dim.0,
            gridDimY: grid_dim.1,
            gridDimZ: grid_dim.2,
            blockDimX: block_dim.0,
            blockDimY: block_dim.1,
            blockDimZ: block_dim.2,
            sharedMemBytes: shared_mem_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &mut overlap,
            numAttrs: 1,
        };
        let mut args = ByValue(args);
        let mut params = [(&raw mut args).cast::<c_void>()];
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: as in `launch`; the attribute and the arguments outlive the call, which copies them.
        let result = unsafe {
            cuLaunchKernelEx(&config, function.cu_function(), params.as_mut_ptr(), std::ptr::null_mut())
        };
        match result.result() {
            Ok(()) => Ok(()),
            Err(e) => kernel.does_not_launch(launch, e),
        }
    }

    /// Enqueues a product of cuBLAS.
    ///
    /// # Safety
    /// The addresses are of matrices of those sizes.
    pub(crate) unsafe fn gemm(&self, gemm: Gemm) -> Result<()> {
        let Gemm { a, b, y, y_stride, rows, inner, columns, dtype, add } = gemm;
        let factors = match dtype {
            DType::F32 => cublas::cudaDataType::CUDA_R_32F,
            DType::F16 => cublas::cudaDataType::CUDA_R_16F,
            DType::BF16 => cublas::cudaDataType::CUDA_R_16BF,
            other => bail!("no product of {}", other.as_str()),
        };
        let sums = if y.dtype == 0 { cublas::cudaDataType::CUDA_R_32F } else { factors };
        let size = |n: usize| int("a product", n);
        let (alpha, beta) = (1f32, if add { 1f32 } else { 0f32 });
        let order = |factor: Factor| match factor.transposed {
            true => cublas::cublasOperation_t::CUBLAS_OP_T,
            false => cublas::cublasOperation_t::CUBLAS_OP_N,
        };
        // Column by column, as cuBLAS has it, yᵀ = bᵀ aᵀ.
        // SAFETY: by the contract of this function; alpha and beta are read before this returns.
        unsafe {
            gemm_ex(
                *self.device.cublas_handle().handle(),
                order(b),
                order(a),
                size(columns)?,
                size(rows)?,
                size(inner)?,
                (&raw const alpha).cast(),
                b.address as *const c_void,
                factors,
                size(b.stride)?,
                a.address as *const c_void,
                factors,
                size(a.stride)?,
                (&raw const beta).cast(),
                y.address as *mut c_void,
                sums,
                size(y_stride)?,
                cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
    }

    /// Whether kernels can begin while those before them end: the GPU has compute capability 9.0, and so has the code that
    /// runs on it, which otherwise does not wait.
    fn overlaps(&self) -> bool {
        let (major, minor) = self.stream.context().compute_capability().unwrap_or_default();
        let built_for = env!("MAMBA_CUDA_CAPABILITIES").split(", ").filter_map(|cap| cap.parse::<i32>().ok());
        built_for.into_iter().any(|cap| (90..=10 * major + minor).contains(&cap))
    }

    /// What `enqueue` launches, as a graph, none of it run; none where the driver does not capture. Not on a stream that other
    /// threads may be using, whose work would become part of it: only on this thread's own.
    pub(crate) fn capture(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<Option<Graph>> {
        const PER_THREAD: usize = 2; // CU_STREAM_PER_THREAD, which candle's devices use if not told otherwise
        let own = self.stream.cu_stream().addr() == PER_THREAD;
        if !own || self.stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).is_err() {
            return Ok(None);
        }
        let enqueued = enqueue();
        // Whatever happened, the stream must leave the mode.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        // What failed fails again, with its reason, where it is launched without a graph.
        Ok(enqueued.ok().and(graph.ok()).flatten().map(Graph))
    }

    /// Loads a kernel, once for each context.
    fn function(&self, kernel: Kernel, shared: usize) -> Result<CudaFunction> {
        type Key = (usize, &'static str, Option<DType>);
        // With the most shared memory that was asked for: the driver keeps one number a function, which must not shrink while
        // another thread is about to launch.
        type Loaded = (CudaFunction, Arc<Mutex<usize>>);
        static FUNCTIONS: RwLock<Option<HashMap<Key, Loaded>>> = RwLock::new(None);
        const WITHOUT_ASKING: usize = 40 << 10; // of 48, some of which kernels have of their own
        let context = self.stream.context();
        let key = (context.cu_ctx().addr(), kernel.name, kernel.dtype);
        let known = FUNCTIONS.read().unwrap_or_else(PoisonError::into_inner);
        let (function, most) = match known.as_ref().and_then(|known| known.get(&key)) {
            Some(loaded) => loaded.clone(),
            None => {
                drop(known);
                let mut known = FUNCTIONS.write().unwrap_or_else(PoisonError::into_inner);
                let module = context.load_module(Ptx::from_binary(kernel.module.read()?));
                let module = module.or_else(|e| self.does_not_run(kernel.module, e))?;
                let function = module.load_function(&kernel.symbol()).w()?;
                let loaded = (function, Arc::new(Mutex::new(WITHOUT_ASKING)));
                // Another thread may have loaded it meanwhile.
                known.get_or_insert_default().entry(key).or_insert(loaded).clone()
            }
        };
        let mut most = most.lock().unwrap_or_else(PoisonError::into_inner);
        if shared > *most {
            function.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32).w()?;
            *most = shared;
        }
        drop(most);
        Ok(function)
    }

    fn does_not_run<T>(&self, module: &Module, error: impl std::fmt::Display) -> Result<T> {
        let (major, minor) = self.stream.context().compute_capability().unwrap_or_default();
        bail!(
            "the kernels of {} do not load on this GPU, of compute capability {major}.{minor} ({error}): they were built for {}; \
             build with CUDA_COMPUTE_CAP={major}{minor}, or install a driver that knows the CUDA toolkit that built them",
            module.name,
            env!("MAMBA_CUDA_CAPABILITIES")
        )
    }

    /// The sums of the columns of a `(rows, columns)` matrix of `f32`, in order, whatever the launch; written to `out`.
    pub(crate) fn sum_rows(&self, matrix: &Buffer, rows: usize, columns: usize, out: &Buffer) -> Result<()> {
        static MODULE: Module = module!("sum_rows");
        let kernel = Kernel { module: &MODULE, name: "sum_rows", dtype: None };
        let launch = Launch { blocks: [columns.div_ceil(32), 1, 1], threads: [32, 16], shared: 0 };
        let args = SumRows {
            matrix: matrix.pointer().address,
            out: out.pointer(),
            rows: rows as i64,
            columns: columns as i64,
        };
        // SAFETY: the matrix is of that size, `out` of one row.
        unsafe { self.launch(kernel, launch, args) }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumRows {
    matrix: u64,
    out: Pointer,
    rows: i64,
    columns: i64,
}
const _: () = assert!(size_of::<SumRows>() == 40);
// SAFETY: as `SumRows` in `sum_rows.cu`.
unsafe impl Arguments for SumRows {}

/// Launches that were captured, to run again as one.
pub(crate) struct Graph(CudaGraph);

// SAFETY: handles of the driver may be used from any thread, one at a time: what changes a graph takes it by value or `&mut`.
unsafe impl Send for Graph {}
// SAFETY: nothing can be done with a shared one: `launch` takes `&mut`.
unsafe impl Sync for Graph {}

impl Graph {
    /// Enqueues everything in it.
    pub(crate) fn launch(&mut self) -> Result<()> {
        self.0.launch().w()
    }
}

impl Launch {
    fn config(&self) -> LaunchConfig {
        let [x, y, z] = self.blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (self.threads[0] as u32, self.threads[1] as u32, 1),
            shared_mem_bytes: self.shared as u32,
        }
    }
}

impl Kernel {
    fn does_not_launch<T>(&self, launch: Launch, error: impl std::fmt::Display) -> Result<T> {
        let Launch { blocks, threads, .. } = launch;
        bail!("{} of {blocks:?} blocks of {threads:?} threads does not launch: {error}", self.symbol())
    }

    fn symbol(&self) -> String {
        match self.dtype {
            Some(dtype) => format!("{}_{}", self.name, dtype.as_str()),
            None => self.name.into(),
        }
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
    use candle_core::cuda_backend::cudarc::driver::sys;
    let (mut pool, mut threshold) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: the device is that of a context; the attribute is a u64, which is read before the call returns.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, device.cuda_stream().context().cu_device()).result().w()?;
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result().w()
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
