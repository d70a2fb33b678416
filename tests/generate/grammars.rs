//! Constraints: what is generated keeps to them, and nothing that they allow is lost.

use std::collections::BTreeSet;

use mamba_generate::{
    Batch, Candidates, Chain, Error, FinishReason, Generator, GeneratorBuilder, Grammar, GrammarCompiler,
    GrammarDrafter, History, LogitsFilter, NgramDrafter, SamplingConfig, Speculative, TextGenerator,
    TextOptions,
};
use mamba_model::Model;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{DecoderWrapper, Tokenizer};

use crate::models;

/// The token for the end of a text in the vocabulary of the default model.
const END: u32 = 0;

fn tokenizer() -> Tokenizer {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    Tokenizer::from_file(folder.join("examples/models/mamba2-shakespeare/tokenizer.json")).unwrap()
}

/// With a token for each of some texts.
fn small_tokenizer(tokens: &[&str], decoder: &str) -> Tokenizer {
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| (token.to_string(), id)).collect();
    let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocab, vec![]).build().unwrap());
    tokenizer.with_decoder(serde_json::from_str::<Option<DecoderWrapper>>(decoder).unwrap());
    tokenizer
}

fn shakespeare<'a>(
    model: &'a Model,
    tokenizer: &Tokenizer,
    grammar: &Grammar,
    seed: Option<u64>,
) -> GeneratorBuilder<'a, Model> {
    let config = match seed {
        Some(seed) => SamplingConfig { seed, ..Default::default() },
        None => SamplingConfig { temperature: 0.0, ..Default::default() },
    };
    let mut sampling = config.build().unwrap();
    sampling.push_front(grammar.clone());
    let prompt = tokenizer.encode("KING RICHARD:\n", false).unwrap();
    Generator::builder(model)
        .prompt(prompt.get_ids())
        .sampling(sampling)
        .max_new_tokens(400)
        .eos_tokens(&[END])
}

fn text(builder: GeneratorBuilder<'_, Model>, tokenizer: &Tokenizer) -> (String, Option<FinishReason>) {
    let mut text = TextGenerator::new(builder.build().unwrap(), tokenizer, TextOptions::default()).unwrap();
    let all = text.by_ref().map(|piece| piece.unwrap()).collect();
    (all, text.finish_reason())
}

const SCHEMA: &str = r##"{
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["good", "bad", "ugly"]}, "minItems": 1, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
        "king": {"type": "boolean"}
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": false,
    "x-guidance": {"whitespace_flexible": false},
    "$defs": {"place": {
        "type": "object",
        "properties": {"lat": {"type": "number", "minimum": -90, "maximum": 90}, "of": {"anyOf": [{"const": "Verona"}, {"type": "null"}]}},
        "required": ["lat", "of"],
        "additionalProperties": false
    }}
}"##;

/// What the schema says, said again in Rust.
fn satisfies_schema(value: &Value) -> bool {
    let within = |value: &Value, keys: &[&str]| {
        value.as_object().is_some_and(|o| o.keys().all(|key| keys.contains(&key.as_str())))
    };
    let tag = |tag: &Value| ["good", "bad", "ugly"].iter().any(|known| tag == known);
    let home = |home: &Value| {
        within(home, &["lat", "of"])
            && home["lat"].as_f64().is_some_and(|lat| (-90.0..=90.0).contains(&lat))
            && home.get("of").is_some_and(|of| of == "Verona" || of.is_null())
    };
    within(value, &["name", "age", "tags", "home", "king"])
        && value["name"].as_str().is_some_and(|name| name.chars().count() <= 12)
        && value["age"].as_u64().is_some_and(|age| age <= 120)
        && value["tags"].as_array().is_some_and(|tags| (1..=3).contains(&tags.len()) && tags.iter().all(tag))
        && value.get("home").is_none_or(home)
        && value.get("king").is_none_or(Value::is_boolean)
}

#[test]
fn a_json_schema_is_kept_whatever_the_seed() {
    let (model, tokenizer) = (models::open("mamba2-shakespeare"), tokenizer());
    for wrong in ["[]", r#"{"name": "x", "age": 121, "tags": ["bad"]}"#, r#"{"age": 1, "tags": ["bad"]}"#] {
        assert!(!satisfies_schema(&serde_json::from_str(wrong).unwrap()), "{wrong}");
    }
    let grammar = GrammarCompiler::new(&tokenizer, 512, &[END]).unwrap().json_schema(SCHEMA).unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..25 {
        let (text, reason) = text(shakespeare(&model, &tokenizer, &grammar, Some(seed)), &tokenizer);
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("seed {seed}: {e}: {text}"));
        assert!(satisfies_schema(&value), "seed {seed}: {text}");
        // The brace that closes the object lets nothing follow.
        assert_eq!(reason, Some(FinishReason::Complete), "seed {seed}: {text}");
        seen.insert(text);
    }
    assert!(seen.len() > 22, "only {} texts", seen.len());
    assert!(seen.iter().any(|text| text.contains("lat")) && seen.iter().any(|text| !text.contains("lat")));
}

/// The language of `LANGUAGE`, listed.
fn language() -> BTreeSet<Vec<u8>> {
    let mut all = BTreeSet::new();
    for word in ["yes", "no", "na", "nana"] {
        for tail in ["", " é", " ou", "😀"] {
            for digits in (0..10).map(|d| d.to_string()).chain((0..100).map(|d| format!("{d:02}"))) {
                all.insert(format!("{word}{tail}{digits}").into_bytes());
            }
            all.insert(format!("{word}{tail}").into_bytes());
        }
    }
    all
}
const LANGUAGE: &str = "(yes|no|na(na)?)( (é|ou)|😀)?[0-9]{0,2}";

/// The ids that a filter leaves.
fn allowed(grammar: &mut Grammar, generated: &[u32], vocab_size: usize) -> mamba_generate::Result<Vec<u32>> {
    let mut candidates = Candidates::new();
    candidates.load(&vec![0.0; vocab_size], generated.len()).unwrap();
    grammar.apply(&mut candidates, History::new(generated, 0))?;
    Ok(candidates.as_slice().iter().map(|c| c.id).collect())
}

#[test]
fn masks_are_those_of_looking_at_every_text_of_the_language() {
    let bytes_of_letters = {
        let (letters, mut bytes) = (tokenizers::decoders::byte_level::ByteLevel::alphabet(), vec![]);
        // The alphabet in the order of bytes: the printable ones stand for themselves, the others come after.
        let mut others = (0u32..).map(|n| char::from_u32(0x100 + n).unwrap());
        for byte in 0..=255u8 {
            let letter = char::from(byte);
            bytes.push(if letters.contains(&letter) { letter } else { others.next().unwrap() });
        }
        bytes
    };
    let byte = |c: char| bytes_of_letters.iter().position(|&l| l == c).unwrap() as u8;
    let byte_level = tokenizer();
    let vocab: Vec<Option<Vec<u8>>> = (0..512)
        .map(|id| byte_level.id_to_token(id).filter(|_| id != END).map(|t| t.chars().map(byte).collect()))
        .collect();
    // Another way of spelling, with two tokens for one text and padding at the end.
    let pieces = [
        "▁", "▁o", "u", "y", "e", "s", "es", "n", "o", "na", "an", "a", "é", "<0xC3>", "<0xA9>", "<0xF0>",
        "<0x9F>", "<0x98>", "<0x80>", "😀", "0", "1", "23", "234", "no", "<0x6E>", "x", "<s>", "<pad>",
    ];
    let mut sentence = small_tokenizer(
        &pieces,
        r#"{"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]}"#,
    );
    sentence.add_special_tokens(["<s>", "<pad>"].map(|t| tokenizers::AddedToken::from(t, true))).unwrap();
    let spelled = |token: &str| match token.strip_prefix("<0x") {
        Some(hex) => vec![u8::from_str_radix(&hex[..2], 16).unwrap()],
        None => token.replace('▁', " ").into_bytes(),
    };
    let pieces: Vec<_> = (0..32).map(|id| pieces.get(id).filter(|_| id < 27).map(|t| spelled(t))).collect();

    let language = language();
    let begins = |text: &[u8]| {
        language
            .range::<[u8], _>((std::ops::Bound::Included(text), std::ops::Bound::Unbounded))
            .next()
            .is_some_and(|next| next.starts_with(text))
    };
    for (tokenizer, vocab, end) in [(byte_level, vocab, END), (sentence, pieces, 27)] {
        let compiler = GrammarCompiler::new(&tokenizer, vocab.len(), &[end]).unwrap();
        let grammar = compiler.regex(LANGUAGE).unwrap();
        let (mut random, mut masks, mut ends) = (crate::support::random::Random::new(5), 0, 0);
        for _ in 0..200 {
            let (mut grammar, mut ids, mut text) = (grammar.clone(), vec![], vec![]);
            loop {
                let mut expected: Vec<u32> = (0..vocab.len() as u32)
                    .filter(|&id| {
                        let token = &vocab[id as usize];
                        token.as_ref().is_some_and(|bytes| begins(&[&text[..], bytes].concat()))
                    })
                    .collect();
                let complete = expected.is_empty();
                if language.contains(&text) {
                    expected.push(end);
                    expected.sort();
                }
                let got = allowed(&mut grammar, &ids, vocab.len()).unwrap();
                assert_eq!(got, expected, "after {:?}", String::from_utf8_lossy(&text));
                assert_eq!(grammar.is_complete(History::new(&ids, 0)).unwrap(), complete, "{ids:?}");
                masks += 1;
                let id = expected[random.ids(1, expected.len() as u32)[0] as usize];
                ids.push(id);
                if id == end {
                    assert!(grammar.is_complete(History::new(&ids, 0)).unwrap());
                    ends += 1;
                    break;
                }
                text.extend(vocab[id as usize].as_ref().unwrap());
            }
        }
        assert!(masks > 600 && ends == 200, "{masks} masks");
    }
}

#[test]
fn forced_text_comes_as_it_must() {
    let (model, tokenizer) = (models::open("mamba2-shakespeare"), tokenizer());
    let compiler = GrammarCompiler::new(&tokenizer, 512, &[END]).unwrap();
    let grammar = compiler.regex("qqq ✓ [{]zx[}]").unwrap();
    for seed in [None, Some(1), Some(2)] {
        let made = text(shakespeare(&model, &tokenizer, &grammar, seed), &tokenizer);
        assert_eq!(made, ("qqq ✓ {zx}".into(), Some(FinishReason::Complete)));
    }
    // Where one token is left, the likeliest and any other sampling choose it.
    let grammar = compiler.lark("start: \"to\" (\" be\" | \" not\")+ \"!\"").unwrap();
    for seed in 0..10 {
        let (made, _) = text(shakespeare(&model, &tokenizer, &grammar, Some(seed)), &tokenizer);
        let middle = made.strip_prefix("to").and_then(|rest| rest.strip_suffix('!')).unwrap();
        assert!(!middle.is_empty() && middle.replace(" be", "").replace(" not", "").is_empty(), "{made}");
    }
}

#[test]
fn a_text_that_may_go_on_ends_by_a_stop_token() {
    let (model, tokenizer) = (models::open("mamba2-shakespeare"), tokenizer());
    let compiler = GrammarCompiler::new(&tokenizer, 512, &[END]).unwrap();
    let grammar = compiler.regex("[a-z]{2,}").unwrap();
    let mut one = grammar.clone();
    let (a, b) = (tokenizer.token_to_id("a").unwrap(), tokenizer.token_to_id("b").unwrap());
    for (generated, ends) in [(vec![], false), (vec![a], false), (vec![a, b], true), (vec![b, a, a], true)] {
        assert_eq!(allowed(&mut one, &generated, 512).unwrap().contains(&END), ends);
        assert!(!one.is_complete(History::new(&generated, 0)).unwrap());
    }
    // The end is so likely here that it comes as soon as it may.
    let bias = SamplingConfig { logit_bias: vec![(END, 1e4)], ..Default::default() };
    let mut sampling = bias.build().unwrap();
    sampling.push_front(grammar.clone());
    let builder = shakespeare(&model, &tokenizer, &grammar, None).sampling(sampling);
    let mut generator = builder.build().unwrap();
    let ids: Vec<u32> = generator.by_ref().map(|token| token.unwrap().id).collect();
    assert_eq!(generator.finish_reason(), Some(FinishReason::StopToken));
    let (last, before) = ids.split_last().unwrap();
    assert_eq!(*last, END);
    let lengths: Vec<usize> =
        (0..=before.len()).map(|n| tokenizer.decode(&before[..n], true).unwrap().len()).collect();
    assert!(lengths.iter().all(|&n| (n >= 2) == (n == lengths[before.len()])), "{lengths:?}");
    // Without it there is no end but the length.
    let grammar = GrammarCompiler::new(&tokenizer, 512, &[]).unwrap().regex("[a-z]{2,}").unwrap();
    let builder = shakespeare(&model, &tokenizer, &grammar, Some(1)).max_new_tokens(30);
    let (made, reason) = text(builder, &tokenizer);
    assert!(reason == Some(FinishReason::Length) && made.bytes().all(|b| b.is_ascii_lowercase()), "{made}");
}

#[test]
fn resumed_forked_batched_and_speculative_are_plain() {
    let (model, tokenizer) = (models::open("mamba2-shakespeare"), tokenizer());
    let compiler = GrammarCompiler::new(&tokenizer, 512, &[END]).unwrap();
    let grammar = compiler.json_schema(SCHEMA).unwrap();
    let other = compiler.regex("(To be, or not to be[.] ){2}[A-Z]+").unwrap();
    for seed in [None, Some(3), Some(4)] {
        let builder = || shakespeare(&model, &tokenizer, &grammar, seed);
        let ids = |tokens: &mut dyn Iterator<Item = mamba_generate::Result<mamba_generate::Token>>| {
            tokens.map(|token| token.unwrap().id).collect::<Vec<u32>>()
        };
        let mut plain = builder().build().unwrap();
        let whole = ids(&mut plain);
        assert!(whole.len() > 10, "{seed:?}");
        assert_eq!(plain.finish_reason(), Some(FinishReason::Complete));

        // Cut anywhere: from a copy of the state, and from its bytes.
        let step = if seed.is_none() { 1 } else { whole.len() / 3 };
        for cut in (0..whole.len()).step_by(step).chain([whole.len()]) {
            let mut first = builder().build().unwrap();
            first.prefill().unwrap();
            first.by_ref().take(cut).for_each(drop);
            let state = first.state().unwrap();
            let bytes = state.to_bytes(&model).unwrap();
            let read = mamba_generate::GenerationState::from_bytes(&model, &bytes).unwrap();
            for state in [state, read] {
                let mut rest = builder().prompt(&[]).resume(state).build().unwrap();
                assert_eq!(ids(&mut rest), whole[cut..], "{seed:?} cut at {cut}");
                assert_eq!(rest.finish_reason(), Some(FinishReason::Complete), "{seed:?} cut at {cut}");
            }
        }

        for most in [1, 4] {
            let mut guessed =
                Speculative::new(builder().build().unwrap(), NgramDrafter::default(), most).unwrap();
            assert_eq!(ids(&mut guessed), whole, "{seed:?}, {most} at once");
        }

        // Rows with other grammars, and with none.
        let mut batch = Batch::new(&model);
        let row = batch.add(builder().build().unwrap()).unwrap();
        batch.add(shakespeare(&model, &tokenizer, &other, seed).build().unwrap()).unwrap();
        let free = Generator::builder(&model).prompt(&[40, 50]).max_new_tokens(25);
        batch.add(free.build().unwrap()).unwrap();
        let (mut got, mut reasons) = (vec![], vec![]);
        while !batch.is_empty() {
            for event in batch.step().unwrap() {
                let token = event.token.unwrap().unwrap();
                if event.row == row {
                    got.push(token.id);
                }
                reasons.extend(event.finished.and_then(|generator| generator.finish_reason()));
            }
        }
        assert_eq!(got, whole, "{seed:?} in a batch");
        assert_eq!(reasons.len(), 3);
    }
}

/// A generation goes back and forth, and a clone goes its own way.
#[test]
fn what_is_allowed_is_a_function_of_the_text() {
    let tokenizer = tokenizer();
    let compiler = GrammarCompiler::new(&tokenizer, 512, &[END]).unwrap();
    let mut grammar = compiler.json_schema(SCHEMA).unwrap();
    let ids = tokenizer.encode(r#"{"name":"Tybalt","age":19,"tags":["bad"],"home":{"lat":4"#, false).unwrap();
    let ids = ids.get_ids();
    let fresh = |n: usize| allowed(&mut compiler.json_schema(SCHEMA).unwrap(), &ids[..n], 512).unwrap();
    let mut random = crate::support::random::Random::new(1);
    for n in random.ids(60, ids.len() as u32 + 1) {
        let mut clone = grammar.clone();
        for grammar in [&mut grammar, &mut clone] {
            assert_eq!(allowed(grammar, &ids[..n as usize], 512).unwrap(), fresh(n as usize), "{n} tokens");
        }
    }
    // After a token that is not allowed, too.
    let wrong = [ids[0], ids[0], ids[0]];
    let error = allowed(&mut grammar, &wrong, 512).unwrap_err().to_string();
    assert!(
        error.starts_with("grammar: token ") && error.contains(" at position 1 cannot be followed"),
        "{error}"
    );
    assert_eq!(allowed(&mut grammar, ids, 512).unwrap(), fresh(ids.len()));
}

#[test]
fn what_cannot_be_a_constraint_is_refused() {
    let compiler = GrammarCompiler::new(&tokenizer(), 512, &[END]).unwrap();
    let refused = |outcome: mamba_generate::Result<Grammar>| match outcome {
        Err(Error::Grammar(message)) => message,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("accepted"),
    };
    let cases = [
        (refused(compiler.json_schema("{")), "the JSON schema is no JSON: EOF"),
        (refused(compiler.json_schema(r#"{"type": "nonsense"}"#)), "the JSON schema cannot be used: "),
        (refused(compiler.json_schema("false")), "the JSON schema cannot be used: "),
        (
            refused(compiler.json_schema(r#"{"type": "integer", "minimum": 3, "maximum": 2}"#)),
            "the JSON schema cannot be used: ",
        ),
        (refused(compiler.json_schema(r##"{"$ref": "#/$defs/none"}"##)), "the JSON schema cannot be used: "),
        (refused(compiler.regex("a\\")), "the regular expression cannot be used: it ends in a backslash"),
        (refused(compiler.regex("(a")), "the regular expression cannot be used: "),
        (refused(compiler.lark("")), "the grammar cannot be used: "),
        (refused(compiler.lark("start: other")), "the grammar cannot be used: "),
    ];
    for (message, expected) in cases {
        println!("{message}");
        assert!(message.starts_with(expected), "{message}");
        assert!(!message.contains(['\n', '<']), "{message}");
    }

    // A vocabulary that lacks the letters, at the start and later.
    let ab = small_tokenizer(&["a", "b"], r#"{"type": "Fuse"}"#);
    let compiler = GrammarCompiler::new(&ab, 2, &[]).unwrap();
    for pattern in ["c", "é", ""] {
        let message = refused(compiler.regex(pattern));
        assert_eq!(
            message,
            "the regular expression allows nothing: no token of the vocabulary can stand at position 0 of the text"
        );
    }
    let mut dead = compiler.regex("abc|aac").unwrap();
    assert_eq!(allowed(&mut dead, &[], 2).unwrap(), [0]);
    assert_eq!(allowed(&mut dead, &[0], 2).unwrap(), [0, 1]);
    let error = allowed(&mut dead, &[0, 1], 2).unwrap_err();
    assert_eq!(error.to_string(), "grammar: no token of the vocabulary can stand at position 2 of the text");
    assert_eq!(allowed(&mut dead, &[0], 2).unwrap(), [0, 1]);

    // Vocabularies that do not fit, and that are no bytes.
    for (size, ends) in [(1, vec![]), (2, vec![2])] {
        let error = GrammarCompiler::new(&ab, size, &ends).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "vocab_size", .. }), "{error}");
    }
    let words = small_tokenizer(&["a"], r###"{"type": "WordPiece", "prefix": "##", "cleanup": true}"###);
    let error = GrammarCompiler::new(&words, 1, &[]).unwrap_err().to_string();
    assert!(error.starts_with("grammar: the tokenizer does not say the bytes of its tokens"), "{error}");
}

/// The error comes where the text ends, and what was generated before stays.
#[test]
fn a_constraint_that_another_filter_contradicts_ends_the_generation() {
    let (model, tokenizer) = (models::open("mamba2-shakespeare"), tokenizer());
    let grammar = GrammarCompiler::new(&tokenizer, 512, &[END]).unwrap().regex("ab+").unwrap();
    let a = tokenizer.token_to_id("a").unwrap();
    let banned: Vec<Vec<u32>> = (0..512).filter(|&id| id != a).map(|id| vec![id]).collect();
    let mut sampling =
        SamplingConfig { banned_tokens: banned, temperature: 0.0, ..Default::default() }.build().unwrap();
    sampling.push_front(Chain::new().with(grammar.clone()));
    let mut generator = shakespeare(&model, &tokenizer, &grammar, None).sampling(sampling).build().unwrap();
    assert_eq!(generator.next().unwrap().unwrap().id, a);
    assert!(matches!(generator.next(), Some(Err(Error::NoCandidates { .. }))));
    assert!(generator.next().is_none());
    assert_eq!(generator.generated(), [a]);
}

/// What is forced is read at once.
#[test]
fn forced_text_is_guessed() {
    let (model, tokenizer) = (models::open("mamba2-shakespeare"), tokenizer());
    let compiler = GrammarCompiler::new(&tokenizer, 512, &[END]).unwrap();
    for grammar in [
        compiler.json_schema(SCHEMA).unwrap(),
        compiler
            .regex("(I|Thou) (will|wilt) not speak of this to Verona's [a-z]{3,9}, nor thou to Mantua's")
            .unwrap(),
    ] {
        for seed in [None, Some(1), Some(2), Some(3)] {
            let builder = || shakespeare(&model, &tokenizer, &grammar, seed);
            let plain: Vec<u32> = builder().build().unwrap().map(|token| token.unwrap().id).collect();
            let drafter = GrammarDrafter::new(&grammar, &tokenizer, NgramDrafter::default());
            let mut guessed = Speculative::new(builder().build().unwrap(), drafter, 8).unwrap();
            let ids: Vec<u32> = guessed.by_ref().map(|token| token.unwrap().id).collect();
            assert_eq!(ids, plain, "{seed:?}");
            let stats = guessed.stats();
            println!("{seed:?}: {} tokens, {stats:?}", plain.len());
            assert!(stats.accepted > 0 && stats.rounds < plain.len() as u64, "{seed:?}: {stats:?}");
        }
    }
}

/// Tokenizers that put a space before a text put none before what is forced within one: each guess is a token that the grammar
/// allows, and all of them together are what is forced.
#[test]
fn forced_text_is_guessed_without_the_space_of_a_beginning() {
    const TOKENS: [&str; 12] = ["n", "a", "m", "e", ":", "x", "na", "name", "▁", "▁name", "Ġ", "Ġname"];
    let metaspace =
        r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false}"#;
    let mut sentence_piece = small_tokenizer(&TOKENS, metaspace);
    let steps: [tokenizers::NormalizerWrapper; 2] = [
        tokenizers::normalizers::Prepend::new("▁".into()).into(),
        tokenizers::normalizers::Replace::new(" ", "▁").unwrap().into(),
    ];
    sentence_piece.with_normalizer(Some(tokenizers::normalizers::Sequence::new(steps.into()))).unwrap();
    let byte_level =
        r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}"#;
    let mut gpt2 = small_tokenizer(&TOKENS, byte_level);
    gpt2.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::byte_level::ByteLevel::new(true, true, true)));
    for tokenizer in [sentence_piece, gpt2] {
        let spelled = tokenizer.encode("name:", false).unwrap();
        assert!(["▁", "Ġ"].contains(&spelled.get_tokens()[0].as_str()), "{:?}", spelled.get_tokens());
        let grammar = GrammarCompiler::new(&tokenizer, TOKENS.len(), &[])
            .unwrap()
            .regex("(x|a)name:name(x|a)")
            .unwrap();
        let mut drafter = GrammarDrafter::new(&grammar, &tokenizer, NgramDrafter::default());
        let mut guesses = vec![];
        mamba_generate::Drafter::draft(&mut drafter, &[5], 0, &[], 8, &mut guesses).unwrap();
        assert_eq!(guesses, [7, 4, 7]);
        let (mut generated, mut grammar) = (vec![5], grammar);
        for id in guesses {
            assert!(allowed(&mut grammar, &generated, TOKENS.len()).unwrap().contains(&id));
            generated.push(id);
        }
    }
}
