//! Prompts that share beginnings.

use mamba_generate::{CausalLm, Generator, PrefixCache, PrefixCacheOptions, Reuse, StateLm};
use mamba_model::{InferenceCache, Model};

use crate::models;

fn fresh(model: &Model, ids: &[u32]) -> Vec<f32> {
    let (mut cache, mut logits) = (CausalLm::new_cache(model).unwrap(), Vec::new());
    CausalLm::prefill(model, ids, &mut cache, &mut logits).unwrap();
    logits
}

fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn cache(max_bytes: usize, chunk: usize) -> PrefixCache<InferenceCache> {
    PrefixCache::new(PrefixCacheOptions { max_bytes, chunk })
}

#[test]
fn a_cached_prefix_equals_a_recomputed_one() {
    check_recomputed(&models::all());
    check_recomputed(&models::in_bf16());
}

mod cuda {
    use super::*;
    use crate::support::target::with_gpu;

    #[test]
    fn a_cached_prefix_equals_a_recomputed_one() {
        with_gpu(|device| {
            let models = models::on(device);
            check_recomputed(&models);
            Ok(models.len())
        });
    }
}

fn check_recomputed(models: &[(String, Model)]) {
    for (name, model) in models {
        let mut prefixes = cache(1 << 24, 16);
        let base = models::ids(model, 70, 1);
        let mut compared = 0;
        for (shared, tail, seed) in
            [(0, 70, 1), (70, 0, 2), (40, 9, 3), (40, 30, 4), (33, 5, 5), (70, 12, 6), (16, 1, 7)]
        {
            let ids = [&base[..shared], &models::ids(model, tail, seed)].concat();
            let (_, logits, reuse) = prefixes.prefill(model, &ids).unwrap();
            assert_eq!(reuse.reused + reuse.read, ids.len());
            assert!(reuse.reused <= reuse.known && reuse.known >= shared, "{name}: {reuse:?}");
            let off = gap(&logits, &fresh(model, &ids));
            assert!(off <= models::bound(model), "{name} sharing {shared}: off by {off:.1e}");
            // Again: nothing is read, and not a bit differs.
            let (mut state, again, reuse) = prefixes.prefill(model, &ids).unwrap();
            assert_eq!((reuse.reused, reuse.read), (ids.len(), 0));
            assert_eq!(gap(&again, &logits), 0.0, "{name}");
            // The state is whole as well.
            let (mut next, mut expected) = (Vec::new(), Vec::new());
            CausalLm::step(model, 1, &mut state, &mut next).unwrap();
            let mut plain = CausalLm::new_cache(model).unwrap();
            CausalLm::prefill(model, &ids, &mut plain, &mut expected).unwrap();
            CausalLm::step(model, 1, &mut plain, &mut expected).unwrap();
            assert!(gap(&next, &expected) <= models::bound(model), "{name} after a step");
            compared += 1;
        }
        assert_eq!(compared, 7);
    }
}

/// What follows the state after a chunk has the bits of a prompt that was read in the same chunks.
#[test]
fn after_a_chunk_not_a_bit_differs() {
    for (name, model) in models::all().into_iter().chain(models::in_bf16()) {
        let shared = models::ids(&model, 32, 1);
        let ids = [&shared[..], &models::ids(&model, 40, 2)].concat();
        let mut cold = cache(1 << 24, 16);
        let (_, expected, reuse) = cold.prefill(&model, &ids).unwrap();
        assert_eq!(reuse, Reuse { known: 0, reused: 0, read: 72 });
        let mut warm = cache(1 << 24, 16);
        warm.prefill(&model, &shared).unwrap();
        let (_, logits, reuse) = warm.prefill(&model, &ids).unwrap();
        assert_eq!(reuse, Reuse { known: 32, reused: 32, read: 40 });
        assert_eq!(gap(&logits, &expected), 0.0, "{name}");
    }
}

/// A system prompt of 560 tokens that many prompts share, as in the reports of users of other systems.
#[test]
fn a_shared_system_prompt_is_found_from_the_third_prompt_on() {
    let model = models::open("mamba_tied");
    let system = models::ids(&model, 560, 1);
    let prompt = |seed| {
        let mut rest = models::ids(&model, 300, seed);
        rest[0] = seed as u32; // they part right behind it
        [&system[..], &rest].concat()
    };
    let mut prefixes = cache(1 << 26, 512);
    let reuses: Vec<usize> =
        (2..7).map(|seed| prefixes.prefill(&model, &prompt(seed)).unwrap().2.reused).collect();
    // The second finds a chunk, and leaves a state where the two part.
    assert_eq!(reuses, [0, 512, 560, 560, 560]);
    let stats = prefixes.stats();
    assert_eq!((stats.hits, stats.partial, stats.misses, stats.short), (0, 4, 1, 1));
    assert_eq!((stats.reused_tokens, stats.read_tokens), (512 + 3 * 560, 860 + 348 + 3 * 300));
    // The same prompt again is a hit: nothing is read.
    assert_eq!(prefixes.prefill(&model, &prompt(4)).unwrap().2, Reuse { known: 860, reused: 860, read: 0 });
    let after = prefixes.stats();
    assert_eq!((after.hits, after.partial, after.misses, after.short), (1, 4, 1, 1));
    assert_eq!((after.reused_tokens, after.read_tokens), (stats.reused_tokens + 860, stats.read_tokens));
    // Without chunks only the place where prompts part is found.
    let mut prefixes = cache(1 << 26, 0);
    let reuses: Vec<usize> =
        (2..6).map(|seed| prefixes.prefill(&model, &prompt(seed)).unwrap().2.reused).collect();
    assert_eq!(reuses, [0, 0, 560, 560]);
}

#[test]
fn the_budget_holds_and_the_oldest_state_goes_first() {
    let model = models::open("mamba_tied");
    let state = StateLm::cache_bytes(&model, &CausalLm::new_cache(&model).unwrap());
    let each = state + 4 * model.config().vocab_size + 4 * 10;
    let mut prefixes = cache(3 * each, 0);
    let prompt = |seed: u32| [&[seed][..], &models::ids(&model, 9, u64::from(seed))].concat();
    let mut reused = |seed| prefixes.prefill(&model, &prompt(seed)).unwrap().2.reused;
    assert_eq!([1, 2, 3, 1, 4].map(&mut reused), [0, 0, 0, 10, 0]);
    // 2 was the oldest when 4 came; then 3 is, when 2 comes again.
    assert_eq!([1, 2, 4, 3].map(&mut reused), [10, 0, 10, 0]);
    let stats = prefixes.stats();
    assert!(stats.bytes <= 3 * each && stats.states == 3, "{stats:?}");
    assert_eq!(stats.evictions, 3);
    prefixes.clear();
    assert_eq!((prefixes.stats().states, prefixes.stats().bytes), (0, 0));
    // What is larger than the budget is not kept, and drops nothing.
    let mut small = cache(100, 4);
    small.prefill(&model, &prompt(1)).unwrap();
    assert_eq!((small.stats().states, small.stats().evictions), (0, 0));
}

/// Keys and values that states share count once, so that a budget keeps as many states as its memory holds.
#[test]
fn what_states_share_counts_once() {
    let model = models::open("jamba");
    let ids = models::ids(&model, 640, 1);
    let state = |len: usize| {
        let mut cache = CausalLm::new_cache(&model).unwrap();
        if len > 0 {
            CausalLm::prefill(&model, &ids[..len], &mut cache, &mut Vec::new()).unwrap();
        }
        StateLm::cache_bytes(&model, &cache)
    };
    let (blank, whole) = (state(0), state(640));
    // Ten states, each with its own state space states, and three blocks of keys and values for all of them.
    let expected = 10 * blank + (whole - blank) + 4 * 640 + 4 * model.config().vocab_size;
    let mut prefixes = cache(expected, 64);
    prefixes.prefill(&model, &ids).unwrap();
    let stats = prefixes.stats();
    assert_eq!((stats.states, stats.bytes, stats.evictions), (10, expected, 0));
    assert!(whole > 3 * blank, "counted in each, they would not have had room: {whole}, {blank}");
}

#[test]
fn a_conversation_goes_on_from_its_end() {
    let model = models::open("mamba2_g8");
    let mut prefixes = cache(1 << 24, 0);
    let mut generator =
        Generator::builder(&model).prompt(&models::ids(&model, 20, 1)).max_new_tokens(10).build().unwrap();
    generator.prefill_with(&mut prefixes).unwrap();
    generator.by_ref().for_each(drop);
    let mut tokens = [generator.prompt(), generator.generated()].concat();
    prefixes.insert(&model, &tokens[..29], generator.cache(), &[]).unwrap();
    tokens.extend(models::ids(&model, 5, 2));
    let mut next = Generator::builder(&model).prompt(&tokens).max_new_tokens(3).build().unwrap();
    assert_eq!(next.prefill_with(&mut prefixes).unwrap(), Reuse { known: 29, reused: 29, read: 6 });
    let off = gap(&fresh(&model, &tokens), &prefixes.prefill(&model, &tokens).unwrap().1);
    assert!(off < 1e-4, "{off}");
    // The state at the end of a prompt serves only with the logits that follow it.
    let mut other = cache(1 << 24, 0);
    other.insert(&model, &tokens[..29], generator.cache(), &[]).unwrap();
    assert_eq!(other.prefill(&model, &tokens[..29]).unwrap().2, Reuse { known: 29, reused: 0, read: 29 });
}

#[test]
fn misuse() {
    let (model, other) = (models::open("mamba_tied"), models::open("mamba_untied_bias"));
    let mut prefixes = cache(1 << 20, 8);
    assert!(prefixes.prefill(&model, &[]).is_err());
    // A state after nothing would serve every prompt.
    let blank = CausalLm::new_cache(&model).unwrap();
    let error = prefixes.insert(&model, &[], &blank, &[]).unwrap_err().to_string();
    assert!(error.contains("expected at least one token id"), "{error}");
    assert!(prefixes.insert(&model, &[u32::MAX], &blank, &[]).is_err());
    assert!(prefixes.insert(&model, &[1], &blank, &[0.0; 3]).is_err());
    assert_eq!((prefixes.stats().states, prefixes.stats().misses), (0, 0));
    prefixes.prefill(&model, &[1, 2, 3]).unwrap();
    let error = prefixes.prefill(&other, &[1, 2, 3]).unwrap_err().to_string();
    assert!(error.contains("the prefix cache belongs to the model"), "{error}");
    let mut started = Generator::builder(&model).history(&[1]).prompt(&[2]).build().unwrap();
    let error = started.prefill_with(&mut prefixes).unwrap_err().to_string();
    assert_eq!(
        error,
        "prefill_with: `generator` is 1 tokens that were read before, expected one that has read nothing"
    );
}
