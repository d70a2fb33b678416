//! Trainings on disk, complete or not there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::data::Position;
use crate::parallel::on_first;
use crate::trainer::{TrainOptions, Trainer};
use crate::{Error, Result};

const TENSORS: &str = "training.safetensors";
const SUMMARY: &str = "training.json";
const PREFIX: &str = "step-";

/// What a saved training says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Summary {
    step: usize,
    position: Position,
    options: TrainOptions,
}

impl Trainer {
    /// Saves everything that the training needs to go on, to the bit, and beside it whatever `beside` puts into the folder
    /// (the model as others read it, a tokenizer). `folder` gets a sub-folder `step-…` that is complete or not there.
    ///
    /// Of several processes, which all call this, rank 0 writes, after all were found to have the same parameters.
    ///
    /// # Errors
    /// If a file cannot be written, or processes differ.
    pub fn save(
        &self,
        folder: &Path,
        position: Position,
        beside: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let place = folder.join(format!("{PREFIX}{:08}", self.step));
        self.require_same_values()?;
        on_first(self.collective(), || self.write(&place, position, beside))?;
        Ok(place)
    }

    fn write(
        &self,
        place: &Path,
        position: Position,
        beside: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        atomically(place, |part| {
            write_tensors(&part.join(TENSORS), &self.tensors()?)?;
            let summary = Summary { step: self.step, position, options: self.options.clone() };
            write_json(&part.join(SUMMARY), &summary)?;
            beside(part)
        })
    }

    /// Everything that steps change, by name.
    fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors: BTreeMap<String, Tensor> = self.optimizer.state()?;
        for parameter in self.model.parameters() {
            tensors.insert(format!("value.{}", parameter.name()), parameter.value().detach());
        }
        if let Some(ema) = &self.ema {
            let averages = ema.averages().iter();
            tensors.extend(averages.map(|(name, x)| (format!("ema.{name}"), x.clone())));
        }
        Ok(tensors)
    }

    /// Goes on from a folder that [`save`](Self::save) gave; where to go on in the data.
    ///
    /// The trainer must have been made as that one was. Another schedule counts from now on, and there may be another number
    /// of processes: rank 0 reads, and the others begin where it does.
    ///
    /// # Errors
    /// If a file is missing or damaged, or does not fit the model or the optimizer.
    pub fn resume(&mut self, place: &Path) -> Result<Position> {
        let collective = self.collective.clone();
        let position = on_first(&*collective, || self.read(place))?;
        self.take_state_of_first()?;
        Ok(position)
    }

    fn read(&mut self, place: &Path) -> Result<Position> {
        let path = place.join(SUMMARY);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let summary: Summary =
            serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("is not a training: {e}")))?;
        let path = place.join(TENSORS);
        let loaded = candle_core::safetensors::load(&path, &Device::Cpu)
            .map_err(|e| Error::file(&path, format!("cannot be read: {}", mamba_model::Error::from(e))))?;
        self.set(&loaded.into_iter().collect(), summary.step, &path)?;
        Ok(summary.position)
    }

    /// Takes what [`tensors`](Self::tensors) gave, and `path` holds.
    fn set(&mut self, tensors: &BTreeMap<String, Tensor>, step: usize, path: &Path) -> Result<()> {
        for parameter in self.model.parameters() {
            let key = format!("value.{}", parameter.name());
            let value = tensors.get(&key);
            let value = value.ok_or_else(|| Error::file(path, format!("has no tensor `{key}`")))?;
            if value.dims() != parameter.value().dims() {
                let (got, expected) = (value.dims(), parameter.value().dims());
                let message = format!("has tensor `{key}` of shape {got:?}, expected {expected:?}");
                return Err(Error::file(path, message));
            }
            parameter.set(value)?;
        }
        let trained = tensors.keys().filter(|key| key.starts_with("value.")).count();
        if trained != self.model.parameters().len() {
            let message = format!("trains {trained} parameters, expected {}", self.model.parameters().len());
            return Err(Error::file(path, message));
        }
        self.optimizer.load(tensors, step)?;
        if let Some(ema) = &mut self.ema {
            let strip =
                |(key, x): (&String, &Tensor)| Some((key.strip_prefix("ema.")?.to_owned(), x.clone()));
            ema.load(&tensors.iter().filter_map(strip).collect())?;
        }
        self.step = step;
        Ok(())
    }

    /// Makes everything that steps change what it is in rank 0.
    pub(crate) fn take_state_of_first(&mut self) -> Result<()> {
        let collective = self.collective.clone();
        if collective.world_size() == 1 {
            return Ok(());
        }
        let step = on_first(&*collective, || Ok::<_, Error>(self.step))?;
        let mut tensors = self.tensors()?;
        for tensor in tensors.values_mut() {
            // How often a parameter was updated is an integer.
            let wide = if tensor.dtype() == DType::F32 { DType::F32 } else { DType::F64 };
            *tensor = collective.broadcast(&tensor.to_dtype(wide)?)?.to_dtype(tensor.dtype())?;
        }
        collective.wait()?;
        self.set(&tensors, step, Path::new("the state of rank 0"))
    }
}

/// The last complete training below a folder.
pub fn latest(folder: &Path) -> Option<PathBuf> {
    trainings(folder).into_iter().next_back().map(|(_, place)| place)
}

/// Removes all trainings below a folder but the last `keep`.
///
/// # Errors
/// If one cannot be removed.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let mut old = trainings(folder);
    old.truncate(old.len().saturating_sub(keep));
    old.into_iter()
        .try_for_each(|(_, place)| std::fs::remove_dir_all(&place).map_err(|e| Error::io(&place, e)))
}

/// Complete trainings by step, in order.
fn trainings(folder: &Path) -> Vec<(usize, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let training = |place: PathBuf| {
        let step = place.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
        place.join(SUMMARY).is_file().then_some((step, place))
    };
    let mut found: Vec<(usize, PathBuf)> = entries.filter_map(|entry| training(entry.path())).collect();
    found.sort();
    found
}

/// Fills a folder beside its place, has the disk take it, then moves it there. What was there before is moved aside first and
/// removed last, so that a full disk leaves it, and a crash leaves one of them complete, if beside its place.
pub(crate) fn atomically(place: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut part = place.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let part = PathBuf::from(part);
    let mut old = place.as_os_str().to_owned();
    old.push(format!(".{}.old", std::process::id()));
    let old = PathBuf::from(old);
    let io = |e| Error::io(&part, e);
    std::fs::create_dir_all(&part).map_err(io)?;
    let filled = fill(&part).and_then(|()| {
        sync(&part).map_err(io)?;
        let moved = place.exists();
        if moved {
            std::fs::rename(place, &old).map_err(|e| Error::io(place, e))?;
        }
        std::fs::rename(&part, place).map_err(|e| {
            if moved {
                let _ = std::fs::rename(&old, place); // where it was before
            }
            io(e)
        })?;
        if moved {
            std::fs::remove_dir_all(&old).map_err(|e| Error::io(&old, e))?;
        }
        Ok(())
    });
    if filled.is_err() {
        let _ = std::fs::remove_dir_all(&part); // the first error is the one that matters
    }
    filled
}

/// Has the disk take all files in a folder.
fn sync(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => sync(&path)?,
            false => std::fs::OpenOptions::new().append(true).open(&path)?.sync_all()?,
        }
    }
    Ok(())
}

pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let tensors: Vec<(&String, Tensor)> =
        tensors.iter().map(|(name, x)| Ok((name, x.contiguous()?))).collect::<Result<_>>()?;
    safetensors::serialize_to_file(tensors, None, path)
        .map_err(|e| Error::file(path, format!("cannot be written: {e}")))
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::file(path, format!("cannot be written: {e}")))?;
    std::fs::write(path, text + "\n").map_err(|e| Error::io(path, e))
}
