//! Tokens per second of whole models, beside candle-transformers' models with the same weights, in one run:
//! `cargo bench -p mamba-benches --bench decode`.
//!
//! Weights are random and made in memory. The peers' logits are compared with ours first: a peer that computes
//! something else is reported as such. They run by turns, and the best of several rounds counts, since machines are noisy.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{mamba, mamba2};
use clap::Parser;
use mamba_model::Model;
use mamba_model::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};

/// Measures prompt reading and generation.
#[derive(Debug, Parser)]
struct Args {
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate.
    #[arg(long, default_value_t = 32)]
    generate: usize,
    /// Rounds; the best counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Dtypes of the weights; the peers have f32 only.
    #[arg(long, value_delimiter = ',', default_values_t = ["f32".to_owned(), "f16".into(), "bf16".into()])]
    dtypes: Vec<String>,
    /// Leave the peers out.
    #[arg(long)]
    alone: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A model with its state, as the benchmark drives it.
trait Subject {
    fn name(&self) -> &'static str;
    /// Forgets everything, reads the prompt and gives the logits of its last position.
    fn prefill(&mut self, ids: &[u32]) -> Result<Tensor>;
    fn step(&mut self, id: u32) -> Result<Tensor>;
}

struct Ours {
    model: Model,
    cache: mamba_model::InferenceCache,
}

impl Subject for Ours {
    fn name(&self) -> &'static str {
        "this"
    }
    fn prefill(&mut self, ids: &[u32]) -> Result<Tensor> {
        self.cache.reset()?;
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu)?;
        Ok(self.model.prefill(&ids, &mut self.cache)?)
    }
    fn step(&mut self, id: u32) -> Result<Tensor> {
        Ok(self.model.step(&Tensor::new(&[id], &Device::Cpu)?, &mut self.cache)?)
    }
}

/// The same weights in another dtype.
fn converted(model: &Model, dtype: DType) -> Result<Model> {
    let tensors = model.parameters().iter().cloned().collect();
    Ok(Model::new(model.config(), VarBuilder::from_tensors(tensors, dtype, &Device::Cpu))?)
}

struct PeerMamba1 {
    config: mamba::Config,
    model: mamba::Model,
    state: mamba::State,
}

impl Subject for PeerMamba1 {
    fn name(&self) -> &'static str {
        "candle-transformers"
    }
    /// Its model takes one token at a time.
    fn prefill(&mut self, ids: &[u32]) -> Result<Tensor> {
        self.state = mamba::State::new(1, &self.config, DType::F32, &Device::Cpu)?;
        let mut logits = self.step(ids[0])?;
        for &id in &ids[1..] {
            logits = self.step(id)?;
        }
        Ok(logits)
    }
    fn step(&mut self, id: u32) -> Result<Tensor> {
        Ok(self.model.forward(&Tensor::new(&[id], &Device::Cpu)?, &mut self.state)?)
    }
}

struct PeerMamba2 {
    config: mamba2::Config,
    model: mamba2::Model,
    state: mamba2::State,
}

impl Subject for PeerMamba2 {
    fn name(&self) -> &'static str {
        "candle-transformers"
    }
    /// Token by token, which is faster than its `forward_prefill` and takes any length.
    fn prefill(&mut self, ids: &[u32]) -> Result<Tensor> {
        self.state = mamba2::State::new(1, &self.config, DType::F32, &Device::Cpu)?;
        let mut logits = self.step(ids[0])?;
        for &id in &ids[1..] {
            logits = self.step(id)?;
        }
        Ok(logits)
    }
    fn step(&mut self, id: u32) -> Result<Tensor> {
        Ok(self.model.forward(&Tensor::new(&[id], &Device::Cpu)?, &mut self.state)?)
    }
}

/// Our parameters under the names of state-spaces, with the given name of the embedding.
fn peer_weights(model: &Model, embedding: &str) -> VarBuilder<'static> {
    let rename = |name: &str| {
        let mixer = name.replace(".0.mamba1.", ".mixer.").replace(".0.mamba2.", ".mixer.");
        mixer.replace(".0.norm.", ".norm.").replace("embedding.", &format!("{embedding}."))
    };
    let tensors: HashMap<String, Tensor> =
        model.parameters().iter().map(|(name, x)| (rename(name), x.clone())).collect();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

fn peer(model: &Model) -> Result<Box<dyn Subject>> {
    let config = model.config();
    let (d_model, n_layer, vocab_size) = (config.d_model, config.layers.len(), config.vocab_size);
    Ok(match &config.layers[0].branches[0].mixers[0] {
        (_, MixerSpec::Mamba1(_)) => {
            let config = mamba::Config { d_model, n_layer, vocab_size, pad_vocab_size_multiple: 8 };
            let state = mamba::State::new(1, &config, DType::F32, &Device::Cpu)?;
            let model = mamba::Model::new(&config, peer_weights(model, "embedding"))?;
            Box::new(PeerMamba1 { config, model, state })
        }
        (_, MixerSpec::Mamba2(c)) => {
            let (d_state, headdim, ngroups) = (c.d_state, c.headdim, c.ngroups);
            let config = mamba2::Config {
                d_model,
                n_layer,
                vocab_size,
                d_state,
                expand: 2,
                headdim,
                ngroups,
                pad_vocab_size_multiple: 16,
            };
            let state = mamba2::State::new(1, &config, DType::F32, &Device::Cpu)?;
            let model = mamba2::Model::new(&config, peer_weights(model, "embeddings"))?;
            Box::new(PeerMamba2 { config, model, state })
        }
        other => anyhow::bail!("no peer for {other:?}"),
    })
}

/// Tokens per second of the prompt and of generation.
fn measure(subject: &mut dyn Subject, ids: &[u32], generate: usize) -> Result<[f64; 2]> {
    let start = Instant::now();
    subject.prefill(ids)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let prefill = ids.len() as f64 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for i in 0..generate {
        subject.step(ids[i % ids.len()])?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    }
    Ok([prefill, generate as f64 / start.elapsed().as_secs_f64()])
}

fn main() -> Result<()> {
    // SAFETY: no other thread runs yet. Idle threads of candle would spin and starve the busy ones, ours and theirs.
    unsafe { std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0") };
    let args = Args::parse();
    let shapes = [
        ("mamba-130m", 50280, MixerSpec::Mamba1(Mamba1Config::new(768))),
        ("mamba2-130m", 50288, MixerSpec::Mamba2(Mamba2Config::new(768))),
    ];
    let ids: Vec<u32> = (0..args.prompt as u32).map(|i| i.wrapping_mul(2_654_435_761) % 50_000).collect();
    let mut rows = vec![];
    for (name, vocab, mixer) in shapes {
        let model = Model::random(&ModelConfig::uniform(vocab, 768, 24, mixer), 0, &Device::Cpu)?;
        for dtype in &args.dtypes {
            let dtype: DType = dtype.parse()?;
            let theirs = if args.alone || dtype != DType::F32 { None } else { Some(peer(&model)?) };
            let model = converted(&model, dtype)?;
            let cache = model.new_cache(1)?;
            let mut subjects: Vec<Box<dyn Subject>> = vec![Box::new(Ours { model, cache })];
            subjects.extend(theirs);

            let few = &ids[..ids.len().min(16)];
            let logits =
                subjects.iter_mut().map(|s| Ok(s.prefill(few)?.flatten_all()?.narrow(0, 0, vocab)?));
            let logits = logits.collect::<Result<Vec<Tensor>>>()?;
            let mut best = vec![[0.0f64; 2]; subjects.len()];
            for _ in 0..args.rounds {
                for (subject, best) in subjects.iter_mut().zip(&mut best) {
                    let now = measure(subject.as_mut(), &ids, args.generate)?;
                    *best = [best[0].max(now[0]), best[1].max(now[1])];
                }
            }
            for (i, subject) in subjects.iter().enumerate() {
                let gap =
                    (&logits[i] - &logits[0])?.to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar::<f32>()?;
                let scale = logits[0].to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar::<f32>()?;
                rows.push(serde_json::json!({
                    "model": name, "weights": dtype.as_str(), "backend": subject.name(), "prompt": args.prompt,
                    "prefill_tokens_per_s": best[i][0], "decode_tokens_per_s": best[i][1],
                    "prefill_ratio": best[0][0] / best[i][0], "decode_ratio": best[0][1] / best[i][1],
                    "logits_differ_by": f64::from(gap / scale),
                }));
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!(
        "| model | weights | backend | prefill {} (tokens/s) | decode (tokens/s) | ours is faster by | logits differ by |",
        args.prompt
    );
    println!("|---|---|---|---|---|---|---|");
    for row in rows {
        let n = |field: &str| row[field].as_f64().unwrap_or(f64::NAN);
        println!(
            "| {} | {} | {} | {:.1} | {:.1} | {:.2}, {:.2} | {:.0e} |",
            row["model"].as_str().unwrap_or_default(),
            row["weights"].as_str().unwrap_or_default(),
            row["backend"].as_str().unwrap_or_default(),
            n("prefill_tokens_per_s"),
            n("decode_tokens_per_s"),
            n("prefill_ratio"),
            n("decode_ratio"),
            n("logits_differ_by"),
        );
    }
    Ok(())
}
