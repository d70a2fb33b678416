//! From logits to a token: filters and a sampler together, and the options that describe the usual ones.

use mamba_ops::Draw;

use crate::candidates::Candidates;
use crate::error::{Error, Result};
use crate::filter::{
    BannedTokens, Chain, Dry, DryConfig, ForcedTokens, History, LogitBias, LogitsFilter, MinP, NoRepeatNgram,
    OccurrencePenalty, RepetitionPenalty, Temperature, TopK, TopNSigma, TopP, Typical, Xtc,
};
use crate::mirostat::Mirostat;
use crate::sampler::{ArgMax, Multinomial, Sampler};

/// The usual options of sampling.
///
/// [`build`](Self::build) makes of them, in this order, those that are set: logit bias, repetition penalty, presence and
/// frequency penalty, DRY, no repeated n-grams, banned tokens, forced tokens; temperature, top-n-sigma, top-k, top-p, min-p,
/// typical, XTC; then one draw, or Mirostat's. A temperature of 0 means greedy decoding: the likeliest token after the
/// first group.
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
    /// The probability that the most typical tokens reach, see [`Typical`].
    pub typical_p: Option<f64>,
    /// How many standard deviations below the largest a logit may be, see [`TopNSigma`].
    pub top_n_sigma: Option<f64>,
    /// Exclusion of the top choices: its probability and its threshold, see [`Xtc`].
    pub xtc: Option<(f64, f64)>,
    /// The surprise to reach and the rate of learning, τ and η, see [`Mirostat`].
    pub mirostat: Option<(f64, f64)>,
    /// How much less likely tokens become that occurred before, see [`RepetitionPenalty`].
    pub repetition_penalty: Option<f64>,
    /// What tokens lose that were generated already, see [`OccurrencePenalty`]. 0 by default.
    pub presence_penalty: f64,
    /// What tokens lose for each time that they were generated, see [`OccurrencePenalty`]. 0 by default.
    pub frequency_penalty: f64,
    /// Penalties for repeated sequences, see [`Dry`].
    pub dry: Option<DryConfig>,
    /// The length of sequences that never occur twice, see [`NoRepeatNgram`].
    pub no_repeat_ngram: Option<usize>,
    /// What is added to the logits of tokens, see [`LogitBias`].
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens, and sequences of them, that are never generated, see [`BannedTokens`].
    pub banned_tokens: Vec<Vec<u32>>,
    /// Places among the generated tokens and what stands there, see [`ForcedTokens`].
    pub forced_tokens: Vec<(usize, u32)>,
    /// What the draws follow from, see [`Multinomial`]. 0 by default; greedy decoding does not use it.
    pub seed: u64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            typical_p: None,
            top_n_sigma: None,
            xtc: None,
            mirostat: None,
            repetition_penalty: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry: None,
            no_repeat_ngram: None,
            logit_bias: Vec::new(),
            banned_tokens: Vec::new(),
            forced_tokens: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingConfig {
    /// Makes the filters and the sampler.
    ///
    /// # Errors
    /// If an option is outside the domain of its filter, also where greedy decoding would not use it.
    pub fn build(&self) -> Result<Sampling> {
        let mut chain = self.edits()?;
        let greedy = self.temperature == 0.0;
        // Greedy decoding is not changed by what follows, which is made nevertheless, to check the options.
        let choices = self.choices(greedy)?;
        let mirostat = self.mirostat.map(|(tau, eta)| Mirostat::new(tau, eta, self.seed)).transpose()?;
        let sampling = if greedy {
            Sampling::new(chain, ArgMax)
        } else {
            chain.push(choices);
            match mirostat {
                Some(mirostat) => Sampling::new(chain, mirostat),
                None => Sampling::new(chain, Multinomial::with_seed(self.seed)),
            }
        };
        Ok(Sampling { draw: self.draw(), ..sampling })
    }

    /// The draw that is all there is to it, but for its random number, if no option asks for more.
    fn draw(&self) -> Option<Draw> {
        let (temperature, top_k, top_p, min_p) =
            (self.temperature as f32, self.top_k, self.top_p, self.min_p);
        let draw = Draw { temperature, top_k, top_p, min_p, uniform: 0.0 };
        let draw = if self.temperature == 0.0 { Draw::GREEDY } else { draw };
        // Nothing else is set, or has an effect.
        let repetition_penalty = self.repetition_penalty.filter(|penalty| *penalty != 1.0);
        let mut rest = Self { temperature: 1.0, repetition_penalty, seed: 0, ..self.clone() };
        (rest.top_k, rest.top_p, rest.min_p) = (None, None, None);
        if self.temperature == 0.0 {
            (rest.typical_p, rest.top_n_sigma, rest.xtc, rest.mirostat) = (None, None, None, None);
        }
        (rest == Self::default()).then_some(draw)
    }

    /// What changes which token is the likeliest.
    fn edits(&self) -> Result<Chain> {
        let mut chain = Chain::new();
        if !self.logit_bias.is_empty() {
            chain.push(LogitBias::new(self.logit_bias.iter().copied())?);
        }
        if let Some(penalty) = self.repetition_penalty {
            chain.push(RepetitionPenalty::new(penalty)?);
        }
        if (self.presence_penalty, self.frequency_penalty) != (0.0, 0.0) {
            chain.push(OccurrencePenalty::new(self.presence_penalty, self.frequency_penalty)?);
        }
        if let Some(dry) = &self.dry {
            chain.push(Dry::new(dry.clone())?);
        }
        if let Some(n) = self.no_repeat_ngram {
            chain.push(NoRepeatNgram::new(n)?);
        }
        if !self.banned_tokens.is_empty() {
            chain.push(BannedTokens::new(self.banned_tokens.iter().cloned())?);
        }
        if !self.forced_tokens.is_empty() {
            chain.push(ForcedTokens::new(self.forced_tokens.iter().copied()));
        }
        Ok(chain)
    }

    /// What changes how far from the likeliest token a draw may go.
    fn choices(&self, greedy: bool) -> Result<Chain> {
        let mut chain = Chain::new();
        if !greedy && self.temperature != 1.0 {
            chain.push(Temperature::new(self.temperature)?);
        }
        if let Some(n) = self.top_n_sigma {
            chain.push(TopNSigma::new(n)?);
        }
        if let Some(k) = self.top_k {
            chain.push(TopK::new(k)?);
        }
        if let Some(p) = self.top_p {
            chain.push(TopP::new(p)?);
        }
        if let Some(p) = self.min_p {
            chain.push(MinP::new(p)?);
        }
        if let Some(mass) = self.typical_p {
            chain.push(Typical::new(mass)?);
        }
        if let Some((probability, threshold)) = self.xtc {
            chain.push(Xtc::new(probability, threshold, self.seed)?);
        }
        Ok(chain)
    }
}

/// Chooses tokens: filters, then a sampler, and the buffer they share.
///
/// It may hold state, such as that of random numbers, so it serves one generation at a time.
pub struct Sampling {
    filters: Chain,
    sampler: Box<dyn Sampler>,
    candidates: Candidates,
    /// What filters and sampler come to, but for the random number, if that can be said.
    draw: Option<Draw>,
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
        Self { filters, sampler: Box::new(sampler), candidates: Candidates::new(), draw: None }
    }

    /// Makes one that takes the likeliest token, the one with the lowest id among equals.
    pub fn greedy() -> Self {
        Self { draw: Some(Draw::GREEDY), ..Self::new(Chain::new(), ArgMax) }
    }

    /// Whether the next token is one [`draw`](Self::draw), which a model may make.
    pub(crate) fn can_draw(&self) -> bool {
        self.draw.is_some()
    }

    /// The draw by which someone else is to choose the next token, which [`next_token`](Self::next_token) will not see then; none if
    /// filters must see the logits.
    pub(crate) fn draw(&mut self) -> Option<Draw> {
        let draw = self.draw?;
        if draw == Draw::GREEDY {
            return Some(draw);
        }
        Some(Draw { uniform: self.sampler.uniform()?, ..draw })
    }

    /// Chooses the token that follows `history`, from one logit per token of the vocabulary.
    ///
    /// # Errors
    /// If a logit is NaN or plus infinity, if all are minus infinity, or if a filter fails. Errors name the position,
    /// which is the length of `history`.
    pub fn next_token(&mut self, logits: &[f32], history: History<'_>) -> Result<u32> {
        self.filter(logits, history)?;
        self.sampler.sample(&mut self.candidates)
    }

    /// What the filters leave of the logits that follow `history`.
    ///
    /// # Errors
    /// As [`next_token`](Self::next_token).
    pub fn filter(&mut self, logits: &[f32], history: History<'_>) -> Result<&mut Candidates> {
        self.candidates.load(logits, history.tokens().len())?;
        self.filters.apply(&mut self.candidates, history)?;
        Ok(&mut self.candidates)
    }

    /// Whether a filter says that the generated text is complete: see [`LogitsFilter::is_complete`].
    ///
    /// # Errors
    /// If a filter fails.
    pub fn is_complete(&mut self, history: History<'_>) -> Result<bool> {
        self.filters.is_complete(history)
    }

    /// Adds a filter before all others.
    pub fn push_front(&mut self, filter: impl LogitsFilter + 'static) {
        self.filters.push_front(filter);
        self.draw = None;
    }

    /// What it remembers between tokens, such as how far random numbers were used; empty if nothing.
    ///
    /// [`restore`](Self::restore)d into another one with the same options, the same tokens follow.
    ///
    /// # Example
    /// ```
    /// use mamba_generate::{History, SamplingConfig};
    ///
    /// let config = SamplingConfig { seed: 3, ..Default::default() };
    /// let mut one = config.build()?;
    /// one.next_token(&[0.0; 1000], History::default())?;
    /// let mut two = config.build()?;
    /// two.restore(&one.state())?;
    /// let next = one.next_token(&[0.0; 1000], History::default())?;
    /// assert_eq!(two.next_token(&[0.0; 1000], History::default())?, next);
    /// # Ok::<(), mamba_generate::Error>(())
    /// ```
    pub fn state(&self) -> Vec<u64> {
        let mut words = Vec::new();
        self.filters.save_state(&mut words);
        self.sampler.save_state(&mut words);
        words
    }

    /// Goes on from where another one was, whose [`state`](Self::state) this is; the seed is also that of the other one.
    ///
    /// # Errors
    /// If the state is not of one with the same options.
    pub fn restore(&mut self, mut state: &[u64]) -> Result<()> {
        self.filters.restore_state(&mut state)?;
        self.sampler.restore_state(&mut state)?;
        match state.len() {
            0 => Ok(()),
            n => Err(Error::invalid(
                "sampling",
                "state",
                format_args!("{n} words longer than what is restored from it"),
                "the state of a sampling with the same options",
            )),
        }
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
                SamplingConfig { presence_penalty: f64::NAN, ..base.clone() },
                SamplingConfig { frequency_penalty: f64::INFINITY, ..base.clone() },
                SamplingConfig { typical_p: Some(0.0), ..base.clone() },
                SamplingConfig { top_n_sigma: Some(-1.0), ..base.clone() },
                SamplingConfig { xtc: Some((2.0, 0.1)), ..base.clone() },
                SamplingConfig { mirostat: Some((5.0, 0.0)), ..base.clone() },
                SamplingConfig { dry: Some(DryConfig { base: 0.0, ..DryConfig::default() }), ..base.clone() },
                SamplingConfig { no_repeat_ngram: Some(0), ..base.clone() },
                SamplingConfig { logit_bias: vec![(0, f32::NAN)], ..base.clone() },
                SamplingConfig { banned_tokens: vec![vec![]], ..base.clone() },
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
        let history = [1, 2, 3, 199, 3, 199, 3];
        for bits in 0..1u32 << 13 {
            let on = |bit: u32| bits >> bit & 1 == 1;
            let config = SamplingConfig {
                temperature: if on(0) { 0.01 } else { 1.0 },
                top_k: on(1).then_some(3),
                top_p: on(2).then_some(1e-6),
                min_p: on(3).then_some(1.0),
                repetition_penalty: on(4).then_some(100.0),
                typical_p: on(5).then_some(0.01),
                top_n_sigma: on(6).then_some(0.01),
                xtc: on(7).then_some((1.0, 0.001)),
                mirostat: on(8).then_some((0.01, 10.0)),
                presence_penalty: if on(9) { 1e4 } else { 0.0 },
                dry: on(10).then(DryConfig::default),
                no_repeat_ngram: on(11).then_some(2),
                banned_tokens: if on(12) { (0..190).map(|id| vec![id]).collect() } else { vec![] },
                seed: u64::from(bits),
                ..Default::default()
            };
            let mut sampling = config.build().unwrap();
            assert!(sampling.next_token(&logits, History::new(&history, 5)).unwrap() < 200, "{config:?}");
        }
    }

    #[test]
    fn what_is_kept_between_tokens_is_all_there_is() {
        let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 101) as f32 * 0.1).collect();
        for mirostat in [None, Some((3.0, 0.3))] {
            let config = SamplingConfig { xtc: Some((0.5, 0.01)), mirostat, seed: 8, ..Default::default() };
            let mut one = config.build().unwrap();
            let next = |sampling: &mut Sampling| sampling.next_token(&logits, History::default()).unwrap();
            for _ in 0..10 {
                next(&mut one);
            }
            let mut two = SamplingConfig { seed: 9, ..config.clone() }.build().unwrap();
            two.restore(&one.state()).unwrap();
            let rest = |sampling: &mut Sampling| (0..40).map(|_| next(sampling)).collect::<Vec<_>>();
            assert_eq!(rest(&mut two), rest(&mut one));
            // Of other options.
            let mut other = SamplingConfig::default().build().unwrap();
            let error = other.restore(&one.state()).unwrap_err().to_string();
            assert!(error.contains("words longer than what is restored from it"), "{error}");
            assert!(two.restore(&one.state()[1..]).is_err());
            assert!(Sampling::greedy().state().is_empty());
        }
    }
}
