//! Whether states are those of a stack.

use candle_core::{Result, Tensor, bail};

use super::{Attention, Conv, KeysValues, Layer, Mixer, OP, Stack, State, expect};

/// All attentions, in the order of their states.
#[cfg(feature = "cuda")]
pub(super) fn attentions(stack: &Stack) -> Vec<&Attention> {
    let mut all = vec![];
    for layer in &stack.layers {
        all.extend(layer.shared.iter().map(|shared| &shared.attention));
        for (_, mixer) in &layer.mixers {
            if let Mixer::Attention(attention) = mixer {
                all.push(attention);
            }
        }
    }
    all
}

/// Checks that there is a state for each mixer, and of the right shape; those of attentions.
pub(super) fn check_states<'a>(
    stack: &'a Stack,
    states: &'a [State],
    batch: usize,
) -> Result<Vec<(&'a Attention, &'a [KeysValues<'a>])>> {
    let mut rest = states.iter();
    let mut attentions: Vec<(&Attention, &[KeysValues])> = vec![];
    let mixers = |layer: &'a Layer| layer.mixers.iter().map(|(_, mixer)| mixer);
    let count: usize = stack.layers.iter().map(|l| l.mixers.len() + usize::from(l.shared.is_some())).sum();
    if states.len() != count {
        bail!("{OP}: got {} states, expected {count}", states.len());
    }
    let mut of_attention = |attention: &'a Attention, state: &'a State| -> Result<()> {
        if state.kv.len() != batch {
            bail!("{OP}: got keys and values of {} sequences, expected {batch}", state.kv.len());
        }
        attentions.push((attention, &state.kv));
        match &attention.conv {
            Some(conv) => check_tensor("state.conv", state.conv, &window_of(conv, batch)?),
            None => Ok(()),
        }
    };
    for layer in &stack.layers {
        if let Some(shared) = &layer.shared
            && let Some(state) = rest.next()
        {
            of_attention(&shared.attention, state)?;
        }
        for (mixer, state) in mixers(layer).zip(&mut rest) {
            match mixer {
                Mixer::Mamba1(m) => {
                    let (d_inner, d_state) = m.a.dims2()?;
                    check_tensor("state.conv", state.conv, &window_of(&m.conv, batch)?)?;
                    check_tensor("state.ssm", state.ssm, &[batch, d_inner, d_state])?;
                }
                Mixer::Mamba2(m) => {
                    check_tensor("state.conv", state.conv, &window_of(&m.conv, batch)?)?;
                    check_tensor("state.ssm", state.ssm, &[batch, m.a.dim(0)?, m.headdim, m.d_state])?;
                }
                Mixer::Attention(m) => of_attention(m, state)?,
                Mixer::ShortConv(m) => check_tensor("state.conv", state.conv, &window_of(&m.conv, batch)?)?,
                Mixer::Mlp(_) => {}
            }
        }
    }
    Ok(attentions)
}

fn window_of(conv: &Conv, batch: usize) -> Result<[usize; 3]> {
    let (channels, width) = conv.weight.dims2()?;
    Ok([batch, channels, width - 1])
}

fn check_tensor(name: &str, x: Option<&Tensor>, expected: &[usize]) -> Result<()> {
    match x {
        Some(x) => expect(name, x, expected),
        None => bail!("{OP}: `{name}` is missing, expected {expected:?}"),
    }
}
