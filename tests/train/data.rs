//! Text to batches.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Device;
use mamba_train::data::{
    Batch, Batches, Batching, Dataset, Encoding, Position, TokenFile, TokenWriter, encode,
};
use tokenizers::Tokenizer;

use crate::support::golden::path;

fn file(documents: &[Vec<u32>]) -> (tempfile::TempDir, Arc<TokenFile>) {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = TokenWriter::create(folder.path().join("x.tokens")).unwrap();
    for document in documents {
        writer.begin_document();
        writer.push(document).unwrap();
    }
    let tokens = Arc::new(writer.finish().unwrap());
    (folder, tokens)
}

/// Each prediction within a document comes exactly once, and none across documents.
#[test]
fn rows_cover_every_document() {
    let lengths = [1, 2, 9, 0, 10, 11, 25, 1, 30];
    let documents: Vec<Vec<u32>> =
        lengths.iter().enumerate().map(|(d, n)| (0..*n).map(|i| (d * 100 + i) as u32).collect()).collect();
    let (_folder, tokens) = file(&documents);
    let end = tokens.len();
    let data = Dataset::new(tokens, 0..end, 10).unwrap();
    let mut want: Vec<(u32, u32)> =
        documents.iter().flat_map(|d| d.windows(2).map(|pair| (pair[0], pair[1]))).collect();
    want.sort();
    assert_eq!(data.predictions(), want.len() as u64);
    for batching in [Batching::Padded { rows: 4 }, Batching::Packed { tokens: 15 }] {
        let mut order = data.in_order(batching, &Device::Cpu).unwrap();
        let mut shuffled = data.shuffled(batching, 3).unwrap();
        let mut next = || shuffled.next_batch(&Device::Cpu).unwrap();
        let mut predictions: Vec<_> = order.by_ref().flat_map(|batch| pairs(&batch.unwrap())).collect();
        assert_eq!(predictions.len(), want.len());
        let mut batches = 0;
        while predictions.len() < 4 * want.len() {
            let batch = next();
            if let Batching::Packed { tokens } = batching {
                assert!(batch.count <= tokens && batch.inputs.elem_count() == batch.count);
            }
            predictions.extend(pairs(&batch));
            batches += 1;
        }
        assert!(batches > 3, "{batching:?}");
        // In order, and in the epochs that follow: all of them, once.
        for epoch in predictions.chunks_exact_mut(want.len()) {
            epoch.sort();
            assert_eq!(epoch, want, "{batching:?}");
        }
    }
}

/// Each input that predicts something, and its target.
fn pairs(batch: &Batch) -> Vec<(u32, u32)> {
    let inputs = batch.inputs.flatten_all().unwrap().to_vec1::<u32>().unwrap();
    let targets = batch.targets.flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let counts = |(input, target): (u32, i64)| Some((input, u32::try_from(target).ok()?));
    inputs.into_iter().zip(targets).filter_map(counts).collect()
}

#[test]
fn impossible_batches_are_refused() {
    let (_folder, tokens) = file(&[(0..30).collect()]);
    let data = Dataset::new(tokens, 0..30, 10).unwrap();
    for (batching, message) in [
        (Batching::Padded { rows: 0 }, "option `rows` is 0, expected at least 1"),
        (Batching::Packed { tokens: 9 }, "option `tokens` is 9, expected at least those of a row, 10"),
    ] {
        assert_eq!(data.shuffled(batching, 0).unwrap_err().to_string(), message);
        assert_eq!(data.in_order(batching, &Device::Cpu).err().unwrap().to_string(), message);
    }
}

#[test]
fn an_epoch_is_every_row_once_and_can_be_entered_anywhere() {
    let (_folder, tokens) = file(&[(0..205).collect()]);
    const THREE: Batching = Batching::Padded { rows: 3 };
    let (data, rest) = Dataset::split(tokens, 10, 0.02).unwrap();
    assert_eq!((data.len(), rest.predictions()), (20, 4));
    let first_ids = |batches: &mut Batches, count: usize| -> Vec<u32> {
        let batch = |_| batches.next_batch(&Device::Cpu).unwrap().inputs.to_vec2::<u32>().unwrap();
        (0..count).flat_map(batch).map(|row| row[0]).collect()
    };
    let mut batches = data.shuffled(THREE, 7).unwrap();
    let all = first_ids(&mut batches, 14);
    assert_eq!(batches.position(), Position { epoch: 2, row: 2 });
    for epoch in all[..40].chunks(20) {
        let mut seen = epoch.to_vec();
        seen.sort();
        assert_eq!(seen, (0..20).map(|i| 10 * i).collect::<Vec<_>>());
    }
    assert_ne!(all[..20], all[20..40]);
    for skip in [0, 1, 5, 6, 13] {
        let mut ahead = data.shuffled(THREE, 7).unwrap();
        first_ids(&mut ahead, skip);
        let mut later = data.shuffled(THREE, 7).unwrap();
        later.seek(ahead.position()).unwrap();
        assert_eq!(first_ids(&mut later, 14 - skip), all[3 * skip..], "{skip}");
    }
    let mut other = data.shuffled(THREE, 8).unwrap();
    assert_ne!(first_ids(&mut other, 14), all);
    assert!(other.seek(Position { epoch: 0, row: 20 }).is_err());
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(path("models/mamba-shakespeare/tokenizer.json")).unwrap()
}

#[test]
fn files_become_documents() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let text = "To be, or not to be.\n";
    let files = [
        write("a.txt", text),
        write("b.jsonl", &format!("{{\"text\": {text:?}}}\n\n{{\"text\": \"Ay.\", \"x\": 1}}\n")),
    ];
    let tokenizer = tokenizer();
    let encoding = Encoding { tokenizer: &tokenizer, end: Some(3), field: "text" };
    let mut seen = 0;
    let tokens = encode(&files, &encoding, &folder.path().join("out.tokens"), |n| seen += n).unwrap();
    let all = tokens.read(0, tokens.len() as usize).unwrap();
    let documents: Vec<Vec<u32>> =
        all.chunk_by(|_, next| !next.1).map(|d| d.iter().map(|t| t.0).collect()).collect();
    let ids = |text: &str| -> Vec<u32> {
        tokenizer.encode(text, false).unwrap().get_ids().iter().copied().chain([3]).collect()
    };
    assert_eq!(documents, [ids(text), ids(text), ids("Ay.")]);
    assert_eq!(seen, files.iter().map(|f| f.metadata().unwrap().len()).sum::<u64>());

    let bad = |name: &str, text: &str| {
        let files = [write(name, text)];
        encode(&files, &encoding, &folder.path().join("bad.tokens"), |_| {}).unwrap_err().to_string()
    };
    assert!(
        bad("c.jsonl", "{\"text\": \"a\"}\n{\"txt\": 1}\n")
            .ends_with("line 2 has no text in the field `text`")
    );
    assert!(bad("d.jsonl", "{\n").contains("line 1 is not JSON"));
    assert!(!folder.path().join("bad.tokens").exists());
    assert!(TokenFile::open(folder.path().join("a.txt")).is_err());
}

/// A text of several pieces is encoded as it is at once.
#[test]
fn long_texts_are_encoded_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let text = "What light through yonder window breaks?\n\n  It is the east,\tand Juliet is the sun. "
        .repeat(30_000);
    let path = folder.path().join("long.txt");
    std::fs::write(&path, &text).unwrap();
    let tokenizer = tokenizer();
    let encoding = Encoding { tokenizer: &tokenizer, end: None, field: "text" };
    let tokens = encode(&[path], &encoding, &folder.path().join("long.tokens"), |_| {}).unwrap();
    let whole = tokenizer.encode_fast(text.as_str(), false).unwrap();
    let got: Vec<u32> = tokens.read(0, tokens.len() as usize).unwrap().into_iter().map(|t| t.0).collect();
    assert!(text.len() > 2 << 20 && got == whole.get_ids());
}
