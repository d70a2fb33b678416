//! Low-rank adapters: what they change, what they leave alone, and how others keep them.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use mamba_model::Model;
use mamba_model::config::{LayerSpec, Mamba1Config, Mamba2Config, MixerSpec, MlpConfig, ModelConfig};
use mamba_train::data::Batch;
use mamba_train::{LoraConfig, Schedule, TrainOptions, TrainableModel, Trainer, load_adapter, save_adapter};

use crate::support::golden::{Golden, path};
use crate::support::random::Random;
use crate::support::tolerance::max_error;
use crate::{bits, open};

fn base() -> Model {
    let mamba1 = MixerSpec::Mamba1(Mamba1Config { d_state: 4, ..Mamba1Config::new(16) });
    let mamba2 = MixerSpec::Mamba2(Mamba2Config { d_state: 8, headdim: 8, ..Mamba2Config::new(16) });
    let mlp = MixerSpec::Mlp(MlpConfig { bias: false, ..MlpConfig::new(128) });
    let layers = vec![LayerSpec::new([mamba1.clone(), mlp]), LayerSpec::new([mamba2])];
    let config = ModelConfig { layers, ..ModelConfig::uniform(37, 16, 2, mamba1) };
    // An embedding with rows that are never given out.
    let config = ModelConfig { padded_vocab_size: 40, ..config };
    Model::random(&config, 3, &Device::Cpu).unwrap()
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn ids() -> Tensor {
    Tensor::new(Random::new(9).ids(24, 37), &Device::Cpu).unwrap().reshape((2, 12)).unwrap()
}

fn logits(model: &Model) -> Tensor {
    model.forward(&ids(), None).unwrap()
}

fn train(model: TrainableModel, steps: usize) -> Trainer {
    let schedule = Schedule { lr: 5e-2, warmup: 1, steps, ..Schedule::default() };
    let mut trainer = Trainer::new(model, TrainOptions { schedule, ..TrainOptions::default() }).unwrap();
    for step in 0..steps {
        let rows = vec![Random::new(step as u64).ids(13, 37), Random::new(100 + step as u64).ids(9, 37)];
        trainer.step(&[Batch::padded(&rows, &Device::Cpu).unwrap()]).unwrap();
    }
    trainer
}

/// For each kind of module and way of scaling: nothing changes at the start, something after training, and the merged model
/// says the same as the one with adapters; the base keeps its bits.
#[test]
fn merged_equals_unmerged() {
    let base = base();
    let before = logits(&base);
    let all = [
        "in_proj",
        "x_proj",
        "dt_proj",
        "out_proj",
        "conv1d",
        "up_proj",
        "down_proj",
        "embedding",
        "lm_head",
    ];
    let mut cases: Vec<(Vec<String>, Vec<String>)> =
        all.iter().map(|target| (strings(&[target]), vec![])).collect();
    cases.push((strings(&all), strings(&["A_log", "D", "dt_bias", "norm_f.weight"])));
    cases.push((strings(&["layers.1.*"]), vec![]));
    for (targets, trained) in cases {
        for (rank_stabilized, dora) in [(false, false), (true, false), (false, true)] {
            let config = LoraConfig {
                rank: 3,
                rank_stabilized,
                dora,
                targets: targets.clone(),
                train: trained.clone(),
                ..LoraConfig::default()
            };
            let model = TrainableModel::lora(&base, &config, DType::F32, 1).unwrap();
            let start = max_error(&logits(&model.view().unwrap()), &before);
            assert!(start < if dora { 1e-6 } else { 1e-30 }, "{targets:?}: {start} at the start");
            let trainer = train(model, 8);
            let adapted = trainer.model().view().unwrap();
            let merged = trainer.model().snapshot(DType::F32).unwrap().merged().unwrap();
            assert!(!merged.has_adapters() && adapted.has_adapters());
            let (got, want) = (logits(&merged), logits(&adapted));
            let change = max_error(&want, &before);
            assert!(change > 1e-5, "{targets:?} {dora}: training changed {change}");
            let error = max_error(&got, &want);
            assert!(error < 1e-5, "{targets:?} {rank_stabilized} {dora}: {error}");
            for (name, value) in base.parameters() {
                let (_, now) = adapted.parameters().iter().find(|(n, _)| n == name).unwrap();
                let changed = trainer.model().parameters().get(name).is_some();
                assert_eq!(bits(value) != bits(now), changed, "{name}");
            }
        }
    }
}

/// What does not train has no state: the parameters of the optimizer are those of the adapters.
#[test]
fn only_factors_are_trained() {
    let config = LoraConfig { rank: 2, targets: strings(&["in_proj"]), ..LoraConfig::default() };
    let model = TrainableModel::lora(&base(), &config, DType::F32, 1).unwrap();
    let names: Vec<&str> = model.parameters().iter().map(|p| p.name()).collect();
    assert_eq!(
        names,
        [
            "layers.0.0.mamba1.in_proj.lora_A.weight",
            "layers.0.0.mamba1.in_proj.lora_B.weight",
            "layers.1.0.mamba2.in_proj.lora_A.weight",
            "layers.1.0.mamba2.in_proj.lora_B.weight",
        ]
    );
    let tracked: Vec<&str> = model
        .model()
        .parameters()
        .iter()
        .filter(|(_, x)| x.track_op())
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(tracked.len(), 4);
    assert!(model.snapshot(DType::F32).unwrap().save_pretrained(Path::new("/nowhere"), DType::F32).is_err());
}

#[test]
fn wrong_targets_are_errors() {
    let fails =
        |config: LoraConfig| TrainableModel::lora(&base(), &config, DType::F32, 1).unwrap_err().to_string();
    let with = |targets: &[&str], train: &[&str]| LoraConfig {
        targets: strings(targets),
        train: strings(train),
        ..LoraConfig::default()
    };
    let error = fails(with(&["in_proj", "q_proj"], &[]));
    assert_eq!(
        error,
        "adapter: the target `q_proj` matches nothing; there are conv1d, down_proj, dt_proj, embedding, gate_proj, \
         in_proj, lm_head, out_proj, up_proj, x_proj"
    );
    assert!(
        fails(with(&["in_proj"], &["A"])).starts_with("adapter: the parameter to train `A` matches nothing")
    );
    assert!(fails(with(&[], &[])).contains("no targets"));
    assert!(fails(LoraConfig { rank: 0, ..LoraConfig::default() }).contains("`rank` is 0"));
}

#[test]
fn saved_adapters_are_the_same_adapters() {
    let base = open("mamba_tied", DType::F32);
    for (dora, targets) in
        [(false, ["in_proj", "conv1d", "embedding"]), (true, ["x_proj", "out_proj", "lm_head"])]
    {
        let config = LoraConfig {
            rank: 2,
            dora,
            rank_stabilized: dora,
            targets: strings(&targets),
            train: strings(&["A_log"]),
            ..LoraConfig::default()
        };
        let trainer = train(TrainableModel::lora(&base, &config, DType::F32, 1).unwrap(), 2);
        let folder = tempfile::tempdir().unwrap();
        save_adapter(trainer.model(), &config, "tiny", folder.path()).unwrap();
        let again = load_adapter(&base, folder.path()).unwrap();
        assert_eq!(bits(&logits(&again)), bits(&logits(&trainer.model().view().unwrap())));

        // Another model has no place for them.
        let error =
            load_adapter(&open("mamba2_g1_untied", DType::F32), folder.path()).unwrap_err().to_string();
        assert!(error.contains("adapter_model.safetensors"), "{error}");
    }
}

/// PEFT's own adapters, with PEFT's own answers.
#[test]
fn adapters_of_peft_say_what_they_say_there() {
    let mut cases = 0;
    for name in ["lora", "rslora_alpha_pattern", "dora"] {
        let folder = path("train_peft").join(name);
        let golden = Golden::read(&folder.join("io.safetensors"));
        let base = open(golden.option("base").unwrap(), DType::F32);
        let adapted = load_adapter(&base, &folder).unwrap();
        let ids = golden.tensors["input_ids"].to_dtype(DType::U32).unwrap();
        let got = adapted.forward(&ids, None).unwrap();
        let want = &golden.tensors["logits"];
        let error = max_error(&got, want);
        assert!(error < 1e-5, "{name}: {error}");
        let apart = max_error(&base.forward(&ids, None).unwrap(), want);
        assert!(apart > 1e-2, "{name}: the adapters change nothing");
        let error = max_error(&adapted.merged().unwrap().forward(&ids, None).unwrap(), want);
        assert!(error < 1e-5, "{name} merged: {error}");
        cases += 1;
    }
    assert_eq!(cases, 3);
}
