//! Dropout whose mask is a function of its key, so that it is drawn again instead of kept.

mod autograd;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod philox;
pub mod reference;

use candle_core::{Result, Tensor};

use crate::args::{self, Checker};

const OP: &str = "dropout";

/// Arguments of [`dropout`].
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    /// The input, any shape.
    pub x: &'a Tensor,
    /// How likely it is that an element is left out, from 0 to less than 1.
    pub rate: f64,
    /// One half of the key of the mask: that of a whole training, say.
    pub seed: u64,
    /// The other half: another mask for each number, such as those of step and layer together.
    pub stream: u64,
}

impl<'a> Dropout<'a> {
    /// All arguments but the stream, which is 0.
    pub fn new(x: &'a Tensor, rate: f64, seed: u64) -> Self {
        Self { x, rate, seed, stream: 0 }
    }

    fn mask(&self) -> Result<Mask> {
        let check = Checker::new(OP, "x", self.x)?;
        let Self { rate, seed, stream, .. } = *self;
        check.require((0.0..1.0).contains(&rate), || {
            format!("`rate` is {rate}, expected at least 0 and less than 1")
        })?;
        // What is below the threshold is left out.
        let threshold = (rate * 2f64.powi(32)) as u32;
        Ok(Mask { seed, stream, threshold, scale: 1.0 / (1.0 - rate) })
    }
}

/// Which elements stay, and what they are multiplied with.
#[derive(Debug, Clone, Copy)]
struct Mask {
    seed: u64,
    stream: u64,
    threshold: u32,
    scale: f64,
}

/// Leaves out elements at random, and scales the others so that the expectation stays.
///
/// `yᵢ = xᵢ / (1 - rate)` where `uᵢ ≥ rate`, else 0; `uᵢ` is the 32-bit word `i` (in row-major order) of the counter-based generator
/// Philox 4×32-10 under the key `(seed, stream)`, divided by 2³². So the mask is a function of key and shape: the same on every device,
/// for any number of threads, and when [`checkpoint`](crate::checkpoint()) computes a layer again. The mask is not kept.
///
/// # Shapes
/// `x`, `y`: the same, any; f32, f16, bf16 or f64. The product is `f32` and rounded once (f64 for f64).
/// # Gradients
/// For `x`, by the same mask.
/// # Errors
/// If `rate` is not from 0 to less than 1, or the dtype is none of these.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{Dropout, dropout};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::ones(10_000, DType::F32, &Device::Cpu)?;
/// let args = Dropout { stream: 7, ..Dropout::new(&x, 0.25, 1) };
/// let y = dropout(&args)?;
/// let mean = y.mean_all()?.to_scalar::<f32>()?;
/// assert!((mean - 1.0).abs() < 0.03, "{mean}");
/// assert_eq!(y.to_vec1::<f32>()?, dropout(&args)?.to_vec1::<f32>()?);
/// assert_ne!(y.to_vec1::<f32>()?, dropout(&Dropout { stream: 8, ..args })?.to_vec1::<f32>()?);
/// # Ok(()) }
/// ```
/// # Source
/// Srivastava et al., 2014; Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3", for the generator.
pub fn dropout(args: &Dropout) -> Result<Tensor> {
    let mask = args.mask()?;
    if mask.threshold == 0 {
        return Ok(args.x.clone());
    }
    if args::fused(args.x) { autograd::apply(args.x, mask) } else { reference::forward(args) }
}
