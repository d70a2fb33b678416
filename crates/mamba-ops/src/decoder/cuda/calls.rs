//! What is launched for a token.

use candle_core::Result;

use super::arguments::{AttentionArgs, EmbedArgs, GateArgs, Mamba1Args, Mamba2Args, ProjectArgs};
use crate::device::{Gemm, Gpu, Kernel, Launch};

/// Work for the GPU. It holds the addresses of weights and buffers that the decoder keeps, and of states that lie where they did when
/// it was made.
#[allow(clippy::large_enum_variant, reason = "nearly all are kernels, in one list that is made once")]
pub(super) enum Call {
    Kernel(Kernel, Launch, Args),
    /// A product of cuBLAS.
    Product(Gemm),
}

#[derive(Clone, Copy)]
pub(super) enum Args {
    Embed(EmbedArgs),
    Project(ProjectArgs),
    Mamba1(Mamba1Args),
    Mamba2(Mamba2Args),
    Attention(AttentionArgs),
    Gate(GateArgs),
}

impl Call {
    pub(super) fn launch(&self, gpu: &Gpu) -> Result<()> {
        // SAFETY: the shapes of weights and states were checked, and the buffers made for them; blocks of keys and values too, when
        // their addresses were written down. What kernels read before they wait, weights and the states of their layer, is
        // written by no kernel between the embedding, which waits for the token before, and them.
        unsafe {
            match *self {
                Self::Kernel(kernel, launch, args) => match args {
                    Args::Embed(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Project(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Mamba1(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Mamba2(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Attention(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Gate(args) => gpu.launch_overlapping(kernel, launch, args),
                },
                Self::Product(gemm) => gpu.gemm(gemm),
            }
        }
    }
}
