//! Ops of state space models for candle.

mod args;
pub mod autograd;
pub mod causal_conv1d;
mod host;
mod layout;
pub mod norm;
mod reference;
pub mod selective_scan;
pub mod selective_state_update;
pub mod simd;
pub mod ssd;

pub use causal_conv1d::{
    CausalConv1d, CausalConv1dOutput, CausalConv1dUpdate, causal_conv1d, causal_conv1d_update,
};
pub use layout::{Activation, SequenceLayout};
pub use norm::{Norm, NormKind, NormOutput, norm};
pub use selective_scan::{SelectiveScan, SelectiveScanOutput, selective_scan};
pub use selective_state_update::{SelectiveStateUpdate, selective_state_update};
pub use ssd::{SsdChunkScan, SsdChunkScanOutput, ssd_chunk_scan};
