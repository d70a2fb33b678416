//! Loading takes the model and one tensor, whatever the format.

use candle_core::{DType, Device};
use mamba_model::Model;
use mamba_model::checkpoint::LocalDir;
use mamba_model::checkpoint::gguf::{GgmlType, Metadata};
use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};

use crate::support::alloc::{live, peak, reset_peak};

/// What is neither weights nor a tensor: headers, names, the errors that are not raised.
const REST: usize = 300_000;

pub fn one_tensor_at_a_time() {
    let mut config = ModelConfig::uniform(3000, 256, 6, MixerSpec::Mamba1(Mamba1Config::new(256)));
    config.tie_embeddings = false;
    let folder = tempfile::tempdir().unwrap();
    let file = |kind: GgmlType| folder.path().join(format!("{kind}.gguf"));
    let kinds = [GgmlType::F32, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_K];
    {
        let model = Model::random(&config, 1, &Device::Cpu).unwrap();
        for kind in kinds {
            // Writing as well: the model is there already.
            reset_peak();
            let before = live();
            model.save_gguf(file(kind), kind, Metadata::default(), |_| {}).unwrap();
            let took = peak() - before;
            let largest = 3000 * 256 * 4;
            println!("writing {kind}: {took} bytes, the largest tensor has {largest}");
            // The values, and the same in the file's type.
            assert!(took <= 2 * largest + (1 << 20) + REST, "writing {kind} takes {took} bytes");
        }
        model.save_pretrained(folder.path(), DType::F32).unwrap();
    }
    let safetensors = folder.path().join("model.safetensors");
    let files = kinds.map(file).into_iter().chain([safetensors]);
    let mut loaded = 0;
    for path in files {
        for dtype in [DType::F32, DType::BF16] {
            let load =
                || Model::from_pretrained(&LocalDir::new(&path).unwrap(), dtype, &Device::Cpu).unwrap();
            drop(load()); // threads and tables that are made once
            reset_peak();
            let before = live();
            let model = load();
            let took = peak() - before;
            let bytes = |x: &candle_core::Tensor| x.elem_count() * x.dtype().size_in_bytes();
            let weights: usize = model.parameters().iter().map(|(_, x)| bytes(x)).sum();
            let largest = model.parameters().iter().map(|(_, x)| x.elem_count() * 4).max().unwrap();
            let name = path.file_name().unwrap().to_string_lossy();
            println!("{name} as {dtype:?}: {took} bytes, weights {weights}, the largest tensor {largest}");
            assert!(took >= weights, "the measure is wrong");
            assert!(took <= weights + largest + REST, "{name} as {dtype:?} takes {took} bytes");
            loaded += 1;
        }
    }
    assert_eq!(loaded, 10);
}
