//! A token drawn from each row of logits, where the logits are.

#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{Result, Tensor, bail};

use crate::args::Checker;

const OP: &str = "sample";

/// What [`sample`] gives where there is nothing to choose from: a logit is NaN or plus infinity, or all are minus infinity.
pub const NO_TOKEN: u32 = u32::MAX;

/// How one token is drawn: what is kept of a row, and the random number that decides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 for the likeliest token, whatever the rest says.
    pub temperature: f32,
    /// How many of the likeliest tokens are kept; all if absent.
    pub top_k: Option<usize>,
    /// The probability that the kept tokens reach, of those that top-k keeps; above 0 and at most 1.
    pub top_p: Option<f64>,
    /// The least probability that is kept, relative to the largest; above 0 and at most 1.
    pub min_p: Option<f64>,
    /// The random number, from 0 to less than 1.
    pub uniform: f64,
}

impl Draw {
    /// The likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, uniform: 0.0 };

    fn check(&self) -> Result<()> {
        let Self { temperature, top_k, top_p, min_p, uniform } = *self;
        let part = |p: Option<f64>| p.is_none_or(|p| p > 0.0 && p <= 1.0);
        if !(temperature >= 0.0 && temperature.is_finite()) {
            bail!("{OP}: `temperature` is {temperature}, expected a finite number of at least 0")
        }
        if top_k == Some(0) {
            bail!("{OP}: `top_k` is 0, expected at least 1")
        }
        if !part(top_p) {
            bail!("{OP}: `top_p` is {}, expected above 0 and at most 1", top_p.unwrap_or(f64::NAN))
        }
        if !part(min_p) {
            bail!("{OP}: `min_p` is {}, expected above 0 and at most 1", min_p.unwrap_or(f64::NAN))
        }
        if !(0.0..1.0).contains(&uniform) {
            bail!("{OP}: `uniform` is {uniform}, expected at least 0 and less than 1")
        }
        Ok(())
    }
}

/// Arguments of [`sample`].
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// The logits, `(rows, vocab_size)`.
    pub logits: &'a Tensor,
    /// How the token of each row is drawn.
    pub draws: &'a [Draw],
}

impl<'a> Sample<'a> {
    /// All arguments.
    pub fn new(logits: &'a Tensor, draws: &'a [Draw]) -> Self {
        Self { logits, draws }
    }

    fn check(&self) -> Result<()> {
        let check = Checker::new(OP, "logits", self.logits)?;
        let [rows, vocab_size] = check.main_dims(["rows", "vocab_size"])?;
        check
            .require(vocab_size > 0, || "`logits` has no tokens, expected vocab_size of at least 1".into())?;
        let draws = self.draws.len();
        check.require(draws == rows, || {
            format!("`draws` are {draws}, expected one for each of {rows} rows")
        })?;
        self.draws.iter().try_for_each(Draw::check)
    }
}

/// Draws a token from each row of logits.
///
/// `pᵢ ∝ exp(xᵢ / temperature)`; of these top-k keeps the likeliest, then top-p the fewest of the likeliest that reach its part of
/// what is left, then min-p those of at least its part of the largest; tokens of equal logits count as less likely the larger
/// their ids. The token is the first at which the sum of the kept `p`, in units of all of it, exceeds `uniform`: in the order of
/// likelihood if top-k or top-p took something away, else in that of ids. A temperature of 0 takes the likeliest.
///
/// On a GPU one kernel, and 32 bytes a row go there and 4 come back, where all logits would; masses are summed as integers in units of
/// 2⁻⁴⁰ of the largest, so that the same draw gives the same token each time. Other devices go through the
/// [reference](reference::forward).
///
/// # Shapes
/// `logits`: `(rows, vocab_size)`, f32, f16, bf16 or f64 · the result: `(rows)`, u32, on the same device; [`NO_TOKEN`] where there
/// is nothing to choose from.
/// # Gradients
/// None.
/// # Errors
/// If there is not one draw a row, an option is outside its range, or shape or dtype is wrong.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_ops::{Draw, Sample, sample};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[0.1f32, 2.5, 2.0, -1.0], [9.0, 0.0, 0.0, 9.5]], &Device::Cpu)?;
/// // 0.62 and 0.38 are left of the first row, in this order.
/// let second = Draw { temperature: 1.0, top_k: Some(2), uniform: 0.7, ..Draw::GREEDY };
/// let ids = sample(&Sample::new(&logits, &[second, Draw::GREEDY]))?;
/// assert_eq!(ids.to_vec1::<u32>()?, [2, 3]);
/// # Ok(()) }
/// ```
/// # Source
/// Holtzman et al., 2020, for top-p; Nguyen et al., 2024, for min-p.
pub fn sample(args: &Sample) -> Result<Tensor> {
    args.check()?;
    #[cfg(feature = "cuda")]
    if args.logits.device().is_cuda() && args.logits.dtype() != DType::F64 && !args.draws.is_empty() {
        return cuda::sample(args);
    }
    reference::forward(args)
}
