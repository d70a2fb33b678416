//! Every family on a GPU: what it computes in CPU memory, which is what its library computes.

use candle_core::{DType, Device, Result, Tensor};
use mamba_model::Batch;

use crate::laws::MODELS;
use crate::support::random::Random;
use crate::support::target::with_gpu;
use crate::support::tolerance::max_error;
use crate::{in_pieces, open, open_on};

/// One forward, pieces with single steps, and rows of unequal lengths, in f32.
#[test]
fn families() {
    with_gpu(|device| {
        for name in MODELS {
            let (model, on_gpu) = (open(name, DType::F32), open_on(name, DType::F32, device));
            let ids = Random::new(3).ids(2 * 14, model.config().vocab_size as u32);
            let ids = Tensor::from_vec(ids, (2, 14), &Device::Cpu)?;
            let ids_there = ids.to_device(device)?;
            let want = model.forward(&ids, None).unwrap();
            let close = |got: &Tensor, want: &Tensor, how: &str| -> Result<()> {
                let gap = max_error(&got.to_device(&Device::Cpu)?, want);
                assert!(gap <= 1e-4, "{name} {how}: off by {gap:.1e}");
                Ok(())
            };
            close(&on_gpu.forward(&ids_there, None).unwrap(), &want, "at once")?;
            close(&in_pieces(&on_gpu, &ids_there, &[8, 1, 1, 1, 3]), &want, "in pieces")?;
            let uneven = |model: &mamba_model::Model, ids: &Tensor| {
                model.forward(Batch::left_padded(ids, &[14, 5]).unwrap(), None).unwrap()
            };
            close(&uneven(&on_gpu, &ids_there), &uneven(&model, &ids), "padded")?;
        }
        Ok(MODELS.len())
    });
}
