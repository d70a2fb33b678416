//! What the examples `train` and `finetune` share: flags, the loop, and everything that a person sees of it.

#[path = "memory.rs"]
mod memory;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use mamba_generate::{Generator, SamplingConfig, TextGenerator, TextOptions};
use mamba_model::{Model, Recompute};
use mamba_train::data::{
    Augmentation, Batching, Dataset, Encoding, Position, TokenFile, TokenSplits, encode,
};
use mamba_train::parallel::{Alone, Backend, Collective, World, connect, on_first};
use mamba_train::record::{Curve, EventWriter, JsonLines, loss_curve};
use mamba_train::{Decay, TrainOptions, TrainableModel, Trainer, latest, prune};
use serde_json::json;
use tokenizers::Tokenizer;

use crate::cli::Precision;

/// Flags of a training. Those of the recipe change what `--options` says, or the defaults.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Text files, a document each, or .jsonl files, a document a line.
    #[arg(long, required = true, num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// The field of a line that holds its text.
    #[arg(long, default_value = "text")]
    pub field: String,
    /// Text files to validate on; without any, the last part of the data.
    #[arg(long, num_args = 1..)]
    pub validation_data: Vec<PathBuf>,
    /// How large that last part is.
    #[arg(long, default_value_t = 0.05)]
    pub validation: f64,
    /// A token that ends each document, such as <|endoftext|>.
    #[arg(long)]
    pub end: Option<String>,
    /// Where everything goes: checkpoints, metrics, loss curve. A training that is there goes on.
    #[arg(long, default_value = "trained")]
    pub out: PathBuf,
    /// A file with options, as training.json has them under "options".
    #[arg(long)]
    pub options: Option<PathBuf>,
    /// Optimizer steps; 1000 from scratch.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Rows of a batch, of all processes together; a packed one has as many tokens at most as so many rows of full length.
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Batches whose gradients are added for one step.
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
    /// Tokens that a row predicts at most.
    #[arg(long, default_value_t = 256)]
    pub seqlen: usize,
    /// Fill short rows up, instead of packing: putting rows one behind another, each read as if it were alone.
    #[arg(long)]
    pub padded: bool,
    /// The highest learning rate; 1e-3 from scratch.
    #[arg(long)]
    pub lr: Option<f64>,
    /// The last learning rate; a hundredth of the highest if only that is given.
    #[arg(long)]
    pub min_lr: Option<f64>,
    /// Steps to the highest learning rate; 100 from scratch, or a tenth of the steps if that is less.
    #[arg(long)]
    pub warmup: Option<usize>,
    /// How the learning rate goes down; a cosine if nothing is said; wsd is over the last fifth of the steps.
    #[arg(long, value_enum)]
    pub decay: Option<DecayKind>,
    /// Weight decay of matrices; 0.1 from scratch.
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// The largest norm of gradients; 0 for no limit; 1 if nothing is said.
    #[arg(long)]
    pub clip: Option<f64>,
    /// Train a moving average too, which keeps so much of itself each step (0.999, say), and use it.
    #[arg(long)]
    pub ema: Option<f64>,
    /// How much of the embedding and of what each layer adds is left out while training.
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// Cut the text into rows elsewhere in each epoch.
    #[arg(long)]
    pub shift: bool,
    /// How likely a token is split into the two that it was merged of while training, and these again.
    #[arg(long, default_value_t = 0.0)]
    pub split_tokens: f64,
    /// Of initial values, of the order of the data, and of what is left out.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// What the model computes in; values, moments and sums are f32.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub dtype: Precision,
    /// auto, cpu, cuda or cuda:N; of several processes on a machine, auto and cuda give each another GPU.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// What several processes, started as by torchrun or srun, add their gradients over; auto is nccl on GPUs.
    #[arg(long, value_enum, default_value_t = BackendKind::Auto)]
    pub backend: BackendKind,
    /// Seconds after which a process that does not come, or does not answer, is given up.
    #[arg(long, default_value_t = 600.0)]
    pub timeout: f64,
    /// Compute layers again in backward, to need less memory.
    #[arg(long)]
    pub recompute: bool,
    /// Steps between validations.
    #[arg(long, default_value_t = 100)]
    pub eval_every: usize,
    /// Batches of a validation at most.
    #[arg(long, default_value_t = 50)]
    pub eval_batches: usize,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 500)]
    pub save_every: usize,
    /// Checkpoints that are kept.
    #[arg(long, default_value_t = 2)]
    pub keep: usize,
    /// The beginning of a text that is generated at each validation.
    #[arg(long)]
    pub sample: Option<String>,
}

/// Schedules by name.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum DecayKind {
    Constant,
    Linear,
    Cosine,
    Wsd,
}

/// Backends by name.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum BackendKind {
    Auto,
    Nccl,
    Tcp,
}

/// This process among those of a training: alone, unless the environment says otherwise.
pub struct Processes {
    world: Option<World>,
    /// Its device by name.
    pub device: String,
}

impl Processes {
    fn connect(&self, args: &RunArgs, device: &Device) -> Result<Arc<dyn Collective>> {
        let Some(world) = &self.world else { return Ok(Arc::new(Alone)) };
        let backend = match args.backend {
            BackendKind::Auto => Backend::Auto,
            BackendKind::Nccl => Backend::Nccl,
            BackendKind::Tcp => Backend::Tcp,
        };
        let timeout = Duration::try_from_secs_f64(args.timeout).context("--timeout")?;
        Ok(connect(world, backend, device, timeout)?)
    }

    /// Whose turn it is to do what processes of one machine do after each other, so that the later ones find it done: rank 0
    /// is the first, then comes one of each other machine, then the rest.
    fn turn(&self) -> usize {
        self.world.as_ref().map_or(0, |world| usize::from(world.rank > 0) + usize::from(world.local_rank > 0))
    }
}

impl RunArgs {
    /// Which process this is, and its device.
    pub fn processes(&self) -> Result<Processes> {
        let world = World::from_env()?;
        let device = match (&world, self.device.as_str()) {
            (Some(world), "auto") => world.gpu().map_or("cpu".into(), |gpu| format!("cuda:{gpu}")),
            (Some(world), "cuda") => format!("cuda:{}", world.gpu()?),
            (_, device) => device.to_owned(),
        };
        Ok(Processes { world, device })
    }

    /// The recipe: defaults, then the file, then flags.
    pub fn train_options(&self, defaults: TrainOptions) -> Result<TrainOptions> {
        let mut options = match &self.options {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
                serde_json::from_str(&text).with_context(|| path.display().to_string())?
            }
            None => defaults,
        };
        let schedule = &mut options.schedule;
        schedule.steps = self.steps.unwrap_or(schedule.steps);
        schedule.min_lr = self.min_lr.or(self.lr.map(|lr| lr / 100.0)).unwrap_or(schedule.min_lr);
        schedule.lr = self.lr.unwrap_or(schedule.lr);
        schedule.warmup = self.warmup.unwrap_or(schedule.warmup.min(schedule.steps / 10));
        schedule.decay = match self.decay {
            None => schedule.decay,
            Some(DecayKind::Constant) => Decay::Constant,
            Some(DecayKind::Linear) => Decay::Linear,
            Some(DecayKind::Cosine) => Decay::Cosine,
            Some(DecayKind::Wsd) => Decay::Wsd { last: schedule.steps / 5 },
        };
        options.optimizer.weight_decay = self.weight_decay.unwrap_or(options.optimizer.weight_decay);
        options.clip_norm = self.clip.unwrap_or(options.clip_norm);
        options.ema = self.ema.or(options.ema);
        Ok(options)
    }

    pub fn model_dtype(&self) -> DType {
        self.dtype.into()
    }

    fn recompute(&self) -> Recompute {
        if self.recompute { Recompute::Layers } else { Recompute::Nothing }
    }

    /// How rows differ from epoch to epoch.
    fn augmentation(&self, tokenizer: &Tokenizer) -> Result<Augmentation> {
        let splits = (self.split_tokens != 0.0).then(|| TokenSplits::new(tokenizer, self.split_tokens));
        Ok(Augmentation { shift: self.shift, splits: splits.transpose()? })
    }

    /// How rows come into batches.
    fn batching(&self) -> Batching {
        match self.padded {
            true => Batching::Padded { rows: self.batch },
            false => Batching::Packed { tokens: self.batch * self.seqlen },
        }
    }

    /// What processes of one training must have in common, beside its options.
    fn of_all(&self, training: &Dataset, validation: &Dataset) -> String {
        format!(
            "{:?}, --accumulate {}, --dropout {}, --shift {}, --split-tokens {}, --seed {}, --eval-every {}, --eval-batches {}, --save-every {}, {} and {} predictions",
            self.batching(),
            self.accumulate,
            self.dropout,
            self.shift,
            self.split_tokens,
            self.seed,
            self.eval_every,
            self.eval_batches,
            self.save_every,
            training.predictions(),
            validation.predictions(),
        )
    }

    /// Encodes the data, unless the output folder has it encoded already.
    fn datasets(&self, tokenizer: &Tokenizer) -> Result<(Dataset, Dataset)> {
        std::fs::create_dir_all(&self.out).with_context(|| self.out.display().to_string())?;
        let training = self.tokens(tokenizer, &self.data, "training")?;
        if self.validation_data.is_empty() {
            return Ok(Dataset::split(training, self.seqlen, self.validation)?);
        }
        let validation = self.tokens(tokenizer, &self.validation_data, "validation")?;
        let whole = |tokens: Arc<TokenFile>| {
            let end = tokens.len();
            Dataset::new(tokens, 0..end, self.seqlen)
        };
        Ok((whole(training)?, whole(validation)?))
    }

    fn tokens(&self, tokenizer: &Tokenizer, files: &[PathBuf], name: &str) -> Result<Arc<TokenFile>> {
        let end = match &self.end {
            Some(token) => {
                Some(tokenizer.token_to_id(token).with_context(|| format!("the tokenizer has no {token}"))?)
            }
            None => None,
        };
        // What the tokens depend on stands beside them.
        let mut made_of = vec![];
        for path in files {
            let data = std::fs::metadata(path).with_context(|| path.display().to_string())?;
            let changed = data.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            made_of.push(json!([path, data.len(), changed.map(|t| t.as_secs())]));
        }
        let text = tokenizer.to_string(false).map_err(|e| anyhow::anyhow!("{e}"))?;
        let vocabulary = text.bytes().fold(0u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let key =
            json!({ "files": made_of, "field": self.field, "end": end, "tokenizer": vocabulary }).to_string();
        let (path, note) =
            (self.out.join(format!("{name}.tokens")), self.out.join(format!("{name}.tokens.json")));
        if std::fs::read_to_string(&note).is_ok_and(|note| note == key) {
            return Ok(Arc::new(TokenFile::open(&path)?));
        }
        let bytes = made_of.iter().filter_map(|file| file[1].as_u64()).sum();
        let bar = bar(bytes, "encoding {wide_bar} {bytes}/{total_bytes} {eta}");
        let encoding = Encoding { tokenizer, end, field: &self.field };
        let tokens = encode(files, &encoding, &path, |read| bar.inc(read));
        bar.finish_and_clear();
        let tokens = Arc::new(tokens?);
        std::fs::write(&note, key)?;
        Ok(tokens)
    }
}

fn bar(len: u64, template: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len).with_style(style)
}

/// What a training is about.
pub struct Task<'a> {
    pub args: &'a RunArgs,
    pub processes: &'a Processes,
    pub tokenizer: &'a Tokenizer,
    pub model: TrainableModel,
    pub options: TrainOptions,
    /// Writes what others load into a folder.
    #[allow(clippy::type_complexity)]
    pub export: &'a dyn Fn(&TrainableModel, &Path) -> mamba_train::Result<()>,
}

/// Trains to the end, or until Ctrl-C, and leaves the result in `final`. Of several processes the first shows and writes.
pub fn run(task: Task) -> Result<()> {
    let Task { args, processes, tokenizer, model, options, export } = task;
    let model = model.with_recompute(args.recompute()).with_dropout(args.dropout, args.seed)?;
    let device = model.model().device().clone();
    let collective = processes.connect(args, &device)?;
    let first = collective.is_first();
    let (training, validation) = in_turn(&*collective, processes.turn(), || args.datasets(tokenizer))?;
    collective.agree("flags or data", &args.of_all(&training, &validation))?;
    let trained = model.parameters().elements();
    let mut trainer = Trainer::new(model, options)?.parallel(collective.clone())?;
    let augmentation = args.augmentation(tokenizer)?;
    let batches = training.shuffled(args.batching(), args.seed)?.augmented(augmentation);
    let mut batches = batches.share(trainer.share());
    let mut metrics = first.then(|| Metrics::open(&args.out)).transpose()?;
    if let Some(place) = on_first(&*collective, || anyhow::Ok(latest(&args.out)))? {
        batches.seek(trainer.resume(&place)?)?;
        if let Some(metrics) = &mut metrics {
            metrics.go_back_to(trainer.steps_done())?;
            eprintln!("going on from {}; another --out begins anew", place.display());
        }
    }
    if first {
        let processes = match collective.world_size() {
            1 => String::new(),
            size => format!(" in {size} processes"),
        };
        eprintln!(
            "{trained} numbers to train on {}; {} tokens to learn from, {} to validate on; {} steps of at most {} of them{processes}",
            if trainer.model().model().device().is_cuda() { "the GPU" } else { "the CPU" },
            training.predictions(),
            validation.predictions(),
            trainer.options().schedule.steps,
            args.batch * args.seqlen * args.accumulate.max(1),
        );
    }
    stop_on_ctrl_c();
    let steps = trainer.options().schedule.steps;
    let bar = match first {
        true => bar(steps as u64, "{wide_bar} {pos}/{len} {msg} {eta} left"),
        false => ProgressBar::hidden(),
    };
    bar.set_position(trainer.steps_done() as u64);
    let mut speed = Speed::new();
    let mut stopped = false;
    while !trainer.is_finished() {
        // One that is asked to stop takes the others along, all after the same step.
        stopped = collective.any(STOP.load(Relaxed))?;
        if stopped {
            break;
        }
        let parts = (0..args.accumulate.max(1))
            .map(|_| batches.next_batch(&device))
            .collect::<mamba_train::Result<Vec<_>>>()?;
        let report = trainer.step(&parts)?;
        let tokens_per_s = speed.after(report.tokens);
        bar.inc(1);
        let memory = memory::bytes(&device).map(|n| format!(" {},", HumanBytes(n))).unwrap_or_default();
        bar.set_message(format!("loss {:.4}, {tokens_per_s:.0} tokens/s,{memory}", report.loss));
        if let Some(metrics) = &mut metrics {
            metrics.step(&report, tokens_per_s)?;
        }
        if report.skipped && first {
            bar.suspend(|| eprintln!("step {}: a gradient is not a number, skipped", report.step));
        }
        let last = trainer.is_finished();
        if report.step.is_multiple_of(args.eval_every.max(1)) || last {
            let loss = trainer.evaluate(&validation, args.batching(), args.eval_batches)?;
            if let Some(metrics) = &mut metrics {
                metrics.validation(report.step, loss)?;
                let line = format!(
                    "step {} loss {:.4} validation {loss:.4} lr {:.2e} norm {:.2} {tokens_per_s:.0} tokens/s",
                    report.step, report.loss, report.lr, report.grad_norm
                );
                let text = sample(&mut trainer, tokenizer, args)?;
                bar.suspend(|| println!("{line}{}", text.map(|t| format!("\n  {t}")).unwrap_or_default()));
            }
            speed = Speed::new();
        }
        if report.step.is_multiple_of(args.save_every.max(1)) && !last {
            save(&mut trainer, batches.position(), args, tokenizer, export)?;
        }
    }
    bar.finish_and_clear();
    if stopped && first {
        eprintln!("stopping; Ctrl-C once more leaves the last steps unsaved");
    }
    let place = save(&mut trainer, batches.position(), args, tokenizer, export)?;
    let Some(mut metrics) = metrics else { return Ok(()) };
    metrics.curve(&args.out.join("loss.svg"))?;
    if !trainer.is_finished() {
        println!(
            "stopped after step {}; the same command goes on from {}",
            trainer.steps_done(),
            place.display()
        );
        return Ok(());
    }
    let result = args.out.join("final");
    std::fs::create_dir_all(&result)?;
    trainer.with_average(|trainer| export(trainer.model(), &result))?;
    save_tokenizer(tokenizer, &result)?;
    println!(
        "the result is in {}, its loss curve in {}",
        result.display(),
        args.out.join("loss.svg").display()
    );
    Ok(())
}

fn save(
    trainer: &mut Trainer,
    position: Position,
    args: &RunArgs,
    tokenizer: &Tokenizer,
    export: &dyn Fn(&TrainableModel, &Path) -> mamba_train::Result<()>,
) -> Result<PathBuf> {
    let place = trainer.save(&args.out, position, |folder| export(trainer.model(), folder))?;
    if trainer.collective().is_first() {
        save_tokenizer(tokenizer, &place)?;
        prune(&args.out, args.keep.max(1))?;
    }
    Ok(place)
}

/// Lets processes do something one turn after another; what fails for one fails for all.
fn in_turn<T>(collective: &dyn Collective, turn: usize, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let (mut f, mut outcome) = (Some(f), None);
    for now in 0..3 {
        if now == turn {
            outcome = f.take().map(|f| f());
        }
        let failed = collective.any(matches!(outcome, Some(Err(_))))?;
        if failed {
            break;
        }
    }
    outcome.unwrap_or_else(|| bail!("another process failed"))
}

fn save_tokenizer(tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    tokenizer.save(folder.join("tokenizer.json"), false).map_err(|e| anyhow::anyhow!("{e}"))
}

/// A few words of the model as it is.
fn sample(trainer: &mut Trainer, tokenizer: &Tokenizer, args: &RunArgs) -> Result<Option<String>> {
    let Some(prompt) = &args.sample else { return Ok(None) };
    let encoding = tokenizer.encode(prompt.as_str(), false).map_err(|e| anyhow::anyhow!("{e}"))?;
    ensure!(!encoding.is_empty(), "--sample: no token");
    let model: Model = trainer.with_average(|trainer| trainer.model().view())?;
    let sampling = SamplingConfig { temperature: 0.8, seed: args.seed, ..Default::default() }.build()?;
    let tokens = Generator::builder(&model)
        .prompt(encoding.get_ids())
        .sampling(sampling)
        .max_new_tokens(60)
        .build()?;
    let mut text = prompt.clone();
    for piece in TextGenerator::new(tokens, tokenizer, TextOptions::default())? {
        text += &piece?.to_string();
    }
    Ok(Some(text.replace('\n', "\n  ")))
}

/// Whether this process was asked to stop.
static STOP: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C asks to stop, and so does SIGTERM, as schedulers send it; a second time it ends the program at once.
fn stop_on_ctrl_c() {
    extern "C" fn asked(signal: libc::c_int) {
        STOP.store(true, Relaxed);
        // SAFETY: `signal` may be called within a handler; the default action needs none of our memory.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let handler: extern "C" fn(libc::c_int) = asked;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler stores into an atomic and calls `signal`, nothing else.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Tokens a second since the last interruption.
struct Speed {
    start: Instant,
    tokens: usize,
}

impl Speed {
    fn new() -> Self {
        Self { start: Instant::now(), tokens: 0 }
    }

    fn after(&mut self, tokens: usize) -> f64 {
        self.tokens += tokens;
        self.tokens as f64 / self.start.elapsed().as_secs_f64().max(1e-9)
    }
}

/// Where numbers go: lines of JSON, TensorBoard, and a curve.
struct Metrics {
    lines: JsonLines,
    events: EventWriter,
}

impl Metrics {
    fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        Ok(Self {
            lines: JsonLines::append(folder.join("metrics.jsonl"))?,
            events: EventWriter::create(folder)?,
        })
    }

    /// Forgets what came after the step that a training goes on from.
    fn go_back_to(&mut self, step: usize) -> Result<()> {
        Ok(self.lines.retain(|line| line["step"].as_u64().is_some_and(|s| s <= step as u64))?)
    }

    fn step(&mut self, report: &mamba_train::StepReport, tokens_per_s: f64) -> Result<()> {
        let mut line = serde_json::to_value(report)?;
        line["tokens_per_s"] = json!(tokens_per_s);
        self.lines.write(&line)?;
        let step = report.step as u64;
        for (tag, value) in [("loss/train", report.loss), ("lr", report.lr), ("grad_norm", report.grad_norm)]
        {
            self.events.scalar(step, tag, value)?;
        }
        Ok(self.events.scalar(step, "tokens_per_s", tokens_per_s)?)
    }

    fn validation(&mut self, step: usize, loss: f64) -> Result<()> {
        self.lines.write(&json!({ "step": step, "validation_loss": loss }))?;
        self.events.scalar(step as u64, "loss/validation", loss)?;
        Ok(self.events.flush()?)
    }

    fn curve(&mut self, path: &Path) -> Result<()> {
        let lines = self.lines.read()?;
        let points = |field: &str| {
            let point = |line: &serde_json::Value| Some((line["step"].as_f64()?, line[field].as_f64()?));
            lines.iter().filter_map(point).collect()
        };
        let curves = [
            Curve { name: "training", points: points("loss") },
            Curve { name: "validation", points: points("validation_loss") },
        ];
        Ok(std::fs::write(path, loss_curve("loss, nats a token", &curves))?)
    }
}
