//! A checkpoint as the source of a model's weights.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::form::{self, Form, Forms};
use super::{Checkpoint, NameMap};
use crate::{Error, Result};

struct Backend {
    checkpoint: Arc<Checkpoint>,
    names: NameMap,
    forms: Forms,
}

impl Checkpoint {
    /// A builder that gives a model its weights by their canonical names, from this checkpoint.
    ///
    /// `names` says how the file spells them. Weights are converted to `dtype`, or to the type that
    /// `get_with_hints_dtype` asks for, on their way to `device`. Keep a clone of the `Arc` to see afterwards which
    /// tensors were [read](Self::coverage).
    ///
    /// Errors of the builder name file and tensor; `mamba_model::Error::from` gives them back in full.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use candle_core::{DType, Device, Tensor};
    /// use mamba_model::Error;
    /// use mamba_model::checkpoint::{Checkpoint, LocalDir, NameMap};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let norm = Tensor::ones(3, DType::F16, &Device::Cpu)?;
    /// norm.save_safetensors("backbone.norm_f.weight", folder.path().join("model.safetensors"))?;
    /// let checkpoint = Arc::new(Checkpoint::open(&LocalDir::new(folder.path())?)?);
    ///
    /// const NAMES: NameMap = NameMap::new(&[("norm_f", "backbone.norm_f")]);
    /// let weights = checkpoint.clone().var_builder(NAMES, DType::F32, &Device::Cpu);
    /// let error = weights.pp("norm_f").get(4, "weight").map_err(Error::from).unwrap_err();
    /// assert!(error.to_string().ends_with("tensor `backbone.norm_f.weight` has shape [3], expected [4]"));
    /// assert_eq!(weights.pp("norm_f").get(3, "weight")?.dtype(), DType::F32);
    /// assert!(checkpoint.coverage(&NAMES).is_complete());
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn var_builder(
        self: Arc<Self>,
        names: NameMap,
        dtype: DType,
        device: &Device,
    ) -> VarBuilder<'static> {
        self.var_builder_with(names, Box::new(|_| Form::Same), dtype, device)
    }

    /// As [`var_builder`](Self::var_builder), with tensors that the file keeps in another form.
    pub(crate) fn var_builder_with(
        self: Arc<Self>,
        names: NameMap,
        forms: Forms,
        dtype: DType,
        device: &Device,
    ) -> VarBuilder<'static> {
        let backend: Box<dyn SimpleBackend> = Box::new(Backend { checkpoint: self, names, forms });
        VarBuilder::from_backend(backend, dtype, device.clone())
    }
}

impl Backend {
    fn find(&self, canonical: &str) -> Option<String> {
        self.names.resolve(canonical, |name| self.checkpoint.contains(name))
    }

    fn read(&self, canonical: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let name = self.find(canonical).ok_or_else(|| self.missing(canonical))?;
        let Some(shape) = shape else { return self.checkpoint.tensor_as(&name, dtype, device) };
        let form = (self.forms)(canonical);
        let names = form.names(name.clone());
        for name in &names {
            let entry = self.checkpoint.entry(name)?;
            let (got, expected) = (&entry.stored.shape, form.shape_in_file(shape.dims()));
            // GGUF files leave out axes of length 1, or add some.
            let same = match self.checkpoint.metadata() {
                Some(_) => form::without_ones(got) == form::without_ones(&expected),
                None => *got == expected,
            };
            if !same {
                let file = self.checkpoint.path_of(entry).to_path_buf();
                return Err(Error::Shape { file, tensor: name.clone(), got: got.clone(), expected });
            }
        }
        let read = |name: &str, dtype, part| self.checkpoint.read(name, part, dtype, device);
        let tensor = form.read(&names, read, shape, dtype)?;
        if matches!(form, Form::Decay | Form::DecayColumn)
            && tensor.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?.is_nan()
        {
            let message = "has values above 0 or none at all, expected decays";
            let file = self.checkpoint.path_of(self.checkpoint.entry(&name)?);
            return Err(Error::tensor(file, &name, message));
        }
        Ok(tensor)
    }

    fn missing(&self, canonical: &str) -> Error {
        let names = self.names.candidates(canonical);
        let tensor = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" or ");
        Error::NoSuchTensor { origin: self.checkpoint.origin().to_string(), tensor }
    }
}

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.read(name, Some(&shape), dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.read(name, None, dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.find(name).is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::checkpoint::LocalDir;

    const NAMES: NameMap =
        NameMap::new(&[("layers.{l}.0.mamba2", "backbone.layers.{l}.mixer")]).with_unread(&["lm_head"]);

    #[test]
    fn weights_are_found_converted_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let a_log = Tensor::new(&[1f32, 2.5], &Device::Cpu).unwrap();
        let tensors = HashMap::from([
            ("backbone.layers.0.mixer.A_log", a_log.clone()),
            ("backbone.layers.0.mixer.D", a_log.to_dtype(DType::BF16).unwrap()),
            ("lm_head.weight", a_log.clone()),
            ("stray", a_log.clone()),
        ]);
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        let checkpoint = Arc::new(Checkpoint::open(&LocalDir::new(folder.path()).unwrap()).unwrap());
        let weights = checkpoint.clone().var_builder(NAMES, DType::F16, &Device::Cpu);
        let mixer = weights.pp("layers").pp(0).pp(0).pp("mamba2");
        assert!(mixer.contains_tensor("D") && !mixer.contains_tensor("conv1d.bias"));
        assert_eq!(mixer.get(2, "D").unwrap().dtype(), DType::F16);
        let a = mixer.get_with_hints_dtype(2, "A_log", Init::Const(0.), DType::F32).unwrap();
        assert_eq!(a.to_vec1::<f32>().unwrap(), [1., 2.5]);
        assert_eq!(mixer.get_unchecked("A_log").unwrap().dtype(), DType::F16);

        let coverage = checkpoint.coverage(&NAMES);
        assert_eq!(coverage.to_string(), "unread: stray; read more than once: backbone.layers.0.mixer.A_log");
        assert!(!coverage.is_complete());
        assert!(checkpoint.same("lm_head.weight", "stray").unwrap());
        assert!(!checkpoint.same("lm_head.weight", "backbone.layers.0.mixer.D").unwrap());

        let error = mixer.get(2, "E").map_err(Error::from).unwrap_err().to_string();
        assert!(error.ends_with("no tensor `backbone.layers.0.mixer.E`"), "{error}");
    }
}
