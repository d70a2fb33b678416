//! Wrong arguments of every op, one at a time: an error that names the op and the argument, and never a panic.

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::{
    CausalConv1d, CausalConv1dUpdate, GatedRmsNorm, Mamba1Inner, Mamba2SplitConv1dScan, Norm, Packing,
    SelectiveScan, SelectiveStateUpdate, SequenceLayout, SsdChunkScan, causal_conv1d, causal_conv1d_update,
    mamba1_inner, mamba2_split_conv1d_scan, norm, selective_scan, selective_state_update, ssd_chunk_scan,
};

use crate::laws::Tensors;

/// What an argument is to its op.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// The one that others are compared with.
    Main,
    /// In the dtype of the main one.
    Activation,
    /// In any floating dtype.
    Parameter,
    /// `f32`, for a main argument that is not `f64`.
    State,
}

use Kind::{Activation as Act, Main, Parameter, State};

/// An op, its arguments by name, and a call with them.
struct Subject {
    op: &'static str,
    /// Name, extents by symbol, kind. An extent whose symbol stands nowhere else is free: it cannot disagree. A symbol
    /// with `!` is a sum of others, which always can.
    arguments: Vec<(&'static str, &'static str, Kind)>,
    call: fn(&Tensors) -> Result<()>,
}

fn extent(symbol: &str) -> usize {
    match symbol.trim_start_matches('!') {
        "b" => 2,
        "l" => 5,
        "d" => 6,
        "n" => 4,
        "g" => 2,
        "h" => 4,
        "p" => 3,
        "w" => 3,
        "w1" => 2,
        "r" => 7,
        "m" => 9,
        "k" => 8,
        // Of Mamba-2: d_ssm, conv_dim, channels; of Mamba: two dims, the rows of x_proj.
        "hp" => 12,
        "conv" => 12 + 2 * 2 * 4,
        "zxbcdt" => 12 + 28 + 4,
        "xz" => 12,
        "rnn" => 7 + 8,
        other => panic!("no extent for {other}"),
    }
}

impl Subject {
    fn symbols(&self, shape: &'static str) -> Vec<&'static str> {
        shape.split_whitespace().collect()
    }

    fn good(&self) -> Tensors {
        let tensor = |(name, shape, _): &(&str, &'static str, Kind)| {
            let shape: Vec<usize> = self.symbols(shape).into_iter().map(extent).collect();
            ((*name).to_owned(), Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap())
        };
        self.arguments.iter().map(tensor).collect()
    }

    /// Arguments that have an extent of this symbol.
    fn sharing(&self, symbol: &str) -> Vec<&'static str> {
        let shares = |a: &&(&str, &'static str, Kind)| self.symbols(a.1).contains(&symbol);
        self.arguments.iter().filter(shares).map(|a| a.0).collect()
    }

    #[track_caller]
    fn fails(&self, name: &str, bad: Tensor, named: &[&str], why: &str) {
        let mut tensors = self.good();
        tensors.insert(name.into(), bad);
        let op = self.op;
        match (self.call)(&tensors) {
            Ok(()) => panic!("{op}: `{name}` of {why} passes"),
            Err(error) => {
                let message = error.to_string();
                let names = named.iter().any(|name| message.contains(&format!("`{name}`")));
                assert!(
                    message.starts_with(&format!("{op}: ")) && names && message.contains(", expected "),
                    "{op}, `{name}` of {why}: {message}"
                );
            }
        }
    }
}

fn subjects() -> Vec<Subject> {
    const FIRST: SequenceLayout = SequenceLayout::ChannelsFirst;
    const LAST: SequenceLayout = SequenceLayout::ChannelsLast;
    fn conv(t: &Tensors, layout: SequenceLayout) -> Result<()> {
        let good = CausalConv1d::new(&t["x"], &t["weight"]);
        let (bias, initial_state) = (t.get("bias"), t.get("initial_state"));
        causal_conv1d(&CausalConv1d { bias, initial_state, layout, ..good }).map(drop)
    }
    fn conv_update(t: &Tensors) -> Result<()> {
        let good = CausalConv1dUpdate::new(&t["x"], &t["state"], &t["weight"]);
        causal_conv1d_update(&CausalConv1dUpdate { bias: t.get("bias"), ..good }).map(drop)
    }
    fn scan(t: &Tensors, layout: SequenceLayout) -> Result<()> {
        selective_scan(&SelectiveScan {
            d: t.get("d"),
            z: t.get("z"),
            delta_bias: t.get("delta_bias"),
            initial_state: t.get("initial_state"),
            layout,
            ..SelectiveScan::new(&t["u"], &t["delta"], &t["a"], &t["b"], &t["c"])
        })
        .map(drop)
    }
    fn ssd(t: &Tensors) -> Result<()> {
        ssd_chunk_scan(&SsdChunkScan {
            d: t.get("d"),
            z: t.get("z"),
            dt_bias: t.get("dt_bias"),
            initial_state: t.get("initial_state"),
            ..SsdChunkScan::new(&t["x"], &t["dt"], &t["a"], &t["b"], &t["c"])
        })
        .map(drop)
    }
    fn update(t: &Tensors) -> Result<()> {
        selective_state_update(&SelectiveStateUpdate {
            d: t.get("d"),
            z: t.get("z"),
            dt_bias: t.get("dt_bias"),
            ..SelectiveStateUpdate::new(&t["state"], &t["x"], &t["dt"], &t["a"], &t["b"], &t["c"])
        })
        .map(drop)
    }
    fn norms(t: &Tensors) -> Result<()> {
        norm(&Norm {
            bias: t.get("bias"),
            residual: t.get("residual"),
            z: t.get("z"),
            ..Norm::rms(&t["x"], &t["weight"], 1e-5)
        })
        .map(drop)
    }
    fn mamba1(t: &Tensors) -> Result<()> {
        mamba1_inner(&Mamba1Inner {
            in_proj: t.get("in_proj"),
            conv_bias: t.get("conv_bias"),
            delta_bias: t.get("delta_bias"),
            d: t.get("d"),
            out_proj: t.get("out_proj"),
            initial_conv_state: t.get("initial_conv_state"),
            initial_ssm_state: t.get("initial_ssm_state"),
            ..Mamba1Inner::new(&t["xz"], &t["conv_weight"], &t["x_proj"], &t["dt_proj"], &t["a"])
        })
        .map(drop)
    }
    fn mamba2(t: &Tensors) -> Result<()> {
        let weight = &t["norm.weight"];
        let norm = GatedRmsNorm { weight, eps: 1e-5, group_size: None, norm_before_gate: false };
        mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan {
            in_proj: t.get("in_proj"),
            conv_bias: t.get("conv_bias"),
            dt_bias: t.get("dt_bias"),
            d: t.get("d"),
            norm: Some(norm),
            out_proj: t.get("out_proj"),
            ngroups: 2,
            initial_conv_state: t.get("initial_conv_state"),
            initial_ssm_state: t.get("initial_ssm_state"),
            ..Mamba2SplitConv1dScan::new(&t["zxbcdt"], &t["conv_weight"], &t["a"], 3)
        })
        .map(drop)
    }
    let mut all = vec![
        Subject {
            op: "causal_conv1d",
            arguments: vec![
                ("x", "b d l", Main),
                ("weight", "d w", Parameter),
                ("bias", "d", Parameter),
                ("initial_state", "b d w1", State),
            ],
            call: |t| conv(t, FIRST),
        },
        Subject {
            op: "causal_conv1d",
            arguments: vec![
                ("x", "b l d", Main),
                ("weight", "d w", Parameter),
                ("bias", "d", Parameter),
                ("initial_state", "b d w1", State),
            ],
            call: |t| conv(t, LAST),
        },
        Subject {
            op: "causal_conv1d_update",
            arguments: vec![
                ("x", "b d l", Main),
                ("weight", "d w", Parameter),
                ("bias", "d", Parameter),
                ("state", "b d w1", State),
            ],
            call: conv_update,
        },
        Subject {
            op: "selective_scan",
            arguments: vec![
                ("u", "b d l", Main),
                ("delta", "b d l", Act),
                ("a", "d n", Parameter),
                ("b", "b g n l", Act),
                ("c", "b g n l", Act),
                ("d", "d", Parameter),
                ("z", "b d l", Act),
                ("delta_bias", "d", Parameter),
                ("initial_state", "b d n", State),
            ],
            call: |t| scan(t, FIRST),
        },
        Subject {
            op: "selective_scan",
            arguments: vec![
                ("u", "b l d", Main),
                ("delta", "b l d", Act),
                ("a", "d n", Parameter),
                ("b", "b l n", Act),
                ("c", "d n", Parameter),
                ("d", "d", Parameter),
                ("z", "b l d", Act),
                ("delta_bias", "d", Parameter),
                ("initial_state", "b d n", State),
            ],
            call: |t| scan(t, LAST),
        },
        Subject {
            op: "ssd_chunk_scan",
            arguments: vec![
                ("x", "b l h p", Main),
                ("dt", "b l h", Act),
                ("a", "h", Parameter),
                ("b", "b l g n", Act),
                ("c", "b l g n", Act),
                ("d", "h p", Parameter),
                ("z", "b l h p", Act),
                ("dt_bias", "h", Parameter),
                ("initial_state", "b h p n", State),
            ],
            call: ssd,
        },
        Subject {
            op: "selective_state_update",
            arguments: vec![
                ("state", "b h p n", State),
                ("x", "b h p", Main),
                ("dt", "b h", Act),
                ("a", "h", Parameter),
                ("b", "b g n", Act),
                ("c", "b g n", Act),
                ("d", "h", Parameter),
                ("z", "b h p", Act),
                ("dt_bias", "h", Parameter),
            ],
            call: update,
        },
        Subject {
            op: "selective_state_update",
            arguments: vec![
                ("state", "b d n", State),
                ("x", "b d", Main),
                ("dt", "b d", Act),
                ("a", "d n", Parameter),
                ("b", "b n", Act),
                ("c", "b n", Act),
                ("d", "d", Parameter),
                ("z", "b d", Act),
                ("dt_bias", "d", Parameter),
            ],
            call: update,
        },
        Subject {
            op: "norm",
            arguments: vec![
                ("x", "b l d", Main),
                ("weight", "d", Parameter),
                ("bias", "d", Parameter),
                ("residual", "b l d", Act),
                ("z", "b l d", Act),
            ],
            call: norms,
        },
    ];
    let of_mamba1 = [
        ("conv_weight", "d w", Parameter),
        ("conv_bias", "d", Parameter),
        ("x_proj", "!rnn d", Parameter),
        ("dt_proj", "d r", Parameter),
        ("delta_bias", "d", Parameter),
        ("a", "d n", Parameter),
        ("d", "d", Parameter),
        ("out_proj", "m d", Parameter),
        ("initial_conv_state", "b d w1", State),
        ("initial_ssm_state", "b d n", State),
    ];
    let of_mamba2 = [
        ("conv_weight", "conv w", Parameter),
        ("conv_bias", "conv", Parameter),
        ("dt_bias", "h", Parameter),
        ("a", "h", Parameter),
        ("d", "h p", Parameter),
        ("norm.weight", "hp", Parameter),
        ("out_proj", "m hp", Parameter),
        ("initial_conv_state", "b conv w1", State),
        ("initial_ssm_state", "b h p n", State),
    ];
    // From what the first projection gives, and from what it takes.
    let (xz, zxbcdt) = (("xz", "b l !xz", Main), ("zxbcdt", "b l !zxbcdt", Main));
    let blocks = [
        ("mamba1_inner", &of_mamba1[..], vec![xz], mamba1 as fn(&Tensors) -> Result<()>),
        ("mamba1_inner", &of_mamba1, vec![("xz", "b l k", Main), ("in_proj", "!xz k", Parameter)], mamba1),
        ("mamba2_split_conv1d_scan", &of_mamba2, vec![zxbcdt], mamba2),
        (
            "mamba2_split_conv1d_scan",
            &of_mamba2,
            vec![("zxbcdt", "b l k", Main), ("in_proj", "!zxbcdt k", Parameter)],
            mamba2,
        ),
    ];
    all.extend(blocks.map(|(op, others, first, call)| Subject {
        op,
        arguments: first.into_iter().chain(others.iter().copied()).collect(),
        call,
    }));
    all
}

/// Calls `f` with each subject and argument.
fn for_each_argument(f: impl Fn(&Subject, &'static str, &'static str, Kind, &Tensor)) {
    for subject in subjects() {
        let good = subject.good();
        (subject.call)(&good).unwrap_or_else(|e| panic!("{}: {e}", subject.op));
        for (name, shape, kind) in &subject.arguments {
            f(&subject, name, shape, *kind, &good[*name]);
        }
    }
}

/// The names that an error about `name` may give: others where it is what they are compared with.
fn names<'a>(subject: &'a Subject, name: &'a str, kind: Kind, symbols: &[&str]) -> Vec<&'a str> {
    let others = symbols.iter().flat_map(|symbol| subject.sharing(symbol));
    let others = others.filter(|_| {
        kind == Main || matches!(name, "a" | "b" | "weight" | "conv_weight" | "dt_proj" | "state")
    });
    std::iter::once(name).chain(others).collect()
}

#[test]
fn wrong_rank() {
    for_each_argument(|subject, name, shape, kind, good| {
        let named = names(subject, name, kind, &subject.symbols(shape));
        subject.fails(name, good.unsqueeze(0).unwrap(), &named, "one rank more");
        let last = good.rank() - 1;
        if (name, shape) != ("d", "h p") {
            subject.fails(name, good.get_on_dim(last, 0).unwrap(), &named, "one rank less"); // else one a head
        }
        subject.fails(name, good.flatten_all().unwrap().get(0).unwrap(), &named, "rank 0");
    });
}

#[test]
fn wrong_extent() {
    for_each_argument(|subject, name, shape, kind, good| {
        for (axis, symbol) in subject.symbols(shape).into_iter().enumerate() {
            if matches!(symbol, "m" | "l") && subject.sharing(symbol).len() == 1 {
                continue; // free
            }
            let mut named = names(subject, name, kind, &[symbol]);
            let in_a_sum = matches!(symbol, "n" | "h") && subject.op.starts_with("mamba");
            if matches!(symbol, "w" | "r") || symbol.starts_with('!') || in_a_sum {
                named.extend(subject.arguments.iter().map(|a| a.0).chain(["ngroups"]));
            }
            // Of Mamba-1, B and C have their own numbers of groups: any divisor of the channels.
            let divisor = (subject.op, symbol) == ("selective_scan", "g");
            let lengths = if divisor { vec![4, 0] } else { vec![extent(symbol) + 1, extent(symbol) - 1, 0] };
            for len in lengths {
                let mut dims = good.dims().to_vec();
                dims[axis] = len;
                let bad = Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
                subject.fails(name, bad, &named, &format!("{len} {symbol}"));
            }
        }
    });
}

#[test]
fn wrong_dtype() {
    for_each_argument(|subject, name, _, kind, good| {
        let cast = |dtype: DType| good.to_dtype(dtype).unwrap();
        for integer in [DType::U32, DType::U8, DType::I64] {
            subject.fails(name, cast(integer), &[name], integer.as_str());
        }
        let wrong: &[DType] = match kind {
            Act => &[DType::F64, DType::F16, DType::BF16],
            State => &[DType::F64, DType::F16, DType::BF16],
            // An f64 computation has f64 states, and other activations disagree with it in any other dtype.
            Main if subject.arguments.iter().any(|a| a.2 == State) => &[DType::F64],
            Main | Parameter => &[],
        };
        // The residual stream of a norm may be f32, but the other dtypes are wrong.
        for dtype in wrong {
            let states = subject.arguments.iter().filter(|a| kind == Main && a.2 != Parameter).map(|a| a.0);
            let named: Vec<&str> = std::iter::once(name).chain(states).collect();
            subject.fails(name, cast(*dtype), &named, dtype.as_str());
        }
        if kind == Parameter && !(subject.op == "selective_scan" && name == "c") {
            for dtype in [DType::F64, DType::F16, DType::BF16] {
                let mut tensors = subject.good();
                tensors.insert(name.into(), cast(dtype));
                (subject.call)(&tensors).unwrap_or_else(|e| panic!("`{name}` of {dtype:?}: {e}"));
            }
        }
    });
}

/// What has no backward refuses each argument that tracks gradients, and each that shares storage with the state.
#[test]
fn updates_refuse_gradients_and_aliases() {
    for subject in subjects().iter().filter(|subject| subject.op.ends_with("update")) {
        for (name, ..) in &subject.arguments {
            let var = Var::from_tensor(&subject.good()[*name]).unwrap();
            subject.fails(name, var.as_tensor().clone(), &[name], "a variable");
            if *name == "state" {
                continue;
            }
            let mut tensors = subject.good();
            let (x, state) = (tensors[*name].clone(), tensors["state"].clone());
            let len = x.elem_count();
            let buffer = Tensor::zeros(len + state.elem_count(), DType::F32, &Device::Cpu).unwrap();
            let part = |start: usize, like: &Tensor| {
                buffer.narrow(0, start, like.elem_count()).unwrap().reshape(like.shape()).unwrap()
            };
            tensors.insert("state".into(), part(len, &state));
            tensors.insert((*name).into(), part(0, &x));
            let message = (subject.call)(&tensors).unwrap_err().to_string();
            let expected = format!("{}: `{name}` shares storage", subject.op);
            assert!(message.starts_with(&expected), "{message}");
        }
    }
}

#[test]
fn options() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let fails = |result: Result<()>, op: &str, option: &str| {
        let message = result.expect_err(&format!("{op}: a wrong `{option}` passes")).to_string();
        assert!(message.starts_with(&format!("{op}: `{option}` is ")), "{message}");
    };
    let (x, dt, a, b) = (zeros(&[2, 5, 4, 3]), zeros(&[2, 5, 4]), zeros(&[4]), zeros(&[2, 5, 2, 6]));
    let ssd = SsdChunkScan::new(&x, &dt, &a, &b, &b);
    let (zxbcdt, conv) = (zeros(&[2, 5, 44]), zeros(&[28, 4]));
    let block = Mamba2SplitConv1dScan { ngroups: 2, ..Mamba2SplitConv1dScan::new(&zxbcdt, &conv, &a, 3) };
    let (state, token, token_dt, token_b) =
        (zeros(&[2, 4, 3, 6]), zeros(&[2, 4, 3]), zeros(&[2, 4]), zeros(&[2, 2, 6]));
    let update = SelectiveStateUpdate::new(&state, &token, &token_dt, &a, &token_b, &token_b);
    // Packings of another batch, of more tokens, and of a row with padding that is too short.
    let ids = Tensor::new(&[[0i64, 0, -1, 1], [2, 2, 2, 2]], &Device::Cpu).unwrap();
    let padded = Packing::from_seq_idx(&ids).unwrap();
    for packing in [Packing::from_lengths(&[5]), Packing::from_lengths(&[5, 5]), padded] {
        let packing = Some(&packing);
        let (xd, w) = (zeros(&[2, 6, 5]), zeros(&[6, 3]));
        let conv = causal_conv1d(&CausalConv1d { packing, ..CausalConv1d::new(&xd, &w) });
        fails(conv.map(drop), "causal_conv1d", "packing");
        let (n, bc) = (zeros(&[6, 4]), zeros(&[2, 4, 5]));
        let scan = SelectiveScan { packing, ..SelectiveScan::new(&xd, &xd, &n, &bc, &bc) };
        fails(selective_scan(&scan).map(drop), "selective_scan", "packing");
        fails(ssd_chunk_scan(&SsdChunkScan { packing, ..ssd }).map(drop), "ssd_chunk_scan", "packing");
        let result = mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan { packing, ..block }).map(drop);
        fails(result, "mamba2_split_conv1d_scan", "packing");
        let (xz, x_proj, dt_proj) = (zeros(&[2, 5, 12]), zeros(&[15, 6]), zeros(&[6, 7]));
        let inner = Mamba1Inner { packing, ..Mamba1Inner::new(&xz, &w, &x_proj, &dt_proj, &n) };
        fails(mamba1_inner(&inner).map(drop), "mamba1_inner", "packing");
    }
    // States are one a sequence.
    let (x, packing) = (zeros(&[1, 6, 5]), Packing::from_lengths(&[2, 3]));
    let (w, state) = (zeros(&[6, 3]), zeros(&[1, 6, 2]));
    let args =
        CausalConv1d { packing: Some(&packing), initial_state: Some(&state), ..CausalConv1d::new(&x, &w) };
    let message = causal_conv1d(&args).unwrap_err().to_string();
    let expected =
        "causal_conv1d: `initial_state` has shape [1, 6, 2], expected (sequences 2, dim 6, width - 1 2)";
    assert!(message.contains(expected), "{message}");
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    for dt_limit in [(nan, 1.0), (0.0, nan), (1.0, 0.5), (inf, inf), (-inf, -inf), (inf, -inf)] {
        fails(ssd_chunk_scan(&SsdChunkScan { dt_limit, ..ssd }).map(drop), "ssd_chunk_scan", "dt_limit");
        let result = selective_state_update(&SelectiveStateUpdate { dt_limit, ..update }).map(drop);
        fails(result, "selective_state_update", "dt_limit");
        let result = mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan { dt_limit, ..block }).map(drop);
        fails(result, "mamba2_split_conv1d_scan", "dt_limit");
    }
    let chunk_size = 0;
    fails(ssd_chunk_scan(&SsdChunkScan { chunk_size, ..ssd }).map(drop), "ssd_chunk_scan", "chunk_size");
    let result = mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan { chunk_size, ..block }).map(drop);
    fails(result, "mamba2_split_conv1d_scan", "chunk_size");
    // Chunks longer than anything are fine.
    ssd_chunk_scan(&SsdChunkScan { chunk_size: usize::MAX, ..ssd }).unwrap();
    let (x, weight) = (zeros(&[2, 12]), zeros(&[12]));
    let plain = Norm::rms(&x, &weight, 1e-5);
    for eps in [nan, inf, -inf, -1e-5] {
        fails(norm(&Norm { eps, ..plain }).map(drop), "norm", "eps");
        let gated = GatedRmsNorm { weight: &weight, eps, group_size: None, norm_before_gate: true };
        let result =
            mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan { norm: Some(gated), ..block }).map(drop);
        fails(result, "mamba2_split_conv1d_scan", "norm.eps");
    }
    for group_size in [Some(0), Some(5), Some(24), Some(usize::MAX)] {
        fails(norm(&Norm { group_size, ..plain }).map(drop), "norm", "group_size");
        let gated = GatedRmsNorm { weight: &weight, eps: 1e-5, group_size, norm_before_gate: true };
        let result =
            mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan { norm: Some(gated), ..block }).map(drop);
        fails(result, "mamba2_split_conv1d_scan", "norm.group_size");
    }
}

mod cuda {
    use super::*;
    use crate::support::target::with_gpu;

    /// Each argument in the memory of another device than the others.
    #[test]
    fn wrong_device() {
        with_gpu(|gpu| {
            let cases = std::cell::Cell::new(0);
            for_each_argument(|subject, name, shape, kind, good| {
                let named = names(subject, name, kind, &subject.symbols(shape));
                let others: Vec<&str> = subject.arguments.iter().map(|argument| argument.0).collect();
                let named = if kind == Main { others } else { named };
                subject.fails(name, good.to_device(gpu).unwrap(), &named, "another device");
                cases.set(cases.get() + 1);
            });
            Ok(cases.get())
        });
    }
}
