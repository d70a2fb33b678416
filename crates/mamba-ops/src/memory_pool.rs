//! What becomes of memory that is freed.

use candle_core::{Device, Result};

/// Lets this process keep the memory of a device that it frees, for what it allocates next.
///
/// By default CUDA gives freed memory back whenever a stream is waited for, and maps it again at the next allocation: a loop that
/// reads a loss each step, and holds gigabytes within it, pays for that each time. The C library of Linux does the same with each large
/// buffer, whose every page is then cleared again when it is first touched: that takes longer than a norm or a convolution over it. Other
/// processes see the memory as taken, as they do with PyTorch on a GPU. With another C library, or an allocator of your own, there is
/// nothing to do on the CPU. There is no way back but the end of the process.
///
/// # Errors
/// If the driver fails.
/// # Example
/// ```
/// mamba_ops::keep_freed_memory(&candle_core::Device::Cpu)?;
/// # Ok::<_, candle_core::Error>(())
/// ```
/// # Source
/// `CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`, CUDA driver API; `mallopt(3)`.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::device::keep_freed_memory(device),
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        Device::Cpu => {
            // SAFETY: sets two numbers of the allocator, under its lock: no buffer is mapped by itself, and the heap does not shrink.
            unsafe {
                libc::mallopt(libc::M_MMAP_MAX, 0);
                libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
            }
            Ok(())
        }
        _ => Ok(()),
    }
}
