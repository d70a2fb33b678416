//! Softmax attention with everything that the hybrids add to it.

use candle_core::Tensor;
use mamba_ops::{Activation, Norm, decoder, norm};

use super::conv::CausalConv;
use super::rope::Rotary;
use super::{Mixer, scaled, wide};
use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{AttentionConfig, PackedAttention};
use crate::linear::Linear;
use crate::params::Params;

pub(crate) struct Attention {
    config: AttentionConfig,
    projections: Projections,
    rotary: Option<Rotary>,
    conv1d: Option<CausalConv>,
    /// Of queries and of keys.
    qk_norm: Option<(Tensor, Tensor)>,
    o_proj: Linear,
}

/// The projections in, as they are stored.
enum Projections {
    /// To queries, keys and values.
    Separate([Linear; 3]),
    /// To `[q | k | v | mlp]`.
    Packed(Linear),
}

/// What is added to queries, keys and values, by their place in this order.
pub(crate) type QkvAdapter<'a> = &'a dyn Fn(usize, &Tensor) -> Result<Tensor>;

impl Attention {
    /// From `d_in` to `d_out` channels.
    pub(crate) fn new(config: &AttentionConfig, d_in: usize, d_out: usize, params: &Params) -> Result<Self> {
        let AttentionConfig { nheads, nheads_kv, headdim, qkv_bias, out_bias, .. } = *config;
        let PackedAttention { d_conv, d_mlp } = config.packed.unwrap_or_default();
        let linear = |name: &str, d: usize| Linear::new(&params.at(name), d_in, d, qkv_bias);
        let projections = match config.packed {
            Some(_) => Projections::Packed(linear("qkv_proj", config.qkv_dim() + d_mlp)?),
            None => Projections::Separate([
                linear("q_proj", nheads * headdim)?,
                linear("k_proj", nheads_kv * headdim)?,
                linear("v_proj", nheads_kv * headdim)?,
            ]),
        };
        let conv = |width: usize| {
            CausalConv::new(&params.at("conv1d"), config.qkv_dim(), width, true, Activation::Identity)
        };
        let weight = |name: &str| params.at(name).get(headdim, "weight");
        let qk_norm = match config.qk_norm_eps {
            Some(_) => Some((weight("q_norm")?, weight("k_norm")?)),
            None => None,
        };
        let d_out_proj = nheads * headdim + d_mlp / 2;
        Ok(Self {
            projections,
            rotary: config.rope.as_ref().map(Rotary::new),
            conv1d: (d_conv > 0).then(|| conv(d_conv)).transpose()?,
            qk_norm,
            o_proj: Linear::new(&params.at("o_proj"), d_out_proj, d_out, out_bias)?,
            config: config.clone(),
        })
    }

    /// The weights for a decoder.
    pub(crate) fn decoder_attention(&self) -> Result<Option<decoder::Attention>> {
        let AttentionConfig { nheads, nheads_kv, headdim, softmax_scale, key_scale, window, .. } =
            self.config;
        let qkv = match &self.projections {
            Projections::Packed(linear) => linear.decoder(),
            Projections::Separate([q, k, v]) => Linear::decoder_of(&[q, k, v])?,
        };
        let conv = match &self.conv1d {
            Some(conv1d) => match conv1d.decoder()? {
                Some(conv) => Some(conv),
                None => return Ok(None),
            },
            None => None,
        };
        let (Some(qkv), Some(out_proj)) = (qkv, self.o_proj.decoder()) else { return Ok(None) };
        let device = out_proj.weights[0].device().clone();
        let qk_norms = match (&self.qk_norm, self.config.qk_norm_eps) {
            (Some((q, k)), Some(eps)) => Some((eps, [q.clone(), k.clone()])),
            _ => None,
        };
        Ok(Some(decoder::Attention {
            qkv: decoder::Product { scale: self.config.input_scale, ..qkv },
            conv,
            nheads,
            nheads_kv,
            headdim,
            softmax_scale,
            key_scale,
            window,
            qk_norms,
            rotary: self.rotary.as_ref().map_or(Ok(None), |rotary| rotary.decoder(&device))?,
            mlp: self.config.packed.map_or(0, |packed| packed.d_mlp / 2),
            out_proj,
        }))
    }

    /// `(batch, seqlen, d_in)` to `(batch, seqlen, d_out)`.
    pub(crate) fn apply(
        &self,
        x: &Tensor,
        sequences: &Sequences,
        state: Option<&mut MixerState>,
        adapter: Option<QkvAdapter>,
    ) -> Result<Tensor> {
        let x = &scaled(x.clone(), self.config.input_scale)?;
        let (qkv, mlp) = match &self.projections {
            Projections::Packed(linear) => {
                let all = linear.forward(x)?;
                let (qkv_dim, width) = (self.config.qkv_dim(), all.dim(2)?);
                let mlp = (width > qkv_dim).then(|| all.narrow(2, qkv_dim, width - qkv_dim));
                (all.narrow(2, 0, qkv_dim)?, mlp.transpose()?)
            }
            Projections::Separate(linears) => {
                let project = |(i, linear): (usize, &Linear)| match adapter {
                    Some(adapter) => Ok((linear.forward(x)? + adapter(i, x)?)?),
                    None => linear.forward(x),
                };
                let parts: Vec<Tensor> = linears.iter().enumerate().map(project).collect::<Result<_>>()?;
                (Tensor::cat(&parts, 2)?, None)
            }
        };
        let mut y =
            sequences.each(&qkv, state, |qkv, sequences, state| self.attend(qkv, sequences, state))?;
        if let Some(mlp) = mlp {
            let half = mlp.dim(2)? / 2;
            let part = |i: usize| wide(&mlp.narrow(2, i * half, half)?);
            let gated = (part(0)? * part(1)?.silu()?)?;
            y = Tensor::cat(&[&y, &gated.to_dtype(y.dtype())?], 2)?;
        }
        self.o_proj.forward(&y)
    }

    /// From `[q | k | v]`, `(batch, seqlen, qkv_dim)`, of sequences of one length.
    fn attend(&self, qkv: &Tensor, sequences: &Sequences, state: Option<&mut MixerState>) -> Result<Tensor> {
        let AttentionConfig { nheads, nheads_kv, headdim, .. } = self.config;
        let (batch, seqlen, _) = qkv.dims3()?;
        let (conv, kv) = match state {
            Some(MixerState { conv, kv, .. }) => (conv.as_mut(), kv.as_mut()),
            None => (None, None),
        };
        let qkv = match &self.conv1d {
            Some(conv1d) => conv1d.forward(qkv, None, conv)?,
            None => qkv.clone(),
        };
        if qkv.elem_count() == 0 {
            return Ok(Tensor::zeros((batch, seqlen, nheads * headdim), qkv.dtype(), qkv.device())?);
        }
        let heads = |first: usize, count: usize| {
            qkv.narrow(2, first * headdim, count * headdim)?.reshape((batch, seqlen, count, headdim))
        };
        let (mut q, mut k) = (heads(0, nheads)?, heads(nheads, nheads_kv)?);
        let v = heads(nheads + nheads_kv, nheads_kv)?.contiguous()?;
        if let (Some((q_norm, k_norm)), Some(eps)) = (&self.qk_norm, self.config.qk_norm_eps) {
            q = norm(&Norm::rms(&q, q_norm, eps))?.y;
            k = norm(&Norm::rms(&k, k_norm, eps))?.y;
        }
        k = scaled(k, self.config.key_scale)?;
        if let Some(rotary) = &self.rotary {
            let angles = rotary.angles(sequences, &q)?;
            (q, k) = (rotary.forward(&q, &angles)?, rotary.forward(&k, &angles)?);
        }
        let k = k.contiguous()?;
        let y = match kv {
            None => self.softmax(&q, &[k], &[v])?,
            Some(rows) => {
                let mut outputs = vec![];
                for (i, cache) in rows.iter_mut().enumerate() {
                    let row = |x: &Tensor| x.narrow(0, i, 1);
                    cache.append(&row(&k)?, &row(&v)?)?;
                    let (keys, values) = cache.blocks()?;
                    outputs.push(self.softmax(&row(&q)?, &keys, &values)?);
                    cache.trim();
                }
                Tensor::cat(&outputs, 0)?
            }
        };
        Ok(y.reshape((batch, seqlen, nheads * headdim))?)
    }

    fn softmax(&self, q: &Tensor, keys: &[Tensor], values: &[Tensor]) -> Result<Tensor> {
        let (scale, window) = (self.config.softmax_scale, self.config.window);
        let args = mamba_ops::Attention { scale, window, ..mamba_ops::Attention::new(q, keys, values) };
        Ok(mamba_ops::attention(&args)?)
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, sequences: &Sequences, state: Option<&mut MixerState>) -> Result<Tensor> {
        self.apply(x, sequences, state, None)
    }

    fn decoder(&self) -> Result<Option<decoder::Mixer>> {
        Ok(self.decoder_attention()?.map(decoder::Mixer::Attention))
    }
}
