//! How the tensors of a model are kept, which is the same in all architectures but for a few.

use crate::checkpoint::Form;
use crate::config::ModelConfig;
use crate::families::parts::Parts;

/// The form of a tensor by its canonical name.
pub(super) fn form(config: &ModelConfig, name: &str) -> Form {
    if let Some((_, leaf)) = name.split_once(".mamba1.") {
        return match leaf {
            "A_log" => Form::Decay,
            "conv1d.weight" => Form::Squeezed,
            _ => Form::Same,
        };
    }
    if let Some((_, leaf)) = name.split_once(".mamba2.") {
        return match leaf {
            "A_log" => Form::DecayColumn,
            "D" => Form::Column,
            "norm.weight" => Form::Rows(Parts::of(config).mamba2.map_or(1, |c| c.ngroups)),
            "conv1d.weight" => Form::Squeezed,
            _ => Form::Same,
        };
    }
    if name.ends_with(".short_conv.conv1d.weight") {
        return Form::Squeezed;
    }
    if name.split('.').any(|part| part == "gate_up_proj") {
        return Form::GateUp;
    }
    let expert = name.split_once(".moe.experts.").and_then(|(_, rest)| rest.split('.').next()?.parse().ok());
    match (expert, Parts::of(config).moe) {
        (Some(index), Some(moe)) => Form::Expert { index, count: moe.experts },
        _ => Form::Same,
    }
}
