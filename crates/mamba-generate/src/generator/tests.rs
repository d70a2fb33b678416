use std::time::Duration;

use super::*;
use crate::cancel::CancelToken;
use crate::error::BoxError;
use crate::fake::Fake;
use crate::filter::History;
use crate::prefix_cache::PrefixCacheOptions;
use crate::sampling::{Sampling, SamplingConfig};
use crate::speculative::{NgramDrafter, Speculative};

fn ids(generator: impl Iterator<Item = Result<Token>>) -> Vec<u32> {
    generator.map(|token| token.unwrap().id).collect()
}

#[test]
fn no_step_is_wasted() {
    let model = Fake::saying(3, &[5, 6, 7, 8]);
    let mut cache = Vec::new();
    let mut generator =
        Generator::builder(&model).prompt(&[1, 2, 3]).cache(&mut cache).max_new_tokens(3).build().unwrap();
    assert_eq!(model.calls(), [""; 0]);
    assert_eq!(generator.size_hint(), (0, Some(3)));
    assert_eq!(generator.finish_reason(), None);
    assert_eq!(ids(&mut generator), [5, 6, 7]);
    assert_eq!(generator.finish_reason(), Some(FinishReason::Length));
    assert_eq!((generator.prompt(), generator.generated()), (&[1, 2, 3][..], &[5, 6, 7][..]));
    assert_eq!(generator.pending(), Some(7));
    assert!(generator.next().is_none() && generator.next().is_none());
    assert_eq!(generator.size_hint(), (0, Some(0)));
    assert_eq!(model.calls(), ["prefill 3", "step", "step"]);
    assert_eq!(cache, [1, 2, 3, 5, 6]);
}

#[test]
fn a_caller_may_take_fewer() {
    let model = Fake::saying(1, &[5, 6, 7]);
    let generator = Generator::builder(&model).prompt(&[1]).build().unwrap();
    assert_eq!(ids(generator.take(2)), [5, 6]);
    assert_eq!(model.calls(), ["new_cache", "prefill 1", "step"]);
}

#[test]
fn no_tokens_wanted_none_computed() {
    let model = Fake::saying(1, &[5]);
    let mut generator = Generator::builder(&model).prompt(&[1]).max_new_tokens(0).build().unwrap();
    assert!(generator.next().is_none());
    assert_eq!(generator.finish_reason(), Some(FinishReason::Length));
    assert_eq!((generator.pending(), generator.cache().len()), (None, 0));
    assert_eq!(model.calls(), ["new_cache"]);
}

#[test]
fn stops_at_eos_or_at_a_stop_token_and_yields_it() {
    let model = Fake::saying(1, &[5, 6, 7, 8]);
    let builder = || Generator::builder(&model).prompt(&[1]).eos_tokens(&[6, 60]).max_new_tokens(4);
    for (ignore, expected, reason) in
        [(false, &[5, 6][..], FinishReason::StopToken), (true, &[5, 6, 7, 8][..], FinishReason::Length)]
    {
        let mut generator = builder().ignore_eos(ignore).build().unwrap();
        assert_eq!(ids(&mut generator), expected);
        assert_eq!(generator.finish_reason(), Some(reason));
        assert_eq!(generator.cache()[..], [&[1], &expected[..expected.len() - 1]].concat());
    }
    let mut generator = builder().ignore_eos(true).stop_tokens(&[7]).build().unwrap();
    assert_eq!(ids(&mut generator), [5, 6, 7]);
    // A stop token that is also the last one allowed.
    let mut generator = builder().stop_tokens(&[8]).ignore_eos(true).build().unwrap();
    assert_eq!(ids(&mut generator).len(), 4);
    assert_eq!(generator.finish_reason(), Some(FinishReason::StopToken));
}

#[test]
fn no_stop_token_before_the_least_number() {
    let model = Fake::saying(1, &[5, 6, 6, 6]);
    let mut generator = Generator::builder(&model)
        .prompt(&[1])
        .eos_tokens(&[5])
        .stop_tokens(&[6])
        .min_new_tokens(3)
        .build()
        .unwrap();
    // Neither 5 nor 6 before, but what comes first among equals.
    assert_eq!(ids(&mut generator), [0, 0, 0, 6]);
    assert_eq!(generator.finish_reason(), Some(FinishReason::StopToken));
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    let model = Fake::saying(1, &[5, 6]);
    let sampling = SamplingConfig { banned_tokens: vec![vec![5]], temperature: 0.0, ..Default::default() };
    let generator = Generator::builder(&model).prompt(&[1]).sampling(sampling.build().unwrap());
    let mut generator = generator.logprobs(2).max_new_tokens(2).build().unwrap();
    // One logit of 20 among 511 of 0.
    let norm = (20f64.exp() + 511.0).ln();
    let token = generator.next().unwrap().unwrap();
    let logprobs = token.logprobs.unwrap();
    assert_eq!((token.id, logprobs.top[0].id, logprobs.top[1].id), (0, 5, 0));
    assert!((f64::from(logprobs.chosen) + norm).abs() < 1e-5);
    assert!((f64::from(logprobs.top[0].logprob) - (20.0 - norm)).abs() < 1e-7);
    let mut plain = Generator::builder(&model).prompt(&[1]).build().unwrap();
    assert_eq!(plain.next().unwrap().unwrap().logprobs, None);
}

#[test]
fn continued_equals_uninterrupted() {
    let model = Fake::saying(2, &[5, 6, 7, 8, 9]);
    let config = SamplingConfig { temperature: 0.0, repetition_penalty: Some(1.1), ..Default::default() };
    let mut cache = Vec::new();
    let mut tokens = vec![1, 2];
    let mut first = Generator::builder(&model)
        .prompt(&tokens)
        .cache(&mut cache)
        .sampling(config.build().unwrap())
        .max_new_tokens(2)
        .build()
        .unwrap();
    tokens.extend(ids(&mut first));
    let pending = first.pending().unwrap();
    let history = tokens[..tokens.len() - 1].to_vec();
    let second = Generator::builder(&model)
        .history(&history)
        .prompt(&[pending])
        .cache(&mut cache)
        .sampling(config.build().unwrap())
        .max_new_tokens(3)
        .build()
        .unwrap();
    assert_eq!(second.prompt(), [6]);
    tokens.extend(ids(second));
    assert_eq!(tokens, [1, 2, 5, 6, 7, 8, 9]);
    assert_eq!(cache, [1, 2, 5, 6, 7, 8]);
}

#[test]
fn filters_see_history_prompt_and_what_was_generated() {
    use std::sync::{Arc, Mutex};

    use crate::{ArgMax, Candidates, Chain, LogitsFilter};
    type Seen = Arc<Mutex<Vec<(Vec<u32>, Vec<u32>)>>>;
    struct Spy(Seen);
    impl LogitsFilter for Spy {
        fn apply(&mut self, _: &mut Candidates, history: History<'_>) -> Result<()> {
            self.0.lock().unwrap().push((history.tokens().to_vec(), history.generated().to_vec()));
            Ok(())
        }
    }
    let seen = Seen::default();
    let model = Fake::saying(1, &[5, 6]);
    let generator = Generator::builder(&model)
        .history(&[9])
        .prompt(&[1])
        .sampling(Sampling::new(Chain::new().with(Spy(seen.clone())), ArgMax))
        .max_new_tokens(2)
        .build()
        .unwrap();
    ids(generator);
    assert_eq!(*seen.lock().unwrap(), [(vec![9, 1], vec![]), (vec![9, 1, 5], vec![5])]);
}

#[test]
fn a_prompt_can_be_read_beforehand() {
    let model = Fake::saying(2, &[5, 6]);
    let mut generator = Generator::builder(&model).prompt(&[1, 2]).max_new_tokens(2).build().unwrap();
    generator.prefill().unwrap();
    generator.prefill().unwrap();
    assert_eq!(
        (generator.cache().len(), generator.pending(), generator.size_hint()),
        (2, None, (0, Some(2)))
    );
    assert_eq!(ids(&mut generator), [5, 6]);
    generator.prefill().unwrap();
    assert_eq!(model.calls(), ["new_cache", "prefill 2", "step"]);
    let model = Fake { fail_at: Some(2), ..Fake::saying(2, &[5]) };
    let mut generator = Generator::builder(&model).prompt(&[1, 2]).build().unwrap();
    assert!(generator.prefill().is_err() && generator.state().is_err() && generator.next().is_none());
}

#[test]
fn resumed_equals_uninterrupted_wherever_it_was_cut() {
    let model = Fake::saying(2, &[5, 6, 7, 8, 9]);
    let config = SamplingConfig { temperature: 0.9, xtc: Some((0.1, 0.3)), seed: 4, ..Default::default() };
    let builder = || {
        let sampling = config.build().unwrap();
        Generator::builder(&model).sampling(sampling).min_new_tokens(2).stop_tokens(&[9]).max_new_tokens(9)
    };
    let mut whole = builder().prompt(&[1, 2]).build().unwrap();
    let expected = ids(&mut whole);
    for cut in 0..=expected.len() {
        let mut first = builder().prompt(&[1, 2]).build().unwrap();
        let before: Vec<u32> = first.by_ref().take(cut).map(|token| token.unwrap().id).collect();
        let states = [first.state().unwrap(), {
            first.prefill().unwrap();
            first.state().unwrap()
        }];
        for state in states {
            let saved = state.to_bytes(&model).unwrap();
            let state = GenerationState::from_bytes(&model, &saved).unwrap();
            assert_eq!(state.generated(), before);
            let mut second = builder().resume(state).build().unwrap();
            let after = ids(&mut second);
            assert_eq!([before.clone(), after].concat(), expected, "cut at {cut}");
            assert_eq!((second.prompt(), second.generated()), (whole.prompt(), whole.generated()));
            assert_eq!((second.pending(), second.cache()), (whole.pending(), whole.cache()));
            assert_eq!(second.finish_reason(), whole.finish_reason());
        }
    }
    // At its end, it is at its end.
    let mut over =
        builder().resume(whole.state().unwrap()).max_new_tokens(whole.generated().len()).build().unwrap();
    assert!(over.next().is_none());
    assert_eq!(over.finish_reason(), whole.finish_reason());
}

#[test]
fn cancelled_from_another_thread_and_gone_on_with() {
    let model = Fake::saying(1, &[5, 6, 7, 8]);
    let token = CancelToken::new();
    let builder = || Generator::builder(&model).prompt(&[1]).cancel_token(&token);
    let mut generator = builder().build().unwrap();
    let mut seen = vec![];
    let reason = generator.run(|t| {
        seen.push(t.id);
        if t.id == 6 {
            let token = token.clone();
            std::thread::spawn(move || token.cancel()).join().unwrap();
        }
        ControlFlow::Continue(())
    });
    assert_eq!((reason.unwrap(), seen), (Some(FinishReason::Cancelled), vec![5, 6]));
    assert!(generator.next().is_none());
    assert_eq!(generator.finish_reason().unwrap().to_string(), "cancelled");
    assert_eq!((generator.cache().as_slice(), generator.pending()), (&[1, 5][..], Some(6)));
    // Before anything was read, nothing is.
    model.calls.borrow_mut().clear();
    let mut nothing = builder().build().unwrap();
    assert!(nothing.next().is_none());
    assert_eq!(model.calls(), ["new_cache"]);
    token.reset();
    let mut rest = Generator::builder(&model).resume(generator.state().unwrap()).build().unwrap();
    let reason =
        rest.run(|token| if token.id == 8 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) });
    assert_eq!((reason.unwrap(), rest.generated()), (None, &[5, 6, 7, 8][..]));
}

/// The bytes of a state, and a generation that goes on from them.
fn reopened<'m>(model: &'m Fake, generator: &Generator<'_, Fake>) -> GeneratorBuilder<'m, Fake> {
    let saved = generator.state().unwrap().to_bytes(model).unwrap();
    Generator::builder(model).resume(GenerationState::from_bytes(model, &saved).unwrap())
}

#[test]
fn a_stop_token_is_the_end_of_what_is_resumed_too() {
    let model = Fake::saying(1, &[5, 6, 7]);
    let mut first = Generator::builder(&model).prompt(&[1]).stop_tokens(&[6]).build().unwrap();
    assert_eq!(ids(&mut first), [5, 6]);
    let mut ended = reopened(&model, &first).eos_tokens(&[6]).build().unwrap();
    assert!(ended.next().is_none());
    assert_eq!((ended.finish_reason(), ended.pending()), (Some(FinishReason::StopToken), Some(6)));
    // Who has no such token goes on, and so does another turn.
    assert_eq!(ids(reopened(&model, &first).max_new_tokens(3).build().unwrap()), [7]);
    let turn = reopened(&model, &first).prompt(&[4]).stop_tokens(&[6]).max_new_tokens(2);
    assert_eq!(ids(turn.build().unwrap()), [0, 0]);
}

#[test]
fn cancelled_between_prompt_and_first_token_nothing_is_lost() {
    let model = Fake::saying(3, &[5, 6]);
    let token = CancelToken::new();
    let mut first = Generator::builder(&model).prompt(&[1, 2, 3]).cancel_token(&token).build().unwrap();
    first.prefill().unwrap();
    token.cancel();
    assert!(first.next().is_none());
    assert_eq!((first.finish_reason(), first.unread()), (Some(FinishReason::Cancelled), &[][..]));
    let none = reopened(&model, &first).max_new_tokens(0).build().unwrap();
    for generator in [&first, &none] {
        model.calls.borrow_mut().clear();
        let rest = reopened(&model, generator).max_new_tokens(2).build().unwrap();
        assert_eq!(ids(rest), [5, 6]);
        assert_eq!(model.calls(), ["step"], "the prompt is not read again");
        let turn = reopened(&model, generator).prompt(&[4]).max_new_tokens(1).build().unwrap();
        assert_eq!((ids(turn), model.calls().pop().unwrap()), (vec![6], "prefill 1".into()));
    }
}

#[test]
fn a_prompt_is_read_in_pieces_and_cancelled_between_two() {
    let prompt: Vec<u32> = (1..8).collect();
    let expected = [50, 60];
    let plain = Fake::saying(7, &expected);
    let whole = |piece| {
        plain.calls.borrow_mut().clear();
        let builder = Generator::builder(&plain).prompt(&prompt).prompt_piece(piece).max_new_tokens(2);
        (ids(builder.build().unwrap()), plain.calls())
    };
    assert_eq!(
        whole(3),
        (
            expected.to_vec(),
            ["new_cache", "prefill 3", "prefill 3", "prefill 1", "step"].map(Into::into).to_vec()
        )
    );
    assert_eq!(whole(7).1, ["new_cache", "prefill 7", "step"]);
    let error = Generator::builder(&plain).prompt(&prompt).prompt_piece(0).build().err().unwrap();
    assert_eq!(error.to_string(), "generator: `prompt_piece` is 0, expected a number from 1");

    let token = CancelToken::new();
    let model = Fake { cancel_at: Some((6, token.clone())), ..Fake::saying(7, &expected) };
    let builder =
        || Generator::builder(&model).prompt(&prompt).prompt_piece(3).cancel_token(&token).max_new_tokens(2);
    // By the iterator, by `prefill`, and with a prefix cache.
    for how in 0..4 {
        token.reset();
        let mut prefixes = PrefixCache::new(PrefixCacheOptions { max_bytes: 1 << 20, chunk: 4 });
        let mut first = builder().build().unwrap();
        let read = match how {
            0 => 6,
            1 => first.prefill().map(|()| 6).unwrap(),
            2 => {
                let reuse = first.prefill_with(&mut prefixes).unwrap();
                // Pieces end where states are kept, so the last one was being read.
                assert_eq!(reuse, Reuse { known: 0, reused: 0, read: 7 });
                7
            }
            _ => {
                let mut speculative = Speculative::new(first, NgramDrafter::default(), 3).unwrap();
                assert!(speculative.next().is_none());
                first = speculative.into_generator().unwrap();
                6
            }
        };
        assert!(first.next().is_none());
        assert_eq!(first.finish_reason(), Some(FinishReason::Cancelled));
        assert_eq!((first.cache()[..].to_vec(), first.unread()), (prompt[..read].to_vec(), &prompt[read..]));
        assert_eq!((first.pending(), first.timings().prompt_tokens), (None, read));
        assert_eq!(first.state().unwrap().read(), read);
        token.reset();
        model.calls.borrow_mut().clear();
        let mut rest = reopened(&model, &first).max_new_tokens(2).build().unwrap();
        assert_eq!((ids(&mut rest), rest.prompt()), (expected.to_vec(), &prompt[..]));
        let unread = if read == 6 { &["prefill 1", "step"][..] } else { &["step"] };
        assert_eq!(model.calls(), unread);
        // Another turn reads the rest of the prompt first.
        let mut turn = reopened(&model, &first).prompt(&[9]).max_new_tokens(1).build().unwrap();
        ids(&mut turn);
        assert_eq!(turn.cache()[..], [&prompt[..], &[9]].concat());
    }
    // A lent cache keeps what was read.
    token.reset();
    let mut cache = Vec::new();
    let mut lent = builder().cache(&mut cache).build().unwrap();
    assert!(lent.next().is_none());
    let unread = lent.unread().to_vec();
    token.reset();
    assert_eq!(
        (
            cache.clone(),
            ids(Generator::builder(&model)
                .prompt(&unread)
                .cache(&mut cache)
                .max_new_tokens(2)
                .build()
                .unwrap())
        ),
        (prompt[..6].to_vec(), expected.to_vec())
    );
}

#[test]
fn a_turn_reads_only_what_is_new() {
    let model = Fake::saying(2, &[5, 6, 7, 8, 9]);
    let mut first = Generator::builder(&model).prompt(&[1, 2]).max_new_tokens(2).build().unwrap();
    assert_eq!(ids(&mut first), [5, 6]);
    let state = first.state().unwrap();
    assert_eq!((state.tokens(), state.read(), state.cache().len()), (&[1, 2, 5, 6][..], 3, 3));
    model.calls.borrow_mut().clear();
    let second = Generator::builder(&model).resume(state).prompt(&[4]).max_new_tokens(2);
    let mut second = second.build().unwrap();
    assert_eq!(ids(&mut second), [8, 9]);
    assert_eq!(model.calls(), ["prefill 2", "step"]);
    assert_eq!(second.prompt(), [6, 4]);
    assert_eq!(second.cache()[..], [1, 2, 5, 6, 4, 8]);
    // Of another sampling, unless it is told to forget.
    let config = SamplingConfig { temperature: 0.5, ..Default::default() };
    let other = |state| {
        Generator::builder(&model).resume(state).prompt(&[4]).sampling(config.build().unwrap()).build()
    };
    let error = other(second.state().unwrap()).err().unwrap().to_string();
    assert!(error.contains("expected the state of a sampling with the same options"), "{error}");
    assert!(other(second.state().unwrap().without_sampling()).is_ok());
}

#[test]
fn bad_prompts_are_refused() {
    let model = Fake::saying(1, &[]);
    let error = Generator::builder(&model).build().err().unwrap();
    assert_eq!(error.to_string(), "generator: `prompt` is empty, expected at least one token id");
    let error = Generator::builder(&model).prompt(&[1, 512]).build().err().unwrap();
    assert_eq!(
        error.to_string(),
        "generator: `prompt` holds token 512 at position 1, expected ids below 512"
    );
    assert_eq!(model.calls(), [""; 0]);
}

#[test]
fn the_error_of_the_model_is_kept_and_ends_the_iterator() {
    for (fail_at, during, yielded) in [(2, "prefill", 0), (4, "step", 2)] {
        let model = Fake { fail_at: Some(fail_at), ..Fake::saying(2, &[5, 6, 7]) };
        let mut generator = Generator::builder(&model).prompt(&[1, 2]).build().unwrap();
        assert_eq!(ids(generator.by_ref().take(yielded)).len(), yielded);
        let error = generator.next().unwrap().unwrap_err();
        let source = std::error::Error::source(&error).unwrap();
        assert_eq!(source.to_string(), "out of fake memory");
        assert!(error.to_string().contains(during), "{error}");
        assert!(generator.next().is_none() && generator.next().is_none());
        assert_eq!((generator.finish_reason(), generator.pending()), (None, None));
        assert_eq!(generator.generated().len(), yielded);
    }
}

#[test]
fn nan_is_an_error_that_names_position_and_token() {
    let model = Fake { nan_at: Some(3), ..Fake::saying(2, &[5, 6, 7]) };
    for config in [SamplingConfig::default(), SamplingConfig { temperature: 0.0, ..Default::default() }] {
        let sampling = config.build().unwrap();
        let mut generator = Generator::builder(&model).prompt(&[1, 2]).sampling(sampling).build().unwrap();
        assert_eq!(generator.next().unwrap().unwrap().id, 5);
        let error = generator.next().unwrap().unwrap_err();
        assert!(matches!(error, Error::InvalidLogit { id: 3, position: 3, .. }), "{error}");
        assert!(generator.next().is_none());
    }
}

#[test]
fn a_wrong_number_of_logits_is_an_error() {
    struct Short;
    impl CausalLm for Short {
        type Cache = ();
        fn vocab_size(&self) -> usize {
            4
        }
        fn new_cache(&self) -> Result<(), BoxError> {
            Ok(())
        }
        fn prefill(&self, _: &[u32], _: &mut (), logits: &mut Vec<f32>) -> Result<(), BoxError> {
            logits.push(1.0);
            Ok(())
        }
        fn step(&self, id: u32, cache: &mut (), logits: &mut Vec<f32>) -> Result<(), BoxError> {
            self.prefill(&[id], cache, logits)
        }
    }
    let mut generator = Generator::builder(&Short).prompt(&[1]).build().unwrap();
    let error = generator.next().unwrap().unwrap_err();
    assert!(matches!(error, Error::LogitsLength { got: 1, expected: 4, position: 1 }), "{error}");
}

#[test]
fn timings_count_tokens_and_time() {
    let model = Fake::saying(2, &[5, 6, 7]);
    let mut generator = Generator::builder(&model).prompt(&[1, 2]).max_new_tokens(3).build().unwrap();
    assert_eq!(generator.timings(), Timings::default());
    ids(&mut generator);
    let timings = generator.timings();
    assert_eq!((timings.prompt_tokens, timings.generated_tokens), (2, 3));
    assert!(timings.prompt > Duration::ZERO && timings.generation > Duration::ZERO);
    assert!(timings.prompt_tokens_per_s().is_some() && timings.tokens_per_s().is_some());
}
