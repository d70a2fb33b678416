//! How much memory a training takes, for people to see.

use candle_core::Device;

/// Bytes: of a GPU, what all programs have of it now; else the most that this one has had so far. None where nobody says.
pub fn bytes(device: &Device) -> Option<u64> {
    if device.is_cuda() { of_gpu() } else { of_process() }
}

#[cfg(feature = "cuda")]
fn of_gpu() -> Option<u64> {
    let (free, all) = candle_core::cuda_backend::cudarc::driver::result::mem_get_info().ok()?;
    Some((all - free) as u64)
}

#[cfg(not(feature = "cuda"))]
fn of_gpu() -> Option<u64> {
    None
}

#[cfg(unix)]
fn of_process() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to room for the answer, which is plain numbers, so zeros are one too.
    let usage = unsafe {
        (libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) == 0).then(|| usage.assume_init())
    }?;
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Some(usage.ru_maxrss as u64 * unit)
}

#[cfg(not(unix))]
fn of_process() -> Option<u64> {
    None
}
