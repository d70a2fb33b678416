//! Decoding steps of Mamba-1 or Mamba-2: move the state of each channel on by a token or several, in place.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{Result, Tensor};

use crate::args::{self, Checker, Dim};
use crate::host;
use crate::simd::Isa;
use crate::state_indices::StateIndices;

const OP: &str = "selective_state_update";

/// Arguments of [`selective_state_update`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveStateUpdate<'a> {
    /// `(batch, dim, d_state)` or `(batch, nheads, headdim, d_state)`, with indices `(states, …)`: changed in place.
    pub state: &'a Tensor,
    /// The new input, `(batch, dim)` or `(batch, nheads, headdim)`; of several tokens `(batch, tokens, …)`, as everything
    /// that is laid out as `x`, and `b` and `c`.
    pub x: &'a Tensor,
    /// The step size, laid out as `x`, or one a head, `(batch, nheads)`.
    pub dt: &'a Tensor,
    /// `(dim, d_state)` or `(nheads, headdim, d_state)`, or one a head, `(nheads,)`; negative in a stable system.
    pub a: &'a Tensor,
    /// What the input writes into the state, `(batch, d_state)` or `(batch, ngroups, d_state)`.
    pub b: &'a Tensor,
    /// What the output reads from the state, `(batch, d_state)` or `(batch, ngroups, d_state)`.
    pub c: &'a Tensor,
    /// The skip connection, `(dim,)` or `(nheads, headdim)`, or one a head, `(nheads,)`.
    pub d: Option<&'a Tensor>,
    /// The gate, laid out as `x`.
    pub z: Option<&'a Tensor>,
    /// Added to `dt` first, `(dim,)` or `(nheads, headdim)`, or one a head, `(nheads,)`.
    pub dt_bias: Option<&'a Tensor>,
    /// Whether `dt` then goes through a softplus.
    pub dt_softplus: bool,
    /// The bounds that `dt` is clamped to at last.
    pub dt_limit: (f64, f64),
    /// Which states the rows move on; each its own if absent.
    pub state_indices: Option<&'a StateIndices>,
}

impl<'a> SelectiveStateUpdate<'a> {
    /// The required arguments; everything else absent, `dt` taken as it is.
    pub fn new(
        state: &'a Tensor,
        x: &'a Tensor,
        dt: &'a Tensor,
        a: &'a Tensor,
        b: &'a Tensor,
        c: &'a Tensor,
    ) -> Self {
        Self {
            state,
            x,
            dt,
            a,
            b,
            c,
            d: None,
            z: None,
            dt_bias: None,
            dt_softplus: false,
            dt_limit: (f64::NEG_INFINITY, f64::INFINITY),
            state_indices: None,
        }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "x", self.x)?;
        let d_state = self.state.dims().last().copied().unwrap_or(0);
        let n: Dim = ("d_state", d_state);
        // The form is that of the state: of a batch element one axis of channels, or heads of channels.
        let has_heads = self.state.rank() == 4;
        let (batch, tokens, nheads, headdim) = match (has_heads, self.x.rank()) {
            (false, 3) => {
                let [batch, tokens, dim] = check.main_dims(["batch", "tokens", "dim"])?;
                (batch, Some(tokens), dim, 1)
            }
            (false, _) => {
                let [batch, dim] = check.main_dims(["batch", "dim"])?;
                (batch, None, dim, 1)
            }
            (true, 4) => {
                let [batch, tokens, nheads, headdim] =
                    check.main_dims(["batch", "tokens", "nheads", "headdim"])?;
                (batch, Some(tokens), nheads, headdim)
            }
            (true, _) => {
                let [batch, nheads, headdim] = check.main_dims(["batch", "nheads", "headdim"])?;
                (batch, None, nheads, headdim)
            }
        };
        let rows: Vec<Dim> =
            [("batch", batch)].into_iter().chain(tokens.map(|tokens| ("tokens", tokens))).collect();
        let rows = rows.as_slice();
        let channels: &[Dim] =
            if has_heads { &[("nheads", nheads), ("headdim", headdim)] } else { &[("dim", nheads)] };
        let heads = &channels[..1];
        let states = check.states(self.state_indices, batch, self.state)?;
        check.state("state", self.state, &[&[states], channels, &[n]].concat())?;
        // With one axis, a head is a channel and `dt`, `d`, `dt_bias` may only be one a channel.
        let per_head = |x: &Tensor, rank: usize| x.rank() == rank && has_heads;
        let dt_per_head = per_head(self.dt, rows.len() + 1);
        check.activation("dt", self.dt, &[rows, if dt_per_head { heads } else { channels }].concat())?;
        let a_per_head = per_head(self.a, 1);
        let a_dims = if a_per_head { heads.to_vec() } else { [channels, &[n]].concat() };
        check.parameter("a", self.a, &a_dims)?;
        for (name, x) in [("d", self.d), ("dt_bias", self.dt_bias)] {
            if let Some(x) = x {
                check.parameter(name, x, if per_head(x, 1) { heads } else { channels })?;
            }
        }
        if let Some(z) = self.z {
            check.activation("z", z, &[rows, channels].concat())?;
        }
        let grouped = |x: &Tensor| x.rank() == rows.len() + 2;
        let ngroups = if grouped(self.b) { self.b.dims()[rows.len()] } else { 1 };
        for (name, x) in [("b", self.b), ("c", self.c)] {
            let groups: &[Dim] = if grouped(x) { &[("ngroups", ngroups)] } else { &[] };
            check.activation(name, x, &[rows, groups, &[n]].concat())?;
            check.require(grouped(x) || ngroups == 1, || {
                format!("`{name}` has shape {:?}, expected ngroups {ngroups} as `b`", x.dims())
            })?;
        }
        check.require(ngroups > 0 && nheads.is_multiple_of(ngroups), || {
            format!("`b` has {ngroups} groups, expected a divisor of {} {nheads}", channels[0].0)
        })?;
        check.dt_limit(self.dt_limit)?;
        let tokens = tokens.unwrap_or(1);
        Ok(Sizes { batch, tokens, nheads, headdim, ngroups, d_state, has_heads, dt_per_head, a_per_head })
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub batch: usize,
    pub tokens: usize,
    /// Without heads: channels, of which each is a head of one channel.
    pub nheads: usize,
    pub headdim: usize,
    pub ngroups: usize,
    pub d_state: usize,
    pub has_heads: bool,
    pub dt_per_head: bool,
    pub a_per_head: bool,
}

/// Moves the state on by one token (or several) and returns what is read from it; the state changes in place.
///
/// `h ← exp(Δ · A) h + Δ · x ⊗ B`, `y = h C + D · x`, gated by `silu(z)` if given, where `Δ = dt + dt_bias`, through a
/// softplus if asked for, then clamped to `dt_limit`. Every clone of the tensor `state` sees the change.
///
/// # Shapes
/// For Mamba-1: `state`: `(batch, dim, d_state)` · `x`, `dt`, `z`, `y`: `(batch, dim)` · `a`: `(dim, d_state)` ·
/// `d`, `dt_bias`: `(dim,)`. For Mamba-2: `state`: `(batch, nheads, headdim, d_state)` · `x`, `z`, `y`:
/// `(batch, nheads, headdim)` · `dt`: the same or `(batch, nheads)` · `a`: `(nheads, headdim, d_state)` or `(nheads,)` ·
/// `d`, `dt_bias`: `(nheads, headdim)` or `(nheads,)`; one `dt` and one `a` a head is the fast way. For both `b`, `c`:
/// `(batch, d_state)` or `(batch, ngroups, d_state)`, where neighbouring channels or heads share a group.
/// Several tokens at once: `(batch, tokens, …)` for `x`, `dt`, `z`, `b`, `c` and `y`. With
/// [`state_indices`](StateIndices), `state` is a pool `(states, …)`.
/// `state` is contiguous `f32` (`f64` if `x` is); `x` is f32, f16, bf16 or f64 and `y` has its dtype.
/// # Gradients
/// None: this serves decoding.
/// # Errors
/// If a shape, dtype or device disagrees with `x`, or an argument tracks gradients.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{SelectiveStateUpdate, selective_state_update};
/// # fn main() -> candle_core::Result<()> {
/// let state = Tensor::zeros((1, 1, 2), DType::F32, &Device::Cpu)?;
/// let (x, dt) = (Tensor::new(&[[3f32]], &Device::Cpu)?, Tensor::new(&[[1f32]], &Device::Cpu)?);
/// let a = Tensor::new(&[[0f32, -1000.0]], &Device::Cpu)?; // remembers, forgets
/// let ones = Tensor::new(&[[1f32, 1.0]], &Device::Cpu)?;
/// let args = SelectiveStateUpdate::new(&state, &x, &dt, &a, &ones, &ones);
/// assert_eq!(selective_state_update(&args)?.to_vec2::<f32>()?, [[6.0]]);
/// assert_eq!(selective_state_update(&args)?.to_vec2::<f32>()?, [[9.0]]);
/// assert_eq!(state.to_vec3::<f32>()?, [[[6.0, 3.0]]]);
/// # Ok(()) }
/// ```
/// # Source
/// `selective_state_update` in state-spaces/mamba.
pub fn selective_state_update(args: &SelectiveStateUpdate) -> Result<Tensor> {
    let sizes = args.sizes()?;
    let SelectiveStateUpdate { state, x, dt, a, b, c, d, z, dt_bias, dt_softplus, dt_limit, state_indices } =
        *args;
    let inputs = [
        ("x", Some(x)),
        ("dt", Some(dt)),
        ("a", Some(a)),
        ("b", Some(b)),
        ("c", Some(c)),
        ("d", d),
        ("z", z),
        ("dt_bias", dt_bias),
    ];
    Checker::new(OP, "x", x)?.in_place(state, &inputs)?;
    if !args::fused(x) {
        let (y, next) = reference::forward(args)?;
        host::replace(state, &next)?;
        return Ok(y);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        // The kernels take one token.
        if x.rank() == state.rank() {
            let in_place =
                |alone: &SelectiveStateUpdate| Ok((selective_state_update(alone)?, alone.state.clone()));
            return Ok(reference::tokens(args, in_place)?.0);
        }
        return cuda::update(args, sizes);
    }
    let per_head = |x: &Tensor| sizes.has_heads && x.rank() == 1;
    let (d_per_head, bias_per_head) = (d.is_some_and(per_head), dt_bias.is_some_and(per_head));
    let (x, dt, a) = (host::read("x", x)?, host::read("dt", dt)?, host::read("a", a)?);
    let (b, c) = (host::read("b", b)?, host::read("c", c)?);
    let (d, z) = (host::read_opt("d", d)?, host::read_opt("z", z)?);
    let dt_bias = host::read_opt("dt_bias", dt_bias)?;
    let update = cpu::Update {
        sizes,
        x: &x,
        dt: &dt,
        a: &a,
        b: &b,
        c: &c,
        d: d.as_deref(),
        d_per_head,
        z: z.as_deref(),
        dt_bias: dt_bias.as_deref(),
        bias_per_head,
        dt_softplus,
        dt_limit: (dt_limit.0 as f32, dt_limit.1 as f32),
        states: state_indices.map(StateIndices::states),
    };
    let y = host::modify(OP, state, |state| Ok(cpu::update(&update, Isa::current(), state)))?;
    host::tensor(y, args.x.shape().clone(), args.x.dtype())
}
