//! What every model keeps, whatever it is made of.

use candle_core::{DType, Device, Tensor};
use mamba_model::InferenceCache;

use crate::support::golden::path;
use crate::support::random::Random;
use crate::support::tolerance::max_error;
use crate::{in_pieces, open};

/// One checkpoint of each kind of mixer and option.
const MODELS: [&str; 7] = [
    "mamba_tied",
    "mamba_untied_bias",
    "mamba2_g8",
    "mamba2_time_step_limit",
    "ss_mamba1_layer_norm_mlp",
    "ss_mamba2_partial_ssm",
    "ss_mamba2_d_has_hdim",
];

fn ids(batch: usize, seqlen: usize, vocab: usize) -> Tensor {
    Tensor::from_vec(Random::new(5).ids(batch * seqlen, vocab as u32), (batch, seqlen), &Device::Cpu).unwrap()
}

#[test]
fn any_split_equals_one_forward() {
    for name in MODELS {
        let model = open(name, DType::F32);
        let input = ids(2, 21, model.config().vocab_size);
        let want = model.forward(&input, None).unwrap();
        for lengths in [vec![21], vec![1; 21], vec![2, 3, 1, 1, 5, 9], vec![0, 20, 0, 1]] {
            let gap = max_error(&in_pieces(&model, &input, &lengths), &want);
            assert!(gap <= 1e-5, "{name} in {lengths:?}: off by {gap:.1e}");
        }
    }
}

#[test]
fn rows_do_not_see_each_other() {
    for name in MODELS {
        let model = open(name, DType::F32);
        let input = ids(3, 17, model.config().vocab_size);
        let together = in_pieces(&model, &input, &[9, 1, 7]);
        for row in 0..3 {
            let alone = in_pieces(&model, &input.narrow(0, row, 1).unwrap(), &[9, 1, 7]);
            let gap = max_error(&together.narrow(0, row, 1).unwrap(), &alone);
            assert!(gap <= 1e-6, "{name} row {row}: off by {gap:.1e}");
        }
    }
}

#[test]
fn forked_caches_diverge_without_touching() {
    for name in MODELS {
        let model = open(name, DType::F32);
        let input = ids(1, 8, model.config().vocab_size);
        let token = |id: u32| Tensor::new(&[id], &Device::Cpu).unwrap();
        let mut one = model.new_cache(1).unwrap();
        model.prefill(&input, &mut one).unwrap();
        let mut two = one.fork().unwrap();
        let (a, b) = (model.step(&token(1), &mut one).unwrap(), model.step(&token(2), &mut two).unwrap());
        assert!(max_error(&a, &b) > 1e-4, "{name}");
        // What the other one did cannot be seen.
        let mut again = model.new_cache(1).unwrap();
        model.prefill(&input, &mut again).unwrap();
        model.step(&token(1), &mut again).unwrap();
        let next = |cache: &mut InferenceCache| model.step(&token(3), cache).unwrap();
        assert_eq!(max_error(&next(&mut one), &next(&mut again)), 0.0, "{name}");
        // Nor is anything left after a reset.
        two.reset().unwrap();
        assert_eq!(two.position(), 0);
        let mut fresh = model.new_cache(1).unwrap();
        assert_eq!(max_error(&next(&mut two), &next(&mut fresh)), 0.0, "{name}");
    }
}

#[test]
fn saved_caches_go_on() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let model = open(name, DType::F32);
        let input = ids(2, 12, model.config().vocab_size);
        let mut cache = model.new_cache(2).unwrap();
        model.prefill(&input.narrow(1, 0, 7).unwrap(), &mut cache).unwrap();
        let file = folder.path().join(format!("{name}.safetensors"));
        cache.save(&file).unwrap();
        let mut loaded = InferenceCache::load(&file, model.config(), &Device::Cpu).unwrap();
        assert_eq!((loaded.position(), loaded.batch(), loaded.bytes()), (7, 2, cache.bytes()));
        let rest = input.narrow(1, 7, 5).unwrap();
        let (a, b) = (model.prefill(&rest, &mut cache).unwrap(), model.prefill(&rest, &mut loaded).unwrap());
        assert_eq!(max_error(&a, &b), 0.0, "{name}");
    }
    let file = folder.path().join("mamba_tied.safetensors");
    let other = open("mamba2_g8", DType::F32);
    let error = InferenceCache::load(&file, other.config(), &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("belongs to a model of other sizes"), "{error}");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let model = open("mamba_tied", DType::F32);
    assert!(InferenceCache::load(&file, model.config(), &Device::Cpu).is_err());
    std::fs::write(&file, b"").unwrap();
    assert!(InferenceCache::load(&file, model.config(), &Device::Cpu).is_err());
}

#[test]
fn cache_bytes_do_not_grow_with_tokens() {
    // d_inner · (d_state + d_conv - 1) floats a layer: see the config.json of mamba_tied.
    let model = open("mamba_tied", DType::F32);
    let mut cache = model.new_cache(1).unwrap();
    assert_eq!(cache.bytes(), 2 * 48 * (6 + 3) * 4);
    model.prefill(&ids(1, 50, 61), &mut cache).unwrap();
    assert_eq!(cache.bytes(), 2 * 48 * (6 + 3) * 4);
    // (d_ssm + 2 · ngroups · d_state) · (d_conv - 1) + nheads · headdim · d_state.
    let config = std::fs::read_to_string(path("models/mamba2_g8/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let n = |field: &str| config[field].as_u64().unwrap() as usize;
    let d_ssm = n("num_heads") * n("head_dim");
    let layer =
        (d_ssm + 2 * n("n_groups") * n("state_size")) * (n("conv_kernel") - 1) + d_ssm * n("state_size");
    let cache = open("mamba2_g8", DType::F32).new_cache(3).unwrap();
    assert_eq!(cache.bytes(), 3 * n("num_hidden_layers") * layer * 4);
}

#[test]
fn misuse() {
    let model = open("mamba_tied", DType::F32);
    let input = |ids: &[u32]| Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
    let mut cache = model.new_cache(1).unwrap();
    let error = model.forward(&input(&[3, 61]), None).unwrap_err().to_string();
    assert_eq!(error, "input: token id 61, expected 0 to 60");
    let error = model.prefill(&input(&[]), &mut cache).unwrap_err().to_string();
    assert_eq!(error, "input: the prompt is empty");
    let error = model.forward(&ids(2, 3, 61), Some(&mut cache)).unwrap_err().to_string();
    assert_eq!(error, "cache: holds 1 sequences, the input has 2");
    let mut other = open("ss_mamba1_layer_norm_mlp", DType::F32).new_cache(1).unwrap();
    assert!(model.forward(&input(&[1]), Some(&mut other)).is_err());
    let error = model.forward(&Tensor::new(&[1u32], &Device::Cpu).unwrap(), None).unwrap_err().to_string();
    assert_eq!(error, "input: ids have shape [1], expected (batch, seqlen)");
    assert_eq!(cache.position(), 0, "what failed must not count");
}
