use tokenizers::Tokenizer;

use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// The options of [`Dry`].
#[derive(Debug, Clone, PartialEq)]
pub struct DryConfig {
    /// The penalty for a repetition of just the allowed length. 0.8 by default.
    pub multiplier: f64,
    /// What each further token of repetition multiplies the penalty with. 1.75 by default.
    pub base: f64,
    /// How many tokens may be repeated before a repetition costs anything. 2 by default.
    pub allowed_length: usize,
    /// How many of the last tokens are searched for repetitions. All by default.
    pub range: usize,
    /// Tokens across which nothing counts as a repetition, such as line breaks; see [`breaks`](Self::breaks).
    pub breakers: Vec<u32>,
}

impl Default for DryConfig {
    fn default() -> Self {
        Self { multiplier: 0.8, base: 1.75, allowed_length: 2, range: usize::MAX, breakers: Vec::new() }
    }
}

impl DryConfig {
    /// The tokens whose text has one of `strings` in it; the usual ones are `"\n"`, `":"`, `"\""` and `"*"`.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn breaks(tokenizer: &Tokenizer, strings: &[&str]) -> Result<Vec<u32>> {
        let mut breakers = Vec::new();
        for id in 0..tokenizer.get_vocab_size(true) as u32 {
            let text = tokenizer.decode(&[id], false).map_err(Error::Tokenizer)?;
            if strings.iter().any(|string| text.contains(string)) {
                breakers.push(id);
            }
        }
        Ok(breakers)
    }
}

/// Makes tokens less likely that would go on with a repetition: "don't repeat yourself".
///
/// If the last `n` tokens of the history occurred before, followed by token `t`, with `n` as large as possible and at least
/// `allowed_length`, the logit of `t` falls by `multiplier · base^(n - allowed_length)`. Neither the repetition nor `t`
/// has a breaker in it. The exponent stops growing where the penalty would no longer fit into `f32`.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, Dry, DryConfig, History, LogitsFilter};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.0; 6], 0)?;
/// // The last three tokens stood there before, and 4 followed.
/// Dry::new(DryConfig::default())?.apply(&mut candidates, History::new(&[1, 2, 3, 4, 5, 1, 2, 3], 0))?;
/// assert_eq!(candidates.as_slice()[4].logit, -0.8 * 1.75);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// DRY by p-e-w (oobabooga/text-generation-webui, pull request 5677); as `dry` in llama.cpp.
#[derive(Debug, Clone, PartialEq)]
pub struct Dry {
    config: DryConfig,
    /// The length of the repetition that ends before each earlier token; kept between tokens for its memory only.
    lengths: Vec<usize>,
    /// (token, length of the longest repetition that it would go on with)
    longest: Vec<(u32, usize)>,
}

impl Dry {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `multiplier` is not a finite number above 0, `base` not a finite number from 1, or `allowed_length` 0.
    pub fn new(mut config: DryConfig) -> Result<Self> {
        if !(config.multiplier.is_finite() && config.multiplier > 0.0) {
            return Err(Error::invalid("dry", "multiplier", config.multiplier, "a finite number above 0"));
        }
        if !(config.base.is_finite() && config.base >= 1.0) {
            return Err(Error::invalid("dry", "base", config.base, "a finite number from 1"));
        }
        if config.allowed_length == 0 {
            return Err(Error::invalid("dry", "allowed_length", 0, "a number from 1"));
        }
        config.breakers.sort_unstable();
        Ok(Self { config, lengths: Vec::new(), longest: Vec::new() })
    }

    fn is_breaker(&self, id: u32) -> bool {
        self.config.breakers.binary_search(&id).is_ok()
    }

    /// Fills `longest` for this history.
    fn search(&mut self, tokens: &[u32]) {
        let tokens = &tokens[tokens.len().saturating_sub(self.config.range)..];
        let n = tokens.len();
        let last = |i: usize| tokens[n - 1 - i];
        self.longest.clear();
        let limit = (0..n).find(|&i| self.is_breaker(last(i))).unwrap_or(n);
        if limit < self.config.allowed_length {
            return;
        }
        // The Z function of the reversed history: lengths[i] tokens that end before the i-th last one are its end.
        self.lengths.clear();
        self.lengths.resize(n, 0);
        let (mut start, mut end) = (0, 0);
        for i in 1..n {
            let mut length = if i < end { self.lengths[i - start].min(end - i) } else { 0 };
            while i + length < n && last(length) == last(i + length) {
                length += 1;
            }
            if i + length > end {
                (start, end) = (i, i + length);
            }
            self.lengths[i] = length;
            let (length, next) = (length.min(limit), last(i - 1));
            if length >= self.config.allowed_length && !self.is_breaker(next) {
                self.longest.push((next, length));
            }
        }
        // The longest of each token.
        self.longest.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        self.longest.dedup_by_key(|(token, _)| *token);
    }
}

impl LogitsFilter for Dry {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        self.search(history.tokens());
        let DryConfig { multiplier, base, allowed_length, .. } = self.config;
        for &(token, length) in &self.longest {
            let penalty = multiplier * base.powi((length - allowed_length).min(i32::MAX as usize) as i32);
            candidates.update_one(token, |logit| (f64::from(logit) - penalty.min(1e30)) as f32);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::filtered;

    fn penalties(config: DryConfig, history: &[u32]) -> Vec<f32> {
        filtered(&mut Dry::new(config).unwrap(), &[0.0; 8], history).iter().map(|x| -x).collect()
    }

    fn config(breakers: &[u32]) -> DryConfig {
        DryConfig {
            multiplier: 1.0,
            base: 2.0,
            allowed_length: 2,
            breakers: breakers.into(),
            ..DryConfig::default()
        }
    }

    #[test]
    fn the_longest_repetition_counts() {
        // "2 3" was followed by 4 and by 6; "1 2 3" by 4 only.
        let history = [1, 2, 3, 4, 2, 3, 6, 1, 2, 3];
        assert_eq!(penalties(config(&[]), &history), [0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0]);
        // Only what is in range.
        let near = DryConfig { range: 6, ..config(&[]) };
        assert_eq!(penalties(near, &history), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn repetitions_may_overlap_and_short_ones_are_free() {
        // Five times the same: four of them occurred before, followed by a fifth.
        assert_eq!(penalties(config(&[]), &[5; 5])[5], 4.0);
        assert_eq!(penalties(config(&[]), &[5, 6, 5]), [0.0; 8]);
        assert_eq!(penalties(config(&[]), &[]), [0.0; 8]);
    }

    #[test]
    fn breakers_cut_and_are_never_penalised() {
        let history = [1, 7, 3, 4, 5, 1, 7, 3, 4];
        assert_eq!(penalties(config(&[]), &history)[5], 4.0);
        assert_eq!(penalties(config(&[7]), &history)[5], 1.0);
        assert_eq!(penalties(config(&[4]), &history), [0.0; 8]);
        assert_eq!(penalties(config(&[5]), &history), [0.0; 8]);
    }

    #[test]
    fn what_is_long_stays_finite() {
        let out = filtered(&mut Dry::new(DryConfig::default()).unwrap(), &[0.0; 8], &[3; 5000]);
        assert!(out[3].is_finite() && out[3] < -1e29);
    }

    #[test]
    fn refuses_bad_numbers() {
        let base = DryConfig::default;
        for bad in [
            DryConfig { multiplier: 0.0, ..base() },
            DryConfig { multiplier: f64::NAN, ..base() },
            DryConfig { base: 0.5, ..base() },
            DryConfig { base: f64::INFINITY, ..base() },
            DryConfig { allowed_length: 0, ..base() },
        ] {
            assert!(Dry::new(bad.clone()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// Against a search of every earlier place for the longest end of the history.
        #[test]
        fn equals_the_definition(
            history in prop::collection::vec(0u32..4, 0..40),
            breakers in prop::collection::vec(0u32..4, 0..2),
        ) {
            let got = penalties(config(&breakers), &history);
            let n = history.len();
            for token in 0..8u32 {
                let mut longest = 0;
                for at in (0..n).filter(|&at| history[at] == token && !breakers.contains(&token)) {
                    let length = (1..=at).take_while(|&k| {
                        history[at - k] == history[n - k] && !breakers.contains(&history[n - k])
                    }).count();
                    longest = longest.max(length);
                }
                let expected = if longest >= 2 { 2f32.powi(longest as i32 - 2) } else { 0.0 };
                prop_assert_eq!(got[token as usize], expected);
            }
        }
    }
}
