//! A transformer block that several layers use, as in Zamba: its weights are the same everywhere but for adapters.

use candle_core::Tensor;
use mamba_ops::{Norm, NormKind, decoder, norm};

use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{ModelConfig, SharedBlockSpec};
use crate::linear::Linear;
use crate::mixers::attention::Attention;
use crate::mixers::mlp::Mlp;
use crate::params::Params;

pub(crate) struct SharedBlock {
    eps: f64,
    /// Over `[stream | embedding]`.
    norm: Tensor,
    attention: Attention,
    norm2: Tensor,
    mlp: Mlp,
    adapters: Vec<Adapters>,
}

/// What one use adds to the matrices of the block.
struct Adapters {
    /// Which use this is.
    number: usize,
    /// To queries, keys and values.
    qkv: Option<[LowRank; 3]>,
    /// To `[gate | up]`.
    mlp: Option<LowRank>,
}

/// A matrix as a product of two narrow ones.
struct LowRank(Linear, Linear);

impl LowRank {
    fn new(params: &Params, [d_in, rank, d_out]: [usize; 3]) -> Result<Self> {
        let linear = |i: usize, d_in: usize, d_out: usize| Linear::new(&params.at(i), d_in, d_out, false);
        Ok(Self(linear(0, d_in, rank)?, linear(1, rank, d_out)?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.1.forward(&self.0.forward(x)?)
    }

    /// The weights for a decoder.
    fn decoder(&self) -> Option<decoder::LowRank> {
        let matrix = |linear: &Linear| linear.plain().cloned();
        Some(decoder::LowRank { down: matrix(&self.0)?, up: matrix(&self.1)? })
    }
}

impl SharedBlock {
    pub(crate) fn new(block: usize, config: &ModelConfig, params: &Params) -> Result<Self> {
        let spec = &config.shared_blocks[block];
        let d_model = config.d_model;
        let uses =
            config.layers.iter().filter_map(|layer| layer.shared).filter(|shared| shared.block == block);
        let adapters = uses.map(|shared| Adapters::new(shared.adapter, spec, d_model, params));
        Ok(Self {
            eps: config.norm_eps,
            norm: params.at("norm").get(2 * d_model, "weight")?,
            attention: Attention::new(&spec.attention, 2 * d_model, d_model, &params.at("attention"))?,
            norm2: params.at("norm2").get(d_model, "weight")?,
            mlp: Mlp::new(&spec.mlp, d_model, &params.at("mlp"))?,
            adapters: adapters.collect::<Result<_>>()?,
        })
    }

    /// The weights for a decoder, with those of a use.
    pub(crate) fn decoder(&self, adapter: usize, linear: Tensor) -> Result<Option<decoder::Shared>> {
        let rms = |weight: &Tensor| decoder::Norm {
            kind: NormKind::Rms,
            weight: weight.clone(),
            bias: None,
            eps: self.eps,
        };
        let (Some(attention), Some(mlp)) = (self.attention.decoder_attention()?, self.mlp.decoder_mlp()?)
        else {
            return Ok(None);
        };
        let adapters = self.adapters.iter().find(|adapters| adapters.number == adapter);
        let qkv = adapters.and_then(|adapters| adapters.qkv.as_ref());
        let qkv_adapters = match qkv.map(|qkv| qkv.each_ref().map(LowRank::decoder)) {
            Some([Some(q), Some(k), Some(v)]) => Some([q, k, v]),
            Some(_) => return Ok(None),
            None => None,
        };
        let mlp_adapter = match adapters.and_then(|adapters| adapters.mlp.as_ref()) {
            Some(mlp) => match mlp.decoder() {
                Some(mlp) => Some(mlp),
                None => return Ok(None),
            },
            None => None,
        };
        let (norm, norm2) = (rms(&self.norm), rms(&self.norm2));
        Ok(Some(decoder::Shared { norm, attention, qkv_adapters, norm2, mlp, mlp_adapter, linear }))
    }

    /// `(batch, seqlen, d_model)` from the stream and the embedding of the same shape.
    pub(crate) fn forward(
        &self,
        stream: &Tensor,
        embedding: &Tensor,
        adapter: usize,
        sequences: &Sequences,
        state: Option<&mut MixerState>,
    ) -> Result<Tensor> {
        let rms =
            |x: &Tensor, weight: &Tensor| Ok::<_, crate::Error>(norm(&Norm::rms(x, weight, self.eps))?.y);
        let adapters = self.adapters.iter().find(|adapters| adapters.number == adapter);
        let x = rms(&Tensor::cat(&[stream, embedding], 2)?, &self.norm)?;
        let y = match adapters.and_then(|adapters| adapters.qkv.as_ref()) {
            Some(qkv) => self.attention.apply(&x, sequences, state, Some(&|i, x| qkv[i].forward(x)))?,
            None => self.attention.apply(&x, sequences, state, None)?,
        };
        let y = rms(&y, &self.norm2)?;
        match adapters.and_then(|adapters| adapters.mlp.as_ref()) {
            Some(mlp) => self.mlp.apply_adapted(&y, Some(&|x| mlp.forward(x))),
            None => self.mlp.apply(&y),
        }
    }
}

impl Adapters {
    fn new(number: usize, spec: &SharedBlockSpec, d_model: usize, params: &Params) -> Result<Self> {
        let attention = &spec.attention;
        let (q, kv) = (attention.nheads * attention.headdim, attention.nheads_kv * attention.headdim);
        let qkv = |rank: usize| -> Result<[LowRank; 3]> {
            let adapter = |name: &str, d_out: usize| {
                let params = params.at("attention").at(name).at(number);
                LowRank::new(&params, [2 * d_model, rank, d_out])
            };
            Ok([adapter("q_adapters", q)?, adapter("k_adapters", kv)?, adapter("v_adapters", kv)?])
        };
        let mlp = |rank: usize| {
            let params = params.at("mlp").at("gate_up_adapters").at(number);
            LowRank::new(&params, [d_model, rank, 2 * spec.mlp.d_hidden])
        };
        Ok(Self {
            number,
            qkv: spec.attention_adapter_rank.map(qkv).transpose()?,
            mlp: spec.mlp_adapter_rank.map(mlp).transpose()?,
        })
    }
}
