//! The rotary embedding: pairs of channels are turned by an angle that grows with the position.

use candle_core::{DType, Device, Tensor};
use mamba_ops::decoder;

use crate::Result;
use crate::batch::Sequences;
use crate::config::{Rope, RopeScaling};

pub(super) struct Rotary {
    dim: usize,
    interleaved: bool,
    /// What each pair turns by from one position to the next.
    frequencies: Vec<f64>,
    /// What the result is multiplied by.
    factor: f64,
}

/// Cosines and sines, `(rows, seqlen, 1, pairs)`, where `rows` is 1 if all sequences are at the same place.
pub(super) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    pub(super) fn new(config: &Rope) -> Self {
        let Rope { dim, interleaved, .. } = *config;
        let factor = match config.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        Self { dim, interleaved, frequencies: frequencies(config), factor }
    }

    /// The same for a decoder.
    pub(super) fn decoder(&self, device: &Device) -> Result<Option<decoder::Rotary>> {
        let Self { ref frequencies, interleaved, factor, .. } = *self;
        if frequencies.is_empty() {
            return Ok(None);
        }
        let frequencies = Tensor::from_slice(frequencies, frequencies.len(), device)?;
        Ok(Some(decoder::Rotary { frequencies, interleaved, factor }))
    }

    /// The angles of sequences of one length.
    pub(super) fn angles(&self, sequences: &Sequences, like: &Tensor) -> Result<Angles> {
        let (_, seqlen) = sequences.shape();
        let same = sequences.positions.windows(2).all(|pair| pair[0] == pair[1]);
        let starts =
            if same { &sequences.positions[..1.min(sequences.count())] } else { &sequences.positions };
        let (mut cos, mut sin) = (vec![], vec![]);
        for position in starts.iter().flat_map(|start| *start..*start + seqlen) {
            for frequency in &self.frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((c * self.factor) as f32);
                sin.push((s * self.factor) as f32);
            }
        }
        let shape = (starts.len(), seqlen, 1, self.dim / 2);
        let dtype = if like.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let tensor = |values| Tensor::from_vec(values, shape, like.device())?.to_dtype(dtype);
        Ok(Angles { cos: tensor(cos)?, sin: tensor(sin)? })
    }

    /// Turns `(batch, seqlen, heads, headdim)`; in `f32` whatever the dtype.
    pub(super) fn forward(&self, x: &Tensor, angles: &Angles) -> Result<Tensor> {
        let (batch, seqlen, heads, headdim) = x.dims4()?;
        if x.elem_count() == 0 || self.dim == 0 {
            return Ok(x.clone());
        }
        let pairs = self.dim / 2;
        let turning = x.narrow(3, 0, self.dim)?.to_dtype(angles.cos.dtype())?;
        let (a, b) = match self.interleaved {
            true => {
                let pairs = turning.reshape((batch, seqlen, heads, pairs, 2))?;
                (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?)
            }
            false => (turning.narrow(3, 0, pairs)?, turning.narrow(3, pairs, pairs)?),
        };
        let turn = |x: &Tensor, by: &Tensor| x.broadcast_mul(by);
        let first = (turn(&a, &angles.cos)? - turn(&b, &angles.sin)?)?;
        let second = (turn(&b, &angles.cos)? + turn(&a, &angles.sin)?)?;
        let turned = match self.interleaved {
            true => Tensor::stack(&[first, second], 4)?.reshape((batch, seqlen, heads, self.dim))?,
            false => Tensor::cat(&[first, second], 3)?,
        };
        let turned = turned.to_dtype(x.dtype())?;
        match headdim - self.dim {
            0 => Ok(turned),
            rest => Ok(Tensor::cat(&[turned, x.narrow(3, self.dim, rest)?], 3)?),
        }
    }
}

fn frequencies(config: &Rope) -> Vec<f64> {
    let Rope { dim, base, .. } = *config;
    let plain = (0..dim / 2).map(|i| base.powf(-2.0 * i as f64 / dim as f64));
    match config.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
            .map(|f| {
                let turns = original_context * f / std::f64::consts::TAU;
                let fast = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                f * (fast + (1.0 - fast) / factor)
            })
            .collect(),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, truncate, .. } => {
            // The pair that makes so many turns over the original context.
            let pair = |turns: f64| {
                let turn = original_context / (turns * std::f64::consts::TAU);
                dim as f64 * turn.ln() / (2.0 * base.ln())
            };
            let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            let high = if low == high { high + 0.001 } else { high };
            plain
                .enumerate()
                .map(|(i, f)| {
                    let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f * ((1.0 - slow) + slow / factor)
                })
                .collect()
        }
    }
}
