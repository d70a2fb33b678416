//! The scan in plain tensor operations, one token after another: the meaning of the op, and its gradients.

use candle_core::{DType, Result, Tensor};

use super::{SelectiveScan, SelectiveScanOutput};
use crate::args::state_dtype;
use crate::layout::SequenceLayout;
use crate::packing::{Packing, state_of};
use crate::reference::{cast, part, silu, softplus, sum_last};

/// `h_t = exp(Δ_t · A) h_{t-1} + Δ_t · B_t · u_t`, `y_t = C_t · h_t + D · u_t`, for any device and dtype;
/// differentiable. Packed sequences run one by one.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`selective_scan`](super::selective_scan).
pub fn forward(args: &SelectiveScan) -> Result<SelectiveScanOutput> {
    if let Some(packing) = args.packing {
        return packed(args, packing);
    }
    let dtype = state_dtype(args.u.dtype());
    let channels_first = |x: &Tensor| match args.layout {
        SequenceLayout::ChannelsFirst => cast(x, dtype),
        SequenceLayout::ChannelsLast => cast(&x.transpose(1, 2)?, dtype),
    };
    let u = channels_first(args.u)?;
    let (batch, dim, seqlen) = u.dims3()?;
    let a = cast(args.a, dtype)?;
    let d_state = a.dim(1)?;

    let mut delta = channels_first(args.delta)?;
    if let Some(bias) = args.delta_bias {
        delta = delta.broadcast_add(&cast(bias, dtype)?.reshape((1, dim, 1))?)?;
    }
    if args.delta_softplus {
        delta = softplus(&delta)?;
    }
    let b = coefficients(args, args.b, dtype)?;
    let c = coefficients(args, args.c, dtype)?;

    let mut h = match args.initial_state {
        Some(state) => cast(state, dtype)?,
        None => Tensor::zeros((batch, dim, d_state), dtype, u.device())?,
    };
    let mut ys = Vec::with_capacity(seqlen);
    for t in 0..seqlen {
        let delta = part(&delta, 2, t, 1)?; // (batch, dim, 1)
        let decay = delta.broadcast_mul(&a)?.exp()?;
        let write = (delta * part(&u, 2, t, 1)?)?.broadcast_mul(&b.at(t)?)?;
        h = ((decay * &h)? + write)?;
        ys.push(sum_last(&h.broadcast_mul(&c.at(t)?)?)?);
    }
    let mut y = if seqlen == 0 { u.clone() } else { Tensor::cat(&ys, 2)? };
    if let Some(d) = args.d {
        y = (y + u.broadcast_mul(&cast(d, dtype)?.reshape((1, dim, 1))?)?)?;
    }
    if let Some(z) = args.z {
        y = (y * silu(&channels_first(z)?)?)?;
    }
    let y = match args.layout {
        SequenceLayout::ChannelsFirst => y,
        SequenceLayout::ChannelsLast => y.transpose(1, 2)?.contiguous()?,
    };
    Ok(SelectiveScanOutput { y: y.to_dtype(args.u.dtype())?, final_state: h })
}

/// Packed sequences one by one. Parameters go in as `f32`, so that their gradients are summed and then rounded.
fn packed(args: &SelectiveScan, packing: &Packing) -> Result<SelectiveScanOutput> {
    let (axis, (dim, d_state)) = (args.layout.time_axis(), args.a.dims2()?);
    let dtype = state_dtype(args.u.dtype());
    let parameter = |x: Option<&Tensor>| x.map(|x| cast(x, dtype)).transpose();
    let (a, d, delta_bias) = (cast(args.a, dtype)?, parameter(args.d)?, parameter(args.delta_bias)?);
    let constant = |x: &Tensor| if x.rank() == 2 { cast(x, dtype) } else { Ok(x.clone()) };
    let (b, c) = (constant(args.b)?, constant(args.c)?);
    let (y, final_state) = packing.one_by_one(args.u, axis, (&[dim, d_state], dtype), |sequence, i| {
        let coefficient = |x: &Tensor| match (args.layout, x.rank()) {
            (_, 2) => Ok(x.clone()),
            (SequenceLayout::ChannelsFirst, rank) => sequence.of(x, rank - 1),
            (SequenceLayout::ChannelsLast, _) => sequence.of(x, 1),
        };
        let z = args.z.map(|z| sequence.of(z, axis)).transpose()?;
        let initial_state = state_of(args.initial_state, i)?;
        let alone = SelectiveScan {
            u: &sequence.of(args.u, axis)?,
            delta: &sequence.of(args.delta, axis)?,
            a: &a,
            b: &coefficient(&b)?,
            c: &coefficient(&c)?,
            d: d.as_ref(),
            delta_bias: delta_bias.as_ref(),
            z: z.as_ref(),
            initial_state: initial_state.as_ref(),
            packing: None,
            ..*args
        };
        forward(&alone).map(|output| (output.y, output.final_state))
    })?;
    Ok(SelectiveScanOutput { y, final_state })
}

/// `b` or `c`, one value a channel and state.
enum Coefficients {
    /// `(1, dim, d_state)`.
    Constant(Tensor),
    /// `(batch, ngroups, d_state, seqlen)` and the number of channels.
    Varying(Tensor, usize),
}

impl Coefficients {
    /// Those of token `t`, `(batch or 1, dim, d_state)`.
    fn at(&self, t: usize) -> Result<Tensor> {
        match self {
            Self::Constant(x) => Ok(x.clone()),
            Self::Varying(x, dim) => {
                let (batch, groups, d_state, _) = x.dims4()?;
                part(x, 3, t, 1)?
                    .reshape((batch, groups, 1, d_state))?
                    .broadcast_as((batch, groups, dim / groups, d_state))?
                    .reshape((batch, *dim, d_state))
            }
        }
    }
}

fn coefficients(args: &SelectiveScan, x: &Tensor, dtype: DType) -> Result<Coefficients> {
    let (dim, x) = (args.a.dim(0)?, cast(x, dtype)?);
    let grouped = match (args.layout, x.rank()) {
        (_, 2) => return Ok(Coefficients::Constant(x.unsqueeze(0)?)),
        (SequenceLayout::ChannelsFirst, 3) => x.unsqueeze(1)?,
        (SequenceLayout::ChannelsFirst, _) => x,
        (SequenceLayout::ChannelsLast, 3) => x.transpose(1, 2)?.unsqueeze(1)?,
        (SequenceLayout::ChannelsLast, _) => x.permute((0, 2, 3, 1))?,
    };
    Ok(Coefficients::Varying(grouped, dim))
}
