//! Several processes, most often as threads, against one.

#[cfg(feature = "cuda")]
mod cuda;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use mamba_model::Model;
use mamba_model::config::{LayerSpec, Mamba1Config, Mamba2Config, MixerSpec, MlpConfig, ModelConfig};
use mamba_train::data::{Batch, Batches, Batching, Dataset, Position, Share, TokenWriter};
use mamba_train::parallel::{Alone, Collective, Ring, World, on_first};
use mamba_train::{Schedule, StepReport, TrainOptions, TrainableModel, Trainer, latest};

use crate::bits;
use crate::support::random::Random;
use crate::support::tolerance::relative_rms;

const VOCABULARY: u32 = 40;

fn config() -> ModelConfig {
    let mamba1 = MixerSpec::Mamba1(Mamba1Config { d_state: 4, ..Mamba1Config::new(16) });
    let mamba2 = MixerSpec::Mamba2(Mamba2Config { d_state: 8, headdim: 8, ..Mamba2Config::new(16) });
    let mlp = MixerSpec::Mlp(MlpConfig { bias: false, ..MlpConfig::new(128) });
    let layers = vec![LayerSpec::new([mamba1, mlp]), LayerSpec::new([mamba2])];
    ModelConfig {
        layers,
        ..ModelConfig::uniform(VOCABULARY as usize, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)))
    }
}

/// Documents of all lengths, so that rows and batches are ragged.
fn data(folder: &Path) -> Dataset {
    let mut random = Random::new(11);
    let mut writer = TokenWriter::create(folder.join("x.tokens")).unwrap();
    for length in (0..60).map(|i| 2 + i * 7 % 23) {
        writer.begin_document();
        writer.push(&random.ids(length, VOCABULARY)).unwrap();
    }
    let tokens = Arc::new(writer.finish().unwrap());
    let end = tokens.len();
    Dataset::new(tokens, 0..end, 12).unwrap()
}

fn options() -> TrainOptions {
    let schedule = Schedule { lr: 5e-3, warmup: 2, steps: 8, ..Schedule::default() };
    TrainOptions { schedule, ema: Some(0.8), ..TrainOptions::default() }
}

fn trainer_in(dtype: DType, seed: u64) -> Trainer {
    let start = Model::random(&config(), seed, &Device::Cpu).unwrap();
    Trainer::new(TrainableModel::new(&start, dtype).unwrap(), options()).unwrap()
}

fn trainer(seed: u64) -> Trainer {
    trainer_in(DType::F32, seed)
}

fn all_bits(trainer: &Trainer) -> Vec<Vec<u64>> {
    trainer.model().parameters().iter().map(|p| bits(p.value())).collect()
}

/// Each rank on a thread, with what it gave.
fn ranks<T: Send>(size: usize, f: impl Fn(Arc<dyn Collective>) -> T + Sync) -> Vec<T> {
    let rings: Vec<Arc<dyn Collective>> = match size {
        1 => vec![Arc::new(Alone)],
        _ => Ring::threads(size)
            .unwrap()
            .into_iter()
            .map(|ring| Arc::new(ring) as Arc<dyn Collective>)
            .collect(),
    };
    let f = &f;
    std::thread::scope(|scope| {
        // What backward needs of a stack is more than a thread has.
        let spawn = |ring| {
            std::thread::Builder::new().stack_size(1 << 26).spawn_scoped(scope, move || f(ring)).unwrap()
        };
        let threads: Vec<_> = rings.into_iter().map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

struct Trained {
    reports: Vec<StepReport>,
    validation: f64,
    position: Position,
    values: Vec<(String, Tensor)>,
    bits: Vec<Vec<u64>>,
}

/// Steps of two batches each.
fn steps(trainer: &mut Trainer, batches: &mut Batches, count: usize) -> Vec<StepReport> {
    steps_on(trainer, batches, count, &Device::Cpu)
}

fn steps_on(trainer: &mut Trainer, batches: &mut Batches, count: usize, device: &Device) -> Vec<StepReport> {
    let mut step = |_| {
        let parts: Vec<Batch> = (0..2).map(|_| batches.next_batch(device).unwrap()).collect();
        trainer.step(&parts).unwrap()
    };
    (0..count).map(&mut step).collect()
}

fn train(dtype: DType, data: &Dataset, batching: Batching, collective: Arc<dyn Collective>) -> Trained {
    // Only rank 0 begins with the right values: the others take its.
    let mut trainer = trainer_in(dtype, 5 + collective.rank() as u64).parallel(collective).unwrap();
    let mut batches = data.shuffled(batching, 3).unwrap().share(trainer.share());
    let reports = steps(&mut trainer, &mut batches, 6);
    Trained {
        reports,
        validation: trainer.evaluate(data, batching, 7).unwrap(),
        position: batches.position(),
        values: trainer.model().parameters().snapshot().unwrap().into_iter().collect(),
        bits: all_bits(&trainer),
    }
}

/// Whether the steps are the same but for rounding, which Adam makes large where a gradient is next to nothing.
fn close(dtype: DType, a: &[StepReport], b: &[StepReport]) {
    let (loss, norm) = if dtype == DType::F64 { (1e-9, 1e-8) } else { (1e-4, 1e-2) };
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!((a.step, a.tokens, a.lr, a.skipped), (b.step, b.tokens, b.lr, b.skipped));
        assert!((a.loss - b.loss).abs() < loss, "{a:?} {b:?}");
        assert!((a.grad_norm / b.grad_norm - 1.0).abs() < norm, "{a:?} {b:?}");
    }
    // Before the first step there is nothing to make large.
    assert!((a[0].loss - b[0].loss).abs() < 1e-6, "{a:?} {b:?}");
}

/// The losses of one process with the same batches, whatever the number of processes; and the same bits in all of them.
#[test]
fn several_ranks_train_like_one() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    for (batching, dtype) in [
        (Batching::Packed { tokens: 40 }, DType::F64),
        (Batching::Padded { rows: 3 }, DType::F64),
        (Batching::Packed { tokens: 40 }, DType::F32),
        (Batching::Packed { tokens: 40 }, DType::BF16),
    ] {
        let one = ranks(1, |alone| train(dtype, &data, batching, alone)).remove(0);
        for size in [2, 4, 7] {
            let case = format!("{size} ranks, {dtype:?}, {batching:?}");
            let all = ranks(size, |ring| train(dtype, &data, batching, ring));
            for rank in &all {
                assert_eq!(rank.reports, all[0].reports, "{case}");
                assert_eq!(rank.validation, all[0].validation, "{case}");
                assert_eq!(rank.bits, all[0].bits, "{case}");
            }
            let again = ranks(size, |ring| train(dtype, &data, batching, ring));
            assert_eq!(again[0].bits, all[0].bits, "{case}, again");
            assert_eq!(all[0].position, one.position, "{case}");
            if dtype == DType::BF16 {
                continue; // rounds to other numbers where batches are cut otherwise
            }
            close(dtype, &all[0].reports, &one.reports);
            assert!((all[0].validation - one.validation).abs() < 1e-4);
            for ((name, a), (_, b)) in all[0].values.iter().zip(&one.values) {
                let error = relative_rms(a, b);
                assert!(error < if dtype == DType::F64 { 1e-6 } else { 1e-2 }, "{case}, {name}: {error}");
            }
        }
    }
}

/// Every row of a batch in one share, shares about equal, and the position that of the whole.
#[test]
fn shares_are_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let mut uneven = 0;
    for batching in [Batching::Packed { tokens: 60 }, Batching::Padded { rows: 8 }] {
        for of in [1, 2, 3, 4, 11] {
            let mut whole = data.shuffled(batching, 1).unwrap();
            let share = |rank| data.shuffled(batching, 1).unwrap().share(Share { rank, of });
            let mut shares: Vec<Batches> = (0..of).map(share).collect();
            for _ in 0..20 {
                let batch = whole.next_batch(&Device::Cpu).unwrap();
                let parts: Vec<Batch> =
                    shares.iter_mut().map(|share| share.next_batch(&Device::Cpu).unwrap()).collect();
                assert!(shares.iter().all(|share| share.position() == whole.position()));
                let rows = |batch: &Batch| match (&batch.cu_seqlens, batch.inputs.dims()) {
                    (Some(cu_seqlens), _) => cu_seqlens.len() - 1,
                    (None, dims) => dims[0],
                };
                assert_eq!(parts.iter().map(rows).sum::<usize>(), rows(&batch));
                assert_eq!(parts.iter().map(|part| part.count).sum::<usize>(), batch.count);
                let targets = |batch: &Batch| -> Vec<i64> {
                    let targets = batch.targets.flatten_all().unwrap().to_vec1::<i64>().unwrap();
                    targets.into_iter().filter(|target| *target >= 0).collect()
                };
                assert_eq!(parts.iter().flat_map(targets).collect::<Vec<_>>(), targets(&batch));
                match batching {
                    Batching::Padded { .. } => {
                        assert!(parts.iter().all(|part| rows(part).abs_diff(rows(&batch) / of) <= 1))
                    }
                    Batching::Packed { .. } => {
                        assert!(
                            parts.iter().all(|part| part.count.abs_diff(batch.count / of) <= data.seqlen())
                        )
                    }
                }
                uneven += usize::from(parts.iter().any(|part| part.count != parts[0].count));
            }
            let in_order = |share| data.in_order_share(batching, share, &Device::Cpu).unwrap();
            let all = in_order(Share::default()).count();
            let predictions =
                |rank| in_order(Share { rank, of }).map(|batch| batch.unwrap().count).sum::<usize>();
            assert_eq!((0..of).map(predictions).sum::<usize>() as u64, data.predictions());
            assert!((0..of).all(|rank| in_order(Share { rank, of }).count() == all));
        }
    }
    assert!(uneven > 50, "{uneven}");
}

/// A ring saves, another one of more or fewer processes goes on; only rank 0 needs to see the files, and only it writes.
#[test]
fn trainings_go_on_with_another_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let batching = Batching::Packed { tokens: 50 };
    let one = ranks(1, |alone| train(DType::F32, &data, batching, alone)).remove(0);
    let out = folder.path().join("out");
    ranks(2, |ring| {
        let first = ring.is_first();
        let mut trainer = trainer(5).parallel(ring).unwrap();
        let mut batches = data.shuffled(batching, 3).unwrap().share(trainer.share());
        steps(&mut trainer, &mut batches, 3);
        // Were rank 1 to write, it would be here.
        let place = if first { out.clone() } else { folder.path().join("elsewhere") };
        trainer.save(&place, batches.position(), |_| Ok(())).unwrap();
    });
    assert!(!folder.path().join("elsewhere").exists());
    let place = latest(&out).unwrap();
    for size in [1, 2, 3] {
        let all = ranks(size, |ring| {
            let place = if ring.is_first() { place.clone() } else { "nowhere".into() };
            let mut trainer = trainer(9).parallel(ring).unwrap();
            let position = trainer.resume(&place).unwrap();
            assert_eq!(trainer.steps_done(), 3);
            let mut batches = data.shuffled(batching, 3).unwrap().share(trainer.share());
            batches.seek(position).unwrap();
            let reports = steps(&mut trainer, &mut batches, 3);
            (reports, all_bits(&trainer), trainer.with_average(|trainer| Ok(all_bits(trainer))).unwrap())
        });
        close(DType::F32, &all[0].0, &one.reports[3..]);
        assert!(all.iter().all(|rank| *rank == all[0]));
        assert_ne!(all[0].1, all[0].2, "the moving average is one");
    }
    // What fails for rank 0 fails for all.
    for message in ranks(3, |ring| {
        trainer(5).parallel(ring).unwrap().resume(Path::new("nowhere")).unwrap_err().to_string()
    }) {
        assert!(message.contains("nowhere"), "{message}");
    }
    std::fs::write(folder.path().join("file"), "").unwrap();
    for message in ranks(2, |ring| {
        let trainer = trainer(5).parallel(ring).unwrap();
        trainer.save(&folder.path().join("file"), Position::default(), |_| Ok(())).unwrap_err().to_string()
    }) {
        assert!(message.contains("file"), "{message}");
    }
}

/// A gradient that is not a number anywhere is skipped everywhere.
#[test]
fn ranks_skip_together() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    ranks(3, |ring| {
        let last = ring.rank() == 2;
        let mut trainer = trainer(5).parallel(ring).unwrap();
        let mut batches = data.shuffled(Batching::Packed { tokens: 60 }, 3).unwrap().share(trainer.share());
        let before = all_bits(&trainer);
        let parameter = trainer.model().parameters().get("norm_f.weight").unwrap().clone();
        let good = parameter.value().copy().unwrap();
        if last {
            parameter.set(&(&good * f64::NAN).unwrap()).unwrap();
        }
        assert!(trainer.step(&[batches.next_batch(&Device::Cpu).unwrap()]).unwrap().skipped);
        parameter.set(&good).unwrap();
        assert_eq!(all_bits(&trainer), before);
        assert!(!trainer.step(&[batches.next_batch(&Device::Cpu).unwrap()]).unwrap().skipped);
        assert_ne!(all_bits(&trainer), before);
    });
}

#[test]
fn ranks_that_differ_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let messages = ranks(2, |ring| {
        let start = Model::random(&config(), 5, &Device::Cpu).unwrap();
        let options = TrainOptions { clip_norm: ring.rank() as f64, ..options() };
        let trainer = Trainer::new(TrainableModel::new(&start, DType::F32).unwrap(), options).unwrap();
        trainer.parallel(ring).unwrap_err().to_string()
    });
    let expected =
        "parallel training: rank 0 of 2: 1 of 2 ranks differ from rank 0 in the options; rank 0 has {";
    assert!(messages[0].starts_with(expected), "{messages:?}");
    assert!(
        messages[1].contains("\"clip_norm\":0.0") && messages[1].contains("\"clip_norm\":1.0"),
        "{messages:?}"
    );
    // Frozen weights are those of each process.
    let messages = ranks(2, |ring| {
        let start = Model::random(&config(), ring.rank() as u64, &Device::Cpu).unwrap();
        let model = TrainableModel::only(&start, DType::F32, |name| name.contains("norm")).unwrap();
        Trainer::new(model, options()).unwrap().parallel(ring).unwrap_err().to_string()
    });
    assert!(
        messages.iter().all(|message| message.contains("differ from rank 0 in the weights of the model")),
        "{messages:?}"
    );
    // Values that drifted apart are not saved.
    let messages = ranks(2, |ring| {
        let rank = ring.rank() as f64;
        let trainer = trainer(5).parallel(ring).unwrap();
        let parameter = trainer.model().parameters().get("norm_f.weight").unwrap();
        let nudge = Tensor::full(rank * 1e-6, parameter.value().dims(), &Device::Cpu).unwrap();
        let nudged = (parameter.value() + nudge.to_dtype(DType::F32).unwrap()).unwrap();
        parameter.set(&nudged).unwrap();
        trainer.save(folder.path(), Position::default(), |_| Ok(())).unwrap_err().to_string()
    });
    assert!(
        messages.iter().all(|message| message.contains("differ from rank 0 in the values")),
        "{messages:?}"
    );
    assert!(latest(folder.path()).is_none());
    // A batch without predictions anywhere, as with one process.
    let messages = ranks(2, |ring| {
        let mut trainer = trainer(5).parallel(ring).unwrap();
        let nothing = data.shuffled(Batching::Padded { rows: 1 }, 0).unwrap().share(Share { rank: 7, of: 8 });
        trainer.step(&[nothing.clone().next_batch(&Device::Cpu).unwrap()]).unwrap_err().to_string()
    });
    assert!(messages.iter().all(|message| message == "data: a batch without predictions"), "{messages:?}");
}

/// Sums of any length, in both dtypes, with the same bits everywhere and the order of the ranks.
#[test]
fn rings_add() {
    for size in [1, 2, 3, 4, 5] {
        let x = |rank: usize, len: usize| -> Vec<f64> {
            let mut random = Random::new((rank * 1000 + len) as u64);
            (0..len).map(|_| random.uniform(-1.0, 1.0)).collect()
        };
        let lengths = [1, 2, 3, 7, 64, 1001, 300_000];
        let sums = ranks(size, |ring| {
            let sum = |len: &usize| {
                let mine = Tensor::new(x(ring.rank(), *len), &Device::Cpu).unwrap();
                let narrow = ring.all_reduce_sum(&mine.to_dtype(DType::F32).unwrap()).unwrap();
                (ring.all_reduce_sum(&mine).unwrap().to_vec1::<f64>().unwrap(), bits(&narrow))
            };
            lengths.iter().map(sum).collect::<Vec<_>>()
        });
        assert!(sums.iter().all(|rank| *rank == sums[0]));
        for (len, (sum, _)) in lengths.iter().zip(&sums[0]) {
            let all: Vec<Vec<f64>> = (0..size).map(|rank| x(rank, *len)).collect();
            for (i, got) in sum.iter().enumerate() {
                let want: f64 = all.iter().map(|x| x[i]).sum();
                assert!((got - want).abs() < 1e-14, "{size} ranks, {len}: {got}, expected {want}");
            }
        }
        let told = ranks(size, |ring| {
            let shape = (2, 70_000, 2);
            let mine = Tensor::full(ring.rank() as f32 + 0.5, shape, &Device::Cpu).unwrap();
            let first = ring.broadcast(&mine).unwrap();
            assert_eq!(first.dims(), [2, 70_000, 2]);
            assert!(first.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| *x == 0.5));
            assert!(ring.all_reduce_sum(&Tensor::new(&[1u32], &Device::Cpu).unwrap()).is_err());
            let bytes: Vec<u8> = (0..=255).take(256 - ring.rank()).collect();
            assert_eq!(ring.broadcast_bytes(&bytes).unwrap(), (0..=255).collect::<Vec<u8>>());
            assert!(!ring.any(false).unwrap());
            assert!(ring.any(ring.rank() + 1 == size).unwrap());
            ring.barrier().unwrap();
            let value =
                on_first(&*ring, || Ok::<_, mamba_train::Error>(vec![(ring.rank(), "first".to_owned())]));
            assert_eq!(value.unwrap(), [(0, "first".to_owned())]);
            let refused = on_first(&*ring, || Err::<(), _>(mamba_train::Error::Data("none".into())));
            refused.unwrap_err().to_string()
        });
        assert_eq!(told[0], "data: none");
        for (rank, message) in told.iter().enumerate().skip(1) {
            assert_eq!(
                *message,
                format!("parallel training: rank {rank} of {size}: rank 0 failed: data: none")
            );
        }
    }
}

/// Whoever is left says who is gone, at once, and keeps saying it.
#[test]
fn a_rank_that_is_gone_is_noticed() {
    let start = Instant::now();
    let messages = ranks(4, |ring| {
        ring.barrier().unwrap();
        if ring.rank() == 2 {
            return String::new();
        }
        let message = ring.barrier().unwrap_err().to_string();
        assert_eq!(ring.barrier().unwrap_err().to_string(), message);
        message
    });
    for rank in [0, 1, 3] {
        assert!(messages[rank].contains(&format!("rank {rank} of 4: rank 2 is gone")), "{messages:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(20));
    // Others that go on with something else.
    let messages = ranks(2, |ring| {
        let len = 10 + ring.rank();
        ring.all_reduce_sum(&Tensor::zeros(len, DType::F32, &Device::Cpu).unwrap()).unwrap_err().to_string()
    });
    assert!(messages.iter().any(|message| message.contains("they do not do the same")), "{messages:?}");
}

fn world(rank: usize, size: usize, port: u16) -> World {
    World { rank, size, local_rank: rank, master: "127.0.0.1".into(), port }
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// Runs each of these worlds on a thread; what became of each.
fn meet(worlds: Vec<World>, timeout: Duration) -> Vec<Result<usize, String>> {
    std::thread::scope(|scope| {
        let meet = |world: World| {
            scope.spawn(move || {
                let ring = Ring::connect(&world, timeout).map_err(|e| e.to_string())?;
                ring.barrier().map_err(|e| e.to_string())?;
                Ok(ring.rank())
            })
        };
        let threads: Vec<_> = worlds.into_iter().map(meet).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn ranks_that_do_not_come_are_not_waited_for() {
    let (start, second) = (Instant::now(), Duration::from_secs(1));
    let port = free_port();
    let outcome = meet(vec![world(0, 4, port), world(2, 4, port)], second);
    let message = format!("parallel training: rank 0 of 4: nobody came to port {port} in time as rank 1, 3");
    assert_eq!(outcome, [Err(message.clone()), Err(message)], "both say who is missing");
    let port = free_port();
    let alone = meet(vec![world(1, 2, port)], second).remove(0).unwrap_err();
    let expected =
        format!("parallel training: rank 1 of 2: rank 0 was not found at 127.0.0.1:{port} in time");
    assert!(alone.starts_with(&expected), "{alone}");
    let nowhere = World { master: "no-such-host.invalid".into(), ..world(1, 2, port) };
    let error = meet(vec![nowhere], second).remove(0).unwrap_err();
    assert!(error.contains("no-such-host.invalid"), "{error}");
    // One that is there, but does not answer.
    let outcome = meet_slowly(second);
    assert!(outcome.contains("rank 1 did not answer within 1 s"), "{outcome}");
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

fn meet_slowly(timeout: Duration) -> String {
    let port = free_port();
    std::thread::scope(|scope| {
        let slow = scope.spawn(move || {
            let ring = Ring::connect(&world(1, 2, port), timeout).unwrap();
            std::thread::sleep(4 * timeout);
            ring.barrier().unwrap_err();
        });
        let ring = Ring::connect(&world(0, 2, port), timeout).unwrap();
        let error = ring.barrier().unwrap_err().to_string();
        slow.join().unwrap();
        error
    })
}

#[test]
fn wrong_ranks_are_refused_and_strangers_ignored() {
    let long = Duration::from_secs(60);
    let start = Instant::now();
    let port = free_port();
    let outcome = meet(vec![world(0, 3, port), world(1, 3, port), world(1, 3, port)], long);
    let message = "parallel training: rank 0 of 3: two processes were started as rank 1";
    assert_eq!(outcome[0], Err(message.to_owned()));
    assert!(outcome.iter().all(Result::is_err), "{outcome:?}");
    let port = free_port();
    let outcome = meet(vec![world(0, 2, port), world(1, 4, port)], long);
    let message =
        "parallel training: rank 0 of 2: rank 1 was started as one of 4 processes, rank 0 as one of 2"
            .to_owned();
    assert_eq!(outcome, [Err(message.clone()), Err(message)]);
    let listener = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let taken = meet(vec![world(0, 2, port)], long).remove(0).unwrap_err();
    assert!(taken.contains(&format!("rank 0 cannot listen at port {port} (MASTER_PORT)")), "{taken}");
    drop(listener);

    let port = free_port();
    std::thread::scope(|scope| {
        let stranger = scope.spawn(move || {
            let mut stream = loop {
                match TcpStream::connect(("127.0.0.1", port)) {
                    Ok(stream) => break stream,
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            };
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let _ = stream.read(&mut [0; 16]); // closed, with or without a reset
        });
        // Rank 1 comes when the stranger has been there.
        let first = scope.spawn(move || meet(vec![world(0, 2, port)], long));
        stranger.join().unwrap();
        assert_eq!(meet(vec![world(1, 2, port)], long), [Ok(1)]);
        assert_eq!(first.join().unwrap(), [Ok(0)]);
    });
    assert!(start.elapsed() < long);
}

const CHILD: &str = "parallel::processes_find_each_other_by_the_environment";

/// This test starts itself three times as processes of their own, as `torchrun` would, and once as Slurm would.
#[test]
fn processes_find_each_other_by_the_environment() {
    if let Some(folder) = std::env::var_os("MAMBA_TEST_RANK_IN") {
        let world = World::from_env().unwrap().unwrap();
        let ring = Arc::new(Ring::connect(&world, Duration::from_secs(60)).unwrap());
        let data = data(&Path::new(&folder).join(world.rank.to_string()));
        let trained = train(DType::F32, &data, Batching::Packed { tokens: 40 }, ring);
        let losses: Vec<String> = trained.reports.iter().map(|r| format!("{:x}", r.loss.to_bits())).collect();
        println!(
            "losses {} values {:?}",
            losses.join(" "),
            trained.bits.concat().iter().fold(0, |h: u64, x| h.rotate_left(1) ^ x)
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = free_port().to_string();
    let start = |rank: usize| {
        std::fs::create_dir(folder.path().join(rank.to_string())).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([CHILD, "--exact", "--nocapture"]).env("MAMBA_TEST_RANK_IN", folder.path());
        child.env("MASTER_ADDR", "localhost").env("MASTER_PORT", &port);
        match rank {
            2 => child.env("SLURM_PROCID", "2").env("SLURM_NTASKS", "3"),
            _ => child.env("RANK", rank.to_string()).env("WORLD_SIZE", "3"),
        };
        child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let lines: Vec<String> = (0..3)
        .map(start)
        .collect::<Vec<_>>()
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            let (out, err) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{out}{err}");
            out.lines().find(|line| line.contains("losses")).unwrap().to_owned()
        })
        .collect();
    assert!(lines[0].split_whitespace().count() > 8);
    assert!(lines.iter().all(|line| *line == lines[0]), "{lines:?}");
    let here = data(folder.path());
    let threads = ranks(3, |ring| train(DType::F32, &here, Batching::Packed { tokens: 40 }, ring)).remove(0);
    let first = format!("{:x}", threads.reports[0].loss.to_bits());
    assert!(lines[0].contains(&first), "{} {first}", lines[0]);
}
