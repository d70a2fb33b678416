//! The laws of the ops; each op's file is its list of cases.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../support/mod.rs"]
mod support;

mod argmax;
mod attention;
mod blocks;
mod causal_conv1d;
#[cfg(feature = "cuda")]
mod cuda;
mod dropout;
mod embedding;
mod grid;
mod laws;
mod linear;
mod linear_cross_entropy;
mod misuse;
mod norm;
mod optimizer;
mod oracle;
mod pairwise;
mod properties;
mod sample;
mod selective_scan;
mod selective_state_update;
mod ssd;
mod stages;
mod stress;

use mamba_ops::simd::Isa;

use crate::support::target::say;

/// Says which instruction sets the laws visit here; `MAMBA_REQUIRE_ISA` makes one of them mandatory.
#[test]
fn instruction_sets() {
    let available: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
    for name in Isa::NAMES {
        match available.contains(&name) {
            true => say(format_args!("instruction set {name}: tested")),
            false => say(format_args!("instruction set {name}: skipped, this processor does not have it")),
        }
    }
    if support::target::cuda().is_ok() {
        say(format_args!("a CUDA device: tested"));
    }
    if let Ok(required) = std::env::var("MAMBA_REQUIRE_ISA") {
        assert!(available.contains(&required.as_str()), "{required} is required but not available");
    }
}
