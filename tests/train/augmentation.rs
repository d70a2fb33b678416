//! Rows that differ from epoch to epoch.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Device;
use mamba_train::data::{Augmentation, Batches, Batching, Dataset, TokenFile, TokenSplits, TokenWriter};
use tokenizers::Tokenizer;

use crate::support::golden::path;

const SEQLEN: usize = 10;
const PACKED: Batching = Batching::Packed { tokens: 35 };

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

fn dataset(tokens: Arc<TokenFile>) -> Dataset {
    let end = tokens.len();
    Dataset::new(tokens, 0..end, SEQLEN).unwrap()
}

/// The rows of the batches of `epochs` epochs, by epoch; each row with the token that it predicts last.
fn rows(batches: &mut Batches, epochs: usize, per_epoch: usize) -> Vec<Vec<Vec<u32>>> {
    let mut rows = vec![];
    while rows.len() < epochs * per_epoch {
        let batch = batches.next_batch(&Device::Cpu).unwrap();
        assert!(batch.count <= 35);
        let inputs = batch.inputs.to_vec1::<u32>().unwrap();
        let targets = batch.targets.to_vec1::<i64>().unwrap();
        for ends in batch.cu_seqlens.unwrap().windows(2) {
            let mut row = inputs[ends[0]..ends[1]].to_vec();
            row.push(targets[ends[1] - 1] as u32);
            rows.push(row);
        }
    }
    rows.chunks(per_epoch).take(epochs).map(<[_]>::to_vec).collect()
}

/// Long documents are cut elsewhere in each epoch, and read as they are but for less than a row at their ends; others stay.
#[test]
fn shifted_rows_are_the_text() {
    let lengths = [205, 7, 11, 64];
    let documents: Vec<Vec<u32>> =
        (0..4).map(|d| (0..lengths[d]).map(|i| (1000 * d + i) as u32).collect()).collect();
    let (_folder, tokens) = file(&documents);
    let data = dataset(tokens);
    let shifted = Augmentation { shift: true, splits: None };
    let mut batches = data.shuffled(PACKED, 3).unwrap().augmented(shifted);
    let mut starts = vec![];
    for epoch in rows(&mut batches, 8, data.len()) {
        let mut seen: BTreeMap<u32, usize> = BTreeMap::new();
        for row in &epoch {
            assert!((2..=SEQLEN + 1).contains(&row.len()));
            assert!(row.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{row:?}");
            row[1..].iter().for_each(|target| *seen.entry(*target).or_default() += 1);
        }
        let start = epoch.iter().map(|row| row[0]).filter(|id| *id < 1000).min().unwrap();
        assert!((start as usize) < SEQLEN);
        starts.push(start);
        for target in documents.iter().flat_map(|document| &document[1..]) {
            let (document, i) = ((target / 1000) as usize, (target % 1000) as usize);
            let (single, times) = (lengths[document] <= SEQLEN + 1, seen.get(target).copied().unwrap_or(0));
            match single || (SEQLEN..lengths[document] - SEQLEN).contains(&i) {
                true => assert_eq!(times, 1, "{target} of {lengths:?}"),
                false => assert!(times <= 2),
            }
        }
    }
    starts.sort();
    starts.dedup();
    assert!(starts.len() > 3, "{starts:?}");
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(path("models/mamba-shakespeare/tokenizer.json")).unwrap()
}

const TEXT: &str = "What light through yonder window breaks? It is the east, and Juliet is the sun. Arise, fair sun, \
    and kill the envious moon, who is already sick and pale with grief";

/// Rows say the same in other tokens, in each epoch in others, about as many of them split as was asked for.
#[test]
fn split_tokens_are_the_text() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode(TEXT, false).unwrap().get_ids().to_vec();
    assert!(TokenSplits::new(&tokenizer, 1.0).is_err());
    let splits = TokenSplits::new(&tokenizer, 0.2).unwrap();
    // A token of several bytes is two that say the same.
    let say = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    let merged = (0..512).filter_map(|id| Some((id, splits.pair(id)?))).inspect(|(id, pair)| {
        let token = |id: &u32| tokenizer.id_to_token(*id).unwrap();
        assert_eq!(token(id), pair.iter().map(token).collect::<String>());
    });
    assert_eq!(merged.count(), 255);
    // As documents of a row each, so short that splitting does not fill them.
    let documents: Vec<Vec<u32>> = ids.chunks_exact(4).map(<[u32]>::to_vec).collect();
    let (_folder, tokens) = file(&documents);
    let data = dataset(tokens);
    let augmentation = Augmentation { shift: true, splits: Some(splits) };
    let shuffled = data.shuffled(PACKED, 3).unwrap();
    let mut batches = shuffled.clone().augmented(augmentation.clone());
    let epochs = rows(&mut batches, 40, data.len());
    let mut texts: Vec<String> = documents.iter().map(|document| say(document)).collect();
    texts.sort();
    let mut more = 0;
    for epoch in &epochs {
        let mut said: Vec<String> = epoch.iter().map(|row| say(row)).collect();
        said.sort();
        let cut = said.iter().zip(&texts).filter(|(said, text)| said != text).count();
        assert!(cut <= 2, "{said:?} {texts:?}"); // of more than eleven tokens
        more += epoch.iter().map(Vec::len).sum::<usize>();
    }
    assert_ne!(epochs[0], epochs[1]);
    // How many more there are to be expected: a token of n bytes has n - 1 merges.
    fn expected(augmentation: &Augmentation, id: u32) -> f64 {
        let pair = augmentation.splits.as_ref().and_then(|splits| splits.pair(id));
        pair.map_or(1.0, |pair| 0.8 + 0.2 * pair.iter().map(|id| expected(augmentation, *id)).sum::<f64>())
    }
    let want: f64 = 40.0 * documents.iter().flatten().map(|id| expected(&augmentation, *id)).sum::<f64>();
    assert!((more as f64 / want - 1.0).abs() < 0.02, "{more}, expected {want}");

    // From anywhere on, the same again.
    let (mut whole, mut ahead) = (batches.clone(), shuffled.augmented(augmentation));
    let next = |batches: &mut Batches| {
        let batch = batches.next_batch(&Device::Cpu).unwrap();
        (batch.inputs.to_vec1::<u32>().unwrap(), batch.cu_seqlens)
    };
    ahead.seek(whole.position()).unwrap();
    for _ in 0..10 {
        assert_eq!(next(&mut ahead), next(&mut whole));
    }
}

/// What is kept apart is what upstream's models were validated on: of the 575,809 tokens of tinyshakespeare those from 547,018 on.
#[test]
fn the_last_part_is_that_of_upstream() {
    let (_folder, tokens) = file(&[(0..575_809).collect()]);
    let (training, validation) = Dataset::split(tokens, 512, 0.05).unwrap();
    assert_eq!(validation.row(0).unwrap()[0], 547_018);
    assert_eq!((training.predictions(), validation.predictions()), (547_017, 28_790));
}
