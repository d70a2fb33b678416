//! The recurrence in plain tensor operations, one token after another: the meaning of the op, and its gradients.

use candle_core::{Result, Tensor};

use super::{SsdChunkScan, SsdChunkScanOutput};
use crate::args::state_dtype;
use crate::packing::{Packing, state_of};
use crate::reference::{cast, clamp, part, silu, softplus, sum_last};

/// `h_t = exp(Δ_t · A) h_{t-1} + Δ_t · x_t ⊗ B_t`, `y_t = h_t C_t + D · x_t`, for any device and dtype;
/// differentiable. Packed sequences run one by one.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`ssd_chunk_scan`](super::ssd_chunk_scan).
pub fn forward(args: &SsdChunkScan) -> Result<SsdChunkScanOutput> {
    if let Some(packing) = args.packing {
        return packed(args, packing);
    }
    let dtype = state_dtype(args.x.dtype());
    let x = cast(args.x, dtype)?;
    let (batch, seqlen, nheads, headdim) = x.dims4()?;
    let (_, _, ngroups, d_state) = args.b.dims4()?;

    let mut dt = cast(args.dt, dtype)?;
    if let Some(bias) = args.dt_bias {
        dt = dt.broadcast_add(&cast(bias, dtype)?)?;
    }
    if args.dt_softplus {
        dt = softplus(&dt)?;
    }
    let dt = clamp(&dt, args.dt_limit)?;
    let decay = dt.broadcast_mul(&cast(args.a, dtype)?)?.exp()?;
    let (b, c) = (cast(args.b, dtype)?, cast(args.c, dtype)?);
    // Token t of b or c for each head, (batch, nheads, 1, d_state).
    let token = |x: &Tensor, t: usize| {
        part(x, 1, t, 1)?
            .reshape((batch, ngroups, 1, d_state))?
            .broadcast_as((batch, ngroups, nheads / ngroups, d_state))?
            .reshape((batch, nheads, 1, d_state))
    };
    let column = |x: &Tensor, t: usize, len: usize| part(x, 1, t, 1)?.reshape((batch, nheads, len, 1));

    let mut h = match args.initial_state {
        Some(state) => cast(state, dtype)?,
        None => Tensor::zeros((batch, nheads, headdim, d_state), dtype, x.device())?,
    };
    let mut ys = Vec::with_capacity(seqlen);
    for t in 0..seqlen {
        let input = column(&dt, t, 1)?.broadcast_mul(&column(&x, t, headdim)?)?;
        let write = input.broadcast_mul(&token(&b, t)?)?;
        h = (column(&decay, t, 1)?.broadcast_mul(&h)? + write)?;
        ys.push(sum_last(&h.broadcast_mul(&token(&c, t)?)?)?.squeeze(3)?.unsqueeze(1)?);
    }
    let mut y = if seqlen == 0 { x.clone() } else { Tensor::cat(&ys, 1)? };
    if d_state == 0 && y.elem_count() > 0 {
        // Nothing decays and nothing is written, but dt and a have gradients all the same: zeros. (A factor of 0.0 that is no tensor
        // would cut them off.)
        let nothing = decay.zeros_like()?;
        y = y.broadcast_add(&(decay * nothing)?.unsqueeze(3)?)?;
    }
    if let Some(d) = args.d {
        let d = cast(d, dtype)?;
        let d = if d.rank() == 1 { d.unsqueeze(1)? } else { d };
        y = (y + x.broadcast_mul(&d)?)?;
    }
    if let Some(z) = args.z {
        y = (y * silu(&cast(z, dtype)?)?)?;
    }
    Ok(SsdChunkScanOutput { y: y.to_dtype(args.x.dtype())?, final_state: h })
}

/// Packed sequences one by one. Parameters go in as `f32`, so that their gradients are summed and then rounded.
fn packed(args: &SsdChunkScan, packing: &Packing) -> Result<SsdChunkScanOutput> {
    let ((_, _, nheads, headdim), (_, _, _, d_state)) = (args.x.dims4()?, args.b.dims4()?);
    let dtype = state_dtype(args.x.dtype());
    let parameter = |x: Option<&Tensor>| x.map(|x| cast(x, dtype)).transpose();
    let (a, d, dt_bias) = (cast(args.a, dtype)?, parameter(args.d)?, parameter(args.dt_bias)?);
    let (y, final_state) =
        packing.one_by_one(args.x, 1, (&[nheads, headdim, d_state], dtype), |sequence, i| {
            let z = args.z.map(|z| sequence.of(z, 1)).transpose()?;
            let initial_state = state_of(args.initial_state, i)?;
            let alone = SsdChunkScan {
                x: &sequence.of(args.x, 1)?,
                dt: &sequence.of(args.dt, 1)?,
                a: &a,
                d: d.as_ref(),
                dt_bias: dt_bias.as_ref(),
                b: &sequence.of(args.b, 1)?,
                c: &sequence.of(args.c, 1)?,
                z: z.as_ref(),
                initial_state: initial_state.as_ref(),
                packing: None,
                ..*args
            };
            forward(&alone).map(|output| (output.y, output.final_state))
        })?;
    Ok(SsdChunkScanOutput { y, final_state })
}
