//! The block of Mamba-2: one projection for everything, convolution over x, B and C, chunk scan, gated norm.

use candle_core::{DType, Tensor};
use mamba_ops::{
    Activation, GatedRmsNorm, Mamba2SplitConv1dScan, Mamba2SplitConv1dScanOutput, Norm, NormKind,
    SelectiveStateUpdate, decoder, mamba2_split_conv1d_scan, norm, selective_state_update,
};

use super::conv::CausalConv;
use super::{Mixer, NegativeExp, scaled, wide};
use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{GatedNorm, Mamba2Config};
use crate::linear::Linear;
use crate::params::Params;

pub(super) struct Mamba2 {
    config: Mamba2Config,
    in_proj: Linear,
    conv1d: CausalConv,
    dt_bias: Tensor,
    a: NegativeExp,
    d: Tensor,
    norm: Option<(GatedNorm, Tensor)>,
    /// The state before the first token, if it is learned.
    init_states: Option<Tensor>,
    /// What each channel that comes out of the projection is multiplied by, unless all by 1.
    scales: Option<Tensor>,
    out_proj: Linear,
}

impl Mamba2 {
    pub(super) fn new(config: &Mamba2Config, d_model: usize, params: &Params) -> Result<Self> {
        let nheads = config.nheads();
        let d = if config.d_has_headdim { config.d_ssm } else { nheads };
        let norm = match config.norm {
            Some(norm) => Some((norm, params.at("norm").get(config.d_ssm, "weight")?)),
            None => None,
        };
        Ok(Self {
            config: config.clone(),
            in_proj: Linear::new(&params.at("in_proj"), d_model, config.d_in_proj(), config.in_bias)?,
            conv1d: CausalConv::new(
                &params.at("conv1d"),
                config.conv_dim(),
                config.d_conv,
                config.conv_bias,
                Activation::Silu,
            )?,
            dt_bias: params.get_f32(nheads, "dt_bias")?,
            a: NegativeExp::new(params.get_f32(nheads, "A_log")?)?,
            d: params.get_f32(d, "D")?,
            norm,
            init_states: match config.learnable_init_states {
                true => Some(params.get_f32((nheads, config.headdim, config.d_state), "init_states")?),
                false => None,
            },
            scales: scales(config, params)?,
            out_proj: Linear::new(&params.at("out_proj"), config.d_inner, d_model, config.out_bias)?,
        })
    }

    /// The state of each sequence before these tokens: one that has read nothing begins with the learned state.
    fn initial(&self, sequences: &Sequences, state: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some(init) = &self.init_states else { return Ok(state.cloned()) };
        let row = |(i, position): (usize, &usize)| match state {
            Some(state) if *position > 0 => Ok(state.narrow(0, i, 1)?),
            _ => Ok(init.unsqueeze(0)?),
        };
        let rows: Vec<Tensor> = sequences.positions.iter().enumerate().map(row).collect::<Result<_>>()?;
        if rows.is_empty() { Ok(state.cloned()) } else { Ok(Some(Tensor::cat(&rows, 0)?)) }
    }

    /// One token of each sequence, in place; `(batch, 1, d_ssm)`.
    fn step(&self, zxbcdt: &Tensor, conv: &mut Tensor, ssm: &mut Tensor) -> Result<Tensor> {
        let Mamba2Config { d_ssm, d_state, headdim, ngroups, dt_limit, .. } = self.config;
        let (batch, nheads, conv_dim) = (zxbcdt.dim(0)?, self.config.nheads(), self.config.conv_dim());
        let z = zxbcdt.narrow(2, 0, d_ssm)?;
        let xbc = self.conv1d.forward(&zxbcdt.narrow(2, d_ssm, conv_dim)?, None, Some(conv))?;
        let heads = |x: &Tensor| x.reshape((batch, nheads, headdim));
        let groups = |i: usize| {
            let bc = ngroups * d_state;
            xbc.narrow(2, d_ssm + i * bc, bc)?.reshape((batch, ngroups, d_state))
        };
        // Without a norm the update applies the gate itself.
        let gate = if self.norm.is_none() { Some(heads(&z)?) } else { None };
        let y = selective_state_update(&SelectiveStateUpdate {
            d: Some(&self.skip()?),
            z: gate.as_ref(),
            dt_bias: Some(&self.dt_bias),
            dt_softplus: true,
            dt_limit,
            ..SelectiveStateUpdate::new(
                ssm,
                &heads(&xbc.narrow(2, 0, d_ssm)?)?,
                &zxbcdt.narrow(2, d_ssm + conv_dim, nheads)?.squeeze(1)?,
                &self.a.get()?,
                &groups(0)?,
                &groups(1)?,
            )
        })?
        .reshape((batch, 1, d_ssm))?;
        let Some((GatedNorm { eps, before_gate }, weight)) = &self.norm else { return Ok(y) };
        Ok(norm(&Norm {
            z: Some(&z),
            group_size: Some(d_ssm / ngroups),
            norm_before_gate: *before_gate,
            ..Norm::rms(&y, weight, *eps)
        })?
        .y)
    }

    /// Whether there is something to differentiate by.
    fn is_trained(&self, x: &Tensor) -> bool {
        let Self { in_proj, conv1d, dt_bias, a, d, norm, init_states, out_proj, .. } = self;
        let weight = norm.as_ref().map(|(_, weight)| weight);
        x.track_op()
            || [in_proj, out_proj].into_iter().any(Linear::is_trained)
            || conv1d.is_trained()
            || a.fixed().is_none()
            || [Some(dt_bias), Some(d), weight, init_states.as_ref()]
                .into_iter()
                .flatten()
                .any(Tensor::track_op)
    }

    /// The whole block while training as one function, or as much of it as has no adapter and no multipliers; none if the block
    /// has parts that the function does not have.
    fn fused(&self, x: &Tensor, sequences: &Sequences) -> Result<Option<Tensor>> {
        if self.config.d_bypass() > 0 || !self.is_trained(x) {
            return Ok(None);
        }
        let in_proj = self.in_proj.plain().filter(|_| self.scales.is_none());
        let input = match in_proj {
            Some(weight) => scaled(x.to_dtype(weight.dtype())?, self.config.input_scale)?,
            None => self.project(x)?,
        };
        let output = self.scan(&input, [in_proj, self.out_proj.plain()], sequences, None)?;
        match self.out_proj.plain() {
            Some(_) => Ok(Some(output.y)),
            None => self.out_proj.forward(&output.y).map(Some),
        }
    }

    /// Convolution, scan, gate and norm over sequences, between the projections or with them.
    fn scan(
        &self,
        zxbcdt: &Tensor,
        [in_proj, out_proj]: [Option<&Tensor>; 2],
        sequences: &Sequences,
        state: Option<&MixerState>,
    ) -> Result<Mamba2SplitConv1dScanOutput> {
        let Mamba2Config { d_ssm, headdim, ngroups, dt_limit, chunk_size, .. } = self.config;
        let norm = self.norm.as_ref().map(|(GatedNorm { eps, before_gate }, weight)| GatedRmsNorm {
            weight,
            eps: *eps,
            group_size: Some(d_ssm / ngroups),
            norm_before_gate: *before_gate,
        });
        let initial = self.initial(sequences, state.and_then(|state| state.ssm.as_ref()))?;
        Ok(mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan {
            in_proj,
            conv_bias: self.conv1d.bias(),
            dt_bias: Some(&self.dt_bias),
            d: Some(&self.skip()?),
            norm,
            out_proj,
            ngroups,
            dt_limit,
            chunk_size,
            initial_conv_state: state.and_then(|state| state.conv.as_ref()),
            initial_ssm_state: initial.as_ref(),
            packing: sequences.packing(),
            recompute: false,
            ..Mamba2SplitConv1dScan::new(zxbcdt, &self.conv1d.filters()?, &self.a.get()?, headdim)
        })?)
    }

    /// What the first projection gives, multiplied as configured.
    fn project(&self, x: &Tensor) -> Result<Tensor> {
        let projected = self.in_proj.forward(&scaled(x.clone(), self.config.input_scale)?)?;
        match &self.scales {
            Some(scales) => Ok(wide(&projected)?.broadcast_mul(scales)?.to_dtype(projected.dtype())?),
            None => Ok(projected),
        }
    }

    /// The skip connection of each head, or of each of its channels.
    fn skip(&self) -> Result<Tensor> {
        match self.config.d_has_headdim {
            true => Ok(self.d.reshape((self.config.nheads(), self.config.headdim))?),
            false => Ok(self.d.clone()),
        }
    }

    /// Everything between the projections.
    fn core(
        &self,
        projected: &Tensor,
        sequences: &Sequences,
        mut state: Option<&mut MixerState>,
    ) -> Result<Tensor> {
        // [z₀ | x₀ | z | x B C | dt], the first two for the bypass.
        let bypass = self.config.d_bypass();
        let zxbcdt = projected.narrow(2, 2 * bypass, projected.dim(2)? - 2 * bypass)?;
        let one_token = zxbcdt.dim(1)? == 1 && sequences.packing().is_none();
        let mut y = match &mut state {
            Some(MixerState { conv: Some(conv), ssm: Some(ssm), .. }) if one_token => {
                if self.init_states.is_some()
                    && let Some(initial) = self.initial(sequences, Some(ssm))?
                {
                    *ssm = initial.copy()?;
                }
                self.step(&zxbcdt, conv, ssm)?
            }
            _ => {
                let output = self.scan(&zxbcdt, [None, None], sequences, state.as_deref())?;
                if let Some(MixerState { conv, ssm, .. }) = state {
                    [*conv, *ssm] = [output.final_conv_state, output.final_ssm_state].map(Some);
                }
                output.y
            }
        };
        if bypass > 0 {
            let part = |i: usize| wide(&projected.narrow(2, i * bypass, bypass)?);
            let gated = (part(0)?.silu()? * part(1)?)?;
            y = Tensor::cat(&[&gated.to_dtype(y.dtype())?, &y], 2)?;
        }
        Ok(y)
    }
}

/// What the channels of the projection are multiplied by, in its order; the bypass is left as it is.
fn scales(config: &Mamba2Config, params: &Params) -> Result<Option<Tensor>> {
    if config.zxbcdt_scales == [1.0; 5] {
        return Ok(None);
    }
    let bc = config.ngroups * config.d_state;
    let widths = [config.d_ssm, config.d_ssm, bc, bc, config.nheads()];
    let mut values = vec![1f32; 2 * config.d_bypass()];
    for (scale, width) in config.zxbcdt_scales.iter().zip(widths) {
        values.extend(std::iter::repeat_n(*scale as f32, width));
    }
    let width = values.len();
    let dtype = if params.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok(Some(Tensor::from_vec(values, width, params.device())?.to_dtype(dtype)?))
}

impl Mixer for Mamba2 {
    fn forward(&self, x: &Tensor, sequences: &Sequences, state: Option<&mut MixerState>) -> Result<Tensor> {
        if state.is_none()
            && let Some(y) = self.fused(x, sequences)?
        {
            return Ok(y);
        }
        self.out_proj.forward(&self.core(&self.project(x)?, sequences, state)?)
    }

    fn decoder(&self) -> Result<Option<decoder::Mixer>> {
        let Mamba2Config { d_state, headdim, ngroups, dt_limit, input_scale, .. } = self.config;
        if self.init_states.is_some() || self.config.d_bypass() > 0 {
            return Ok(None);
        }
        let (Some(in_proj), Some(out_proj)) = (self.in_proj.decoder(), self.out_proj.decoder()) else {
            return Ok(None);
        };
        let (Some(conv), Some(a)) = (self.conv1d.decoder()?, self.a.fixed()) else { return Ok(None) };
        let norm = |(norm, weight): &(GatedNorm, Tensor)| decoder::Norm {
            kind: NormKind::Rms,
            weight: weight.clone(),
            bias: None,
            eps: norm.eps,
        };
        Ok(Some(decoder::Mixer::Mamba2(decoder::Mamba2 {
            in_proj: decoder::Product { scale: input_scale, scales: self.scales.clone(), ..in_proj },
            conv,
            dt_bias: self.dt_bias.clone(),
            dt_limit,
            a: a.clone(),
            d: self.d.clone(),
            ngroups,
            headdim,
            d_state,
            norm: self.norm.as_ref().map(norm),
            norm_before_gate: self.norm.as_ref().is_some_and(|(norm, _)| norm.before_gate),
            out_proj,
        })))
    }
}
