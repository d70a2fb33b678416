//! What every model keeps, whatever it is made of.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use mamba_model::checkpoint::{Checkpoint, LocalDir};
use mamba_model::config::{MixerSpec, ModelConfig};
use mamba_model::{Batch, InferenceCache, Model};

use crate::support::golden::path;
use crate::support::random::Random;
use crate::support::tolerance::max_error;
use crate::support::torch::{self, Order};
use crate::{in_pieces, open};

/// One checkpoint of each family, and of each kind of mixer and option.
pub const MODELS: [&str; 24] = [
    "mamba_tied",
    "mamba_untied_bias",
    "mamba2_g8",
    "mamba2_time_step_limit",
    "ss_mamba1_layer_norm_mlp",
    "ss_mamba2_partial_ssm",
    "ss_mamba2_d_has_hdim",
    "ss_mamba2_init_states",
    "ss_mamba2_attention",
    "ss_mamba1_attention_mlp",
    "ss_mamba2_rotary",
    "falcon_mamba_untied_bias",
    "jamba",
    "bamba_options",
    "granitemoehybrid",
    "granitemoehybrid_dense_rope",
    "nemotron_h",
    "nemotron_h_latent_moe",
    "falcon_h1",
    "falcon_h1_norm",
    "lfm2_bias",
    "zamba2",
    "zamba2_one_block",
    "zamba",
];

fn ids(batch: usize, seqlen: usize, vocab: usize) -> Tensor {
    Tensor::from_vec(Random::new(5).ids(batch * seqlen, vocab as u32), (batch, seqlen), &Device::Cpu).unwrap()
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, bound: f64, context: &str) {
    let gap = max_error(got, want);
    assert!(gap <= bound, "{context}: off by {gap:.1e}");
}

#[test]
fn any_split_equals_one_forward() {
    for name in MODELS {
        let model = open(name, DType::F32);
        let input = ids(2, 21, model.config().vocab_size);
        let want = model.forward(&input, None).unwrap();
        for lengths in [vec![21], vec![1; 21], vec![2, 3, 1, 1, 5, 9], vec![0, 20, 0, 1]] {
            close(&in_pieces(&model, &input, &lengths), &want, 1e-5, &format!("{name} in {lengths:?}"));
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
            close(&together.narrow(0, row, 1).unwrap(), &alone, 5e-6, &format!("{name} row {row}"));
        }
    }
}

/// Half precision runs everywhere, in one forward and in pieces alike, with errors of its own size; a router may choose
/// another expert where two are about as good, so models with experts are compared with themselves alone.
#[test]
fn half_precision() {
    for name in MODELS {
        let exact = open(name, DType::F32);
        let input = ids(2, 12, exact.config().vocab_size);
        let want = exact.forward(&input, None).unwrap();
        let experts = exact.parameters().iter().any(|(name, _)| name.contains(".experts."));
        for (dtype, bound) in [(DType::F16, 3e-2), (DType::BF16, 2e-1)] {
            let model = open(name, dtype);
            let whole = model.forward(&input, None).unwrap();
            assert_eq!(whole.dtype(), dtype, "{name}");
            if experts {
                assert!(max_error(&whole, &want).is_finite(), "{name}");
                continue;
            }
            let context = |how: &str| format!("{name} in {} {how}", dtype.as_str());
            close(&whole, &want, bound, &context("at once"));
            close(&in_pieces(&model, &input, &[7, 1, 1, 3]), &want, bound, &context("in pieces"));
            let padded = model.forward(Batch::left_padded(&input, &[12, 5]).unwrap(), None).unwrap();
            close(
                &padded.narrow(0, 0, 1).unwrap(),
                &want.narrow(0, 0, 1).unwrap(),
                bound,
                &context("padded"),
            );
        }
    }
}

/// Rows of unequal lengths, padded on either side or packed, then more of them, then steps: each as if it were alone.
#[test]
fn padding_is_not_seen() {
    let (first, second) = ([9, 4, 1, 0], [2, 0, 7, 3]);
    for name in MODELS {
        let model = open(name, DType::F32);
        let vocab = model.config().vocab_size;
        let tokens = Random::new(8).ids(4 * 20, vocab as u32);
        let text = |row: usize, start: usize, len: usize| &tokens[row * 20 + start..row * 20 + start + len];
        // What each row gives alone, in the same pieces.
        let alone = |row: usize| {
            let mut cache = model.new_cache(1).unwrap();
            let mut logits = vec![];
            for (start, len) in [(0, first[row]), (first[row], second[row]), (first[row] + second[row], 1)] {
                if len > 0 {
                    let ids = Tensor::from_slice(text(row, start, len), (1, len), &Device::Cpu).unwrap();
                    logits.push(model.forward(&ids, Some(&mut cache)).unwrap());
                }
            }
            Tensor::cat(&logits, 1).unwrap()
        };
        let alone: Vec<Tensor> = (0..4).map(alone).collect();
        for how in ["left", "right", "mask", "packed"] {
            let mut cache = model.new_cache(4).unwrap();
            for (call, lengths) in [first, second].iter().enumerate() {
                let seqlen = 9;
                let start = |row: usize| if call == 0 { 0 } else { first[row] };
                let offset = |row: usize| if how == "left" { seqlen - lengths[row] } else { 0 };
                // Padding holds ids that do not exist.
                let mut padded = vec![u32::MAX; 4 * seqlen];
                for row in 0..4 {
                    let at = row * seqlen + offset(row);
                    padded[at..at + lengths[row]].copy_from_slice(text(row, start(row), lengths[row]));
                }
                let packed: Vec<u32> =
                    (0..4).flat_map(|row| text(row, start(row), lengths[row]).to_vec()).collect();
                let mask: Vec<u8> = padded.iter().map(|id| (*id != u32::MAX) as u8).collect();
                let padded = Tensor::from_vec(padded, (4, seqlen), &Device::Cpu).unwrap();
                let mask = Tensor::from_vec(mask, (4, seqlen), &Device::Cpu).unwrap();
                let total = packed.len();
                let packed = Tensor::from_vec(packed, total, &Device::Cpu).unwrap();
                let ends = lengths.iter().scan(0, |end, len| {
                    *end += len;
                    Some(*end)
                });
                let cu_seqlens: Vec<usize> = [0].into_iter().chain(ends).collect();
                let batch = match how {
                    "left" => Batch::left_padded(&padded, lengths),
                    "right" => Batch::right_padded(&padded, lengths),
                    "mask" => Batch::masked(&padded, &mask),
                    _ => Batch::packed(&packed, &cu_seqlens),
                };
                let logits = model.forward(batch.unwrap(), Some(&mut cache)).unwrap();
                for row in (0..4).filter(|row| lengths[*row] > 0) {
                    let got = match how {
                        "packed" => logits.narrow(1, cu_seqlens[row], lengths[row]).unwrap(),
                        _ => logits.narrow(0, row, 1).unwrap().narrow(1, offset(row), lengths[row]).unwrap(),
                    };
                    let want = alone[row].narrow(1, start(row), lengths[row]).unwrap();
                    close(&got, &want, 1e-5, &format!("{name} {how} row {row} call {call}"));
                }
                if how == "right" {
                    let padding =
                        logits.narrow(0, 1, 1).unwrap().narrow(1, lengths[1], seqlen - lengths[1]).unwrap();
                    assert_eq!(max_error(&padding, &padding.zeros_like().unwrap()), 0.0, "{name}");
                }
            }
            let read: Vec<usize> = (0..4).map(|row| first[row] + second[row]).collect();
            assert_eq!(cache.positions(), read);
            let next: Vec<u32> = (0..4).map(|row| text(row, read[row], 1)[0]).collect();
            let logits =
                model.step(&Tensor::new(next.as_slice(), &Device::Cpu).unwrap(), &mut cache).unwrap();
            for row in 0..4 {
                let want = alone[row].narrow(1, read[row], 1).unwrap().squeeze(1).unwrap();
                close(
                    &logits.narrow(0, row, 1).unwrap(),
                    &want,
                    1e-5,
                    &format!("{name} {how} row {row} stepping"),
                );
            }
        }
    }
}

/// Rows that leave and join a batch take their state with them, however much each has read.
#[test]
fn rows_come_and_go() {
    for name in MODELS {
        let model = open(name, DType::F32);
        let input = ids(3, 9, model.config().vocab_size);
        let lengths = [9, 4, 6];
        let batch = || Batch::right_padded(&input, &lengths).unwrap();
        let mut three = model.new_cache(3).unwrap();
        model.prefill(batch(), &mut three).unwrap();
        let one = three.select(&[1]).unwrap();
        let mut mixed = InferenceCache::concat(&[&three.select(&[2, 0]).unwrap(), &one, &three]).unwrap();
        assert_eq!(mixed.positions(), [6, 9, 4, 9, 4, 6], "{name}");
        let step = |cache: &mut InferenceCache| {
            let tokens = Tensor::new(vec![3u32; cache.batch()], &Device::Cpu).unwrap();
            model.step(&tokens, cache).unwrap()
        };
        let got = step(&mut mixed);
        let want = step(&mut three);
        for (row, from) in [2, 0, 1, 0, 1, 2].into_iter().enumerate() {
            let want = want.narrow(0, from, 1).unwrap();
            close(&got.narrow(0, row, 1).unwrap(), &want, 1e-6, &format!("{name} row {row}"));
        }
    }
}

/// The last token of each row, wherever it stands.
#[test]
fn prefill_finds_the_last_tokens() {
    let model = open("jamba", DType::F32);
    let input = ids(3, 6, model.config().vocab_size);
    let lengths = [6, 2, 4];
    let want = model.forward(Batch::right_padded(&input, &lengths).unwrap(), None).unwrap();
    let got = model
        .prefill(Batch::right_padded(&input, &lengths).unwrap(), &mut model.new_cache(3).unwrap())
        .unwrap();
    for (row, len) in lengths.iter().enumerate() {
        let want = want.narrow(0, row, 1).unwrap().narrow(1, len - 1, 1).unwrap().squeeze(1).unwrap();
        close(&got.narrow(0, row, 1).unwrap(), &want, 1e-6, "prefill");
    }
    let empty = Batch::right_padded(&input, &[6, 0, 4]).unwrap();
    let error = model.prefill(empty, &mut model.new_cache(3).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "input: the prompt of row 1 is empty");
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
        model
            .prefill(Batch::right_padded(&input.narrow(1, 0, 7).unwrap(), &[7, 5]).unwrap(), &mut cache)
            .unwrap();
        let file = folder.path().join(format!("{name}.safetensors"));
        cache.save(&file).unwrap();
        let mut loaded = InferenceCache::load(&file, model.config(), &Device::Cpu).unwrap();
        assert_eq!((loaded.positions(), loaded.bytes()), ([7, 5].as_slice(), cache.bytes()));
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

/// Bytes of one sequence after so many tokens, by the sizes of the mixers: states and windows of convolutions are `f32` in every
/// model, keys and values of its own type.
fn expected_bytes(config: &ModelConfig, dtype: DType, tokens: usize) -> usize {
    // Keys and values come in blocks of 256 tokens.
    let kv = |nheads_kv: usize, headdim: usize| {
        tokens.next_multiple_of(256) * 2 * nheads_kv * headdim * dtype.size_in_bytes()
    };
    let mixer = |mixer: &MixerSpec| match mixer {
        MixerSpec::Mamba1(c) => 4 * c.d_inner * (c.d_conv - 1 + c.d_state),
        MixerSpec::Mamba2(c) => {
            4 * ((c.d_ssm + 2 * c.ngroups * c.d_state) * (c.d_conv - 1) + c.d_ssm * c.d_state)
        }
        MixerSpec::Attention(c) => {
            let window = c.packed.map_or(0, |packed| packed.d_conv.saturating_sub(1));
            kv(c.nheads_kv, c.headdim) + 4 * (c.nheads + 2 * c.nheads_kv) * c.headdim * window
        }
        MixerSpec::ShortConv(c) => 4 * config.d_model * (c.d_conv - 1),
        _ => 0,
    };
    let layers = config.layers.iter().map(|layer| {
        let block = layer.shared.map(|shared| &config.shared_blocks[shared.block].attention);
        let mixers = layer.branches.iter().flat_map(|branch| &branch.mixers);
        block.map_or(0, |c| kv(c.nheads_kv, c.headdim)) + mixers.map(|(_, m)| mixer(m)).sum::<usize>()
    });
    layers.sum()
}

#[test]
fn cache_bytes_are_what_the_formula_says() {
    // d_inner · (d_state + d_conv - 1) floats a layer: see the config.json of mamba_tied.
    let model = open("mamba_tied", DType::F32);
    for dtype in [DType::F32, DType::BF16] {
        assert_eq!(expected_bytes(model.config(), dtype, 50), 2 * 48 * (6 + 3) * 4);
    }
    // Two heads of 8 channels, keys and values of 2 bytes: see the config.json of nemotron_h.
    let states = |model: &Model| expected_bytes(model.config(), DType::BF16, 0);
    let hybrid = open("nemotron_h", DType::BF16);
    assert_eq!(expected_bytes(hybrid.config(), DType::BF16, 300), states(&hybrid) + 512 * 2 * 8 * 2 * 2);
    for name in MODELS {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let model = open(name, dtype);
            let mut cache = model.new_cache(2).unwrap();
            for tokens in [0, 1, 256, 257] {
                let new = tokens - cache.position();
                model.forward(&ids(2, new, model.config().vocab_size), Some(&mut cache)).unwrap();
                let want = 2 * expected_bytes(model.config(), dtype, tokens);
                assert_eq!(cache.bytes(), want, "{name} in {dtype:?} after {tokens}");
            }
        }
    }
}

/// Each tensor is read once; one that is not there, or that nobody reads, is named.
#[test]
fn surplus_and_missing_tensors_are_named() {
    type Tensors = BTreeMap<String, Tensor>;
    type Write<'a> = &'a dyn Fn(&Path, &Tensors);
    let safetensors = |folder: &Path, tensors: &Tensors| {
        let tensors: HashMap<_, _> = tensors.clone().into_iter().collect();
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    };
    let torch = |folder: &Path, tensors: &Tensors| torch::write(folder, tensors, Order::Rows, 1);
    let shards = |folder: &Path, tensors: &Tensors| torch::write(folder, tensors, Order::Columns, 2);
    let formats: [(&str, Write); 3] =
        [("safetensors", &safetensors), ("torch", &torch), ("torch in shards", &shards)];
    let (mut without_one, mut without_head) = (0, 0);
    for name in MODELS {
        let source = path("models").join(name);
        let tensors = tensors(&source);
        let tied = open(name, DType::F32).config().tie_embeddings;
        for (format, write) in formats {
            let load = |tensors: &Tensors| {
                let folder = tempfile::tempdir().unwrap();
                std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
                write(folder.path(), tensors);
                load(folder.path())
            };
            load(&tensors).unwrap_or_else(|e| panic!("{name}, {format}: {e}"));
            let mut surplus = tensors.clone();
            surplus.insert(
                "model.layers.0.stray.weight".into(),
                Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap(),
            );
            let error = load(&surplus).unwrap_err().to_string();
            assert!(error.contains("unread: model.layers.0.stray.weight"), "{name}, {format}: {error}");
            let body: Vec<_> = tensors.keys().filter(|name| *name != "lm_head.weight").collect();
            let head = tensors.keys().filter(|name| *name == "lm_head.weight" && !tied);
            for missing in body.into_iter().step_by(7).chain(head) {
                let mut without = tensors.clone();
                without.remove(missing);
                if tied && missing.contains("embedding") {
                    without.remove("lm_head.weight"); // which would stand for it
                }
                let error = load(&without).unwrap_err().to_string();
                assert!(
                    error.contains(&format!("`{missing}`")),
                    "{name}, {format}, without {missing}: {error}"
                );
                without_one += 1;
                without_head += usize::from(missing == "lm_head.weight");
            }
        }
    }
    assert!(
        without_one > 300 && without_head == 3 * 13,
        "{without_one} without one, {without_head} without a head"
    );
}

/// The tensors of a checkpoint as they are stored.
fn tensors(folder: &Path) -> BTreeMap<String, Tensor> {
    let checkpoint = Checkpoint::open(&LocalDir::new(folder).unwrap()).unwrap();
    let read = |name: &str| (name.to_owned(), checkpoint.tensor(name, &Device::Cpu).unwrap());
    checkpoint.names().map(read).collect()
}

/// As in transformers: a head that is said to be the embedding is one of its own where a file has both and they differ, and where a
/// file has one of them it is the other.
#[test]
fn tied_heads() {
    let input = ids(1, 9, 61);
    let load = |name: &str, tied: bool, tensors: &BTreeMap<String, Tensor>| {
        let folder = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(path("models").join(name).join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["tie_word_embeddings"] = tied.into();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        torch::write(folder.path(), tensors, Order::Rows, 1);
        load(folder.path())
    };
    for (name, embedding) in
        [("mamba_tied", "backbone.embeddings.weight"), ("bamba_options", "model.embed_tokens.weight")]
    {
        let tensors = tensors(&path("models").join(name));
        assert!(!tensors.contains_key("lm_head.weight"), "{name}");
        let want = open(name, DType::F32).forward(&input, None).unwrap();
        let with = |head: Tensor| {
            let mut tensors = tensors.clone();
            tensors.insert("lm_head.weight".into(), head);
            tensors
        };
        let logits = |tied, tensors: &BTreeMap<String, Tensor>| {
            let model = load(name, tied, tensors).unwrap();
            (model.config().tie_embeddings, model.forward(&input, None).unwrap())
        };
        let both = with(tensors[embedding].clone());
        let (tied, same) = logits(true, &both);
        assert!(tied && max_error(&same, &want) == 0.0, "{name} with both");
        let mut alone = both.clone();
        alone.remove(embedding);
        let (tied, same) = logits(true, &alone);
        assert!(tied && max_error(&same, &want) == 0.0, "{name} with the head alone");

        let other = with((&tensors[embedding] * 0.5).unwrap());
        let (tied, half) = logits(true, &other);
        assert!(!tied && max_error(&half, &(&want * 0.5).unwrap()) <= 1e-5, "{name} with another head");
        assert_eq!(max_error(&half, &logits(false, &other).1), 0.0, "{name}");

        let error = load(name, false, &tensors).unwrap_err().to_string();
        assert!(error.contains("no tensor `lm_head.weight`"), "{name}: {error}");
        let error = load(name, false, &alone).unwrap_err().to_string();
        assert!(error.contains(&format!("`{embedding}`")), "{name}: {error}");
    }
}

fn load(folder: &Path) -> mamba_model::Result<Model> {
    Model::from_pretrained(&LocalDir::new(folder)?, DType::F32, &Device::Cpu)
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
    let error = model.forward(&input(&[1]), Some(&mut other)).unwrap_err().to_string();
    assert_eq!(error, "cache: belongs to a model of other sizes");
    let error = model.forward(&Tensor::new(&[1u32], &Device::Cpu).unwrap(), None).unwrap_err().to_string();
    assert_eq!(error, "input: ids have shape [1], expected (batch, seqlen)");
    assert_eq!(cache.position(), 0, "what failed must not count");

    let two = ids(2, 3, 61);
    let message = |batch: mamba_model::Result<Batch>| batch.unwrap_err().to_string();
    assert_eq!(
        message(Batch::left_padded(&two, &[1])),
        "input: there are 1 lengths, expected one for each of 2 rows"
    );
    assert_eq!(
        message(Batch::right_padded(&two, &[1, 4])),
        "input: a length is 4, expected at most seqlen 3"
    );
    assert_eq!(
        message(Batch::packed(&two.flatten_all().unwrap(), &[0, 4, 3, 6])),
        "input: cu_seqlens is [0, 4, 3, 6], expected to rise from 0 to 6"
    );
    assert_eq!(
        message(Batch::packed(&two, &[0, 6])),
        "input: packed ids have shape [2, 3], expected (total,) or (1, total)"
    );
    let mask = Tensor::new(&[[1u8, 0, 1], [1, 1, 1]], &Device::Cpu).unwrap();
    assert!(message(Batch::masked(&two, &mask)).contains("mask has padding between tokens"));
}
