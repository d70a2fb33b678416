//! Tokenizers from GGUF files give the ids of the originals, and can be written again.

use std::path::Path;

use mamba_generate::{tokenizer_from_gguf, tokenizer_to_gguf};
use mamba_model::checkpoint::gguf::{Array, Metadata, Value};
use mamba_model::checkpoint::{Checkpoint, LocalDir};
use tokenizers::Tokenizer;

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/gguf/tokenizers")
}

fn metadata(name: &str) -> Metadata {
    let path = folder().join(format!("{name}.gguf"));
    Checkpoint::open(&LocalDir::new(path).unwrap()).unwrap().metadata().unwrap().clone()
}

fn ids(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
    tokenizer.encode(text, special).unwrap().get_ids().to_vec()
}

/// Compares with every text of the golden; the number of texts.
fn check(tokenizer: &Tokenizer, name: &str) -> usize {
    let golden = std::fs::read_to_string(folder().join(format!("{name}.json"))).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let texts = golden["texts"].as_array().unwrap();
    for case in texts {
        let text = case["text"].as_str().unwrap();
        let want = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
        assert_eq!(ids(tokenizer, text, true), want("ids"), "{name}: {text:?}");
        assert_eq!(ids(tokenizer, text, false), want("bare"), "{name} without special tokens: {text:?}");
        let decoded = tokenizer.decode(&want("bare"), true).unwrap();
        assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{name}: {text:?}");
    }
    texts.len()
}

#[test]
fn ids_are_those_of_the_original() {
    let mut texts = 0;
    for name in ["gpt-2", "mpt", "llama-bpe", "dbrx", "qwen2", "tekken", "refact", "falcon", "llama"] {
        let metadata = metadata(name);
        let tokenizer = tokenizer_from_gguf(&metadata).unwrap_or_else(|e| panic!("{name}: {e}"));
        texts += check(&tokenizer, name);
        assert!(tokenizer.token_to_id("[PAD0]").is_none(), "{name}");

        // Once more through what we write.
        let again = tokenizer_to_gguf(&tokenizer).unwrap();
        check(&tokenizer_from_gguf(&again).unwrap(), name);
        let whole = again.get("tokenizer.huggingface.json").is_some();
        assert_eq!(whole, name == "llama", "{name}");
        if !whole {
            assert_eq!(again.str("tokenizer.ggml.pre"), Some(name));
            let merges = |from: &Metadata| from.strings("tokenizer.ggml.merges").unwrap().to_vec();
            assert_eq!(merges(&again), merges(&metadata), "{name}");
        }
    }
    assert_eq!(texts, 8 * 7 + 6);
}

#[test]
fn what_cannot_be_used_is_named() {
    let fails = |change: &dyn Fn(&mut Metadata), name: &str, want: &str| {
        let mut metadata = metadata(name);
        change(&mut metadata);
        let error = tokenizer_from_gguf(&metadata).unwrap_err().to_string();
        assert!(error.contains(want), "{error}\nlacks {want}");
    };
    let text = |text: &str| Value::String(text.into());
    fails(&|m| *m = Metadata::default(), "mpt", "gguf: `tokenizer.ggml.model` is missing");
    fails(
        &|m| drop(m.set("tokenizer.ggml.model", text("bert"))),
        "mpt",
        "`tokenizer.ggml.model` is `bert`, expected gpt2 or llama",
    );
    fails(
        &|m| drop(m.set("tokenizer.ggml.pre", text("klingon"))),
        "mpt",
        "`tokenizer.ggml.pre` is `klingon`",
    );
    fails(&|m| drop(m.set("tokenizer.ggml.tokens", text("a"))), "mpt", "`tokenizer.ggml.tokens` is missing");
    let twice = Array::String(vec!["a".into(); 505]);
    fails(&|m| drop(m.set("tokenizer.ggml.tokens", twice.clone())), "mpt", "has `a` twice, as 0 and 1");
    let merges = |merge: &str| Array::String(vec![merge.into()]);
    fails(&|m| drop(m.set("tokenizer.ggml.merges", merges("ab"))), "mpt", "`tokenizer.ggml.merges` has `ab`");
    fails(
        &|m| drop(m.set("tokenizer.ggml.merges", merges("ab \u{1}"))),
        "mpt",
        "`tokenizer.ggml.merges` cannot be used",
    );
    fails(
        &|m| drop(m.set("tokenizer.ggml.token_type", Array::I32(vec![1]))),
        "mpt",
        "has 1 values for 505 tokens",
    );
    fails(
        &|m| drop(m.set("tokenizer.ggml.scores", Array::F32(vec![1.]))),
        "llama",
        "has 1 values for 700 tokens",
    );
    fails(
        &|m| drop(m.set("tokenizer.ggml.bos_token_id", Value::U32(9999))),
        "llama",
        "is 9999, expected an id below 700",
    );
    fails(&|m| drop(m.set("tokenizer.huggingface.json", text("{"))), "mpt", "is no tokenizer.json");
}
