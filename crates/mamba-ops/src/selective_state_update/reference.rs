//! The step in plain tensor operations: the meaning of the op.

use candle_core::{Result, Tensor};

use super::SelectiveStateUpdate;
use crate::args::state_dtype;
use crate::reference::{cast, clamp, part, silu, softplus, sum_last};

/// `(y, h')` with `h' = exp(Δ · A) h + Δ · x ⊗ B`, `y = h' C + D · x`, for any device and dtype, token by
/// token; `state` stays as it is.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`selective_state_update`](super::selective_state_update).
pub fn forward(args: &SelectiveStateUpdate) -> Result<(Tensor, Tensor)> {
    if let Some(indices) = args.state_indices {
        let alone =
            SelectiveStateUpdate { state: &indices.gather(args.state)?, state_indices: None, ..*args };
        let (y, next) = forward(&alone)?;
        return Ok((indices.without_padding(&y)?, indices.scatter(&next, args.state)?));
    }
    tokens(args, step)
}

/// Several tokens one by one, or the only one, by `step`.
pub(super) fn tokens(
    args: &SelectiveStateUpdate,
    step: fn(&SelectiveStateUpdate) -> Result<(Tensor, Tensor)>,
) -> Result<(Tensor, Tensor)> {
    if args.x.rank() < args.state.rank() {
        return step(args);
    }
    let (mut state, mut ys) = (args.state.clone(), vec![]);
    for t in 0..args.x.dim(1)? {
        let token = |x: &Tensor| part(x, 1, t, 1)?.squeeze(1);
        let z = args.z.map(token).transpose()?;
        let (y, next) = step(&SelectiveStateUpdate {
            state: &state,
            x: &token(args.x)?,
            dt: &token(args.dt)?,
            b: &token(args.b)?,
            c: &token(args.c)?,
            z: z.as_ref(),
            ..*args
        })?;
        ys.push(y);
        state = next;
    }
    let y = if ys.is_empty() { args.x.zeros_like()? } else { Tensor::stack(&ys, 1)? };
    Ok((y, state))
}

/// One token.
fn step(args: &SelectiveStateUpdate) -> Result<(Tensor, Tensor)> {
    let dtype = state_dtype(args.x.dtype());
    // Without heads, each channel is a head of one channel.
    let x = cast(args.x, dtype)?;
    let x = if x.rank() == 2 { x.unsqueeze(2)? } else { x };
    let (batch, nheads, headdim) = x.dims3()?;
    let d_state = args.b.dims()[args.b.rank() - 1];
    let state = cast(args.state, dtype)?.reshape((batch, nheads, headdim, d_state))?;
    // One value a head or a channel, (…, nheads, headdim or 1).
    let channels = |x: &Tensor, leading: usize| -> Result<Tensor> {
        let x = cast(x, dtype)?;
        if x.rank() == leading + 1 { x.unsqueeze(leading + 1) } else { Ok(x) }
    };
    let mut dt = channels(args.dt, 1)?; // (batch, nheads, headdim or 1)
    if let Some(bias) = args.dt_bias {
        dt = dt.broadcast_add(&channels(bias, 0)?)?;
    }
    if args.dt_softplus {
        dt = softplus(&dt)?;
    }
    let dt = clamp(&dt, args.dt_limit)?.unsqueeze(3)?;
    let a = cast(args.a, dtype)?;
    let a = match (a.rank(), args.x.rank()) {
        (1, _) => a.reshape((nheads, 1, 1))?,
        (_, 2) => a.unsqueeze(1)?,
        _ => a,
    };
    // `b` or `c` for each head, (batch, nheads, 1, d_state).
    let heads = |x: &Tensor| -> Result<Tensor> {
        let x = cast(x, dtype)?;
        let x = if x.rank() == 2 { x.unsqueeze(1)? } else { x };
        let ngroups = x.dim(1)?;
        x.unsqueeze(2)?
            .broadcast_as((batch, ngroups, nheads / ngroups, d_state))?
            .reshape((batch, nheads, 1, d_state))
    };
    let decay = dt.broadcast_mul(&a)?.exp()?;
    let write = dt.broadcast_mul(&x.unsqueeze(3)?)?.broadcast_mul(&heads(args.b)?)?;
    let next = (decay.broadcast_mul(&state)? + write)?;
    let mut y = sum_last(&next.broadcast_mul(&heads(args.c)?)?)?.squeeze(3)?;
    if let Some(d) = args.d {
        y = (y + x.broadcast_mul(&channels(d, 0)?)?)?;
    }
    let mut y = y.reshape(args.x.shape())?;
    if let Some(z) = args.z {
        y = (y * silu(&cast(z, dtype)?)?)?;
    }
    Ok((y.to_dtype(args.x.dtype())?, next.reshape(args.state.shape())?))
}
