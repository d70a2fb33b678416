//! Guesses of what a grammar forces.

use tokenizers::Tokenizer;

use super::Grammar;
use crate::error::Result;
use crate::filter::History;
use crate::speculative::Drafter;

/// Guesses the text that a grammar leaves no choice about, such as the names of the properties of a JSON schema, as the
/// tokenizer spells it, or else by the longest tokens that fit; where there is a choice, what another drafter guesses.
///
/// It goes with a generation that is constrained by the same grammar. A guess is wrong only where the model prefers another spelling.
///
/// # Example
/// ```
/// use mamba_generate::{Drafter, GrammarCompiler, GrammarDrafter, NgramDrafter};
/// use tokenizers::Tokenizer;
/// use tokenizers::decoders::fuse::Fuse;
/// use tokenizers::models::bpe::BPE;
///
/// let vocab = [("a", 0), ("b", 1), ("c", 2), ("bc", 3)].map(|(token, id)| (token.to_string(), id));
/// let merges = vec![("b".to_string(), "c".to_string())];
/// let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocab, merges).build()?);
/// tokenizer.with_decoder(Some(Fuse::new()));
/// let grammar = GrammarCompiler::new(&tokenizer, 4, &[])?.regex("(a|b)abc(a|c)")?;
///
/// let mut drafter = GrammarDrafter::new(&grammar, &tokenizer, NgramDrafter::default());
/// let mut guesses = Vec::new();
/// drafter.draft(&[2, 1], 1, &[], 4, &mut guesses)?; // after the prompt c, b was generated
/// assert_eq!(guesses, [0, 3]);
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
#[derive(Debug, Clone)]
pub struct GrammarDrafter<'t, D> {
    grammar: Grammar,
    tokenizer: &'t Tokenizer,
    otherwise: D,
}

impl<'t, D: Drafter> GrammarDrafter<'t, D> {
    /// Makes a drafter for a generation that `grammar` constrains from its first token on.
    pub fn new(grammar: &Grammar, tokenizer: &'t Tokenizer, otherwise: D) -> Self {
        Self { grammar: grammar.clone(), tokenizer, otherwise }
    }
}

impl<D: Drafter> Drafter for GrammarDrafter<'_, D> {
    fn vocab_size(&self) -> Option<usize> {
        self.otherwise.vocab_size()
    }

    fn draft(
        &mut self,
        tokens: &[u32],
        prompt_end: usize,
        sampling: &[u64],
        most: usize,
        guesses: &mut Vec<u32>,
    ) -> Result<()> {
        let forced = self.grammar.forced(History::new(tokens, prompt_end))?;
        // What ends within a character cannot be spelled.
        let text = forced.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        match &self.grammar.spell(text, self.tokenizer)[..] {
            spelled @ [_, ..] => {
                guesses.extend(spelled.iter().take(most));
                Ok(())
            }
            [] => self.otherwise.draft(tokens, prompt_end, sampling, most, guesses),
        }
    }
}
