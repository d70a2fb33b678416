//! Tokenizers from GGUF files give the ids of the originals, and can be written again.

use std::path::Path;

use mamba_generate::{
    ChatTemplate, Message, tokenizer_config_from_gguf, tokenizer_config_to_gguf, tokenizer_from_gguf,
    tokenizer_to_gguf,
};
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

/// A template renders the same from a file's keys, special tokens included, however the configuration spells them.
#[test]
fn chat_templates_survive_both_ways() {
    let tokenizer = tokenizer_from_gguf(&metadata("mpt")).unwrap();
    let vocab = tokenizer.get_vocab(false);
    let text = |id: u32| vocab.iter().find(|(_, other)| **other == id).unwrap().0.clone();
    let (bos, eos, pad) = (text(5), text(9), text(11));
    let body = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
    let several =
        serde_json::json!([{ "name": "default", "template": body }, { "name": "tool_use", "template": "t" }]);
    for templates in [body.into(), several] {
        let config = serde_json::json!({
            "bos_token": { "content": &bos, "special": true }, "eos_token": &eos, "pad_token": &pad,
            "unk_token": null, "chat_template": templates,
        });
        let mut keys = tokenizer_config_to_gguf(&config.to_string(), &tokenizer).unwrap();
        assert_eq!(keys.str("tokenizer.chat_template"), Some(body));
        let ids =
            ["bos", "eos", "padding", "unknown"].map(|n| keys.u64(&format!("tokenizer.ggml.{n}_token_id")));
        assert_eq!(ids, [Some(5), Some(9), Some(11), None]);
        assert_eq!(keys.str("tokenizer.chat_template.tool_use"), templates.is_array().then_some("t"));

        let own = tokenizer_to_gguf(&tokenizer).unwrap();
        keys.extend(own.iter().map(|(key, value)| (key.to_owned(), value.clone())));
        let tokenizer = tokenizer_from_gguf(&keys).unwrap();
        let text = tokenizer_config_from_gguf(&keys, &tokenizer);
        let again: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(again["chat_template"], templates);
        let render = |config: &str| {
            let template = ChatTemplate::from_tokenizer_config(config).unwrap();
            template.render(&[Message::new("user", "Hello")], true).unwrap()
        };
        assert_eq!(render(&text), format!("{bos}Hello{eos}"));
        assert_eq!(render(&text), render(&config.to_string()));
    }
    let nothing = tokenizer_config_from_gguf(&Metadata::default(), &tokenizer);
    assert!(!nothing.contains("chat_template") && !nothing.contains("_token\""), "{nothing}");
    assert!(tokenizer_config_to_gguf("{", &tokenizer).is_err());
}
