//! The learning rate as a function of the step.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::error::require;

/// A learning rate that rises over `warmup` steps and then goes down to `min_lr` at the last step.
///
/// # Example
/// ```
/// use mamba_train::{Decay, Schedule};
/// let schedule = Schedule { lr: 1.0, warmup: 10, steps: 110, min_lr: 0.1, decay: Decay::Cosine };
/// assert_eq!(schedule.at(4), 0.5);
/// assert_eq!(schedule.at(10), 1.0);
/// assert!((schedule.at(60) - 0.55).abs() < 1e-12);
/// assert!((schedule.at(110) - 0.1).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// The highest learning rate.
    pub lr: f64,
    /// Steps until it is reached.
    pub warmup: usize,
    /// Steps in all.
    pub steps: usize,
    /// What is left at the end.
    pub min_lr: f64,
    /// How it gets there.
    pub decay: Decay,
}

/// How a learning rate goes down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// Not at all.
    Constant,
    /// On a straight line.
    Linear,
    /// On half a wave of the cosine.
    #[default]
    Cosine,
    /// Warm-up, stable, decay: only over the last so many steps, on a straight line.
    Wsd {
        /// How many.
        last: usize,
    },
}

impl Default for Schedule {
    /// 1000 steps with a cosine from 1e-3 to 1e-5, after 100 of warm-up.
    fn default() -> Self {
        Self { lr: 1e-3, warmup: 100, steps: 1000, min_lr: 1e-5, decay: Decay::Cosine }
    }
}

impl Schedule {
    /// The learning rate of a step; the first is 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        let start = match self.decay {
            Decay::Wsd { last } => self.steps.saturating_sub(last).max(self.warmup),
            _ => self.warmup,
        };
        let length = self.steps.saturating_sub(start).max(1);
        let progress = (step.saturating_sub(start) as f64 / length as f64).min(1.0);
        let left = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear | Decay::Wsd { .. } => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.min_lr + (self.lr - self.min_lr) * left
    }

    /// Checks that the learning rates are numbers that make sense.
    ///
    /// # Errors
    /// Names the option that does not.
    pub fn check(&self) -> Result<()> {
        let Self { lr, min_lr, .. } = *self;
        require(lr.is_finite() && lr > 0.0, "lr", || format!("is {lr}, expected a number above 0"))?;
        require((0.0..=lr).contains(&min_lr), "min_lr", || format!("is {min_lr}, expected 0 to lr {lr}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let with = |decay| Schedule { lr: 2.0, warmup: 4, steps: 24, min_lr: 0.0, decay };
        let rates = |decay| [0, 3, 4, 14, 19, 24, 99].map(|step| with(decay).at(step));
        assert_eq!(rates(Decay::Constant), [0.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(rates(Decay::Linear), [0.5, 2.0, 2.0, 1.0, 0.5, 0.0, 0.0]);
        assert_eq!(rates(Decay::Wsd { last: 10 }), [0.5, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0]);
        let cosine = rates(Decay::Cosine);
        assert!(cosine[2] == 2.0 && (cosine[3] - 1.0).abs() < 1e-12 && cosine[5].abs() < 1e-12);
        assert!(with(Decay::Cosine).check().is_ok());
        assert!(Schedule { lr: f64::NAN, ..Schedule::default() }.check().is_err());
        assert!(Schedule { min_lr: 1.0, ..Schedule::default() }.check().is_err());
    }
}
