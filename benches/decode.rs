//! Times of whole models on the CPU, beside candle-transformers' models with the same weights, in one run:
//! `cargo bench -p mamba-benches --bench decode`.
//!
//! `prefill 512` is a prompt of so many tokens, `decode` a token behind it, both until their logits are there; `weights_gb_per_s` is how fast a token
//! reads all weights, which binds it. Each model runs in a process of its own, whose most memory is `peak_mib`. Weights are random; with `--save FOLDER` they go there as GGUF files and nothing is measured, and with `--load FOLDER` they are
//! those: `benches/peers/cpu.sh` measures llama.cpp with the same files. The logits of candle-transformers are compared with ours first. They
//! run by turns, and the best of several rounds counts, since machines are noisy.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{mamba, mamba2};
use clap::Parser;
use mamba_model::Model;
use mamba_model::checkpoint::LocalDir;
use mamba_model::checkpoint::gguf::{self, GgmlType, Metadata};
use mamba_model::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use serde_json::{Value, json};

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
    /// Models, of mamba-130m and mamba2-130m.
    #[arg(long, value_delimiter = ',', default_values_t = ["mamba-130m".to_owned(), "mamba2-130m".into()])]
    models: Vec<String>,
    /// Leave the peers out.
    #[arg(long)]
    alone: bool,
    /// Write the weights here, as `MODEL.DTYPE.gguf`, and measure nothing.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Read the weights here, as another run has written them.
    #[arg(long)]
    load: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// The process of one model.
    #[arg(long, hide = true)]
    one: bool,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A model with its state, as the benchmark drives it.
trait Subject {
    /// Forgets everything, reads the prompt and gives the logits of its last position.
    fn prefill(&mut self, ids: &[u32]) -> Result<Tensor>;
    fn step(&mut self, id: u32) -> Result<Tensor>;
}

struct Ours {
    model: Model,
    cache: mamba_model::InferenceCache,
}

impl Subject for Ours {
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

/// Seconds for the prompt and for a token.
fn measure(subject: &mut dyn Subject, ids: &[u32], generate: usize) -> Result<[f64; 2]> {
    let start = Instant::now();
    subject.prefill(ids)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let prefill = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for i in 0..generate {
        subject.step(ids[i % ids.len()])?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    }
    Ok([prefill, start.elapsed().as_secs_f64() / generate as f64])
}

/// The most memory that this process had, in MiB, where the system says it.
fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

/// What a program says, or nothing.
fn ask(program: &str, arguments: &[&str]) -> Option<String> {
    let output =
        Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = info.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(name.trim_start_matches([' ', '\t', ':']).to_owned())
}

fn config(name: &str) -> Result<ModelConfig> {
    let (vocab, mixer) = match name {
        "mamba-130m" => (50280, MixerSpec::Mamba1(Mamba1Config::new(768))),
        "mamba2-130m" => (50288, MixerSpec::Mamba2(Mamba2Config::new(768))),
        _ => anyhow::bail!("no model {name}, expected mamba-130m or mamba2-130m"),
    };
    Ok(ModelConfig::uniform(vocab, 768, 24, mixer))
}

/// Ours and, where there is one, the peer's.
struct Rows {
    ours: Vec<Value>,
    candle_transformers: Vec<Value>,
}

/// One model of one dtype, in this process.
fn run(args: &Args, name: &str, dtype: DType) -> Result<Rows> {
    let file = |folder: &PathBuf| folder.join(format!("{name}.{}.gguf", dtype.as_str()));
    let random = || Ok::<_, anyhow::Error>(Model::random(&config(name)?, 0, &Device::Cpu)?);
    let with_peer = !args.alone && dtype == DType::F32;
    let model = match &args.load {
        Some(folder) => Model::from_pretrained(&LocalDir::new(file(folder))?, dtype, &Device::Cpu)?,
        None => converted(&random()?, dtype)?,
    };
    let vocab = model.config().vocab_size;
    let bytes = |(_, x): &(String, Tensor)| x.elem_count() * x.dtype().size_in_bytes();
    let weights: usize = model.parameters().iter().map(bytes).sum();
    let theirs = if with_peer { Some(peer(&model)?) } else { None };
    let cache = model.new_cache(1)?;
    let mut subjects: Vec<Box<dyn Subject>> = vec![Box::new(Ours { model, cache })];
    subjects.extend(theirs);

    let ids: Vec<u32> = (0..args.prompt as u32).map(|i| i.wrapping_mul(2_654_435_761) % 50_000).collect();
    let few = &ids[..ids.len().min(16)];
    let logits = subjects.iter_mut().map(|s| Ok(s.prefill(few)?.flatten_all()?.narrow(0, 0, vocab)?));
    let logits = logits.collect::<Result<Vec<Tensor>>>()?;
    let mut best = vec![[f64::INFINITY; 2]; subjects.len()];
    for _ in 0..args.rounds {
        for (subject, best) in subjects.iter_mut().zip(&mut best) {
            let now = measure(subject.as_mut(), &ids, args.generate)?;
            *best = [best[0].min(now[0]), best[1].min(now[1])];
        }
    }
    let mut rows = Rows { ours: vec![], candle_transformers: vec![] };
    for (i, _) in subjects.iter().enumerate() {
        let gap = (&logits[i] - &logits[0])?.to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let scale = logits[0].to_dtype(DType::F32)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let to = if i == 0 { &mut rows.ours } else { &mut rows.candle_transformers };
        for (what, tokens, seconds) in
            [(format!("prefill {}", args.prompt), args.prompt, best[i][0]), ("decode".into(), 1, best[i][1])]
        {
            let mut row = json!({
                "case": format!("{name} {} {what}", dtype.as_str()), "ms": 1e3 * seconds,
                "tokens_per_s": tokens as f64 / seconds,
            });
            if tokens == 1 {
                row["weights_gb_per_s"] = json!(1e-9 * weights as f64 / seconds);
            }
            if i > 0 {
                row["logits_differ_by"] = json!(f64::from(gap / scale));
            }
            if subjects.len() == 1 {
                row["peak_mib"] = json!(peak_mib());
            }
            to.push(row);
        }
    }
    Ok(rows)
}

/// Each in a process of its own.
fn run_alone(args: &Args, name: &str, dtype: &str) -> Result<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--one", "--models", name, "--dtypes", dtype]);
    for (option, value) in
        [("--prompt", args.prompt), ("--generate", args.generate), ("--rounds", args.rounds)]
    {
        command.args([option, &value.to_string()]);
    }
    command.args(args.alone.then_some("--alone"));
    if let Some(folder) = &args.load {
        command.arg("--load").arg(folder);
    }
    let output = command.stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{name} {dtype} failed");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn main() -> Result<()> {
    // SAFETY: no other thread runs yet. Idle threads of candle would spin and starve the busy ones, ours and theirs.
    unsafe { std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0") };
    let args = Args::parse();
    let cases: Vec<_> =
        args.models.iter().flat_map(|name| args.dtypes.iter().map(move |dtype| (name, dtype))).collect();
    if args.one {
        let [(name, dtype)] = &*cases else { anyhow::bail!("`--one` is of one model and one dtype") };
        let rows = run(&args, name, dtype.parse()?)?;
        println!("{}", json!({ "ours": rows.ours, "candle_transformers": rows.candle_transformers }));
        return Ok(());
    }
    if let Some(folder) = &args.save {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        for (name, dtype) in cases {
            let model = converted(&Model::random(&config(name)?, 0, &Device::Cpu)?, dtype.parse()?)?;
            let kind: GgmlType = dtype.parse().map_err(|_| anyhow::anyhow!("no {dtype} in GGUF"))?;
            let mut extra = Metadata::default();
            extra.set("tokenizer.ggml.model", gguf::Value::String("no_vocab".into()));
            model.save_gguf(folder.join(format!("{name}.{dtype}.gguf")), kind, extra, |_| {})?;
        }
        return Ok(());
    }
    let (mut ours, mut theirs) = (vec![], vec![]);
    for (name, dtype) in cases {
        let mut rows = run_alone(&args, name, dtype)?;
        for (to, key) in [(&mut ours, "ours"), (&mut theirs, "candle_transformers")] {
            to.extend(rows[key].as_array_mut().map(std::mem::take).unwrap_or_default());
        }
    }
    let device = json!({
        "commit": ask("git", &["rev-parse", "--short", "HEAD"]), "rustc": ask("rustc", &["--version"]),
        "device": processor(), "isa": mamba_ops::simd::Isa::best().name(),
        "threads": rayon::current_num_threads(),
    });
    if args.json {
        let mut all = device;
        (all["rows"], all["candle_transformers"]) = (json!(ours), json!(theirs));
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{device}\n\n| case | ms | tokens/s | GB/s | MiB | candle-transformers | logits differ by |");
    println!("|---|---|---|---|---|---|---|");
    for row in ours {
        let number = |row: &Value, field: &str, digits: usize| match row[field].as_f64() {
            Some(value) => format!("{value:.digits$}"),
            None => "-".into(),
        };
        let peer = theirs.iter().find(|peer| peer["case"] == row["case"]).unwrap_or(&Value::Null);
        let ratio = peer["ms"]
            .as_f64()
            .zip(row["ms"].as_f64())
            .map(|(peer, ours)| format!(" ({:.2} times)", peer / ours));
        println!(
            "| {} | {} | {} | {} | {} | {}{} | {} |",
            row["case"].as_str().unwrap_or_default(),
            number(&row, "ms", 2),
            number(&row, "tokens_per_s", 1),
            number(&row, "weights_gb_per_s", 1),
            number(&row, "peak_mib", 0),
            number(peer, "ms", 2),
            ratio.unwrap_or_default(),
            peer["logits_differ_by"].as_f64().map_or("-".into(), |gap| format!("{gap:.0e}")),
        );
    }
    Ok(())
}
