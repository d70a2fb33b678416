//! Multilayer perceptrons, with and without a gate.

use candle_core::Tensor;
use mamba_ops::decoder;

use super::{Mixer, scaled, wide};
use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{MlpActivation, MlpConfig, MlpLayout};
use crate::linear::Linear;
use crate::params::Params;

pub(crate) struct Mlp {
    config: MlpConfig,
    first: First,
    down_proj: Linear,
}

/// The projections up, as they are stored.
enum First {
    /// Up alone.
    Plain(Linear),
    /// Gate and up.
    Gated(Linear, Linear),
    /// Both in one, in the order of the layout.
    Packed(Linear),
}

/// What is added to the matrix `[gate | up]`, as a function of the input.
type Adapter<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;

impl Mlp {
    pub(crate) fn new(config: &MlpConfig, d_model: usize, params: &Params) -> Result<Self> {
        let MlpConfig { d_hidden, bias, .. } = *config;
        let linear = |name: &str, d_out: usize| Linear::new(&params.at(name), d_model, d_out, bias);
        let first = match config.layout {
            MlpLayout::Plain => First::Plain(linear("up_proj", d_hidden)?),
            MlpLayout::Gated => First::Gated(linear("gate_proj", d_hidden)?, linear("up_proj", d_hidden)?),
            MlpLayout::GateUp => First::Packed(linear("gate_up_proj", 2 * d_hidden)?),
            MlpLayout::UpGate => First::Packed(linear("up_gate_proj", 2 * d_hidden)?),
        };
        let down_proj = Linear::new(&params.at("down_proj"), d_hidden, d_model, bias)?;
        Ok(Self { config: config.clone(), first, down_proj })
    }

    /// From the matrices of one expert: `(d_hidden or 2 · d_hidden, d_in)` and `(d_in, d_hidden)`.
    pub(super) fn from_matrices(config: &MlpConfig, first: Tensor, down: Tensor) -> Self {
        let first = Linear::from_weight(first);
        let first =
            if config.layout == MlpLayout::Plain { First::Plain(first) } else { First::Packed(first) };
        Self { config: config.clone(), first, down_proj: Linear::from_weight(down) }
    }

    /// The weights for a decoder.
    pub(crate) fn decoder_mlp(&self) -> Result<Option<decoder::Mlp>> {
        let (up, layout) = match &self.first {
            First::Plain(up) => (up.decoder(), decoder::MlpLayout::Plain),
            First::Gated(gate, up) => (Linear::decoder_of(&[gate, up])?, decoder::MlpLayout::GateUp),
            First::Packed(both) if self.config.layout == MlpLayout::UpGate => {
                (both.decoder(), decoder::MlpLayout::UpGate)
            }
            First::Packed(both) => (both.decoder(), decoder::MlpLayout::GateUp),
        };
        let (Some(up), Some(down)) = (up, self.down_proj.decoder()) else { return Ok(None) };
        let activation = match self.config.activation {
            MlpActivation::Silu => decoder::MlpActivation::Silu,
            MlpActivation::Gelu => decoder::MlpActivation::Gelu,
            MlpActivation::GeluTanh => decoder::MlpActivation::GeluTanh,
            MlpActivation::Relu2 => decoder::MlpActivation::Relu2,
        };
        // Without a gate there is nothing to scale.
        let gate_scale = if layout == decoder::MlpLayout::Plain { 1.0 } else { self.config.gate_scale };
        Ok(Some(decoder::Mlp { up, layout, activation, gate_scale, down }))
    }

    /// `(.., d_model)` to the same.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.apply_adapted(x, None)
    }

    /// The same with something added to the matrix `[gate | up]`.
    pub(crate) fn apply_adapted(&self, x: &Tensor, adapter: Option<Adapter<'_>>) -> Result<Tensor> {
        let d_hidden = self.config.d_hidden;
        let (gate, up) = match &self.first {
            First::Plain(up) => {
                return self.down_proj.forward(&activate(&wide(&up.forward(x)?)?, self.config.activation)?);
            }
            First::Gated(gate, up) => (gate.forward(x)?, up.forward(x)?),
            First::Packed(both) => {
                let mut both = both.forward(x)?;
                if let Some(adapter) = adapter {
                    both = (both + adapter(x)?)?;
                }
                let axis = both.rank() - 1;
                let (first, second) =
                    (both.narrow(axis, 0, d_hidden)?, both.narrow(axis, d_hidden, d_hidden)?);
                if self.config.layout == MlpLayout::UpGate { (second, first) } else { (first, second) }
            }
        };
        let gate = activate(&scaled(wide(&gate)?, self.config.gate_scale)?, self.config.activation)?;
        self.down_proj.forward(&(gate * wide(&up)?)?)
    }
}

impl Mixer for Mlp {
    fn forward(&self, x: &Tensor, _: &Sequences, _: Option<&mut MixerState>) -> Result<Tensor> {
        self.apply(x)
    }

    fn decoder(&self) -> Result<Option<decoder::Mixer>> {
        Ok(self.decoder_mlp()?.map(decoder::Mixer::Mlp))
    }
}

fn activate(x: &Tensor, activation: MlpActivation) -> Result<Tensor> {
    Ok(match activation {
        MlpActivation::Silu => x.silu()?,
        MlpActivation::Gelu => x.gelu_erf()?,
        MlpActivation::GeluTanh => x.gelu()?,
        MlpActivation::Relu2 => x.relu()?.sqr()?,
    })
}
