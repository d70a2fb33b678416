//! The norm in plain tensor operations: the meaning of the op, and its gradients by candle's autograd.

use candle_core::{D, Result, Tensor};

use super::{Norm, NormKind, NormOutput};
use crate::args::state_dtype;
use crate::reference::{cast, silu};

/// `y = (u - m) / √(Σ (u - m)² / n + eps) · weight + bias` of `u = x + residual`, gated, for any device and dtype;
/// differentiable.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`norm`](super::norm).
pub fn forward(args: &Norm) -> Result<NormOutput> {
    let dtype = state_dtype(args.x.dtype());
    let x = cast(args.x, dtype)?;
    let sum = match args.residual {
        Some(residual) => (x + cast(residual, dtype)?)?,
        None => x,
    };
    let residual = match args.residual {
        Some(_) => sum.to_dtype(args.residual_dtype())?,
        None => cast(args.x, args.residual_dtype())?,
    };
    let gate = args.z.map(|z| silu(&cast(z, dtype)?)).transpose()?;
    let u = match &gate {
        Some(gate) if !args.norm_before_gate => (sum * gate)?,
        _ => sum,
    };
    let mut y = normalised(&u, args)?;
    if let Some(weight) = args.weight {
        y = y.broadcast_mul(&cast(weight, dtype)?)?;
    }
    if let Some(bias) = args.bias {
        y = y.broadcast_add(&cast(bias, dtype)?)?;
    }
    if let (Some(gate), true) = (gate, args.norm_before_gate) {
        y = (y * gate)?;
    }
    Ok(NormOutput { y: y.to_dtype(args.x.dtype())?, residual })
}

/// `(u - m) / √(Σ (u - m)² / n + eps)` by groups.
fn normalised(u: &Tensor, args: &Norm) -> Result<Tensor> {
    if u.elem_count() == 0 {
        return Ok(u.clone());
    }
    let group_size = args.group_size.unwrap_or(u.dim(D::Minus1)?);
    let groups = u.reshape(((), group_size))?;
    let centred = match args.kind {
        NormKind::Rms => groups,
        NormKind::Layer => groups.broadcast_sub(&groups.mean_keepdim(1)?)?,
    };
    let deviation = (centred.sqr()?.mean_keepdim(1)? + args.eps)?.sqrt()?;
    centred.broadcast_div(&deviation)?.reshape(u.shape())
}
