//! Rows of a batch that come and go.

use candle_core::Tensor;

use super::{InferenceCache, KvCache, MixerState};
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
        if let Some(row) = rows.iter().find(|&&row| row >= self.batch()) {
            return Err(Error::Cache(format!("holds {} sequences, row {row} was asked for", self.batch())));
        }
        if rows.is_empty() {
            return Err(Error::Cache("at least one row must be selected".into()));
        }
        let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let take = |x: &Option<Tensor>| -> Result<Option<Tensor>> {
            let take = |x: &Tensor| x.index_select(&Tensor::from_slice(&ids, ids.len(), x.device())?, 0);
            Ok(x.as_ref().map(take).transpose()?)
        };
        let states = self.states.iter().map(|state| {
            let kv = state.kv.as_ref().map(|kv| rows.iter().map(|&row| kv[row].fork()).collect());
            Ok(MixerState { conv: take(&state.conv)?, ssm: take(&state.ssm)?, kv })
        });
        let positions = rows.iter().map(|&row| self.positions[row]).collect();
        Ok(Self::of(states.collect::<Result<_>>()?, positions, self.fingerprint.clone()))
    }

    /// One batch of the rows of several, which may have read different numbers of tokens.
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
        let join =
            |rows: Vec<&Tensor>| if rows.is_empty() { Ok(None) } else { Tensor::cat(&rows, 0).map(Some) };
        let mut states = vec![];
        for (i, state) in first.states.iter().enumerate() {
            let of_all = || caches.iter().filter_map(|cache| cache.states.get(i));
            let kv = of_all().filter_map(|state| state.kv.as_ref()).flatten().map(KvCache::fork).collect();
            states.push(MixerState {
                conv: join(of_all().filter_map(|state| state.conv.as_ref()).collect())?,
                ssm: join(of_all().filter_map(|state| state.ssm.as_ref()).collect())?,
                kv: state.kv.is_some().then_some(kv),
            });
        }
        let positions = caches.iter().flat_map(|cache| cache.positions.clone()).collect();
        Ok(Self::of(states, positions, first.fingerprint.clone()))
    }
}
