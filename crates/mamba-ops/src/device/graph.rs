//! Launches that were captured, to run again as one.

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::cuda_backend::cudarc::driver::sys::CUgraphInstantiate_flags;
use candle_core::cuda_backend::cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

use super::Gpu;

impl Gpu {
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
}

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
