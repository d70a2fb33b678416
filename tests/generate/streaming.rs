//! Text from a real byte-level tokenizer of 512 tokens.

use std::path::Path;

use mamba_generate::{
    BoxError, CausalLm, FinishReason, Generator, SamplingConfig, StopStrings, TextGenerator, TextOptions,
    TextStream,
};
use proptest::prelude::*;
use tokenizers::Tokenizer;

fn tokenizer() -> Tokenizer {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Tokenizer::from_file(root.join("goldens/models/mamba2-shakespeare/tokenizer.json")).unwrap()
}

fn pieces(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
    let mut stream = TextStream::new(tokenizer).skip_special_tokens(skip);
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    pieces.extend(stream.flush().unwrap());
    pieces
}

/// Has read the given tokens, and holds that each token is as likely as its neighbour is far.
struct Noise;

impl CausalLm for Noise {
    type Cache = u64;

    fn vocab_size(&self) -> usize {
        512
    }
    fn new_cache(&self) -> Result<u64, BoxError> {
        Ok(0)
    }
    fn prefill(&self, ids: &[u32], hash: &mut u64, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        for &id in ids {
            *hash = (*hash ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
        logits.clear();
        logits.extend((0..512).map(|i| ((*hash >> (i % 48)) % 64) as f32 / 16.0));
        Ok(())
    }
    fn step(&self, id: u32, hash: &mut u64, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        self.prefill(&[id], hash, logits)
    }
}

fn generator(prompt: &[u32], seed: u64) -> Generator<'static, Noise> {
    let sampling =
        SamplingConfig { seed, repetition_penalty: Some(1.1), ..Default::default() }.build().unwrap();
    Generator::builder(&Noise).prompt(prompt).sampling(sampling).max_new_tokens(300).build().unwrap()
}

proptest! {
    #[test]
    fn random_tokens_stream_to_their_text(ids in prop::collection::vec(0u32..520, 0..300), skip in any::<bool>()) {
        let tokenizer = tokenizer();
        prop_assert_eq!(pieces(&tokenizer, &ids, skip).concat(), tokenizer.decode(&ids, skip).unwrap());
    }

    #[test]
    fn any_text_comes_back(text in "(\\PC|[🙂👩‍👩‍👧🇩🇪é漢\n ]){0,60}") {
        let tokenizer = tokenizer();
        let encoded = tokenizer.encode(text.as_str(), false).unwrap();
        prop_assert_eq!(pieces(&tokenizer, encoded.get_ids(), true).concat(), text);
    }
}

#[test]
fn text_comes_word_by_word_as_decode_stream_has_it() {
    let tokenizer = tokenizer();
    let text = "ROMEO:\nWhat light through yonder window breaks?\n";
    let encoded = tokenizer.encode(text, false).unwrap();
    let mut theirs = tokenizer.decode_stream(true);
    let expected: Vec<String> = encoded.get_ids().iter().filter_map(|&id| theirs.step(id).unwrap()).collect();
    assert_eq!(pieces(&tokenizer, encoded.get_ids(), true), expected);
    assert_eq!(expected.concat(), text);
}

#[test]
fn a_stop_string_that_straddles_three_tokens() {
    let tokenizer = tokenizer();
    let (text, stop) = ("First Citizen:\nSpeak, speak.\n\nROMEO:\nNo.", ".\n\nROMEO:");
    let encoded = tokenizer.encode(text, false).unwrap();
    let expected = &text[..text.find(stop).unwrap()];

    let (mut stream, mut stops) = (TextStream::new(&tokenizer), StopStrings::new([stop]).unwrap());
    let (mut shown, mut within) = (String::new(), 0);
    for &id in encoded.get_ids() {
        let piece = stream.push(id).unwrap().unwrap_or_default();
        let before = shown.len();
        shown += &stops.push(&piece);
        assert!(expected.starts_with(&shown), "{shown:?} leaks");
        within += usize::from(shown.len() == before);
        if stops.matched().is_some() {
            break;
        }
    }
    assert_eq!(shown, expected);
    assert!(within >= 3, "the stop string had {within} tokens");
}

#[test]
fn a_generated_text_is_that_of_its_ids_and_a_seed_repeats_it() {
    let tokenizer = tokenizer();
    let prompt = tokenizer.encode("ROMEO:", false).unwrap();
    let run = |seed| {
        let generator = generator(prompt.get_ids(), seed);
        let mut text = TextGenerator::new(generator, &tokenizer, TextOptions::default()).unwrap();
        let whole: String = text.by_ref().map(Result::unwrap).collect();
        assert_eq!(text.finish_reason(), Some(FinishReason::Length));
        assert_eq!(text.ids().len(), 300);
        assert_eq!(whole, tokenizer.decode(text.ids(), true).unwrap());
        (whole, text.ids().to_vec())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1).1, run(2).1);
}

#[test]
fn wherever_it_stops_the_text_ends_there() {
    let tokenizer = tokenizer();
    let mut stopped = 0;
    for seed in 0..30 {
        let whole: String = TextGenerator::new(generator(&[1], seed), &tokenizer, TextOptions::default())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        for stops in [vec!["e"], vec!["th", " a", "\n"], vec!["zzzz"]] {
            let options = TextOptions {
                stop_strings: stops.iter().map(|s| s.to_string()).collect(),
                ..Default::default()
            };
            let mut text = TextGenerator::new(generator(&[1], seed), &tokenizer, options).unwrap();
            let shown: String = text.by_ref().map(Result::unwrap).collect();
            let end = stops.iter().filter_map(|stop| whole.find(stop)).min();
            assert_eq!(shown, whole[..end.unwrap_or(whole.len())]);
            let reason = if end.is_some() { FinishReason::StopString } else { FinishReason::Length };
            assert_eq!(text.finish_reason(), Some(reason));
            stopped += usize::from(end.is_some());
        }
    }
    assert!(stopped > 30, "{stopped}");
}
