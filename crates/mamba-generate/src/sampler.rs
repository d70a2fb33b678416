//! Samplers: how one token is chosen from the candidates that are left.

use crate::candidates::Candidates;
use crate::error::{Error, Result};
use crate::rng::Rng;

/// Chooses one token.
///
/// # Example
/// ```
/// use mamba_generate::{ArgMax, Candidates, Sampler};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.0, 2.0, 2.0], 0)?;
/// assert_eq!(ArgMax.sample(&mut candidates)?, 1);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
pub trait Sampler: Send {
    /// Chooses one of `candidates`, whose order it may change.
    ///
    /// # Errors
    /// If no candidate has a logit above minus infinity, or a logit is NaN or plus infinity.
    fn sample(&mut self, candidates: &mut Candidates) -> Result<u32>;

    /// The random number of the next draw, if that is the first candidate at which the sum of the weights exceeds this part of their
    /// total: then someone else may find it. None by default.
    fn uniform(&mut self) -> Option<f64> {
        None
    }

    /// Appends what the sampler remembers between tokens to `words`; nothing by default.
    fn save_state(&self, words: &mut Vec<u64>) {
        let _ = words;
    }

    /// Reads from the front of `words` what [`save_state`](Self::save_state) appended, and goes on from there.
    ///
    /// # Errors
    /// If there are too few words.
    fn restore_state(&mut self, words: &mut &[u64]) -> Result<()> {
        let _ = words;
        Ok(())
    }
}

/// Chooses the likeliest token, the one with the lowest id among equals: greedy decoding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ArgMax;

impl Sampler for ArgMax {
    fn sample(&mut self, candidates: &mut Candidates) -> Result<u32> {
        candidates.check()?;
        match candidates.best() {
            Some(best) if best.logit > f32::NEG_INFINITY => Ok(best.id),
            _ => Err(Error::NoCandidates { position: candidates.position() }),
        }
    }
}

/// Draws a token with the probability that its logit stands for, from a seeded source of random numbers.
///
/// The source is ChaCha12, as published, with stream 0 and a key whose first eight bytes are the seed (little endian) and
/// whose others are 0. Each token takes one 64-bit word, of which the upper 53 bits make a number `u` in `[0, 1)`; the
/// token is the first, in the order of the candidates, at which the sum of the weights exceeds `u` times their total, in
/// `f64`. So a seed gives the same tokens in every version and on every machine, as long as `exp` rounds alike there. A model on
/// a GPU that draws itself (see [`CausalLm::draws`](crate::CausalLm::draws)) uses the same `u`, with weights rounded to `f32`: another token only
/// where `u` falls between two of them.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, Multinomial, Sampler};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.0, 0.0, f32::NEG_INFINITY], 0)?;
/// let mut draw = |seed| -> mamba_generate::Result<Vec<u32>> {
///     let mut sampler = Multinomial::with_seed(seed);
///     (0..20).map(|_| sampler.sample(&mut candidates)).collect()
/// };
/// assert_eq!(draw(1)?, draw(1)?);
/// assert_ne!(draw(1)?, draw(2)?);
/// assert!(draw(3)?.iter().all(|&id| id < 2));
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Multinomial {
    rng: Rng,
    /// Cumulative weights; kept between tokens for its memory only.
    cumulative: Vec<f64>,
}

impl Multinomial {
    /// Makes a sampler that draws the same tokens whenever it gets the same seed and the same candidates.
    pub fn with_seed(seed: u64) -> Self {
        Self { rng: Rng::new(seed, 0), cumulative: Vec::new() }
    }
}

impl Sampler for Multinomial {
    fn sample(&mut self, candidates: &mut Candidates) -> Result<u32> {
        candidates.check()?;
        let entries = candidates.as_slice();
        let none = Error::NoCandidates { position: candidates.position() };
        let largest = entries.iter().fold(f32::NEG_INFINITY, |max, c| max.max(c.logit));
        if largest == f32::NEG_INFINITY {
            return Err(none);
        }
        let mut total = 0.0;
        self.cumulative.clear();
        self.cumulative.extend(entries.iter().map(|c| {
            total += f64::from(c.logit - largest).exp();
            total
        }));

        let u = self.rng.uniform();
        // As u < 1, the product is below the total even after rounding, so some sum exceeds it; the first that does has a
        // weight above 0.
        let target = u * total;
        let index = self.cumulative.partition_point(|&sum| sum <= target);
        entries.get(index).map(|c| c.id).ok_or(none)
    }

    fn uniform(&mut self) -> Option<f64> {
        Some(self.rng.uniform())
    }

    fn save_state(&self, words: &mut Vec<u64>) {
        self.rng.save(words);
    }

    fn restore_state(&mut self, words: &mut &[u64]) -> Result<()> {
        self.rng.restore(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(logits: &[f32]) -> Candidates {
        let mut candidates = Candidates::new();
        candidates.load(logits, 3).unwrap();
        candidates
    }

    /// Pearson's statistic of `draws` draws against `weights`.
    fn chi_squared(counts: &[u64], weights: &[f64]) -> f64 {
        let total: f64 = weights.iter().sum();
        let draws = counts.iter().sum::<u64>() as f64;
        counts
            .iter()
            .zip(weights)
            .map(|(&n, w)| {
                let expected = draws * w / total;
                (n as f64 - expected).powi(2) / expected
            })
            .sum()
    }

    #[test]
    fn draws_follow_the_distribution() {
        let weights = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0, 55.0];
        let logits: Vec<f32> = weights.iter().map(|w: &f64| w.ln() as f32 - 30.0).collect();
        for seed in [0, 1, 42, u64::MAX] {
            let (mut sampler, mut candidates) = (Multinomial::with_seed(seed), load(&logits));
            let mut counts = [0; 8];
            for _ in 0..100_000 {
                counts[sampler.sample(&mut candidates).unwrap() as usize] += 1;
            }
            let statistic = chi_squared(&counts, &weights);
            // 7 degrees of freedom: above 24.3 once in a thousand seeds.
            assert!(statistic < 24.3, "seed {seed}: {statistic} from {counts:?}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_tokens_for_ever() {
        let mut candidates = load(&[0.0; 1000]);
        let mut sampler = Multinomial::with_seed(1234);
        let ids: Vec<u32> = (0..8).map(|_| sampler.sample(&mut candidates).unwrap()).collect();
        // From an implementation of ChaCha12 in Python, written for this: floor(1000 u).
        assert_eq!(ids, [551, 509, 788, 16, 572, 66, 113, 380]);
    }

    #[test]
    fn forbidden_tokens_are_never_drawn() {
        let no = f32::NEG_INFINITY;
        let mut candidates = load(&[no, 0.0, no, -200.0, no]);
        let mut sampler = Multinomial::with_seed(9);
        for _ in 0..1000 {
            assert_eq!(sampler.sample(&mut candidates).unwrap(), 1);
        }
    }

    #[test]
    fn nothing_to_choose_is_an_error() {
        for logits in [vec![], vec![f32::NEG_INFINITY; 3]] {
            let samplers: [&mut dyn Sampler; 2] = [&mut ArgMax, &mut Multinomial::with_seed(0)];
            for sampler in samplers {
                let error = sampler.sample(&mut load(&logits)).unwrap_err();
                assert!(matches!(error, Error::NoCandidates { position: 3 }), "{error}");
            }
        }
    }

    #[test]
    fn what_a_filter_breaks_is_an_error() {
        for broken in [f32::NAN, f32::INFINITY] {
            let samplers: [&mut dyn Sampler; 2] = [&mut ArgMax, &mut Multinomial::with_seed(0)];
            for sampler in samplers {
                let mut candidates = load(&[0.0, 1.0]);
                candidates.update(|id, x| if id == 1 { broken } else { x });
                let error = sampler.sample(&mut candidates).unwrap_err();
                assert!(matches!(error, Error::InvalidLogit { id: 1, position: 3, .. }), "{error}");
            }
        }
    }

    #[test]
    fn argmax_takes_the_lowest_id_among_equals() {
        assert_eq!(ArgMax.sample(&mut load(&[1.0, 5.0, 5.0, -0.0])).unwrap(), 1);
        assert_eq!(ArgMax.sample(&mut load(&[-0.0, 0.0])).unwrap(), 0);
    }
}
