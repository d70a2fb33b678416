//! What is saved can be loaded, by us and by transformers, and bad checkpoints say what is wrong with them.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use mamba_model::families::Family;
use mamba_model::{Model, checkpoint::LocalDir};

use crate::open;
use crate::support::golden::{Golden, path};
use crate::support::tolerance::max_error;

fn load(folder: &Path) -> mamba_model::Result<Model> {
    Model::from_pretrained(&LocalDir::new(folder)?, DType::F32, &Device::Cpu)
}

fn copy(name: &str, to: &Path) {
    for entry in std::fs::read_dir(path("models").join(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Between the layouts of state-spaces and transformers there and back, where both have words.
#[test]
fn layouts_are_chosen() {
    let input = Tensor::new(&[[3u32, 1, 4, 1, 5, 9, 2, 6]], &Device::Cpu).unwrap();
    let named = |name: &str| Family::named(name).unwrap();
    for (name, other) in
        [("mamba_tied", "mamba"), ("mamba2_g1_untied", "mamba2"), ("mamba2_g2_tied_bias", "mamba2")]
    {
        let (there, back) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let model = open(name, DType::F32);
        model.save_pretrained_as(named("state-spaces"), there.path(), DType::F32).unwrap();
        let text = std::fs::read_to_string(there.path().join("config.json")).unwrap();
        assert!(text.contains("ssm_cfg") && !text.contains("model_type") && !text.contains("eos"), "{name}");
        let moved = load(there.path()).unwrap();
        assert_eq!(moved.config(), model.config(), "{name}");
        moved.save_pretrained_as(named(other), back.path(), DType::F32).unwrap();
        let again = load(back.path()).unwrap();
        let want = model.forward(&input, None).unwrap();
        for model in [moved, again] {
            assert_eq!(max_error(&model.forward(&input, None).unwrap(), &want), 0.0, "{name}");
        }
    }
    // From a GGUF file too.
    let mut moved = 0;
    for name in ["mamba_tied", "mamba_untied_bias", "mamba2_g1_untied", "mamba2_g2_tied_bias"] {
        let folder = tempfile::tempdir().unwrap();
        let file = path("gguf").join(format!("{name}.gguf"));
        if !file.exists() {
            continue;
        }
        let model = load(&file).unwrap();
        model.save_pretrained_as(named("state-spaces"), folder.path(), DType::F32).unwrap();
        let again = load(folder.path()).unwrap();
        let [got, want] = [&again, &model].map(|model| model.forward(&input, None).unwrap());
        assert_eq!(max_error(&got, &want), 0.0, "{name} from GGUF");
        let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
        let ids = golden.tensors["input_ids"].to_dtype(DType::U32).unwrap();
        let gap = max_error(&again.forward(&ids, None).unwrap(), &golden.tensors["logits"]);
        assert!(gap <= 1e-4, "{name} from GGUF: logits are off by {gap:.1e}");
        moved += 1;
    }
    assert_eq!(moved, 4);
    let error = open("jamba", DType::F32).save_pretrained_as(named("zamba"), "nowhere", DType::F32);
    let message = "config: `layers` is a combination that the layout of zamba has no words for";
    assert_eq!(error.unwrap_err().to_string(), message);
}

#[test]
fn a_saved_model_is_the_same_model() {
    let input = Tensor::new(&[[3u32, 1, 4, 1, 5, 9, 2, 6]], &Device::Cpu).unwrap();
    for (name, model_type) in [
        ("mamba_tied", Some("mamba")),
        ("mamba_untied_bias", Some("mamba")),
        ("mamba2_g2_tied_bias", Some("mamba2")),
        ("mamba2_time_step_limit", Some("mamba2")),
        ("ss_mamba1_layer_norm_mlp", None),
        ("ss_mamba2_partial_ssm", None),
        ("ss_mamba2_d_has_hdim", None),
        ("ss_mamba2_init_states", None),
        ("ss_mamba2_no_norm", None),
        ("ss_mamba2_attention", None),
        ("ss_mamba1_attention_mlp", None),
        ("falcon_mamba_untied_bias", Some("falcon_mamba")),
        ("jamba", Some("jamba")),
        ("jamba_dense", Some("jamba")),
        ("bamba", Some("bamba")),
        ("bamba_options", Some("bamba")),
        ("granitemoehybrid", Some("granitemoehybrid")),
        ("granitemoehybrid_dense_rope", Some("granitemoehybrid")),
        ("nemotron_h", Some("nemotron_h")),
        ("nemotron_h_moe", Some("nemotron_h")),
        ("nemotron_h_latent_moe", Some("nemotron_h")),
        ("falcon_h1", Some("falcon_h1")),
        ("falcon_h1_norm", Some("falcon_h1")),
        ("falcon_h1_gate_norm", Some("falcon_h1")),
        ("lfm2", Some("lfm2")),
        ("lfm2_bias", Some("lfm2")),
        ("zamba2", Some("zamba2")),
        ("zamba2_one_block", Some("zamba2")),
        ("zamba", Some("zamba")),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let model = open(name, DType::F32);
        model.save_pretrained(folder.path(), DType::F32).unwrap();
        let again = load(folder.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        // The names in the file are those that were read.
        let weights = path("models").join(name).join("model.safetensors");
        if weights.exists() {
            let names = |file: &Path| {
                let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
                let mut names: Vec<String> = tensors.into_keys().filter(|n| n != "lm_head.weight").collect();
                names.sort();
                names
            };
            assert_eq!(names(&folder.path().join("model.safetensors")), names(&weights), "{name}");
        }
        assert_eq!(again.config().layers, model.config().layers, "{name}");
        let gap = max_error(&again.forward(&input, None).unwrap(), &model.forward(&input, None).unwrap());
        assert_eq!(gap, 0.0, "{name}");
        let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config.get("model_type").and_then(|v| v.as_str()), model_type, "{name}");
    }
}

/// In f16 what the state depends on exponentially keeps its bits.
#[test]
fn a_model_saved_in_half_precision_keeps_its_decays() {
    let folder = tempfile::tempdir().unwrap();
    let model = open("mamba2_g8", DType::F32);
    model.save_pretrained(folder.path(), DType::F16).unwrap();
    let again = load(folder.path()).unwrap();
    let mut compared = 0;
    for ((name, want), (_, got)) in model.parameters().iter().zip(again.parameters()) {
        let gap = max_error(got, want);
        if ["A_log", "D", "dt_bias"].iter().any(|leaf| name.ends_with(leaf)) {
            compared += 1;
            assert_eq!(gap, 0.0, "{name}");
        }
        assert!(gap <= 1e-3, "{name}");
    }
    assert_eq!(compared, 3 * model.config().layers.len());
}

#[test]
fn bad_checkpoints_say_what_is_wrong() {
    let fails = |name: &str, spoil: &dyn Fn(&Path), want: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        copy(name, folder.path());
        spoil(folder.path());
        let error = load(folder.path()).unwrap_err().to_string();
        for want in want {
            assert!(error.contains(want), "{error}\nlacks {want}");
        }
    };
    let edit = |from: &'static str, to: &'static str| {
        move |folder: &Path| {
            let file = folder.join("config.json");
            let text = std::fs::read_to_string(&file).unwrap();
            assert!(text.contains(from), "{text}");
            std::fs::write(file, text.replace(from, to)).unwrap();
        }
    };
    let remove = |file: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(file)).unwrap();
    let truncate = |file: &'static str, bytes: usize| {
        move |folder: &Path| {
            let whole = std::fs::read(folder.join(file)).unwrap();
            std::fs::write(folder.join(file), &whole[..whole.len().min(bytes)]).unwrap();
        }
    };
    let append = |file: &'static str| {
        move |folder: &Path| {
            let mut whole = std::fs::read(folder.join(file)).unwrap();
            whole.extend([0; 7]);
            std::fs::write(folder.join(file), whole).unwrap();
        }
    };
    fails("mamba_tied", &remove("config.json"), &["no config.json in"]);
    fails("mamba_tied", &remove("model.safetensors"), &["no ", "model.safetensors"]);
    fails("mamba_tied", &truncate("config.json", 30), &["config.json", "is not JSON"]);
    fails("mamba_tied", &truncate("model.safetensors", 0), &["model.safetensors"]);
    fails("mamba_tied", &truncate("model.safetensors", 5000), &["model.safetensors"]);
    fails("mamba_tied", &append("model.safetensors"), &["model.safetensors"]);
    fails("mamba_tied", &edit("\"hidden_size\"", "\"width\""), &["config.json", "`hidden_size` is missing"]);
    fails("mamba_tied", &edit("\"mamba\"", "\"llama\""), &["`model_type` is \"llama\"", "mamba2"]);
    fails("mamba_tied", &edit("\"silu\"", "\"gelu\""), &["`hidden_act` is \"gelu\", expected silu"]);
    fails(
        "mamba_tied",
        &edit("\"state_size\": 6", "\"state_size\": 7"),
        &["model.safetensors", "`backbone.layers.0.mixer.x_proj.weight` has shape", "expected"],
    );
    fails(
        "mamba_tied",
        &edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
        &["does not fit", "config.json", "unread: backbone.layers.1"],
    );
    fails(
        "mamba_tied",
        &edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"),
        &["no tensor `backbone.layers.2."],
    );
    fails("mamba_tied", &edit("\"vocab_size\": 61", "\"vocab_size\": -1"), &["`vocab_size` is -1"]);
    fails("mamba_tied", &edit("\"vocab_size\": 61", "\"vocab_size\": 1e99"), &["`vocab_size` is 1e"]);
    fails(
        "nemotron_h",
        &edit("\"sliding_window\": null", "\"sliding_window\": 4"),
        &["config.json: `sliding_window` is 4, expected null"],
    );
    fails(
        "zamba2",
        &edit("\"use_long_context\": false", "\"use_long_context\": true"),
        &["config.json: `use_long_context` is true, expected false"],
    );
    fails(
        "ss_mamba2_init_states",
        &edit("\"chunk_size\": 8", "\"ngroups\": 2"),
        &["config.json: `ssm_cfg.ngroups` is 2, expected 1 with learnable_init_states"],
    );
    fails("mamba2_g8", &edit("\"n_groups\": 8", "\"n_groups\": 3"), &["`ngroups` is 3, expected a divisor"]);
}
