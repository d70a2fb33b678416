//! Tokens that the model draws where its logits are, beside those that are chosen here from the same logits.

use std::cell::Cell;
use std::collections::BTreeMap;

use mamba_generate::{
    Batch, BatchLm, BoxError, CausalLm, Draw, Error, Generator, GeneratorBuilder, SamplingConfig, StateLm,
};
use mamba_model::{InferenceCache, Model};

use crate::models;

/// A model that draws, or does not, wherever it is; with a NaN among its logits from some token on, or methods that fail, if asked for.
pub struct Drawing<'a> {
    model: &'a Model,
    draws: bool,
    spoilt_at: Option<usize>,
    /// How often it was asked to draw.
    pub drawn: Cell<usize>,
    /// The method that fails.
    pub failing: Cell<&'static str>,
}

impl<'a> Drawing<'a> {
    pub fn new(model: &'a Model, draws: bool) -> Self {
        Self { model, draws, spoilt_at: None, drawn: Cell::new(0), failing: Cell::new("") }
    }

    fn attempt(&self, method: &str) -> Result<(), BoxError> {
        match self.failing.get() == method {
            true => Err(format!("`{method}` is out of memory").into()),
            false => Ok(()),
        }
    }
}

impl CausalLm for Drawing<'_> {
    type Cache = InferenceCache;

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }
    fn new_cache(&self) -> Result<InferenceCache, BoxError> {
        CausalLm::new_cache(self.model)
    }
    fn prefill(
        &self,
        ids: &[u32],
        cache: &mut InferenceCache,
        logits: &mut Vec<f32>,
    ) -> Result<(), BoxError> {
        CausalLm::prefill(self.model, ids, cache, logits)
    }
    fn step(&self, id: u32, cache: &mut InferenceCache, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        CausalLm::step(self.model, id, cache, logits)
    }
    fn draws(&self) -> bool {
        self.draws
    }
    fn step_and_draw(
        &self,
        id: u32,
        cache: &mut InferenceCache,
        draw: &Draw,
        logits: &mut Vec<f32>,
    ) -> Result<Option<u32>, BoxError> {
        self.drawn.set(self.drawn.get() + 1);
        if self.spoilt_at.is_some_and(|at| self.drawn.get() >= at) {
            self.step(id, cache, logits)?;
            logits[2] = f32::NAN;
            return Ok(None);
        }
        self.model.step_and_draw(id, cache, draw, logits)
    }
}

impl StateLm for Drawing<'_> {
    fn fork(&self, cache: &InferenceCache) -> Result<InferenceCache, BoxError> {
        StateLm::fork(self.model, cache)
    }
    fn cache_bytes(&self, cache: &InferenceCache) -> usize {
        self.model.cache_bytes(cache)
    }
    fn fingerprint(&self) -> Result<String, BoxError> {
        StateLm::fingerprint(self.model)
    }
    fn save_cache(&self, cache: &InferenceCache) -> Result<Vec<u8>, BoxError> {
        self.model.save_cache(cache)
    }
    fn load_cache(&self, bytes: &[u8]) -> Result<InferenceCache, BoxError> {
        self.model.load_cache(bytes)
    }
}

impl BatchLm for Drawing<'_> {
    fn step_batch(
        &self,
        ids: &[u32],
        cache: &mut InferenceCache,
        logits: &mut Vec<f32>,
    ) -> Result<(), BoxError> {
        self.attempt("step_batch")?;
        self.model.step_batch(ids, cache, logits)
    }
    fn step_batch_and_draw(
        &self,
        ids: &[u32],
        cache: &mut InferenceCache,
        draws: &[Draw],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Option<u32>>, BoxError> {
        self.drawn.set(self.drawn.get() + 1);
        let mut drawn = self.model.step_batch_and_draw(ids, cache, draws, logits)?;
        if ids.len() > 1 && self.spoilt_at.is_some_and(|at| self.drawn.get() >= at) {
            // The last of several rows alone; of the others no logits are needed.
            if let Some(last) = drawn.last_mut() {
                *last = None;
            }
            logits.clear();
            logits.resize(ids.len() * self.vocab_size(), f32::NAN);
        }
        Ok(drawn)
    }
    fn concat(&self, caches: &[&InferenceCache]) -> Result<InferenceCache, BoxError> {
        self.attempt("concat")?;
        self.model.concat(caches)
    }
    fn select(&self, cache: &InferenceCache, rows: &[usize]) -> Result<InferenceCache, BoxError> {
        self.attempt("select")?;
        BatchLm::select(self.model, cache, rows)
    }
}

/// Options that are one draw, and whether they are.
fn options(seed: u64) -> Vec<(SamplingConfig, bool)> {
    let base = SamplingConfig { seed, ..Default::default() };
    vec![
        (base.clone(), true),
        (SamplingConfig { temperature: 0.0, typical_p: Some(0.5), ..base.clone() }, true),
        (
            SamplingConfig {
                temperature: 0.7,
                top_k: Some(9),
                repetition_penalty: Some(1.0),
                ..base.clone()
            },
            true,
        ),
        (SamplingConfig { temperature: 1.4, top_p: Some(0.8), min_p: Some(0.02), ..base.clone() }, true),
        (SamplingConfig { min_p: Some(0.1), ..base.clone() }, true),
        (SamplingConfig { typical_p: Some(0.5), ..base.clone() }, false),
        (SamplingConfig { repetition_penalty: Some(1.3), ..base.clone() }, false),
        (SamplingConfig { temperature: 0.0, logit_bias: vec![(3, 1.0)], ..base.clone() }, false),
        (SamplingConfig { mirostat: Some((4.0, 0.1)), ..base }, false),
    ]
}

const TOKENS: usize = 40;

fn builder<'m, M: CausalLm>(
    model: &'m M,
    of: &Model,
    config: &SamplingConfig,
    row: usize,
) -> GeneratorBuilder<'m, M> {
    let prompt = models::ids(of, 5 + row % 3, row as u64);
    Generator::builder(model).prompt(&prompt).sampling(config.build().unwrap()).max_new_tokens(TOKENS)
}

fn tokens<M: CausalLm>(builder: GeneratorBuilder<'_, M>) -> Vec<u32> {
    builder.build().unwrap().map(|token| token.unwrap().id).collect()
}

/// Alone and in batches, on whatever device the model is.
fn check(model: &Model) -> usize {
    let (here, there) = (Drawing::new(model, false), Drawing::new(model, true));
    let mut cases = 0;
    let all = options(11);
    for (row, (config, one_draw)) in all.iter().enumerate() {
        let want = tokens(builder(&here, model, config, row));
        there.drawn.set(0);
        assert_eq!(tokens(builder(&there, model, config, row)), want, "{config:?}");
        assert_eq!(there.drawn.get(), if *one_draw { TOKENS - 1 } else { 0 }, "{config:?}");
        // What is told of the logits has to come here.
        there.drawn.set(0);
        assert_eq!(tokens(builder(&there, model, config, row).logprobs(1)), want);
        assert_eq!(there.drawn.get(), 0);
        cases += 1;
    }
    // A batch draws if all of its rows can.
    let drawn = |batch: &[usize]| {
        there.drawn.set(0);
        let mut together = Batch::new(&there);
        let mut rows = BTreeMap::new();
        for &row in batch {
            let generator = builder(&there, model, &all[row].0, row).build().unwrap();
            rows.insert(together.add(generator).unwrap(), (row, vec![]));
        }
        while !together.is_empty() {
            for event in together.step().unwrap() {
                let token = event.token.unwrap().unwrap();
                rows.get_mut(&event.row).unwrap().1.push(token.id);
            }
        }
        for (row, ids) in rows.into_values() {
            assert_eq!(ids, tokens(builder(&here, model, &all[row].0, row)), "row {row} of {batch:?}");
        }
        there.drawn.get()
    };
    assert_eq!(drawn(&[0, 1, 2, 3, 4, 0, 3]), TOKENS - 1);
    assert_eq!(drawn(&[0, 1, 5]), 0);
    cases + 2
}

#[test]
fn drawn_is_chosen() {
    let names = ["mamba_tied", "mamba2-shakespeare"];
    let cases: usize = names.iter().map(|name| check(&models::open(name))).sum();
    assert_eq!(cases, 22);
}

#[test]
fn what_cannot_be_drawn_is_an_error_of_its_row() {
    let model = models::open("mamba_tied");
    let config = SamplingConfig::default();
    let spoilt = || Drawing { spoilt_at: Some(3), ..Drawing::new(&model, true) };
    let one = spoilt();
    let mut generator = builder(&one, &model, &config, 0).build().unwrap();
    for _ in 0..3 {
        generator.next().unwrap().unwrap();
    }
    let error = generator.next().unwrap().unwrap_err();
    assert!(matches!(error, Error::InvalidLogit { id: 2, position: 8, .. }), "{error}");
    assert!(generator.next().is_none());

    let two = spoilt();
    let mut batch = Batch::new(&two);
    let rows = [0, 1].map(|row| batch.add(builder(&two, &model, &config, row).build().unwrap()).unwrap());
    let mut texts: BTreeMap<_, Vec<u32>> = BTreeMap::new();
    let mut failed = vec![];
    while !batch.is_empty() {
        for event in batch.step().unwrap() {
            match event.token.unwrap() {
                Ok(token) => texts.entry(event.row).or_default().push(token.id),
                Err(error) => failed.push((event.row, error)),
            }
        }
    }
    assert!(matches!(failed[..], [(row, Error::InvalidLogit { id: 0, .. })] if row == rows[1]), "{failed:?}");
    assert_eq!(rows.map(|row| texts[&row].len()), [TOKENS, 3]);
}

mod cuda {
    use candle_core::DType;
    use mamba_model::checkpoint::LocalDir;

    use super::*;
    use crate::support::golden::path;
    use crate::support::target::with_gpu;

    #[test]
    fn drawn_is_chosen() {
        with_gpu(|device| {
            let folder = LocalDir::new(path("models/mamba_tied")).unwrap();
            Ok(check(&Model::from_pretrained(&folder, DType::F32, device).unwrap()))
        });
    }
}
