//! That processes train the same: silent differences would spoil a training.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::trainer::Trainer;
use crate::{Error, Result, slices};

/// Elements that one task hashes.
const PIECE: usize = 1 << 15;

impl Trainer {
    /// Requires that all processes train the same parameters by the same options.
    pub(crate) fn require_same_options(&self) -> Result<()> {
        let options = serde_json::to_string(&self.options)
            .map_err(|e| Error::Parallel(format!("options cannot be told: {e}")))?;
        self.collective.agree("the options", &options)?;
        let describe =
            |p: &crate::Parameter| format!("{} {:?} {:?}\n", p.name(), p.value().dims(), p.value().dtype());
        let parameters: String = self.model.parameters().iter().map(describe).collect();
        let known = format!("{} of hash {:016x}", self.model.parameters().len(), hash(parameters.as_bytes()));
        self.collective.agree("the parameters to train", &known)
    }

    /// Requires that all processes have the same weights, frozen ones too.
    pub(crate) fn require_same_model(&self) -> Result<()> {
        match self.collective.world_size() {
            1 => Ok(()),
            _ => self.collective.agree("the weights of the model", &self.model.model().fingerprint()?),
        }
    }

    /// Requires that all processes have the same values to the bit, as they must after the same steps.
    pub(crate) fn require_same_values(&self) -> Result<()> {
        if self.collective.world_size() == 1 {
            return Ok(());
        }
        let hashes = self.model.parameters().iter().map(|parameter| bits(parameter.value()));
        let hashes: Vec<u8> =
            hashes.collect::<Result<Vec<_>>>()?.into_iter().flat_map(u64::to_le_bytes).collect();
        let known = format!("hash {:016x}", hash(&hashes));
        self.collective.agree("the values of the parameters", &known)
    }
}

/// A hash of the bits of a tensor.
fn bits(x: &Tensor) -> Result<u64> {
    let x = x.detach().to_device(&candle_core::Device::Cpu)?;
    let pieces: Vec<u64> = match x.dtype() {
        DType::F64 => x.flatten_all()?.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        _ => slices::read(&x, |x| {
            x.par_chunks(PIECE).map(|piece| mix(piece.iter().map(|x| x.to_bits().into()))).collect()
        })?,
    };
    Ok(mix(pieces.into_iter()))
}

fn hash(bytes: &[u8]) -> u64 {
    mix(bytes.iter().copied().map(u64::from))
}

/// FNV-1a, a word at a time.
fn mix(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325, |h, word| (h ^ word).wrapping_mul(0x0100_0000_01b3))
}
