//! The kinds of layers of the hybrids, in both vocabularies of transformers.

use crate::Result;
use crate::config::Fields;

/// What a layer of a hybrid is built around.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerType {
    Mamba,
    Attention,
    Conv,
    /// A state space block that also reads a shared transformer block.
    Hybrid,
    Mlp,
    Moe,
}

/// The first of the fields that is there, as kinds of layers; of an unknown one the error says where it stands.
pub(super) fn read(fields: &Fields) -> Result<Option<Vec<LayerType>>> {
    for field in ["layer_types", "layers_block_type"] {
        if let Some(words) = fields.strs_opt(field)? {
            fields.check_layers(field, words.len())?;
            let kind = |(i, word): (usize, &String)| {
                from_word(word).ok_or_else(|| fields.error(field, format!("has \"{word}\" at layer {i}")))
            };
            return Ok(Some(words.iter().enumerate().map(kind).collect::<Result<_>>()?));
        }
    }
    Ok(None)
}

/// As [`read`], with one kind for each of `n_layer` layers.
pub(super) fn read_all(fields: &Fields, n_layer: usize) -> Result<Option<Vec<LayerType>>> {
    match read(fields)? {
        Some(types) if types.len() != n_layer => {
            let message = format!("has {} layers, expected num_hidden_layers {n_layer}", types.len());
            Err(fields.error("layer_types", message))
        }
        types => Ok(types),
    }
}

fn from_word(word: &str) -> Option<LayerType> {
    Some(match word {
        "linear_attention" | "mamba" | "mamba2" => LayerType::Mamba,
        "full_attention" | "attention" => LayerType::Attention,
        "conv" => LayerType::Conv,
        "hybrid" => LayerType::Hybrid,
        "mlp" => LayerType::Mlp,
        "moe" => LayerType::Moe,
        _ => return None,
    })
}

/// The words of transformers 5.
pub(super) fn words(types: &[LayerType]) -> Vec<&'static str> {
    let word = |kind: &LayerType| match kind {
        LayerType::Mamba => "linear_attention",
        LayerType::Attention => "full_attention",
        LayerType::Conv => "conv",
        LayerType::Hybrid => "hybrid",
        LayerType::Mlp => "mlp",
        LayerType::Moe => "moe",
    };
    types.iter().map(word).collect()
}
