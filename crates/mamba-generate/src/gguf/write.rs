//! Tokenizers as keys of GGUF files.

use mamba_model::checkpoint::gguf::{Array, Metadata, Value};
use serde_json::Value as Json;
use tokenizers::Tokenizer;

use super::pipeline::{NAMES, Pipeline};
use super::{ADD_BOS, ADD_EOS, BOS, EOS, JSON, KINDS, Kind, MERGES, MODEL, PRE, TOKENS, bad};
use crate::Result;

/// The keys of a GGUF file that describe a tokenizer, for [`Model::save_gguf`](mamba_model::Model::save_gguf).
///
/// A byte-level BPE whose way of cutting texts has a name in llama.cpp is described as llama.cpp does it. Any other
/// tokenizer is put into the file whole, as JSON under `tokenizer.huggingface.json`, which
/// [`tokenizer_from_gguf`](super::tokenizer_from_gguf) understands and llama.cpp does not.
///
/// # Errors
/// If the tokenizer cannot be written as JSON.
pub fn tokenizer_to_gguf(tokenizer: &Tokenizer) -> Result<Metadata> {
    let text = tokenizer.to_string(false).map_err(|e| bad(JSON, format!("cannot be written: {e}")))?;
    let json = serde_json::from_str(&text).map_err(|e| bad(JSON, format!("cannot be written: {e}")))?;
    Ok(describe(tokenizer, &json).unwrap_or_else(|| {
        let mut whole = Metadata::default();
        whole.set(MODEL, Value::String("none".into()));
        whole.set(JSON, Value::String(text));
        whole
    }))
}

/// The keys of llama.cpp, if they say all that there is to say.
fn describe(tokenizer: &Tokenizer, json: &Json) -> Option<Metadata> {
    let pre = NAMES.into_iter().find(|name| is_cut_as(json, name))?;
    let (tokens, kinds) = tokens(tokenizer)?;
    let merges = json["model"]["merges"].as_array()?.iter().map(merge).collect::<Option<Vec<_>>>()?;
    let mut metadata = Metadata::default();
    metadata.set(MODEL, Value::String("gpt2".into()));
    metadata.set(PRE, Value::String(pre.into()));
    metadata.set(TOKENS, Array::String(tokens));
    metadata.set(KINDS, Array::I32(kinds.into_iter().map(|kind| kind as i32).collect()));
    metadata.set(MERGES, Array::String(merges));
    let (bos, eos) = added(tokenizer)?;
    for (add, id, around) in [(ADD_BOS, BOS, bos), (ADD_EOS, EOS, eos)] {
        metadata.set(add, Value::Bool(around.is_some()));
        if let Some(token) = around {
            metadata.set(id, Value::U32(token));
        }
    }
    Some(metadata)
}

/// Whether a tokenizer cuts texts in the way of this name.
fn is_cut_as(json: &Json, name: &str) -> bool {
    let Some(pipeline) = Pipeline::of(name) else { return false };
    let model = &json["model"];
    let unset = |field: &str| matches!(&model[field], Json::Null | Json::Bool(false)) || model[field] == "";
    let plain = ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"];
    let same = |ours: Option<Json>, theirs: &Json| {
        normalised(ours.unwrap_or(Json::Null)) == normalised(theirs.clone())
    };
    model["type"] == "BPE"
        && plain.into_iter().all(unset)
        && model["ignore_merges"].as_bool().unwrap_or(false) == pipeline.ignore_merges
        && same(pipeline.normalizer.as_ref().and_then(|n| serde_json::to_value(n).ok()), &json["normalizer"])
        && same(
            pipeline.pre_tokenizer.as_ref().and_then(|p| serde_json::to_value(p).ok()),
            &json["pre_tokenizer"],
        )
}

/// Without what changes offsets only, and without a sequence around a single step.
fn normalised(mut step: Json) -> Json {
    if let Some(fields) = step.as_object_mut() {
        fields.remove("trim_offsets");
        if let Some(steps) = fields.get_mut("pretokenizers").and_then(Json::as_array_mut) {
            steps.iter_mut().for_each(|step| *step = normalised(step.take()));
        }
    }
    match step["pretokenizers"].as_array().map(Vec::as_slice) {
        Some([only]) => only.clone(),
        _ => step,
    }
}

/// Every token by id, and what it is; ids without a token are unused, unless most are.
fn tokens(tokenizer: &Tokenizer) -> Option<(Vec<String>, Vec<Kind>)> {
    let vocab = tokenizer.get_vocab(true);
    let count = vocab.values().max().map_or(0, |id| *id as usize + 1);
    if count > 2 * vocab.len() {
        return None;
    }
    let mut tokens: Vec<String> = (0..count).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![Kind::Unused; count];
    for (text, id) in vocab {
        (tokens[id as usize], kinds[id as usize]) = (text, Kind::Normal);
    }
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        kinds[id as usize] = if token.special { Kind::Control } else { Kind::UserDefined };
    }
    Some((tokens, kinds))
}

/// Both tokens of a merge with a space between.
fn merge(merge: &Json) -> Option<String> {
    match merge {
        Json::String(both) => Some(both.clone()),
        Json::Array(pair) => match pair.as_slice() {
            [Json::String(left), Json::String(right)] if !left.contains(' ') && !right.contains(' ') => {
                Some(format!("{left} {right}"))
            }
            _ => None,
        },
        _ => None,
    }
}

/// The tokens before and behind each text, unless there are more than one.
fn added(tokenizer: &Tokenizer) -> Option<(Option<u32>, Option<u32>)> {
    let ids = |special: bool| Some(tokenizer.encode("a", special).ok()?.get_ids().to_vec());
    let (bare, all) = (ids(false)?, ids(true)?);
    let start = all.windows(bare.len().max(1)).position(|window| window == bare)?;
    match (&all[..start], &all[start + bare.len()..]) {
        ([], []) => Some((None, None)),
        ([bos], []) => Some((Some(*bos), None)),
        ([], [eos]) => Some((None, Some(*eos))),
        ([bos], [eos]) => Some((Some(*bos), Some(*eos))),
        _ => None,
    }
}
