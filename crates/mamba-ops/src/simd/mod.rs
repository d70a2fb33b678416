//! Run-time choice of the instruction set: a kernel is written once over [`Simd`] and compiled for each.
//!
//! The vectors are those of [`pulp`]; a kernel is a struct that implements [`WithSimd`] and is run by
//! [`Isa::dispatch`]. An [`Isa`] can only be had if the processor supports it, so holding one is proof.

use std::cell::Cell;
use std::sync::OnceLock;

pub use pulp::{Simd, WithSimd};

pub(crate) mod half;
pub(crate) mod math;
pub(crate) mod matrix;
pub(crate) mod slice;

/// Environment variable that asks for an instruction set: `scalar`, `avx2`, `avx512` or `neon`. One that this processor does not have
/// is passed over for the best.
pub const ISA_VARIABLE: &str = "MAMBA_ISA";

/// An instruction set that this processor has.
///
/// # Example
/// ```
/// use mamba_ops::simd::Isa;
/// // Every processor has at least the scalar one; the best comes last.
/// assert_eq!(Isa::available()[0].name(), "scalar");
/// Isa::available()[0].scope(|| assert_eq!(Isa::current().name(), "scalar"));
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Isa(Token);

#[derive(Debug, Clone, Copy)]
enum Token {
    Scalar(pulp::Scalar),
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    Avx2(pulp::x86::V3),
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    Avx512(pulp::x86::V4),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
}

thread_local! {
    static OVERRIDE: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// Asks for the cache lines of a slice, which is read soon: rows far apart are beyond what processors foresee.
#[inline(always)]
pub(crate) fn prefetch(x: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in x.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has the instruction, and it reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// Asks for the cache lines that begin as many bytes behind those of a value that is read now.
#[inline(always)]
pub(crate) fn prefetch_ahead<T>(value: &T, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = std::ptr::from_ref(value).cast::<i8>().wrapping_add(bytes + line);
        // SAFETY: every x86-64 has the instruction, and it reads nothing, wherever that is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (value, bytes);
}

impl Isa {
    /// Every name that [`ISA_VARIABLE`] knows, whether or not this processor has it.
    pub const NAMES: [&'static str; 4] = ["scalar", "avx2", "avx512", "neon"];

    /// The instruction sets of this processor, from the plainest to the best.
    pub fn available() -> Vec<Isa> {
        let mut isas = vec![Isa(Token::Scalar(pulp::Scalar::new()))];
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        {
            let f16c = std::arch::is_x86_feature_detected!("f16c");
            isas.extend(pulp::x86::V3::try_new().filter(|_| f16c).map(|token| Isa(Token::Avx2(token))));
            isas.extend(pulp::x86::V4::try_new().map(|token| Isa(Token::Avx512(token))));
        }
        #[cfg(target_arch = "aarch64")]
        isas.extend(pulp::aarch64::Neon::try_new().map(|token| Isa(Token::Neon(token))));
        isas
    }

    /// The one that [`ISA_VARIABLE`] names if this processor has it, else the best; decided once per process.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let available = Self::available();
            let wanted = std::env::var(ISA_VARIABLE).ok();
            let named = available.iter().find(|isa| Some(isa.name()) == wanted.as_deref());
            *named.unwrap_or(&available[available.len() - 1])
        })
    }

    /// The one that ops called from this thread use: that of the innermost [`scope`](Self::scope), else [`best`](Self::best).
    pub fn current() -> Isa {
        OVERRIDE.get().unwrap_or_else(Self::best)
    }

    /// Runs `f` with this instruction set as the current one of the calling thread, for tests and benchmarks.
    pub fn scope<R>(self, f: impl FnOnce() -> R) -> R {
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                OVERRIDE.set(self.0);
            }
        }
        let _restore = Restore(OVERRIDE.replace(Some(self)));
        f()
    }

    /// Its name, one of [`Isa::NAMES`].
    pub fn name(self) -> &'static str {
        match self.0 {
            Token::Scalar(_) => "scalar",
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Token::Avx2(_) => "avx2",
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Token::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Token::Neon(_) => "neon",
        }
    }

    /// Runs a kernel compiled for this instruction set.
    pub fn dispatch<K: WithSimd>(self, kernel: K) -> K::Output {
        match self.0 {
            Token::Scalar(token) => Simd::vectorize(token, kernel),
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            // SAFETY: `available` gives the token where the processor has all of these.
            Token::Avx2(token) => unsafe { with_f16c(token, kernel) },
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Token::Avx512(token) => Simd::vectorize(token, kernel),
            #[cfg(target_arch = "aarch64")]
            Token::Neon(token) => Simd::vectorize(token, kernel),
        }
    }
}

/// What `vectorize` of pulp does, with F16C: every processor with AVX2 has it, but pulp does not count on it.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
#[target_feature(enable = "avx2,bmi1,bmi2,f16c,fma,lzcnt,popcnt")]
fn with_f16c<K: WithSimd>(token: pulp::x86::V3, kernel: K) -> K::Output {
    kernel.with_simd(token)
}
