//! Generations as values, and scores, with real models.

use mamba_generate::{CausalLm, GenerationState, Generator, GeneratorBuilder, SamplingConfig, score};
use mamba_model::Model;

use crate::models;
use crate::support::golden::{Golden, path};
use crate::support::tolerance::values;

fn builder(model: &Model) -> GeneratorBuilder<'_, Model> {
    let config = SamplingConfig {
        temperature: 0.9,
        top_p: Some(0.95),
        xtc: Some((0.2, 0.1)),
        mirostat: Some((4.0, 0.2)),
        repetition_penalty: Some(1.1),
        seed: 12,
        ..Default::default()
    };
    Generator::builder(model).sampling(config.build().unwrap()).max_new_tokens(16)
}

fn ids(generator: impl Iterator<Item = mamba_generate::Result<mamba_generate::Token>>) -> Vec<u32> {
    generator.map(|token| token.unwrap().id).collect()
}

/// In the middle of a reply, through a file, for every family: not a bit differs.
#[test]
fn resumed_equals_uninterrupted() {
    check_resumed(&models::all());
    check_resumed(&models::in_bf16());
}

mod cuda {
    use super::*;
    use crate::support::target::with_gpu;

    #[test]
    fn resumed_equals_uninterrupted() {
        with_gpu(|device| {
            let models = models::on(device);
            check_resumed(&models);
            Ok(models.len())
        });
    }
}

fn check_resumed(models: &[(String, Model)]) {
    let folder = tempfile::tempdir().unwrap();
    for (name, model) in models {
        let prompt = models::ids(model, 9, 1);
        let expected = ids(builder(model).prompt(&prompt).build().unwrap());
        for cut in [0, 1, 7] {
            let mut first = builder(model).prompt(&prompt).build().unwrap();
            let before = ids(first.by_ref().take(cut));
            first.prefill().unwrap();
            let file = folder.path().join(name);
            first.state().unwrap().save(model, &file).unwrap();
            // What goes on elsewhere does not change the state that was taken.
            ids(&mut first);
            let state = GenerationState::load(model, &file).unwrap();
            assert_eq!(state.generated(), before);
            let after = ids(builder(model).resume(state).build().unwrap());
            assert_eq!([before, after].concat(), expected, "{name} cut at {cut}");
        }
    }
}

/// Many continuations of one prompt, each of which costs only its own tokens.
#[test]
fn a_saved_prompt_is_not_read_again() {
    let model = models::open("mamba2-shakespeare");
    let mut prompt = builder(&model).prompt(&models::ids(&model, 300, 2)).build().unwrap();
    prompt.prefill().unwrap();
    let state = prompt.state().unwrap();
    assert_eq!((state.read(), state.cache().position()), (300, 300));
    for turn in 0..3 {
        let extra = models::ids(&model, 4, 20 + turn);
        let mut forked = builder(&model).resume(state.fork(&model).unwrap()).prompt(&extra).build().unwrap();
        assert_eq!(ids(&mut forked).len(), 16);
        assert_eq!(forked.timings().prompt_tokens, 4);
        assert_eq!(forked.cache().position(), 300 + 4 + 15);
    }
    assert_eq!(state.cache().position(), 300);
}

/// The same weights, read with another configuration, do not go on from each other's states.
#[test]
fn states_under_another_configuration_are_refused() {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(path("models/falcon_h1")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let config = std::fs::read_to_string(path("models/falcon_h1/config.json")).unwrap();
    let model = models::open("falcon_h1");
    let mut generator = builder(&model).prompt(&models::ids(&model, 5, 3)).build().unwrap();
    generator.by_ref().take(3).for_each(drop);
    let state = generator.state().unwrap().to_bytes(&model).unwrap();
    let source = mamba_model::checkpoint::LocalDir::new(copy.path()).unwrap();
    let open =
        || Model::from_pretrained(&source, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    assert!(GenerationState::from_bytes(&open(), &state).is_ok(), "a copy is the same model");
    let mut changed = 0;
    for (field, value) in [
        ("rope_theta", serde_json::json!(12345.0)),
        ("rms_norm_eps", 1e-3.into()),
        ("key_multiplier", 0.75.into()),
        ("lm_head_multiplier", 0.75.into()),
    ] {
        let mut fields: serde_json::Value = serde_json::from_str(&config).unwrap();
        if field == "rope_theta" {
            fields["rope_parameters"]["rope_theta"] = value.clone();
        }
        fields[field] = value;
        std::fs::write(copy.path().join("config.json"), fields.to_string()).unwrap();
        let other = open();
        assert_ne!(other.config(), model.config(), "{field}");
        let error = GenerationState::from_bytes(&other, &state).unwrap_err().to_string();
        assert!(error.contains("belongs to the model "), "{field}: {error}");
        changed += 1;
    }
    assert_eq!(changed, 4);
}

#[test]
fn states_of_other_models_and_damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state");
    let (model, other) = (models::open("mamba_tied"), models::open("mamba_untied_bias"));
    let mut generator = builder(&model).prompt(&models::ids(&model, 5, 3)).build().unwrap();
    generator.by_ref().take(3).for_each(drop);
    generator.state().unwrap().save(&model, &file).unwrap();

    let error = GenerationState::load(&other, &file).unwrap_err().to_string();
    assert!(error.contains("state: belongs to the model ") && error.contains(", expected "), "{error}");
    let whole = std::fs::read(&file).unwrap();
    for length in [0, 7, 8, 15, 40, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..length]).unwrap();
        let error = GenerationState::load(&model, &file).unwrap_err().to_string();
        assert!(
            error.starts_with("saved generation: ") && error.contains(&*file.to_string_lossy()),
            "{error}"
        );
    }
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    std::fs::write(&file, changed).unwrap();
    let error = GenerationState::load(&model, &file).unwrap_err().to_string();
    assert!(error.ends_with("is damaged or cut short: its checksum is wrong"), "{error}");
    let error = GenerationState::load(&model, folder.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("none: "), "{error}");
}

/// The place where the new file is written beside the old one leads to a device that is always full.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_an_error_and_the_old_file_stays() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state");
    let model = models::open("mamba_tied");
    let mut generator = builder(&model).prompt(&models::ids(&model, 5, 3)).build().unwrap();
    generator.by_ref().take(3).for_each(drop);
    generator.state().unwrap().save(&model, &file).unwrap();
    let before = std::fs::read(&file).unwrap();

    generator.by_ref().take(3).for_each(drop);
    let part = folder.path().join(format!("state.{}.part", std::process::id()));
    std::os::unix::fs::symlink("/dev/full", &part).unwrap();
    let error = generator.state().unwrap().save(&model, &file).unwrap_err().to_string();
    assert!(error.contains("state: ") && error.contains("space"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside");
    assert_eq!(GenerationState::load(&model, &file).unwrap().generated().len(), 3);
    // And the generation itself goes on.
    generator.state().unwrap().save(&model, &file).unwrap();
    assert_eq!(GenerationState::load(&model, &file).unwrap().generated().len(), 6);
}

/// Losses of mamba_ssm on validation text.
#[test]
fn scores_equal_the_losses_of_mamba_ssm() {
    // The golden of Mamba-2 was computed in TF32; the other one in f32.
    for (name, bound) in [("mamba-shakespeare", 2e-4), ("mamba2-shakespeare", 2e-2)] {
        let model = models::open(name);
        let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
        let text: Vec<u32> = values(&golden.tensors["val_ids"]).iter().map(|&id| id as u32).collect();
        let mut cache = CausalLm::new_cache(&model).unwrap();
        let whole = score(&model, &text, &mut cache).unwrap();
        let expected = values(&golden.tensors["val_nll"]);
        assert_eq!(whole.losses.len(), expected.len());
        let gap =
            whole.losses.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(gap <= bound, "{name}: off by {gap:.1e}");
        // In two parts that share a token.
        let mut cache = CausalLm::new_cache(&model).unwrap();
        let first = score(&model, &text[..400], &mut cache).unwrap();
        let second = score(&model, &text[399..], &mut cache).unwrap();
        let sum = first.total() + second.total();
        assert!((sum - whole.total()).abs() < 1e-3, "{name}: {sum}, {}", whole.total());
    }
}
