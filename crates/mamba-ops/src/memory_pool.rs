//! What becomes of GPU memory that is freed.

use candle_core::{Device, Result};

/// Lets this process keep the GPU memory that it frees, for what it allocates next.
///
/// By default CUDA gives freed memory back whenever a stream is waited for, and maps it again at the next allocation: a loop that
/// reads a loss each step, and holds gigabytes within it, pays for that each time. Other processes then see the memory as taken,
/// as they do with PyTorch. On other devices there is nothing to do. There is no way back but the end of the process.
///
/// # Errors
/// If the driver fails.
/// # Example
/// ```
/// mamba_ops::keep_freed_memory(&candle_core::Device::Cpu)?;
/// # Ok::<_, candle_core::Error>(())
/// ```
/// # Source
/// `CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`, CUDA driver API.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::device::keep_freed_memory(device);
    }
    let _ = device;
    Ok(())
}
