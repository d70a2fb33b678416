//! The gradient of the table on a GPU.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::OP;
use crate::device::{self, Arguments, Kernel, Launch, Module, int, module};

static MODULE: Module = module!("embedding");

/// As in the kernel.
const THREADS: usize = 256;
const COLUMNS: usize = 4 * THREADS;

#[repr(C)]
#[derive(Clone, Copy)]
struct EmbeddingBackward {
    ids: u64,
    grad: u64,
    table: u64,
    count: i64,
    rows: i64,
    dim: i32,
    _end: i32,
}
const _: () = assert!(size_of::<EmbeddingBackward>() == 48);
// SAFETY: as `EmbeddingBackward` in `embedding.cu`.
unsafe impl Arguments for EmbeddingBackward {}

/// Adds the rows of `grad` to the rows `ids` of a table of zeros; an id out of range adds nothing.
pub(super) fn backward(ids: &Tensor, grad: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, dim) = weight.dims2()?;
    let (ids, count) = (ids.to_dtype(DType::U32)?, ids.elem_count());
    device::pointers(OP, [Some(&ids), Some(grad)], |gpu, [ids, grad]| {
        let table = gpu.zeros(weight.dtype(), rows * dim)?;
        let args = EmbeddingBackward {
            ids: ids.address,
            grad: grad.address,
            table: table.pointer().address,
            count: count as i64,
            rows: rows as i64,
            dim: int(OP, dim)?,
            _end: 0,
        };
        let kernel = Kernel { module: &MODULE, name: "embedding_backward", dtype: Some(weight.dtype()) };
        let blocks = [count, dim.div_ceil(COLUMNS), 1];
        // SAFETY: there are `count` ids and rows of `grad`, `dim` columns; rows of the table are checked by the kernel.
        unsafe { gpu.launch(kernel, Launch { blocks, threads: [THREADS, 1], shared: 0 }, args) }?;
        table.tensor((rows, dim))
    })
}
