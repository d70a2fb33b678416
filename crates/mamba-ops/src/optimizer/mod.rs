//! What an optimizer does with each parameter, in one pass over memory.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{DType, Result, Tensor, bail};

use crate::args::{self, Checker, Dim};
use crate::host;

const OP: &str = "adamw_update";
const SQUARES: &str = "sum_of_squares";

/// Arguments of [`adamw_update`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct AdamWUpdate<'a> {
    /// The parameter, changed in place.
    pub value: &'a Tensor,
    /// The mean of its gradients, changed in place.
    pub first: &'a Tensor,
    /// The mean of their squares, changed in place.
    pub second: &'a Tensor,
    /// The gradient.
    pub grad: &'a Tensor,
    /// Where to round the new value to, if something else computes with it; changed in place.
    pub rounded: Option<&'a Tensor>,
    /// What the gradient is multiplied with first.
    pub grad_scale: f64,
    /// `η`.
    pub lr: f64,
    /// `λ`.
    pub weight_decay: f64,
    /// `β₁`.
    pub beta1: f64,
    /// `β₂`.
    pub beta2: f64,
    /// `ε`.
    pub eps: f64,
    /// The number of this step, from 1.
    pub step: usize,
}

impl<'a> AdamWUpdate<'a> {
    /// The required arguments; a rate of 1e-3, betas of 0.9 and 0.999, no decay.
    pub fn new(
        value: &'a Tensor,
        first: &'a Tensor,
        second: &'a Tensor,
        grad: &'a Tensor,
        step: usize,
    ) -> Self {
        Self {
            value,
            first,
            second,
            grad,
            rounded: None,
            grad_scale: 1.0,
            lr: 1e-3,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            step,
        }
    }

    fn check(&self) -> Result<()> {
        let check = Checker::new(OP, "value", self.value)?;
        check.require(matches!(self.value.dtype(), DType::F32 | DType::F64), || {
            format!("`value` has dtype {}, expected f32 or f64", self.value.dtype().as_str())
        })?;
        let dims: Vec<Dim> = self.value.dims().iter().map(|n| ("value", *n)).collect();
        for (name, x) in [("first", self.first), ("second", self.second)] {
            check.parameter(name, x, &dims)?;
            check.require(x.dtype() == self.value.dtype(), || {
                let [got, expected] = [x, self.value].map(|x| x.dtype().as_str());
                format!("`{name}` has dtype {got}, expected {expected} as `value`")
            })?;
        }
        check.parameter("grad", self.grad, &dims)?;
        if let Some(rounded) = self.rounded {
            check.parameter("rounded", rounded, &dims)?;
        }
        let changed = [Some(self.value), Some(self.first), Some(self.second), self.rounded];
        let all: Vec<&Tensor> = changed.into_iter().chain([Some(self.grad)]).flatten().collect();
        for (i, x) in changed.into_iter().flatten().enumerate() {
            check.require(x.is_contiguous(), || "what is changed in place must be contiguous".into())?;
            check.require(all[i + 1..].iter().all(|other| !args::share_storage(x, other)), || {
                "a tensor that is changed in place shares its storage with another argument".into()
            })?;
        }
        check.require(self.step > 0, || "`step` is 0, expected at least 1".into())
    }

    fn numbers(&self) -> Numbers {
        let step = self.step as f64;
        Numbers {
            factor: self.grad_scale,
            keep: 1.0 - self.lr * self.weight_decay,
            rate: self.lr / (1.0 - self.beta1.powf(step)),
            correction: (1.0 - self.beta2.powf(step)).sqrt(),
        }
    }
}

/// What is the same for all elements.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    /// Of the gradient.
    factor: f64,
    /// What stays of the parameter.
    keep: f64,
    /// `η / (1 - β₁ᵗ)`.
    rate: f64,
    /// `√(1 - β₂ᵗ)`.
    correction: f64,
}

/// Updates a parameter and its moments by Adam with decoupled weight decay, in place.
///
/// `m ← β₁ m + (1 - β₁) g`, `v ← β₂ v + (1 - β₂) g²`,
/// `p ← (1 - η λ) p - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)`, where `g` is the scaled gradient and `t` the step.
///
/// # Shapes
/// All of the same shape, any. `value`, `first` and `second` are f32 (or f64, all of them) and contiguous · `grad` any floating
/// dtype · `rounded` any floating dtype, contiguous.
/// # Gradients
/// None: the values alone are read and changed.
/// # Errors
/// If a shape, dtype or device disagrees with `value`, or the step is 0.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{AdamWUpdate, adamw_update};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, -2.0], &Device::Cpu)?;
/// let (m, v) = (Tensor::zeros(2, DType::F32, &Device::Cpu)?, Tensor::zeros(2, DType::F32, &Device::Cpu)?);
/// let gradient = (&x * 2.0)?; // of x²
/// adamw_update(&AdamWUpdate { lr: 0.5, ..AdamWUpdate::new(&x, &m, &v, &gradient, 1) })?;
/// assert_eq!(x.to_vec1::<f32>()?, [0.5, -1.5]); // the first step is of the learning rate
/// # Ok(()) }
/// ```
/// # Source
/// Loshchilov and Hutter, 2019; the order of operations is that of `torch.optim.AdamW`.
pub fn adamw_update(args: &AdamWUpdate) -> Result<()> {
    args.check()?;
    if args.value.elem_count() == 0 {
        return Ok(());
    }
    if !args::fused(args.value) || args.value.dtype() != DType::F32 || !args.grad.dtype().is_float() {
        return reference::adamw_update(args);
    }
    #[cfg(feature = "cuda")]
    if args.value.device().is_cuda() {
        return cuda::adamw_update(args);
    }
    cpu::adamw_update(args)?;
    match args.rounded {
        Some(rounded) => {
            let value = args.value.detach().to_dtype(rounded.dtype())?;
            host::replace(&rounded.detach().flatten_all()?, &value.flatten_all()?)
        }
        None => Ok(()),
    }
}

/// Adds the squares of all elements of some tensors: the square of the norm of all gradients.
///
/// `Σ x²` in `f64`, in an order that depends on the shapes alone. On a GPU there is one synchronisation, however many tensors
/// there are, and one more for each that is `f64`.
///
/// # Shapes
/// Any, of any floating dtype.
/// # Gradients
/// None.
/// # Errors
/// If a dtype is not a floating one, or the devices differ.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let (a, b) = (Tensor::new(&[3f32], &Device::Cpu)?, Tensor::new(&[[4f32]], &Device::Cpu)?);
/// assert_eq!(mamba_ops::sum_of_squares(&[&a, &b])?, 25.0);
/// # Ok::<_, candle_core::Error>(())
/// ```
pub fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    for x in tensors {
        if !x.dtype().is_float() {
            bail!("{SQUARES}: a tensor has dtype {}, expected a floating one", x.dtype().as_str())
        }
        if !x.device().same_device(tensors[0].device()) {
            bail!("{SQUARES}: the tensors are on different devices")
        }
    }
    let mut sum = 0.0;
    #[cfg(feature = "cuda")]
    let (fused, tensors) = {
        let fused = |x: &&Tensor| x.device().is_cuda() && x.dtype() != DType::F64;
        tensors.iter().copied().partition::<Vec<_>, _>(fused)
    };
    #[cfg(feature = "cuda")]
    if !fused.is_empty() {
        sum += cuda::sum_of_squares(&fused)?;
    }
    for x in tensors.iter().filter(|x| x.elem_count() > 0) {
        sum += match x.device().is_cpu() && x.dtype() == DType::F32 {
            true => cpu::sum_of_squares(&host::read("x", x)?),
            false => reference::sum_of_squares(x)?,
        };
    }
    Ok(sum)
}
