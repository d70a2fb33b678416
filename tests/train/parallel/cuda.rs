//! NCCL between all GPUs of this machine, which may be one, a thread for each.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use mamba_model::Model;
use mamba_train::data::Batching;
use mamba_train::parallel::{Collective, Nccl, Ring, TIMEOUT};
use mamba_train::{StepReport, TrainableModel, Trainer};

use super::{all_bits, close, config, data, options, steps_on};
use crate::bits;
use crate::support::target::{skipped, with_gpu_and};

/// Runs `f` with a rank for each GPU; none if NCCL is not installed.
fn gpus<T: Send>(f: impl Fn(Arc<dyn Collective>, &Device) -> T + Sync) -> Option<Vec<T>> {
    // Sums of two tests on one GPU could wait for each other.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let count = candle_core::cuda_backend::cudarc::driver::CudaContext::device_count().unwrap();
    let direct = std::env::var("NCCL_P2P_DIRECT_DISABLE").as_deref() != Ok("1");
    assert!(count == 1 || !direct, "ranks are threads here: set NCCL_P2P_DIRECT_DISABLE=1");
    let rings = Ring::threads(count as usize).unwrap();
    let f = &f;
    std::thread::scope(|scope| {
        let rank = |ring: Ring| {
            let device = Device::new_cuda(ring.rank()).unwrap();
            match Nccl::new(ring, &device, TIMEOUT) {
                Ok(nccl) => Some(f(Arc::new(nccl), &device)),
                Err(e) if e.to_string().contains("cannot be loaded") => {
                    skipped(&e.to_string());
                    None
                }
                Err(e) => panic!("{e}"),
            }
        };
        let spawn = |ring| {
            std::thread::Builder::new().stack_size(1 << 26).spawn_scoped(scope, move || rank(ring)).unwrap()
        };
        let threads: Vec<_> = rings.into_iter().map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn gpus_add() {
    with_gpu_and(|_| {
        let sums = gpus(|nccl, device| {
            let size = nccl.world_size() as f64;
            let mut cases = 0;
            for len in [1, 3, 64, 100_001] {
                let mine = Tensor::arange(0f64, len as f64, device)?.affine(1.0, nccl.rank() as f64)?;
                let ranks = size * (size - 1.0) / 2.0;
                let want = Tensor::arange(0f64, len as f64, device)?.affine(size, ranks)?;
                for dtype in [candle_core::DType::F32, candle_core::DType::F64] {
                    // Not at the beginning of its storage.
                    let longer = Tensor::cat(&[&mine.narrow(0, 0, 1)?, &mine], 0)?.to_dtype(dtype)?;
                    let sum = nccl.all_reduce_sum(&longer.narrow(0, 1, len)?).unwrap();
                    assert_eq!(bits(&sum), bits(&want.to_dtype(dtype)?), "{len} {dtype:?}");
                    let first = nccl.broadcast(&mine.to_dtype(dtype)?).unwrap();
                    assert_eq!(
                        bits(&first),
                        bits(&Tensor::arange(0f64, len as f64, device)?.to_dtype(dtype)?)
                    );
                    cases += 2;
                }
            }
            assert!(nccl.any(nccl.is_first()).unwrap());
            nccl.wait().unwrap();
            Ok::<_, candle_core::Error>(cases)
        });
        sums.map(|sums| sums.into_iter().sum()).transpose()
    });
}

#[test]
fn gpus_train_like_one() {
    with_gpu_and(|gpu| {
        let folder = tempfile::tempdir().unwrap();
        let data = data(folder.path());
        let train = |collective: Option<Arc<dyn Collective>>, device: &Device| -> (Vec<StepReport>, _) {
            let start = Model::random(&config(), 5, device).unwrap();
            let model = TrainableModel::new(&start, candle_core::DType::F32).unwrap();
            let mut trainer = Trainer::new(model, options()).unwrap();
            if let Some(collective) = collective {
                trainer = trainer.parallel(collective).unwrap();
            }
            let mut batches =
                data.shuffled(Batching::Packed { tokens: 40 }, 3).unwrap().share(trainer.share());
            (steps_on(&mut trainer, &mut batches, 6, device), all_bits(&trainer))
        };
        let Some(all) = gpus(|nccl, device| train(Some(nccl), device)) else { return Ok(None) };
        assert!(all.iter().all(|rank| *rank == all[0]));
        close(candle_core::DType::F32, &all[0].0, &train(None, gpu).0);
        Ok(Some(all.len()))
    });
}
