//! Cases of `embedding`.

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::{Embedding, embedding};

use crate::support::message;
use crate::support::random::Random;
use crate::support::tolerance::{self, of_rounding, relative_rms, values};

/// Value and gradient of the table, for every dtype, many ids more than once, and the same bits on any number of threads.
#[test]
fn equals_the_reference() -> Result<()> {
    let mut random = Random::new(4);
    for (rows, dim, shape) in
        [(3, 1, vec![1]), (5, 7, vec![2, 9]), (50, 33, vec![4, 100]), (2, 64, vec![3000])]
    {
        let ids =
            Tensor::from_vec(random.ids(shape.iter().product(), rows as u32), shape.clone(), &Device::Cpu)?;
        let table = random.normal(&[rows, dim]);
        let cotangent = random.normal(&[shape.as_slice(), &[dim]].concat());
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let run = |table: &Tensor, fused: bool| -> Result<(Tensor, Tensor)> {
                let table = Var::from_tensor(table)?;
                let args = Embedding::new(&ids, &table);
                let y =
                    if fused { embedding(&args)? } else { mamba_ops::embedding::reference::forward(&args)? };
                let loss = (&y * cotangent.to_dtype(dtype)?.to_dtype(y.dtype())?)?.sum_all()?;
                Ok((y.detach(), loss.backward()?.get(&table).unwrap().clone()))
            };
            let rounded = table.to_dtype(dtype)?;
            let (y, grad) = run(&rounded, true)?;
            let (want_y, want) = run(&rounded.to_dtype(DType::F64)?, false)?;
            assert_eq!(values(&y), values(&want_y));
            let error = relative_rms(&grad, &want);
            assert!(
                error <= of_rounding(&want, dtype, tolerance::BACKWARD),
                "{rows} {dim} {dtype:?}: {error}"
            );
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            assert_eq!(values(&pool.install(|| run(&rounded, true))?.1), values(&grad));
        }
    }
    Ok(())
}

#[test]
fn wrong_ids_are_errors() -> Result<()> {
    let table = Var::zeros((3, 2), DType::F32, &Device::Cpu)?;
    for table in [table.as_tensor().clone(), table.detach()] {
        assert!(embedding(&Embedding::new(&Tensor::new(&[0u32, 3], &Device::Cpu)?, &table)).is_err());
        let error = embedding(&Embedding::new(&Tensor::new(&[0f32], &Device::Cpu)?, &table)).unwrap_err();
        assert_eq!(message(error), "embedding: `ids` has dtype f32, expected u8, u32 or i64");
    }
    Ok(())
}

mod cuda {
    use super::*;
    use crate::support::target::with_gpu;

    /// The gradient on a GPU is that on the CPU, to the rounding of sums in another order, and the same bits twice.
    #[test]
    fn gradient() {
        with_gpu(|device| {
            let mut random = Random::new(5);
            let mut cases = 0;
            for (rows, dim, count) in
                [(3, 1, 1), (5, 7, 18), (50, 33, 400), (2, 64, 3000), (50_000, 768, 4096), (7, 2100, 300)]
            {
                let ids = Tensor::from_vec(random.ids(count, rows as u32), count, &Device::Cpu)?;
                let cotangent = random.normal(&[count, dim]);
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    let run = |device: &Device| -> Result<Tensor> {
                        let table = Var::zeros((rows, dim), dtype, device)?;
                        let y = embedding(&Embedding::new(&ids.to_device(device)?, &table))?;
                        let loss = (y * cotangent.to_dtype(dtype)?.to_device(device)?)?.sum_all()?;
                        loss.backward()?.get(&table).unwrap().to_device(&Device::Cpu)
                    };
                    let (got, want) = (run(device)?, run(&Device::Cpu)?);
                    let error = relative_rms(&got, &want);
                    assert!(
                        error <= of_rounding(&want, dtype, tolerance::BACKWARD),
                        "{rows} {dim} {dtype:?}: {error}"
                    );
                    assert_eq!(values(&got), values(&run(device)?));
                    cases += 1;
                }
            }
            Ok(cases)
        });
    }
}
