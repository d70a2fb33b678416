//! From logits to a token: filters and a sampler together, and the options that describe the usual ones.

use crate::candidates::Candidates;
use crate::error::Result;
use crate::filter::{Chain, History, LogitsFilter, MinP, RepetitionPenalty, Temperature, TopK, TopP};
use crate::sampler::{ArgMax, Multinomial, Sampler};

/// The usual options of sampling.
///
/// [`build`](Self::build) makes of them, in this order, those that are set: repetition penalty, temperature, top-k, top-p,
/// min-p, then one draw. A temperature of 0 means greedy decoding: the likeliest token after the repetition penalty.
///
/// # Example
/// ```
/// use mamba_generate::{History, SamplingConfig};
///
/// let config = SamplingConfig { temperature: 0.8, top_k: Some(2), seed: 42, ..Default::default() };
/// let id = config.build()?.next_token(&[0.1, 2.5, 2.0, -1.0], History::default())?;
/// assert!(id == 1 || id == 2);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits, see [`Temperature`]; 0 means greedy decoding. 1 by default.
    pub temperature: f64,
    /// How many of the likeliest tokens to keep, see [`TopK`].
    pub top_k: Option<usize>,
    /// The probability that the kept tokens reach, see [`TopP`].
    pub top_p: Option<f64>,
    /// The least probability, relative to the largest, see [`MinP`].
    pub min_p: Option<f64>,
    /// How much less likely tokens become that occurred before, see [`RepetitionPenalty`].
    pub repetition_penalty: Option<f64>,
    /// What the draws follow from, see [`Multinomial`]. 0 by default; greedy decoding does not use it.
    pub seed: u64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, min_p: None, repetition_penalty: None, seed: 0 }
    }
}

impl SamplingConfig {
    /// Makes the filters and the sampler.
    ///
    /// # Errors
    /// If an option is outside the domain of its filter, also where greedy decoding would not use it.
    pub fn build(&self) -> Result<Sampling> {
        let mut chain = Chain::new();
        if let Some(penalty) = self.repetition_penalty {
            chain.push(RepetitionPenalty::new(penalty)?);
        }
        let greedy = self.temperature == 0.0;
        // Greedy decoding is not changed by what follows, which is made nevertheless, to check the options.
        let mut rest = Chain::new();
        if !greedy && self.temperature != 1.0 {
            rest.push(Temperature::new(self.temperature)?);
        }
        if let Some(k) = self.top_k {
            rest.push(TopK::new(k)?);
        }
        if let Some(p) = self.top_p {
            rest.push(TopP::new(p)?);
        }
        if let Some(p) = self.min_p {
            rest.push(MinP::new(p)?);
        }
        if greedy {
            return Ok(Sampling::new(chain, ArgMax));
        }
        chain.push(rest);
        Ok(Sampling::new(chain, Multinomial::with_seed(self.seed)))
    }
}

/// Chooses tokens: filters, then a sampler, and the buffer they share.
///
/// It may hold state, such as that of random numbers, so it serves one generation at a time.
pub struct Sampling {
    filters: Chain,
    sampler: Box<dyn Sampler>,
    candidates: Candidates,
}

impl Sampling {
    /// Makes one of any filters and any sampler.
    ///
    /// # Example
    /// ```
    /// use mamba_generate::{Chain, Multinomial, Sampling, TopK};
    ///
    /// let sampling = Sampling::new(Chain::new().with(TopK::new(40)?), Multinomial::with_seed(7));
    /// # Ok::<(), mamba_generate::Error>(())
    /// ```
    pub fn new(filters: Chain, sampler: impl Sampler + 'static) -> Self {
        Self { filters, sampler: Box::new(sampler), candidates: Candidates::new() }
    }

    /// Makes one that takes the likeliest token, the one with the lowest id among equals.
    pub fn greedy() -> Self {
        Self::new(Chain::new(), ArgMax)
    }

    /// Chooses the token that follows `history`, from one logit per token of the vocabulary.
    ///
    /// # Errors
    /// If a logit is NaN or plus infinity, if all are minus infinity, or if a filter fails. Errors name the position,
    /// which is the length of `history`.
    pub fn next_token(&mut self, logits: &[f32], history: History<'_>) -> Result<u32> {
        self.candidates.load(logits, history.tokens().len())?;
        self.filters.apply(&mut self.candidates, history)?;
        self.sampler.sample(&mut self.candidates)
    }
}

impl Default for Sampling {
    /// Greedy decoding.
    fn default() -> Self {
        Self::greedy()
    }
}

impl std::fmt::Debug for Sampling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampling").field("filters", &self.filters).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn draw(config: &SamplingConfig, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampling = config.build().unwrap();
        (0..n).map(|_| sampling.next_token(logits, History::default()).unwrap()).collect()
    }

    #[test]
    fn a_seed_reproduces_and_another_differs() {
        let logits: Vec<f32> = (0..500).map(|i| (i as f32 * 0.7).sin()).collect();
        let config = SamplingConfig { top_p: Some(0.95), seed: 5, ..Default::default() };
        assert_eq!(draw(&config, &logits, 100), draw(&config, &logits, 100));
        assert_ne!(draw(&config, &logits, 100), draw(&SamplingConfig { seed: 6, ..config }, &logits, 100));
    }

    #[test]
    fn zero_temperature_is_greedy_after_the_penalty() {
        let config = SamplingConfig {
            temperature: 0.0,
            top_p: Some(0.5),
            repetition_penalty: Some(2.0),
            ..Default::default()
        };
        let mut sampling = config.build().unwrap();
        assert_eq!(sampling.next_token(&[4.0, 3.0, 3.0], History::default()).unwrap(), 0);
        assert_eq!(sampling.next_token(&[4.0, 3.0, 3.0], History::new(&[0], 1)).unwrap(), 1);
        let config = SamplingConfig { temperature: -0.0, ..config };
        assert_eq!(config.build().unwrap().next_token(&[4.0, 5.0], History::default()).unwrap(), 1);
    }

    #[test]
    fn temperature_comes_before_top_p() {
        // At temperature 1 top-p 0.6 keeps one of [0.64, 0.32, 0.04]; at 2 it is [0.5, 0.35, 0.13], and two are kept.
        let logits = [0.64f32.ln(), 0.32f32.ln(), 0.04f32.ln()];
        let config = SamplingConfig { top_p: Some(0.6), ..Default::default() };
        assert!(draw(&config, &logits, 200).iter().all(|&id| id == 0));
        let config = SamplingConfig { temperature: 2.0, ..config };
        let ids = draw(&config, &logits, 200);
        assert!(ids.contains(&1) && !ids.contains(&2));
    }

    #[test]
    fn every_option_is_checked_even_if_greedy() {
        for temperature in [0.0, 1.0] {
            let base = SamplingConfig { temperature, ..Default::default() };
            for config in [
                SamplingConfig { top_k: Some(0), ..base.clone() },
                SamplingConfig { top_p: Some(0.0), ..base.clone() },
                SamplingConfig { min_p: Some(2.0), ..base.clone() },
                SamplingConfig { repetition_penalty: Some(f64::NAN), ..base.clone() },
            ] {
                assert!(config.build().is_err(), "{config:?}");
            }
        }
        for temperature in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(SamplingConfig { temperature, ..Default::default() }.build().is_err());
        }
    }

    #[test]
    fn a_filter_that_leaves_nothing_is_an_error() {
        struct Nothing;
        impl LogitsFilter for Nothing {
            fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
                candidates.retain(|_| false);
                Ok(())
            }
        }
        let mut sampling = Sampling::new(Chain::new().with(Nothing), Multinomial::with_seed(0));
        let error = sampling.next_token(&[1.0, 2.0], History::new(&[7, 8], 2)).unwrap_err();
        assert!(matches!(error, Error::NoCandidates { position: 2 }), "{error}");
    }

    #[test]
    fn every_combination_of_filters_leaves_something_to_draw() {
        let logits: Vec<f32> = (0..200).map(|i| ((i * 37) % 101) as f32 * 0.3 - 15.0).collect();
        let history = [1, 2, 3, 199, 3];
        for bits in 0..32u32 {
            let on = |bit: u32| bits >> bit & 1 == 1;
            let config = SamplingConfig {
                temperature: if on(0) { 0.01 } else { 1.0 },
                top_k: on(1).then_some(3),
                top_p: on(2).then_some(1e-6),
                min_p: on(3).then_some(1.0),
                repetition_penalty: on(4).then_some(100.0),
                seed: u64::from(bits),
            };
            let mut sampling = config.build().unwrap();
            assert!(sampling.next_token(&logits, History::new(&history, 5)).unwrap() < 200, "{config:?}");
        }
    }
}
