//! The convolution in plain tensor operations: the meaning of the op, and its gradients by candle's autograd.

use candle_core::{Result, Tensor};

use super::{CausalConv1d, CausalConv1dOutput, CausalConv1dUpdate, window_dtype};
use crate::layout::{Activation, SequenceLayout};
use crate::packing::{Packing, state_of};
use crate::reference::{cast, part, silu};

/// `y_t = activation(bias + Σ_k weight[k] · x_{t - width + 1 + k})`, for any device and dtype; differentiable.
/// Packed sequences run one by one.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`causal_conv1d`](super::causal_conv1d).
pub fn forward(args: &CausalConv1d) -> Result<CausalConv1dOutput> {
    let dtype = window_dtype(args.x);
    if let Some(packing) = args.packing {
        return packed(args, packing);
    }
    let x = cast(args.x, dtype)?;
    let x = match args.layout {
        SequenceLayout::ChannelsFirst => x,
        SequenceLayout::ChannelsLast => x.transpose(1, 2)?,
    };
    let (batch, dim, seqlen) = x.dims3()?;
    let width = args.weight.dim(1)?;
    let window = match args.initial_state {
        Some(state) => cast(state, dtype)?,
        None => Tensor::zeros((batch, dim, width - 1), dtype, x.device())?,
    };
    let extended = Tensor::cat(&[&window, &x.contiguous()?], 2)?;
    let weight = cast(args.weight, dtype)?;
    let mut y = match args.bias {
        Some(bias) => cast(bias, dtype)?.reshape((1, dim, 1))?.broadcast_as((batch, dim, seqlen))?,
        None => Tensor::zeros((batch, dim, seqlen), dtype, x.device())?,
    };
    for k in 0..width {
        let tap = part(&weight, 1, k, 1)?.reshape((1, dim, 1))?;
        y = (y + part(&extended, 2, k, seqlen)?.broadcast_mul(&tap)?)?;
    }
    let y = match args.activation {
        Activation::Identity => y,
        Activation::Silu => silu(&y)?,
    };
    let y = match args.layout {
        SequenceLayout::ChannelsFirst => y,
        SequenceLayout::ChannelsLast => y.transpose(1, 2)?.contiguous()?,
    };
    let final_state = part(&extended, 2, seqlen, width - 1)?.contiguous()?;
    Ok(CausalConv1dOutput { y: y.to_dtype(args.x.dtype())?, final_state })
}

/// Packed sequences one by one. Parameters go in as `f32`, so that their gradients are summed and then rounded.
fn packed(args: &CausalConv1d, packing: &Packing) -> Result<CausalConv1dOutput> {
    let (axis, (dim, width)) = (args.layout.time_axis(), args.weight.dims2()?);
    let dtype = window_dtype(args.x);
    let weight = cast(args.weight, dtype)?;
    let bias = args.bias.map(|bias| cast(bias, dtype)).transpose()?;
    let (y, final_state) = packing.one_by_one(args.x, axis, (&[dim, width - 1], dtype), |sequence, i| {
        let (x, state) = (sequence.of(args.x, axis)?, state_of(args.initial_state, i)?);
        let (weight, bias, initial_state) = (&weight, bias.as_ref(), state.as_ref());
        let alone = CausalConv1d { x: &x, weight, bias, initial_state, packing: None, ..*args };
        forward(&alone).map(|output| (output.y, output.final_state))
    })?;
    Ok(CausalConv1dOutput { y, final_state })
}

/// `y` and the windows after it, of every state of a pool; `state` stays as it is.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`causal_conv1d_update`](super::causal_conv1d_update).
pub fn update(args: &CausalConv1dUpdate) -> Result<(Tensor, Tensor)> {
    let run = |state: &Tensor| forward(&CausalConv1d { initial_state: Some(state), ..args.forward() });
    let Some(indices) = args.state_indices else {
        return run(args.state).map(|output| (output.y, output.final_state));
    };
    let output = run(&indices.gather(args.state)?)?;
    Ok((indices.without_padding(&output.y)?, indices.scatter(&output.final_state, args.state)?))
}
