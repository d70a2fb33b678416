//! Checks of arguments, with errors that name the op, the argument, what came and what was expected.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::packing::Packing;
use crate::state_indices::StateIndices;

/// A named extent, as in `("batch", 2)`.
pub(crate) type Dim = (&'static str, usize);

/// Checks the arguments of one op: every tensor against named extents, one device and one dtype.
pub(crate) struct Checker<'a> {
    op: &'static str,
    /// The argument that all others are compared with.
    main: (&'static str, &'a Tensor),
}

impl<'a> Checker<'a> {
    pub(crate) fn new(op: &'static str, name: &'static str, main: &'a Tensor) -> Result<Self> {
        let checker = Self { op, main: (name, main) };
        match main.dtype() {
            DType::F32 | DType::F16 | DType::BF16 | DType::F64 => Ok(checker),
            other => bail!("{op}: `{name}` has dtype {}, expected f32, f16, bf16 or f64", other.as_str()),
        }
    }

    /// The extents of the main argument.
    pub(crate) fn main_dims<const N: usize>(&self, names: [&'static str; N]) -> Result<[usize; N]> {
        let (name, main) = self.main;
        main.dims().try_into().or_else(|_| {
            bail!("{}: `{name}` has shape {:?}, expected ({})", self.op, main.dims(), names.join(", "))
        })
    }

    /// An activation: the given shape, the device and the dtype of the main argument.
    pub(crate) fn activation(&self, name: &'static str, x: &Tensor, dims: &[Dim]) -> Result<()> {
        self.shape(name, x, dims)?;
        let (main_name, main) = self.main;
        if x.dtype() != main.dtype() {
            bail!(
                "{}: `{name}` has dtype {}, expected {} as `{main_name}`",
                self.op,
                x.dtype().as_str(),
                main.dtype().as_str()
            )
        }
        Ok(())
    }

    /// A parameter: the given shape and device, any floating dtype.
    pub(crate) fn parameter(&self, name: &'static str, x: &Tensor, dims: &[Dim]) -> Result<()> {
        self.shape(name, x, dims)?;
        match x.dtype() {
            DType::F32 | DType::F16 | DType::BF16 | DType::F64 => Ok(()),
            other => {
                bail!("{}: `{name}` has dtype {}, expected f32, f16, bf16 or f64", self.op, other.as_str())
            }
        }
    }

    /// A recurrent state: the given shape and device, f32 (f64 if the main argument is).
    pub(crate) fn state(&self, name: &'static str, x: &Tensor, dims: &[Dim]) -> Result<()> {
        self.shape(name, x, dims)?;
        let expected = state_dtype(self.main.1.dtype());
        if x.dtype() != expected {
            let (got, expected) = (x.dtype().as_str(), expected.as_str());
            bail!("{}: `{name}` has dtype {got}, expected {expected}: states are never rounded", self.op)
        }
        Ok(())
    }

    fn shape(&self, name: &'static str, x: &Tensor, dims: &[Dim]) -> Result<()> {
        let matches = x.rank() == dims.len() && x.dims().iter().zip(dims).all(|(got, (_, want))| got == want);
        if !matches {
            let expected: Vec<String> = dims.iter().map(|(name, n)| format!("{name} {n}")).collect();
            bail!("{}: `{name}` has shape {:?}, expected ({})", self.op, x.dims(), expected.join(", "))
        }
        self.device(name, x)
    }

    /// The device of the main argument.
    pub(crate) fn device(&self, name: &'static str, x: &Tensor) -> Result<()> {
        let (main_name, main) = self.main;
        if !x.device().same_device(main.device()) {
            bail!(
                "{}: `{name}` is on {}, expected {} as `{main_name}`",
                self.op,
                device_name(x.device()),
                device_name(main.device())
            )
        }
        Ok(())
    }

    /// Whether the packing fits; what stands for the batch in the shapes of states.
    pub(crate) fn packing(&self, packing: Option<&Packing>, batch: usize, seqlen: usize) -> Result<Dim> {
        let Some(packing) = packing else { return Ok(("batch", batch)) };
        self.require((packing.batch(), packing.seqlen()) == (batch, seqlen), || {
            format!(
                "`packing` is of (batch {}, seqlen {}), expected (batch {batch}, seqlen {seqlen})",
                packing.batch(),
                packing.seqlen()
            )
        })?;
        Ok(("sequences", packing.len()))
    }

    /// Whether the indices fit; the first extent of the state.
    pub(crate) fn states(&self, indices: Option<&StateIndices>, batch: usize, state: &Tensor) -> Result<Dim> {
        let Some(indices) = indices else { return Ok(("batch", batch)) };
        let (states, len) = (state.dims().first().copied().unwrap_or(0), indices.states().len());
        self.require(len == batch, || format!("`state_indices` is of {len} rows, expected batch {batch}"))?;
        let outside = indices.states().iter().flatten().find(|index| **index >= states);
        self.require(outside.is_none(), || {
            format!(
                "`state_indices` is {} somewhere, expected less than states {states}",
                outside.unwrap_or(&0)
            )
        })?;
        Ok(("states", states))
    }

    /// The bounds of a step size.
    pub(crate) fn dt_limit(&self, (low, high): (f64, f64)) -> Result<()> {
        let makes_sense = low <= high && low < f64::INFINITY && high > f64::NEG_INFINITY;
        self.require(makes_sense, || format!("`dt_limit` is ({low}, {high}), expected (low, high)"))
    }

    /// A condition on option or extents that no shape expresses.
    pub(crate) fn require(&self, holds: bool, message: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { bail!("{}: {}", self.op, message()) }
    }

    /// Refuses inputs that track gradients or share storage with `state`, for ops that change it in place.
    pub(crate) fn in_place(&self, state: &Tensor, inputs: &[(&'static str, Option<&Tensor>)]) -> Result<()> {
        for (name, x) in inputs {
            if x.is_some_and(|x| share_storage(x, state)) {
                bail!("{}: `{name}` shares storage with the state that is updated in place", self.op)
            }
        }
        for (name, x) in inputs.iter().chain(&[("state", Some(state))]) {
            if x.is_some_and(|x| x.track_op()) {
                bail!(
                    "{}: `{name}` tracks gradients, expected a detached tensor: this op has no backward",
                    self.op
                )
            }
        }
        Ok(())
    }
}

/// Whether there are fused kernels for this activation; else the reference runs, on any device and dtype.
pub(crate) fn fused(x: &Tensor) -> bool {
    (x.device().is_cpu() || x.device().is_cuda())
        && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// As [`fused`], for ops that have kernels for CPUs alone.
pub(crate) fn fused_on_cpu(x: &Tensor) -> bool {
    fused(x) && x.device().is_cpu()
}

/// Whether two tensors share storage, as views of one buffer do.
pub(crate) fn share_storage(a: &Tensor, b: &Tensor) -> bool {
    let address = |x: &Tensor| std::ptr::from_ref(&*x.storage_and_layout().0).addr();
    address(a) == address(b)
}

/// States are f32, or f64 in f64 computations.
pub(crate) fn state_dtype(activations: DType) -> DType {
    if activations == DType::F64 { DType::F64 } else { DType::F32 }
}

fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}
