//! A sampler that keeps the surprise of its tokens near a target.

use crate::candidates::Candidates;
use crate::error::{Error, Result};
use crate::sampler::{Multinomial, Sampler};
use crate::saved::take;

/// Mirostat 2.0: draws from the tokens that are not too surprising, and learns from each how surprising they may be.
///
/// Starting with `μ = 2τ`: tokens with `-log₂ p > μ` are dropped, but for the likeliest; one of the others is drawn with
/// its probability among them, `q`; then `μ ← μ - η (-log₂ q - τ)`. So the mean surprise of a text goes to `τ` bits a
/// token. Meant to follow a temperature, and nothing else that drops tokens.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, Mirostat, Sampler};
///
/// let mut sampler = Mirostat::new(1.0, 0.1, 7)?; // at first, tokens of up to two bits
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()], 0)?;
/// assert!(sampler.sample(&mut candidates)? < 2);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// Basu et al., 2021, Mirostat; version 2 as in llama.cpp.
#[derive(Debug, Clone)]
pub struct Mirostat {
    tau: f64,
    eta: f64,
    mu: f64,
    draw: Multinomial,
}

impl Mirostat {
    /// Makes the sampler: `tau` is the surprise to reach, in bits, `eta` how fast it learns, `seed` as that of
    /// [`Multinomial`].
    ///
    /// # Errors
    /// If `tau` or `eta` is not a finite number above 0.
    pub fn new(tau: f64, eta: f64, seed: u64) -> Result<Self> {
        for (argument, value) in [("tau", tau), ("eta", eta)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::invalid("mirostat", argument, value, "a finite number above 0"));
            }
        }
        Ok(Self { tau, eta, mu: 2.0 * tau, draw: Multinomial::with_seed(seed) })
    }
}

impl Sampler for Mirostat {
    fn sample(&mut self, candidates: &mut Candidates) -> Result<u32> {
        candidates.check()?;
        let best = match candidates.best() {
            Some(best) if best.logit > f32::NEG_INFINITY => best,
            _ => return Err(Error::NoCandidates { position: candidates.position() }),
        };
        let weight = |logit: f32| f64::from(logit - best.logit).exp();
        let sum =
            |candidates: &Candidates| candidates.as_slice().iter().map(|c| weight(c.logit)).sum::<f64>();
        let least = (-self.mu).exp2() * sum(candidates);
        candidates.retain(|c| weight(c.logit) >= least || c.id == best.id);
        let id = self.draw.sample(candidates)?;
        if let Some(chosen) = candidates.as_slice().iter().find(|c| c.id == id) {
            let surprise = -(weight(chosen.logit) / sum(candidates)).log2();
            self.mu -= self.eta * (surprise - self.tau);
        }
        Ok(id)
    }

    fn save_state(&self, words: &mut Vec<u64>) {
        words.push(self.mu.to_bits());
        self.draw.save_state(words);
    }

    fn restore_state(&mut self, words: &mut &[u64]) -> Result<()> {
        let [mu] = take(words)?;
        self.mu = f64::from_bits(mu);
        self.draw.restore_state(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published algorithm, on probabilities, with the draw given.
    fn step(probabilities: &[f64], mu: &mut f64, tau: f64, eta: f64, u: f64) -> usize {
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
        let kept = order.iter().take_while(|&&i| -probabilities[i].log2() <= *mu).count().max(1);
        let mut kept = order[..kept].to_vec();
        kept.sort_unstable(); // our candidates stand in the order of ids
        let total: f64 = kept.iter().map(|&i| probabilities[i]).sum();
        let mut sum = 0.0;
        let chosen = *kept
            .iter()
            .find(|&&i| {
                sum += probabilities[i];
                sum > u * total
            })
            .unwrap();
        *mu -= eta * (-(probabilities[chosen] / total).log2() - tau);
        chosen
    }

    #[test]
    fn equals_the_published_algorithm() {
        for (tau, eta) in [(0.5, 0.1), (2.0, 0.3), (5.0, 1.0)] {
            let mut sampler = Mirostat::new(tau, eta, 3).unwrap();
            let mut draws = crate::rng::Rng::new(3, 0);
            let mut mu = 2.0 * tau;
            for round in 0..200 {
                let weights: Vec<f64> =
                    (0..40).map(|i| f64::from((i * 17 + round * 5) % 41 + 1).powi(3)).collect();
                let total: f64 = weights.iter().sum();
                let logits: Vec<f32> = weights.iter().map(|w| (w / total).ln() as f32).collect();
                // The same probabilities as the logits, which are rounded.
                let exact: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
                let total: f64 = exact.iter().sum();
                let p: Vec<f64> = exact.iter().map(|x| x / total).collect();
                let mut candidates = Candidates::new();
                candidates.load(&logits, round as usize).unwrap();
                let id = sampler.sample(&mut candidates).unwrap() as usize;
                assert_eq!(id, step(&p, &mut mu, tau, eta, draws.uniform()), "round {round}");
                assert!((sampler.mu - mu).abs() < 1e-4, "round {round}: {} {mu}", sampler.mu);
            }
        }
    }

    #[test]
    fn the_surprise_goes_to_its_target() {
        let logits: Vec<f32> = (0..1000).map(|i| -0.01 * i as f32).collect();
        for tau in [2.0, 3.0, 4.0] {
            let mut sampler = Mirostat::new(tau, 0.1, 11).unwrap();
            let mut surprise = 0.0;
            for round in 0..4000 {
                let mut candidates = Candidates::new();
                candidates.load(&logits, 0).unwrap();
                let before = sampler.mu;
                sampler.sample(&mut candidates).unwrap();
                if round >= 1000 {
                    surprise += (before - sampler.mu) / 0.1 + tau;
                }
            }
            let mean = surprise / 3000.0;
            assert!((mean - tau).abs() < 0.1, "{tau}: {mean}");
        }
    }

    #[test]
    fn what_it_learned_is_kept() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let draw = |sampler: &mut Mirostat| {
            let mut candidates = Candidates::new();
            candidates.load(&logits, 0).unwrap();
            sampler.sample(&mut candidates).unwrap()
        };
        let mut sampler = Mirostat::new(3.0, 0.5, 1).unwrap();
        for _ in 0..20 {
            draw(&mut sampler);
        }
        let mut words = vec![];
        sampler.save_state(&mut words);
        let mut again = Mirostat::new(3.0, 0.5, 2).unwrap();
        again.restore_state(&mut &words[..]).unwrap();
        let rest = |sampler: &mut Mirostat| (0..50).map(|_| draw(sampler)).collect::<Vec<_>>();
        assert_eq!(rest(&mut again), rest(&mut sampler));
    }

    #[test]
    fn refuses_bad_numbers_and_empty_choices() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Mirostat::new(bad, 0.1, 0).is_err() && Mirostat::new(1.0, bad, 0).is_err());
        }
        let mut candidates = Candidates::new();
        candidates.load(&[f32::NEG_INFINITY], 3).unwrap();
        let error = Mirostat::new(1.0, 0.1, 0).unwrap().sample(&mut candidates).unwrap_err();
        assert!(matches!(error, Error::NoCandidates { position: 3 }));
    }
}
