//! Learns to tell apart what languages texts are in: `cargo run --release --example classify`.
//!
//! The texts are pieces of this repository's own files, read byte by byte; the last fifth of each language is kept apart to
//! see what was learnt. Nothing but candle beside the model, as in `train_minimal`.

#[path = "cli/mod.rs"]
mod cli;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss::cross_entropy};
use clap::Parser;
use mamba_model::config::{Mamba2Config, MixerSpec, ModelConfig};
use mamba_model::{Batch, Model, Pooling, SequenceClassifier};
use mamba_train::data::Permutation;

/// The labels, where their texts lie in the repository, and what these files' names end with.
const LANGUAGES: [(&str, &str, &str); 4] = [
    ("Rust", "crates", "rs"),
    ("CUDA", "kernels", "cu"),
    ("Python", "goldens/make", "py"),
    ("Markdown", ".", "md"),
];

/// Trains a classifier of texts in less than a minute, and shows how often it is right about texts that it did not see.
#[derive(Debug, Parser)]
struct Args {
    /// Passes over the training texts.
    #[arg(long, default_value_t = 3)]
    epochs: u64,
    /// Texts of a label.
    #[arg(long, default_value_t = 400)]
    texts: usize,
    /// Of initial values and of the order of the texts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A text to classify at the end.
    #[arg(long)]
    text: Option<String>,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let (mut training, mut held_out) = (vec![], vec![]);
    for (label, (name, folder, ending)) in LANGUAGES.iter().enumerate() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut texts = pieces(&read(&root.join(folder), ending)?);
        ensure!(texts.len() >= 5, "{name} has {} texts, expected 5", texts.len());
        let every = texts.len().div_ceil(args.texts.max(5));
        texts = texts.into_iter().step_by(every).collect();
        let last = texts.split_off(texts.len() * 4 / 5);
        training.extend(texts.into_iter().map(|text| (text, label as u32)));
        held_out.extend(last.into_iter().map(|text| (text, label as u32)));
    }

    let vars = VarMap::new();
    let classifier = classifier(&vars, args.seed)?;
    let mut optimizer = AdamW::new(vars.all_vars(), ParamsAdamW { lr: 3e-3, ..Default::default() })?;
    for epoch in 1..=args.epochs {
        let order = Permutation::new(training.len() as u64, args.seed + epoch);
        let shuffled: Vec<_> = (0..training.len()).map(|i| &training[order.at(i as u64) as usize]).collect();
        let mut sum = 0.0;
        for batch in shuffled.chunks(32) {
            let labels: Vec<u32> = batch.iter().map(|(_, label)| *label).collect();
            let texts: Vec<&str> = batch.iter().map(|(text, _)| text.as_str()).collect();
            let loss = cross_entropy(&scores(&classifier, &texts)?, &Tensor::new(labels, &Device::Cpu)?)?;
            optimizer.backward_step(&loss)?;
            sum += f64::from(loss.to_scalar::<f32>()?) * batch.len() as f64;
        }
        let right = right(&classifier, &held_out)?.iter().sum::<usize>();
        println!(
            "epoch {epoch} loss {:.3} accuracy {:.1} %",
            sum / training.len() as f64,
            100.0 * right as f64 / held_out.len() as f64
        );
    }
    for ((name, ..), (label, right)) in
        LANGUAGES.iter().zip(right(&classifier, &held_out)?.iter().enumerate())
    {
        let all = held_out.iter().filter(|(_, of)| *of == label as u32).count();
        println!("{name}: {right} of {all} texts that were kept apart");
    }
    if let Some(text) = args.text {
        ensure!(!text.is_empty(), "--text is empty");
        let probabilities = candle_nn::ops::softmax(&scores(&classifier, &[&text])?, 1)?.squeeze(0)?;
        for ((name, ..), probability) in LANGUAGES.iter().zip(probabilities.to_vec1::<f32>()?) {
            println!("{name} {:.1} %", 100.0 * probability);
        }
    }
    Ok(())
}

/// Two layers of Mamba-2 over bytes, with the initial values as published, and scores that begin at 0.
fn classifier(vars: &VarMap, seed: u64) -> Result<SequenceClassifier> {
    let mixer = Mamba2Config { d_state: 16, headdim: 16, chunk_size: 64, ..Mamba2Config::new(64) };
    let config = ModelConfig::uniform(256, 64, 2, MixerSpec::Mamba2(mixer));
    for (name, value) in Model::random(&config, seed, &Device::Cpu)?.parameters() {
        vars.data().lock().expect("nobody else").insert(name.clone(), Var::from_tensor(value)?);
    }
    let weights = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    Ok(SequenceClassifier::new(&config, LANGUAGES.len(), Pooling::Mean, weights)?)
}

/// The score of each label for each text, `(texts, labels)`: all texts one behind another, without padding.
fn scores(classifier: &SequenceClassifier, texts: &[&str]) -> Result<Tensor> {
    let bytes: Vec<u32> = texts.iter().flat_map(|text| text.bytes().map(u32::from)).collect();
    let mut ends = vec![0];
    ends.extend(texts.iter().scan(0, |end, text| {
        *end += text.len();
        Some(*end)
    }));
    Ok(classifier.forward(Batch::packed(&Tensor::new(bytes, &Device::Cpu)?, &ends)?)?)
}

/// Of each label, how many texts get the highest score for it.
fn right(classifier: &SequenceClassifier, texts: &[(String, u32)]) -> Result<[usize; LANGUAGES.len()]> {
    let mut right = [0; LANGUAGES.len()];
    for batch in texts.chunks(32) {
        let texts: Vec<&str> = batch.iter().map(|(text, _)| text.as_str()).collect();
        let best = scores(classifier, &texts)?.argmax(1)?.to_vec1::<u32>()?;
        for ((_, label), _) in batch.iter().zip(best).filter(|((_, label), best)| label == best) {
            right[*label as usize] += 1;
        }
    }
    Ok(right)
}

/// The text of all files with this ending in a folder and below, but for hidden folders and what was built.
fn read(folder: &Path, ending: &str) -> Result<String> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    let mut text = String::new();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && !path.is_symlink() && !name.starts_with('.') && name != "target" {
            text += &read(&path, ending)?;
        } else if path.extension().is_some_and(|e| e == ending) {
            text += &std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(text)
}

/// Lines together, until they are 60 bytes long or more.
fn pieces(text: &str) -> Vec<String> {
    let (mut pieces, mut piece) = (vec![], String::new());
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        piece += line;
        piece.push('\n');
        if piece.len() >= 60 {
            pieces.push(std::mem::take(&mut piece));
        }
    }
    pieces
}
