//! The smallest training loop, with nothing but candle: `cargo run --release --example train_minimal`.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};
use mamba_model::Model;
use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};

fn main() -> anyhow::Result<()> {
    let text = b"the quick brown fox jumps over the lazy dog, and the lazy dog barks at the quick brown fox";
    let ids: Vec<u32> = text.iter().map(|byte| u32::from(*byte)).collect();

    // The initial values as published, as variables.
    let config = ModelConfig::uniform(256, 64, 2, MixerSpec::Mamba1(Mamba1Config::new(64)));
    let vars = VarMap::new();
    for (name, value) in Model::random(&config, 1, &Device::Cpu)?.parameters() {
        vars.data().lock().expect("nobody else").insert(name.clone(), Var::from_tensor(value)?);
    }
    let model = Model::new(&config, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let mut optimizer = AdamW::new(vars.all_vars(), ParamsAdamW { lr: 3e-3, ..Default::default() })?;

    let inputs = Tensor::new(&ids[..ids.len() - 1], &Device::Cpu)?.unsqueeze(0)?;
    let targets = Tensor::new(&ids[1..], &Device::Cpu)?;
    for step in 1..=50 {
        let loss = cross_entropy(&model.forward(&inputs, None)?.squeeze(0)?, &targets)?;
        optimizer.backward_step(&loss)?;
        println!("step {step} loss {:.4}", loss.to_scalar::<f32>()?);
    }
    Ok(())
}
