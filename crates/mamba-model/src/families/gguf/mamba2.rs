//! llama.cpp's `mamba2`.

use super::names::names;
use super::{Architecture, Described, Keys, forms, keys};
use crate::Result;
use crate::config::{LayerSpec, MixerSpec, ModelConfig};
use crate::families::parts::Parts;

pub(super) static MAMBA2: Architecture = Architecture {
    name: "mamba2",
    names: names![("norm_f", "output_norm")],
    parse,
    write,
    form: forms::form,
    folding: None,
};

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    let mixer = file.mamba2(config, 0)?;
    config.layers.fill(LayerSpec::new([MixerSpec::Mamba2(mixer)]));
    Ok(())
}

fn write(config: &ModelConfig) -> Option<Keys> {
    Some([keys::neither_attention_nor_mlp(), keys::mamba2(Parts::of(config).mamba2?)?].concat())
}
