//! Kernels, and how they are launched.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::size_of;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, cuLaunchKernelEx,
};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{DType, Result, bail};

use super::{Buffer, Gpu, Pointer};

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

impl Gpu {
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

    /// Whether kernels can begin while those before them end: the GPU has compute capability 9.0, and so has the code that
    /// runs on it, which otherwise does not wait.
    fn overlaps(&self) -> bool {
        let (major, minor) = self.stream.context().compute_capability().unwrap_or_default();
        let built_for = env!("MAMBA_CUDA_CAPABILITIES").split(", ").filter_map(|cap| cap.parse::<i32>().ok());
        built_for.into_iter().any(|cap| (90..=10 * major + minor).contains(&cap))
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
        let kernel = Kernel { module: &SUM_ROWS, name: "sum_rows", dtype: None };
        let launch = Launch { blocks: [columns.div_ceil(32), 1, 1], threads: [32, 16], shared: 0 };
        let args = SumRows::new(matrix, rows, columns, out);
        // SAFETY: the matrix is of that size, `out` of one row.
        unsafe { self.launch(kernel, launch, args) }
    }

    /// The sums over the first and the last axis of `(rows, groups, columns)`, in an order of their own; written to `out`.
    pub(crate) fn sum_groups(
        &self,
        matrix: &Buffer,
        rows: usize,
        [groups, columns]: [usize; 2],
        out: &Buffer,
    ) -> Result<()> {
        let kernel = Kernel { module: &SUM_ROWS, name: "sum_groups", dtype: None };
        let launch = Launch { blocks: [groups, 1, 1], threads: [512, 1], shared: 0 };
        let args = SumRows::new(matrix, rows, columns, out);
        // SAFETY: the matrix is of that size, `out` of one number a group.
        unsafe { self.launch(kernel, launch, args) }
    }
}

static SUM_ROWS: Module = module!("sum_rows");

#[repr(C)]
#[derive(Clone, Copy)]
struct SumRows {
    matrix: u64,
    out: Pointer,
    rows: i64,
    columns: i64,
}
const _: () = assert!(size_of::<SumRows>() == 40);
// SAFETY: as `SumRows` and `SumGroups` in `sum_rows.cu`.
unsafe impl Arguments for SumRows {}

impl SumRows {
    fn new(matrix: &Buffer, rows: usize, columns: usize, out: &Buffer) -> Self {
        let (matrix, out) = (matrix.pointer().address, out.pointer());
        Self { matrix, out, rows: rows as i64, columns: columns as i64 }
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
