//! GPUs that work together, by NVIDIA's library.
//!
//! Streams, events and memory are cudarc's. The functions of NCCL are looked up when they are first needed, not linked: a
//! program with the feature `cuda` is built, and runs on one GPU, where NCCL is not installed. (cudarc's own binding is linked
//! wherever candle uses cudarc, which links it dynamically.)

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaStorage, DType, Device, DeviceLocation, Layout, Storage, Tensor};
use libloading::Library;

use super::collective::{Collective, known};
use super::failed;
use super::ring::Ring;
use crate::{Error, Result};

/// Processes with a GPU each, that add tensors there by NCCL, over NVLink, PCIe or the network; what is on the CPU, and what
/// they have to say to each other, goes over a [`Ring`].
///
/// Ranks that are threads of one process need `NCCL_P2P_DIRECT_DISABLE=1` in the environment, since candle allocates from pools
/// that other GPUs do not see.
///
/// Calls enqueue and return; [`wait`](Collective::wait) notices a process that is gone, so nothing waits for ever.
///
/// # Source
/// <https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html>
pub struct Nccl {
    ring: Ring,
    functions: Functions,
    communicator: Mutex<Communicator>,
    /// Of a context object of its own: candle's, with only one stream, need not record an event for every tensor.
    stream: Arc<CudaStream>,
    timeout: Duration,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nccl").field("ring", &self.ring).finish_non_exhaustive()
    }
}

/// `ncclComm_t`, null after it was aborted.
struct Communicator(*mut c_void);

// SAFETY: NCCL lets any one thread at a time use a communicator; a mutex sees to that.
unsafe impl Send for Communicator {}

impl Nccl {
    /// Has the processes of `ring`, which all call this, use the GPUs that they give, each another one. `timeout` is for that, and
    /// later for each wait.
    ///
    /// # Errors
    /// If NCCL is not installed, refuses, or does not finish in time.
    pub fn new(ring: Ring, device: &Device, timeout: Duration) -> Result<Self> {
        let error = |message: String| failed(ring.rank(), ring.world_size(), message);
        let DeviceLocation::Cuda { gpu_id } = device.location() else {
            return Err(error("NCCL is for GPUs, and the device is a CPU".into()));
        };
        let functions = Functions::load();
        // All or none: one that has no NCCL would leave the others waiting for it.
        let without = ring.sum(&[f64::from(u8::from(functions.is_err()))])?[0];
        let functions = functions.map_err(error)?;
        if without > 0.0 {
            return Err(error(format!("{without} ranks cannot load NCCL")));
        }
        let context = CudaContext::new(gpu_id).map_err(|e| error(e.to_string()))?;
        let stream = context.new_stream().map_err(|e| error(e.to_string()))?;
        let id = match ring.is_first() {
            true => functions.unique_id(),
            false => Ok(UniqueId { bytes: [0; 128] }),
        };
        let id = super::on_first(&ring, || id.map(|id| id.bytes.to_vec()).map_err(error))?;
        let mut unique = UniqueId { bytes: [0; 128] };
        unique.bytes.copy_from_slice(&id);
        let communicator = join(&functions, &context, unique, &ring, timeout)?;
        let nccl = Self { ring, functions, communicator: Mutex::new(communicator), stream, timeout };
        nccl.try_out(device)?;
        Ok(nccl)
    }

    /// The first sum makes the connections.
    fn try_out(&self, device: &Device) -> Result<()> {
        let ones = Tensor::ones(1024, DType::F32, device)?;
        let sum = self.all_reduce_sum(&ones)?;
        self.wait()?;
        let size = self.world_size() as f32;
        match sum.to_vec1::<f32>()?.into_iter().find(|x| *x != size) {
            None => Ok(()),
            Some(other) => Err(self.error(format!("NCCL adds {size} ones to {other}"))),
        }
    }

    fn error(&self, message: impl std::fmt::Display) -> Error {
        failed(self.rank(), self.world_size(), message)
    }

    fn communicator(&self) -> MutexGuard<'_, Communicator> {
        self.communicator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn over(&self, x: &Tensor, operation: Operation) -> Result<Tensor> {
        known(x)?;
        let x = x.detach().contiguous()?;
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(self.error("a tensor is neither on a GPU nor on the CPU"));
        };
        match storage.dtype() {
            DType::F64 => self.over_elements::<f64>(storage, layout, FLOAT64, operation),
            _ => self.over_elements::<f32>(storage, layout, FLOAT32, operation),
        }
    }

    fn over_elements<T: CudaDType + DeviceRepr>(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
        dtype: c_int,
        operation: Operation,
    ) -> Result<Tensor> {
        let count = layout.shape().elem_count();
        let (device, start) = (storage.device(), layout.start_offset());
        if count == 0 {
            return Err(self.error("a tensor without elements"));
        }
        let candle = device.cuda_stream();
        let from = storage.as_cuda_slice::<T>()?.slice(start..start + count);
        // SAFETY: NCCL writes all of it before anything that is enqueued on candle's stream after this reads it.
        let mut to = unsafe { device.alloc::<T>(count)? };
        {
            let communicator = self.communicator();
            if communicator.0.is_null() {
                return Err(self.error("NCCL was stopped by an earlier error"));
            }
            self.stream.join(&candle).w()?;
            let (from, _read) = from.device_ptr(&self.stream);
            let (to, _written) = to.device_ptr_mut(&self.stream);
            let (from, to) = (from as *const c_void, to as *mut c_void);
            let stream = self.stream.cu_stream().cast();
            // SAFETY: both are `count` elements of `dtype` on the GPU of the communicator, and live until work that is enqueued
            // on candle's stream after this is done: that is where they will be freed.
            let code = unsafe {
                match operation {
                    Operation::Sum => {
                        (self.functions.all_reduce)(from, to, count, dtype, SUM, communicator.0, stream)
                    }
                    Operation::Broadcast => {
                        (self.functions.broadcast)(from, to, count, dtype, 0, communicator.0, stream)
                    }
                }
            };
            self.functions.check(code).map_err(|e| self.error(e))?;
        }
        candle.join(&self.stream).w()?;
        let sum = Storage::Cuda(CudaStorage::wrap_cuda_slice(to, device.clone()));
        Ok(Tensor::from((sum, layout.shape().clone())))
    }

    /// What is wrong, if something is known to be.
    fn problem(&self, since: Instant) -> Option<Error> {
        let mut code = SUCCESS;
        // SAFETY: the communicator is live, and `code` is written.
        let asked = unsafe { (self.functions.async_error)(self.communicator().0, &mut code) };
        if let Err(message) = self.functions.check(asked).and_then(|()| self.functions.check(code)) {
            return Some(self.error(message));
        }
        match self.ring.check() {
            Err(e) => Some(e),
            Ok(()) if since.elapsed() > self.timeout => {
                Some(self.error(format!("NCCL did not finish within {} s", self.timeout.as_secs_f64())))
            }
            Ok(()) => None,
        }
    }

    /// Ends what NCCL has under way, also if the others never come.
    fn abort(&self) {
        let mut communicator = self.communicator();
        if !communicator.0.is_null() {
            // SAFETY: it is live, and not used after this.
            unsafe { (self.functions.abort)(communicator.0) };
            communicator.0 = std::ptr::null_mut();
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Makes the communicator, which waits for the others without end: on a thread of its own, so that this one does not.
fn join(
    functions: &Functions,
    context: &Arc<CudaContext>,
    id: UniqueId,
    ring: &Ring,
    timeout: Duration,
) -> Result<Communicator> {
    let error = |message: String| failed(ring.rank(), ring.world_size(), message);
    let (init, context, (size, rank)) =
        (functions.clone(), context.clone(), (ring.world_size() as c_int, ring.rank() as c_int));
    let (sender, made) = channel();
    std::thread::spawn(move || {
        let made = context.bind_to_thread().map_err(|e| e.to_string()).and_then(|()| {
            let mut communicator = std::ptr::null_mut();
            // SAFETY: the GPU is this thread's, and `communicator` is written.
            let code = unsafe { (init.init_rank)(&mut communicator, size, id, rank) };
            init.check(code).map(|()| Communicator(communicator))
        });
        let _ = sender.send(made); // if nobody waits any more, the training is over
    });
    let start = Instant::now();
    loop {
        match made.recv_timeout(Duration::from_millis(20)) {
            Ok(made) => {
                return made.map_err(|e| error(format!("{e} (does each rank have a GPU of its own?)")));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(error("NCCL panicked".into())),
            Err(RecvTimeoutError::Timeout) if start.elapsed() > timeout => {
                let message = format!("NCCL did not connect within {} s", timeout.as_secs_f64());
                return Err(error(message));
            }
            Err(RecvTimeoutError::Timeout) => ring.check()?,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Operation {
    Sum,
    Broadcast,
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.ring.rank()
    }

    fn world_size(&self) -> usize {
        self.ring.world_size()
    }

    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() { self.ring.all_reduce_sum(x) } else { self.over(x, Operation::Sum) }
    }

    fn broadcast(&self, x: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() { self.ring.broadcast(x) } else { self.over(x, Operation::Broadcast) }
    }

    fn wait(&self) -> Result<()> {
        let done = self.stream.record_event(None).map_err(|e| self.error(e))?;
        let start = Instant::now();
        let mut checked = start;
        while !done.is_complete() {
            // Most often it is a matter of a millisecond, so look often, and only now and then at the others.
            match checked.elapsed() < Duration::from_millis(100) {
                true => std::thread::yield_now(),
                false => {
                    checked = Instant::now();
                    if let Some(problem) = self.problem(start) {
                        self.abort();
                        return Err(problem);
                    }
                }
            }
        }
        Ok(())
    }
}

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId {
    bytes: [u8; 128],
}

const SUCCESS: c_int = 0;
/// An operation of a communicator that does not block is under way.
const IN_PROGRESS: c_int = 7;
const SUM: c_int = 0;
const FLOAT32: c_int = 7;
const FLOAT64: c_int = 8;

/// The functions of NCCL 2 that are used, as `nccl.h` declares them.
#[derive(Clone)]
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        *mut c_void,
        *mut c_void,
    ) -> c_int,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        *mut c_void,
        *mut c_void,
    ) -> c_int,
    async_error: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(*mut c_void) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    /// What they are part of.
    _library: Arc<Library>,
}

impl Functions {
    fn load() -> Result<Self, String> {
        const INSTALL: &str = "install NCCL (Debian and Ubuntu: libnccl2; pip: nvidia-nccl-cu13 or -cu12, whose folder \
            nvidia/nccl/lib LD_LIBRARY_PATH is to name), or choose the backend tcp";
        // SAFETY: what the library runs when it is loaded needs nothing of us.
        let library = unsafe {
            Library::new("libnccl.so.2").or_else(|first| Library::new("libnccl.so").map_err(|_| first))
        };
        let library = Arc::new(library.map_err(|e| format!("NCCL cannot be loaded: {e}; {INSTALL}"))?);
        macro_rules! find {
            ($name:literal) => {
                // SAFETY: the type is that of `nccl.h`, the same in all versions of NCCL 2 since 2.13.
                *unsafe { library.get($name) }
                    .map_err(|e| format!("NCCL is older than 2.13: {e}; {INSTALL}"))?
            };
        }
        Ok(Self {
            get_unique_id: find!(b"ncclGetUniqueId"),
            init_rank: find!(b"ncclCommInitRank"),
            all_reduce: find!(b"ncclAllReduce"),
            broadcast: find!(b"ncclBroadcast"),
            async_error: find!(b"ncclCommGetAsyncError"),
            abort: find!(b"ncclCommAbort"),
            error_string: find!(b"ncclGetErrorString"),
            last_error: find!(b"ncclGetLastError"),
            _library: library,
        })
    }

    fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId { bytes: [0; 128] };
        // SAFETY: `id` is written.
        self.check(unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        let text = |pointer: *const c_char| match pointer.is_null() {
            true => String::new(),
            // SAFETY: NCCL gives text that ends with 0 and stays until its next error.
            false => unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned(),
        };
        // SAFETY: any code has a text; the last error is that of the process, of no communicator.
        let (what, last) =
            unsafe { (text((self.error_string)(code)), text((self.last_error)(std::ptr::null_mut()))) };
        Err(if last.is_empty() { format!("NCCL: {what}") } else { format!("NCCL: {what}: {last}") })
    }
}
