//! Several tokens a step, and the same text.

use mamba_generate::{
    BoxError, CausalLm, Drafter, Error, Generator, GeneratorBuilder, ModelDrafter, NgramDrafter,
    SamplingConfig, Speculative, StateLm, Token,
};
use mamba_model::Model;
use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};

use crate::models;

fn ids(generator: impl Iterator<Item = mamba_generate::Result<Token>>) -> Vec<u32> {
    generator.map(|token| token.unwrap().id).collect()
}

fn greedy(model: &Model) -> GeneratorBuilder<'_, Model> {
    Generator::builder(model).prompt(&models::ids(model, 12, 3)).max_new_tokens(40)
}

fn sampled(model: &Model, seed: u64) -> GeneratorBuilder<'_, Model> {
    let config = SamplingConfig { temperature: 0.8, top_p: Some(0.9), seed, ..Default::default() };
    greedy(model).sampling(config.build().unwrap())
}

/// Guesses that are right, wrong, too many, too few or none at all.
struct Scripted<'a> {
    truth: &'a [u32],
    prompt: usize,
    round: usize,
}

impl Drafter for Scripted<'_> {
    fn draft(
        &mut self,
        tokens: &[u32],
        _: usize,
        _: &[u64],
        most: usize,
        guesses: &mut Vec<u32>,
    ) -> mamba_generate::Result<()> {
        self.round += 1;
        let right = [0, most, 1, 3, 2, most, most][self.round % 7];
        let known = &self.truth[(tokens.len() - self.prompt).min(self.truth.len())..];
        guesses.extend(known.iter().take(right));
        match self.round % 3 {
            0 => guesses.extend([0; 9]),
            1 => guesses.push(u32::MAX),
            _ => {}
        }
        Ok(())
    }
}

#[test]
fn whatever_is_guessed_the_text_is_that_of_plain_generation() {
    for (name, model) in models::all() {
        for seed in [None, Some(1), Some(2)] {
            let builder = || seed.map_or_else(|| greedy(&model), |seed| sampled(&model, seed));
            let plain = ids(builder().build().unwrap());
            let label = format!("{name}, {seed:?}");
            for most in [1, 3, 8] {
                let drafter = Scripted { truth: &plain, prompt: 12, round: 0 };
                let mut speculative = Speculative::new(builder().build().unwrap(), drafter, most).unwrap();
                assert_eq!(ids(&mut speculative), plain, "{label}, {most} at once");
                let stats = speculative.stats();
                assert!(stats.accepted > 0 && stats.rounds < 39, "{label}: {stats:?}");
                // A state that has read no guess.
                let generator = speculative.into_generator().unwrap();
                assert_eq!(generator.cache().position(), 12 + 39, "{label}");
            }
            let ngrams = Speculative::new(builder().build().unwrap(), NgramDrafter::default(), 4).unwrap();
            assert_eq!(ids(ngrams), plain, "{label}, n-grams");
        }
    }
}

/// Where sums are rounded more coarsely, and otherwise for many tokens than for one.
#[test]
fn in_bf16_the_text_is_that_of_plain_generation() {
    check_greedy(&models::in_bf16());
}

mod cuda {
    use super::*;
    use crate::support::target::with_gpu;

    #[test]
    fn the_text_is_that_of_plain_generation() {
        with_gpu(|device| {
            let models = models::on(device);
            check_greedy(&models);
            Ok(models.len())
        });
    }
}

/// Greedy texts, which are the same but for rounding.
fn check_greedy(models: &[(String, Model)]) {
    for (name, model) in models {
        let prompt = models::ids(model, 12, 3);
        let plain = ids(greedy(model).build().unwrap());
        for most in [1, 3, 8] {
            let drafter = Scripted { truth: &plain, prompt: 12, round: 0 };
            let mut speculative = Speculative::new(greedy(model).build().unwrap(), drafter, most).unwrap();
            let text = ids(&mut speculative);
            models::assert_same_text(model, &prompt, &text, &plain, &format!("{name}, {most} at once"));
            let generator = speculative.into_generator().unwrap();
            assert_eq!(generator.cache().position(), 12 + 39, "{name}");
        }
        let drafter = ModelDrafter::new(model, mamba_generate::Sampling::greedy()).unwrap();
        let speculative = Speculative::new(greedy(model).build().unwrap(), drafter, 4).unwrap();
        models::assert_same_text(model, &prompt, &ids(speculative), &plain, &format!("{name}, by itself"));
    }
}

/// Hybrids help others and are helped: states of all kinds are undone in the draft and in the model.
#[test]
fn hybrids_draft_and_are_drafted_for() {
    let names = ["jamba", "zamba2", "bamba", "nemotron_h", "falcon_h1", "lfm2", "mamba_tied"];
    let models = names.map(|name| (name, models::open(name)));
    let (mut pairs, mut accepted) = (0, 0);
    for (at, (name, model)) in models.iter().enumerate() {
        for config in [
            SamplingConfig { temperature: 0.0, ..Default::default() },
            SamplingConfig { temperature: 0.7, top_k: Some(30), seed: 5, ..Default::default() },
        ] {
            let builder = || greedy(model).sampling(config.build().unwrap());
            let plain = ids(builder().build().unwrap());
            // Itself, and the next one, which knows nothing of what this one says.
            for (draft, drafting) in [&models[at], &models[(at + 1) % models.len()]] {
                let drafter = ModelDrafter::new(drafting, config.build().unwrap()).unwrap();
                let mut speculative = Speculative::new(builder().build().unwrap(), drafter, 4).unwrap();
                assert_eq!(ids(&mut speculative), plain, "{draft} for {name}");
                let stats = speculative.stats();
                match draft == name {
                    true => {
                        assert_eq!((stats.rounds, stats.accepted), (8, stats.drafted), "{name}: {stats:?}")
                    }
                    false => accepted += stats.accepted,
                }
                pairs += 1;
            }
        }
    }
    assert_eq!(pairs, 4 * names.len());
    assert!(accepted > 0, "no guess of another model was ever right");
}

#[test]
fn a_draft_model_that_agrees_is_always_right() {
    let model = models::open("mamba2-shakespeare");
    for config in [
        SamplingConfig { temperature: 0.0, ..Default::default() },
        SamplingConfig { temperature: 0.9, top_k: Some(50), seed: 5, ..Default::default() },
    ] {
        let builder = || greedy(&model).sampling(config.build().unwrap());
        let plain = ids(builder().build().unwrap());
        let drafter = ModelDrafter::new(&model, config.build().unwrap()).unwrap();
        let mut speculative = Speculative::new(builder().build().unwrap(), drafter, 4).unwrap();
        assert_eq!(ids(&mut speculative), plain);
        // The first token comes from the prompt; 39 remain, five a round.
        let stats = speculative.stats();
        assert_eq!((stats.rounds, stats.accepted), (8, stats.drafted), "{stats:?}");
    }
}

#[test]
fn another_model_of_the_same_vocabulary_helps_and_does_no_harm() {
    let (model, small) = (models::open("mamba2-shakespeare"), models::open("mamba-shakespeare"));
    for seed in 0..3 {
        let config = SamplingConfig { temperature: 0.7, top_p: Some(0.95), seed, ..Default::default() };
        let builder = || greedy(&model).sampling(config.build().unwrap());
        let plain = ids(builder().build().unwrap());
        let drafter = ModelDrafter::new(&small, config.build().unwrap()).unwrap();
        let mut speculative = Speculative::new(builder().build().unwrap(), drafter, 4).unwrap();
        assert_eq!(ids(&mut speculative), plain, "seed {seed}");
        let stats = speculative.stats();
        assert!(
            stats.accepted > 0 && stats.rounds < 39,
            "two models of the same text agree at times: {stats:?}"
        );
    }
}

/// Where the sampling of the draft leaves nothing, the text goes on as if nobody guessed.
#[test]
fn a_draft_that_has_nothing_to_choose_from_does_not_end_the_text() {
    let model = models::open("mamba_tied");
    let plain = ids(greedy(&model).build().unwrap());
    let vocab = model.config().vocab_size as u32;
    let nothing =
        SamplingConfig { banned_tokens: (0..vocab).map(|id| vec![id]).collect(), ..Default::default() };
    let drafter = ModelDrafter::new(&model, nothing.build().unwrap()).unwrap();
    let mut speculative = Speculative::new(greedy(&model).build().unwrap(), drafter, 4).unwrap();
    assert_eq!(ids(&mut speculative), plain);
    assert_eq!((speculative.stats().drafted, speculative.stats().rounds), (0, 39));
}

#[test]
fn cut_anywhere_it_goes_on_plainly() {
    let model = models::open("mamba_tied");
    let plain = ids(sampled(&model, 9).build().unwrap());
    for cut in 0..20 {
        let drafter = Scripted { truth: &plain, prompt: 12, round: 0 };
        let mut speculative = Speculative::new(sampled(&model, 9).build().unwrap(), drafter, 5).unwrap();
        let before = ids(speculative.by_ref().take(cut));
        let rest = speculative.into_generator().unwrap();
        assert_eq!([before, ids(rest)].concat(), plain, "cut at {cut}");
    }
}

#[test]
fn a_draft_with_another_vocabulary_is_an_error() {
    let config = |vocab| ModelConfig::uniform(vocab, 16, 1, MixerSpec::Mamba1(Mamba1Config::new(16)));
    let device = candle_core::Device::Cpu;
    let (model, other) =
        (Model::random(&config(20), 0, &device).unwrap(), Model::random(&config(24), 0, &device).unwrap());
    let generator = || Generator::builder(&model).prompt(&[1]).build().unwrap();
    let drafter = ModelDrafter::new(&other, mamba_generate::Sampling::greedy()).unwrap();
    let error = Speculative::new(generator(), drafter, 4).map(drop).unwrap_err();
    assert!(matches!(error, Error::DraftVocabulary { draft: 24, model: 20 }));
    assert_eq!(
        error.to_string(),
        "speculative: the draft has a vocabulary of 24 tokens, expected that of the model, 20"
    );
    assert!(Speculative::new(generator(), NgramDrafter::default(), 0).is_err());
    assert!(NgramDrafter::new(0, 2).is_err() && NgramDrafter::new(3, 2).is_err());
}

/// Has four tokens, and takes the last two into account.
struct Chain;

impl CausalLm for Chain {
    type Cache = [u32; 2];

    fn vocab_size(&self) -> usize {
        4
    }
    fn new_cache(&self) -> Result<[u32; 2], BoxError> {
        Ok([0; 2])
    }
    fn prefill(&self, ids: &[u32], last: &mut [u32; 2], logits: &mut Vec<f32>) -> Result<(), BoxError> {
        for &id in ids {
            *last = [last[1], id];
        }
        logits.clear();
        logits.extend((0..4).map(|i| ((i * 7 + last[0] * 5 + last[1] * 3) % 11) as f32 * 0.25));
        Ok(())
    }
    fn step(&self, id: u32, last: &mut [u32; 2], logits: &mut Vec<f32>) -> Result<(), BoxError> {
        self.prefill(&[id], last, logits)
    }
}

impl StateLm for Chain {
    fn fork(&self, last: &[u32; 2]) -> Result<[u32; 2], BoxError> {
        Ok(*last)
    }
    fn cache_bytes(&self, _: &[u32; 2]) -> usize {
        8
    }
    fn fingerprint(&self) -> Result<String, BoxError> {
        Ok("chain".into())
    }
    fn save_cache(&self, _: &[u32; 2]) -> Result<Vec<u8>, BoxError> {
        Err("not kept".into())
    }
    fn load_cache(&self, _: &[u8]) -> Result<[u32; 2], BoxError> {
        Err("not kept".into())
    }
}

/// Pearson's test over all texts of four tokens: with guesses from another distribution, their frequencies are those that the
/// model's own probabilities multiply to.
#[test]
fn sampled_texts_have_the_distribution_of_the_model() {
    let mut expected = vec![0.0f64; 256];
    for (text, probability) in expected.iter_mut().enumerate() {
        let ids: Vec<u32> = (0..4).map(|i| (text >> (2 * i) & 3) as u32).collect();
        let score = mamba_generate::score(&Chain, &[&[1], &ids[..]].concat(), &mut [0; 2]).unwrap();
        *probability = (-score.total()).exp();
    }
    assert!((expected.iter().sum::<f64>() - 1.0).abs() < 1e-5);
    let runs = 20_000;
    let mut counts = vec![0.0f64; 256];
    let mut accepted = 0;
    for seed in 0..runs {
        let config = SamplingConfig { seed, ..Default::default() };
        // The drafter draws by itself, at another temperature.
        let own = SamplingConfig { temperature: 2.0, seed: seed + 1_000_000, ..Default::default() }
            .build()
            .unwrap();
        let drafter = Stranger(own);
        let generator =
            Generator::builder(&Chain).prompt(&[1]).sampling(config.build().unwrap()).max_new_tokens(4);
        let mut speculative = Speculative::new(generator.build().unwrap(), drafter, 3).unwrap();
        let text = ids(&mut speculative).iter().rev().fold(0, |text, &id| text << 2 | id as usize);
        counts[text] += 1.0;
        accepted += speculative.stats().accepted;
    }
    assert!(accepted > runs / 2, "{accepted}");
    let statistic: f64 =
        counts.iter().zip(&expected).map(|(n, p)| (n - p * runs as f64).powi(2) / (p * runs as f64)).sum();
    // 255 degrees of freedom; four standard deviations.
    assert!((statistic - 255.0).abs() < 4.0 * 510f64.sqrt(), "{statistic}");
}

/// Guesses from the same model with random numbers of its own.
struct Stranger(mamba_generate::Sampling);

impl Drafter for Stranger {
    fn draft(
        &mut self,
        tokens: &[u32],
        prompt_end: usize,
        _: &[u64],
        most: usize,
        guesses: &mut Vec<u32>,
    ) -> mamba_generate::Result<()> {
        let (mut last, mut logits, mut tokens) = ([0; 2], Vec::new(), tokens.to_vec());
        Chain.prefill(&tokens, &mut last, &mut logits).map_err(|_| Error::EmptyPrompt)?;
        for _ in 0..most {
            let id = self.0.next_token(&logits, mamba_generate::History::new(&tokens, prompt_end))?;
            guesses.push(id);
            tokens.push(id);
            Chain.step(id, &mut last, &mut logits).map_err(|_| Error::EmptyPrompt)?;
        }
        Ok(())
    }
}
