//! transformers' `falcon_mamba`: Mamba with norms, without weights, of dt, B and C.

use super::{Family, mamba};
use crate::Result;
use crate::config::{DtBcNorm, Fields, MixerSpec, ModelConfig};

pub(super) static FALCON_MAMBA: Family = Family {
    model_type: Some("falcon_mamba"),
    names: mamba::NAMES,
    parse,
    write: |config| mamba::write_with(config, "falcon_mamba"),
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    let mut config = mamba::parse(fields)?;
    let norm = DtBcNorm { eps: fields.f64_or("mixer_rms_eps", 1e-6)?, weights: false };
    for (_, mixer) in
        config.layers.iter_mut().flat_map(|layer| &mut layer.branches).flat_map(|b| &mut b.mixers)
    {
        if let MixerSpec::Mamba1(mamba) = mixer {
            mamba.dt_bc_norm = Some(norm);
        }
    }
    Ok(config)
}
