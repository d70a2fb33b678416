//! Rows of a batch that come and go.

use candle_core::Tensor;

use super::{InferenceCache, MixerState};
use crate::{Error, Result};

impl InferenceCache {
    /// The states of some rows of the batch, in the given order; a row may be taken more than once.
    ///
    /// # Errors
    /// If no row is asked for, or one that is not there.
    ///
    /// # Example
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use mamba_model::{InferenceCache, Model};
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    ///
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
    /// let model = Model::random(&config, 0, &Device::Cpu)?;
    /// let mut two = model.new_cache(2)?;
    /// model.prefill(&Tensor::new(&[[3u32, 1], [4, 1]], &Device::Cpu)?, &mut two)?;
    /// let mut one = model.new_cache(1)?;
    /// model.prefill(&Tensor::new(&[[5u32, 9, 2]], &Device::Cpu)?, &mut one)?;
    /// // The first row leaves, another one joins.
    /// let mut rows = InferenceCache::concat(&[&two.select(&[1])?, &one])?;
    /// assert_eq!(rows.batch(), 2);
    /// model.step(&Tensor::new(&[6u32, 5], &Device::Cpu)?, &mut rows)?;
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        if let Some(row) = rows.iter().find(|&&row| row >= self.batch) {
            return Err(Error::Cache(format!("holds {} sequences, row {row} was asked for", self.batch)));
        }
        if rows.is_empty() {
            return Err(Error::Cache("at least one row must be selected".into()));
        }
        let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let take = |x: &Tensor| -> Result<Tensor> {
            Ok(x.index_select(&Tensor::from_slice(&ids, ids.len(), x.device())?, 0)?)
        };
        let states = self.states.iter().map(|state| {
            Ok(match state {
                MixerState::None => MixerState::None,
                MixerState::Recurrent { conv, ssm } => {
                    MixerState::Recurrent { conv: take(conv)?, ssm: take(ssm)? }
                }
            })
        });
        Ok(Self {
            states: states.collect::<Result<_>>()?,
            batch: rows.len(),
            position: self.position,
            fingerprint: self.fingerprint.clone(),
        })
    }

    /// One batch of the rows of several, which may have read different numbers of tokens; its position is the largest.
    ///
    /// # Errors
    /// If there is none, or they belong to models of different sizes.
    pub fn concat(caches: &[&Self]) -> Result<Self> {
        let Some((first, rest)) = caches.split_first() else {
            return Err(Error::Cache("there is nothing to concatenate".into()));
        };
        if rest.iter().any(|cache| cache.fingerprint != first.fingerprint) {
            return Err(Error::Cache("those to concatenate belong to models of different sizes".into()));
        }
        let mut states = vec![];
        for (i, state) in first.states.iter().enumerate() {
            states.push(match state {
                MixerState::None => MixerState::None,
                MixerState::Recurrent { .. } => {
                    let (mut convs, mut ssms) = (vec![], vec![]);
                    for cache in caches {
                        if let Some(MixerState::Recurrent { conv, ssm }) = cache.states.get(i) {
                            convs.push(conv);
                            ssms.push(ssm);
                        }
                    }
                    MixerState::Recurrent { conv: Tensor::cat(&convs, 0)?, ssm: Tensor::cat(&ssms, 0)? }
                }
            });
        }
        Ok(Self {
            states,
            batch: caches.iter().map(|cache| cache.batch).sum(),
            position: caches.iter().map(|cache| cache.position).max().unwrap_or_default(),
            fingerprint: first.fingerprint.clone(),
        })
    }
}
