//! llama.cpp's `mamba`: Mamba and FalconMamba.

use super::names::names;
use super::{Architecture, Described, Keys, forms, keys};
use crate::Result;
use crate::checkpoint::gguf::Value;
use crate::config::{DtBcNorm, LayerSpec, MixerSpec, ModelConfig};
use crate::families::parts::Parts;

pub(super) static MAMBA: Architecture = Architecture {
    name: "mamba",
    names: names![("norm_f", "output_norm")],
    parse,
    write,
    form: forms::form,
    folding: None,
};

/// That of FalconMamba has no weights, and its eps is not in files: all published models have this one.
const NORM: DtBcNorm = DtBcNorm { eps: 1e-6, weights: false };

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    let mut mixer = file.mamba1(config, 0)?;
    mixer.dt_bc_norm = file.fields.bool_or("ssm.dt_b_c_rms", false)?.then_some(NORM);
    config.layers.fill(LayerSpec::new([MixerSpec::Mamba1(mixer)]));
    Ok(())
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let mixer = Parts::of(config).mamba1?;
    let norm = ("ssm.dt_b_c_rms", Value::Bool(mixer.dt_bc_norm.is_some()));
    Some([keys::neither_attention_nor_mlp(), keys::mamba1(mixer)?, vec![norm]].concat())
}
