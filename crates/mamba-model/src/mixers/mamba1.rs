//! The block of Mamba: projection, convolution, selective scan, gate, projection. Channels last throughout.

use candle_core::Tensor;
use mamba_ops::{
    Activation, Mamba1Inner, Norm, NormKind, Packing, SelectiveScan, SelectiveStateUpdate, SequenceLayout,
    decoder, mamba1_inner, norm, selective_scan, selective_state_update,
};

use super::conv::CausalConv;
use super::{Mixer, NegativeExp};
use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{DtBcNorm, Mamba1Config};
use crate::linear::Linear;
use crate::params::Params;

pub(super) struct Mamba1 {
    config: Mamba1Config,
    in_proj: Linear,
    conv1d: CausalConv,
    /// From the channels of each head to its `[dt | B | C]`.
    x_proj: Vec<Linear>,
    /// From `dt` to the channels of each head.
    dt_proj: Vec<Linear>,
    dt_bias: Tensor,
    a: NegativeExp,
    d: Tensor,
    /// The norms of dt, B and C, with their weights if they have some.
    norms: Option<(f64, [Option<Tensor>; 3])>,
    out_proj: Linear,
}

impl Mamba1 {
    pub(super) fn new(config: &Mamba1Config, d_model: usize, params: &Params) -> Result<Self> {
        let Mamba1Config { d_inner, d_state, d_conv, dt_rank, conv_bias, proj_bias, .. } = *config;
        let d_bcdt = dt_rank + 2 * d_state;
        // The bias of dt_proj is added within the scan, in f32.
        let dt_params = params.at("dt_proj");
        let (x_proj, dt_proj, dt_bias, a_log, d) = match config.nheads {
            None => (
                vec![Linear::new(&params.at("x_proj"), d_inner, d_bcdt, false)?],
                vec![Linear::new(&dt_params, dt_rank, d_inner, false)?],
                dt_params.get_f32(d_inner, "bias")?,
                params.get_f32((d_inner, d_state), "A_log")?,
                params.get_f32(d_inner, "D")?,
            ),
            Some(h) => (
                by_head(&params.at("x_proj").get((h, d_bcdt, d_inner / h), "weight")?)?,
                by_head(&dt_params.get((h, d_inner / h, dt_rank), "weight")?)?,
                dt_params.get_f32((h, d_inner / h), "bias")?.flatten_all()?,
                params.get_f32((h, d_inner / h, d_state), "A_log")?.flatten(0, 1)?,
                params.get_f32((h, d_inner / h), "D")?.flatten_all()?,
            ),
        };
        let norms = match config.dt_bc_norm {
            None => None,
            Some(DtBcNorm { eps, weights }) => {
                let weight = |name: &str, d: usize| params.at(name).get_if(weights, d, "weight");
                let weights =
                    [weight("dt_norm", dt_rank)?, weight("b_norm", d_state)?, weight("c_norm", d_state)?];
                Some((eps, weights))
            }
        };
        Ok(Self {
            config: config.clone(),
            in_proj: Linear::new(&params.at("in_proj"), d_model, 2 * d_inner, proj_bias)?,
            conv1d: CausalConv::new(&params.at("conv1d"), d_inner, d_conv, conv_bias, Activation::Silu)?,
            x_proj,
            dt_proj,
            dt_bias,
            a: NegativeExp::new(a_log)?,
            d,
            norms,
            out_proj: Linear::new(&params.at("out_proj"), d_inner, d_model, proj_bias)?,
        })
    }

    /// `x` and `z`, which stand side by side or, with heads, channel by channel in turn.
    fn split(&self, xz: &Tensor) -> Result<(Tensor, Tensor)> {
        let d_inner = self.config.d_inner;
        if self.config.nheads.is_none() {
            return Ok((xz.narrow(2, 0, d_inner)?, xz.narrow(2, d_inner, d_inner)?));
        }
        let (batch, seqlen, _) = xz.dims3()?;
        let pairs = xz.reshape((batch, seqlen, d_inner, 2))?;
        let part = |i: usize| pairs.narrow(3, i, 1)?.squeeze(3)?.contiguous();
        Ok((part(0)?, part(1)?))
    }

    /// The step size of each channel, before its bias, and B and C, `(batch, seqlen, heads, d_state)`.
    fn coefficients(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let Mamba1Config { d_inner, d_state, dt_rank, .. } = self.config;
        let p = d_inner / self.x_proj.len();
        let (mut dt, mut b, mut c) = (vec![], vec![], vec![]);
        for (h, (x_proj, dt_proj)) in self.x_proj.iter().zip(&self.dt_proj).enumerate() {
            let projected = x_proj.forward(&x.narrow(2, h * p, p)?)?;
            let part = |i: usize, start: usize, len: usize| -> Result<Tensor> {
                let part = projected.narrow(2, start, len)?;
                let Some((eps, weights)) = &self.norms else { return Ok(part) };
                let rms = Norm::new(&part, NormKind::Rms, *eps);
                Ok(norm(&Norm { weight: weights[i].as_ref(), ..rms })?.y)
            };
            dt.push(dt_proj.forward(&part(0, 0, dt_rank)?)?);
            b.push(part(1, dt_rank, d_state)?);
            c.push(part(2, dt_rank + d_state, d_state)?);
        }
        Ok([Tensor::cat(&dt, 2)?, Tensor::stack(&b, 2)?, Tensor::stack(&c, 2)?])
    }

    /// Whether there is something to differentiate by.
    fn is_trained(&self, x: &Tensor) -> bool {
        let Self { in_proj, conv1d, x_proj, dt_proj, dt_bias, a, d, out_proj, .. } = self;
        let linears = [in_proj, out_proj].into_iter().chain(x_proj).chain(dt_proj);
        x.track_op()
            || linears.into_iter().any(Linear::is_trained)
            || conv1d.is_trained()
            || a.fixed().is_none()
            || [dt_bias, d].into_iter().any(Tensor::track_op)
    }

    /// The whole block while training as one function, or as much of it as has no adapter; none if the block has parts that
    /// the function does not have.
    fn fused(&self, x: &Tensor, sequences: &Sequences) -> Result<Option<Tensor>> {
        if !self.is_trained(x) {
            return Ok(None);
        }
        let ([x_proj], [dt_proj], None, None) =
            (&*self.x_proj, &*self.dt_proj, &self.norms, self.config.nheads)
        else {
            return Ok(None);
        };
        let (Some(x_proj), Some(dt_proj)) = (x_proj.plain(), dt_proj.plain()) else { return Ok(None) };
        let x = x.to_dtype(self.in_proj.dtype())?;
        let xz = if self.in_proj.plain().is_some() { x } else { self.in_proj.forward(&x)? };
        let output = mamba1_inner(&Mamba1Inner {
            in_proj: self.in_proj.plain(),
            conv_bias: self.conv1d.bias(),
            delta_bias: Some(&self.dt_bias),
            d: Some(&self.d),
            out_proj: self.out_proj.plain(),
            packing: sequences.packing(),
            recompute: false,
            ..Mamba1Inner::new(&xz, &self.conv1d.filters()?, x_proj, dt_proj, &self.a.get()?)
        })?;
        match self.out_proj.plain() {
            Some(_) => Ok(Some(output.y)),
            None => self.out_proj.forward(&output.y).map(Some),
        }
    }

    /// Everything between the projections.
    fn core(&self, xz: &Tensor, sequences: &Sequences, state: Option<&mut MixerState>) -> Result<Tensor> {
        let (conv, ssm) = match state {
            Some(MixerState { conv, ssm, .. }) => (conv.as_mut(), ssm.as_mut()),
            None => (None, None),
        };
        let (x, z) = self.split(xz)?;
        let packing = sequences.packing();
        let x = self.conv1d.forward(&x, packing, conv)?;
        self.scan(&x, &z, packing, ssm)
    }

    /// The scan over sequences or, in place, one step of them.
    fn scan(
        &self,
        x: &Tensor,
        z: &Tensor,
        packing: Option<&Packing>,
        state: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let [dt, b, c] = self.coefficients(x)?;
        let a = self.a.get()?;
        if let (Some(state), 1, None) = (&state, x.dim(1)?, packing) {
            let y = selective_state_update(&SelectiveStateUpdate {
                d: Some(&self.d),
                z: Some(&z.squeeze(1)?),
                dt_bias: Some(&self.dt_bias),
                dt_softplus: true,
                ..SelectiveStateUpdate::new(
                    state,
                    &x.squeeze(1)?,
                    &dt.squeeze(1)?,
                    &a,
                    &b.squeeze(1)?,
                    &c.squeeze(1)?,
                )
            })?;
            return Ok(y.unsqueeze(1)?);
        }
        let output = selective_scan(&SelectiveScan {
            d: Some(&self.d),
            z: Some(z),
            delta_bias: Some(&self.dt_bias),
            delta_softplus: true,
            initial_state: state.as_deref(),
            layout: SequenceLayout::ChannelsLast,
            packing,
            ..SelectiveScan::new(x, &dt, &a, &b, &c)
        })?;
        if let Some(state) = state {
            *state = output.final_state;
        }
        Ok(output.y)
    }
}

/// The matrices of each head, from all of them.
fn by_head(weights: &Tensor) -> Result<Vec<Linear>> {
    let head = |h: usize| Ok(Linear::from_weight(weights.narrow(0, h, 1)?.squeeze(0)?));
    (0..weights.dim(0)?).map(head).collect()
}

impl Mixer for Mamba1 {
    fn forward(&self, x: &Tensor, sequences: &Sequences, state: Option<&mut MixerState>) -> Result<Tensor> {
        if state.is_none()
            && let Some(y) = self.fused(x, sequences)?
        {
            return Ok(y);
        }
        let xz = self.in_proj.forward(x)?;
        self.out_proj.forward(&self.core(&xz, sequences, state)?)
    }

    fn decoder(&self) -> Result<Option<decoder::Mixer>> {
        // With heads, channels of x and z stand by turns.
        let ([x_proj], [dt_proj], None) = (&*self.x_proj, &*self.dt_proj, self.config.nheads) else {
            return Ok(None);
        };
        let products = (self.in_proj.decoder(), x_proj.decoder(), dt_proj.decoder(), self.out_proj.decoder());
        let (Some(in_proj), Some(x_proj), Some(dt_proj), Some(out_proj)) = products else { return Ok(None) };
        let (Some(conv), Some(a)) = (self.conv1d.decoder()?, self.a.fixed()) else { return Ok(None) };
        Ok(Some(decoder::Mixer::Mamba1(decoder::Mamba1 {
            in_proj,
            conv,
            x_proj,
            dt_bc_norms: self.norms.clone(),
            dt_proj: dt_proj.weights[0].clone(),
            dt_bias: self.dt_bias.clone(),
            a: a.clone(),
            d: self.d.clone(),
            out_proj,
        })))
    }
}
