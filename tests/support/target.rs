//! Where the laws run an op: each instruction set of this processor, or the GPU.
//!
//! [`run_on_cuda`] runs a test once more with the GPU as its only target: the same cases, tolerances and comparisons. Inputs move
//! there just before the op and outputs back just after it, in the graph, so gradients do the same. `f64` stays: it is what
//! others are compared with.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Write;
use std::sync::{Mutex, OnceLock};

use candle_core::{DType, Device, Result, Tensor};
use mamba_ops::simd::Isa;

/// One of them.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    Isa(Isa),
    Cuda,
}

/// A test on the GPU.
struct OnCuda {
    device: Device,
    /// What ran there.
    cases: HashSet<String>,
}

thread_local! {
    static ON_CUDA: RefCell<Option<OnCuda>> = const { RefCell::new(None) };
}

impl Target {
    /// The targets of the test that runs: all instruction sets, or, within [`run_on_cuda`], the GPU.
    pub fn available() -> Vec<Self> {
        match device_under_test() {
            None => Isa::available().into_iter().map(Self::Isa).collect(),
            Some(_) => vec![Self::Cuda],
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Isa(isa) => isa.name(),
            Self::Cuda => "cuda",
        }
    }

    /// Whether this is where ops run outside of any scope.
    pub fn is_current(self) -> bool {
        match self {
            Self::Isa(isa) => isa.name() == Isa::current().name(),
            Self::Cuda => true,
        }
    }

    /// Runs `f` with this target as the current one.
    pub fn scope<R>(self, f: impl FnOnce() -> R) -> R {
        match self {
            Self::Isa(isa) => isa.scope(f),
            Self::Cuda => f(),
        }
    }
}

/// The GPU, if the program was built for one and there is one.
pub fn cuda() -> std::result::Result<Device, String> {
    static DEVICE: OnceLock<std::result::Result<Device, String>> = OnceLock::new();
    if !candle_core::utils::cuda_is_available() {
        return Err("built without the feature `cuda`".into());
    }
    let open = || Device::new_cuda(0).map_err(|e| format!("no CUDA device ({e})"));
    DEVICE.get_or_init(open).clone()
}

/// Says a line whoever captures the output of tests.
pub fn say(line: std::fmt::Arguments) {
    let _ = writeln!(std::io::stderr(), "{line}"); // a stream that is closed takes no line
}

/// Says that a test does not run: in its own output, which `test-cuda` counts, and once for all that do not for this reason.
pub fn skipped(why: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    println!("skipped: {why}");
    if SAID.lock().unwrap().insert(why.to_owned()) {
        say(format_args!("skipped: tests of `mod cuda` in this program: {why}"));
    }
}

/// Runs a test on the GPU and says how many cases that were, or that it was skipped; `test-cuda` counts both.
pub fn run_on_cuda(test: fn()) {
    let device = match cuda() {
        Ok(device) => device,
        Err(why) => return skipped(&why),
    };
    ON_CUDA.set(Some(OnCuda { device, cases: HashSet::new() }));
    test();
    let ran = ON_CUDA.take().map_or(0, |on| on.cases.len());
    assert!(ran > 0, "nothing ran on the GPU");
    println!("CUDA: {ran} cases ran");
}

/// Runs a test that is for a GPU alone, which gives the number of its cases, or says why not.
pub fn with_gpu(test: impl Fn(&Device) -> Result<usize>) {
    with_gpu_and(|device| test(device).map(Some));
}

/// As [`with_gpu`], of a test that needs something else too, and says itself why it does not run where there is none of it.
pub fn with_gpu_and(test: impl Fn(&Device) -> Result<Option<usize>>) {
    match cuda() {
        Err(why) => skipped(&why),
        Ok(device) => {
            let Some(ran) = test(&device).unwrap() else { return };
            assert!(ran > 0, "nothing ran on the GPU");
            println!("CUDA: {ran} cases ran");
        }
    }
}

/// The tests of a module once more, on the GPU.
#[macro_export]
macro_rules! on_cuda {
    ($($test:ident),+ $(,)?) => {
        mod cuda {
            $(#[test]
            fn $test() {
                $crate::support::target::run_on_cuda(super::$test);
            })+
        }
    };
}

/// Whether the GPU is the device under test.
pub fn is_cuda() -> bool {
    device_under_test().is_some()
}

fn device_under_test() -> Option<Device> {
    ON_CUDA.with_borrow(|on| on.as_ref().map(|on| on.device.clone()))
}

/// The tensors where the op under test finds them; `case` is counted if that is the GPU.
pub fn place(case: &str, tensors: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    match device_under_test() {
        Some(device) if tensors.values().all(|x| x.dtype() != DType::F64) => {
            let dtypes: Vec<&str> = tensors.values().map(|x| x.dtype().as_str()).collect();
            ON_CUDA.with_borrow_mut(|on| {
                on.as_mut().map(|on| on.cases.insert(format!("{case} {dtypes:?}")));
            });
            tensors.iter().map(|(name, x)| Ok((name.clone(), to(x, &device)?))).collect()
        }
        _ => Ok(tensors.clone()),
    }
}

/// The tensors in CPU memory.
pub fn back(tensors: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    tensors.into_iter().map(|(name, x)| Ok((name, to(&x, &Device::Cpu)?))).collect()
}

/// A tensor on another device; candle moves no empty ones, which are made there instead.
fn to(x: &Tensor, device: &Device) -> Result<Tensor> {
    if x.elem_count() > 0 || x.device().same_device(device) {
        return x.to_device(device);
    }
    let shape: Vec<usize> = x.dims().iter().map(|n| (*n).max(1)).collect();
    let empty = x.dims().iter().enumerate().filter(|(_, n)| **n == 0);
    empty
        .map(|(axis, _)| axis)
        .try_fold(Tensor::zeros(shape, x.dtype(), device)?, |x, axis| x.narrow(axis, 0, 0))
}
