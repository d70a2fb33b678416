"""The equations once more, in numpy, one step of time after another, written apart from the published code.

Nothing here is stored. It checks what is: outputs directly, gradients through the complex step. Every function takes
float64 or complex128 arrays, because for an analytic f, `imag(f(x + i h v)) / h` is the derivative of f at x along v,
without cancellation, so that an h of 1e-30 gives all digits.
"""

import numpy as np


def softplus(x):
    return np.log1p(np.exp(x))


def silu(x):
    return x / (1 + np.exp(-x))


def clamp(x, low, high):
    return np.where(x.real < low, low, np.where(x.real > high, high, x))


def selective_scan(u, delta, a, b, c, d=None, z=None, delta_bias=None, *, delta_softplus):
    batch, dim, seqlen = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[None, :, None]
    if delta_softplus:
        delta = softplus(delta)

    def at(m, i, t):  # the (batch, d_state) row of channel i at time t
        if m.ndim == 2:
            return np.broadcast_to(m[i], (batch, m.shape[1]))
        return m[:, i // (dim // m.shape[1]), :, t]

    kind = np.result_type(*(x for x in (u, delta, a, b, c, d, z) if x is not None))
    y = np.zeros((batch, dim, seqlen), kind)
    state = np.zeros((batch, dim, a.shape[1]), kind)
    for t in range(seqlen):
        for i in range(dim):
            step = delta[:, i, t, None]
            state[:, i] = np.exp(step * a[i]) * state[:, i] + step * at(b, i, t) * u[:, i, t, None]
            y[:, i, t] = (state[:, i] * at(c, i, t)).sum(-1)
    if d is not None:
        y = y + u * d[None, :, None]
    if z is not None:
        y = y * silu(z)
    return {"y": y, "final_state": state}


def ssd(x, dt, a, b, c, d=None, z=None, dt_bias=None, initial_states=None, *, dt_softplus, dt_limit):
    batch, seqlen, nheads, headdim = x.shape
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    dt = clamp(dt, *dt_limit)
    kind = np.result_type(*(v for v in (x, dt, a, b, c, d, z, initial_states) if v is not None))
    y = np.zeros(x.shape, kind)
    state = np.zeros((batch, nheads, headdim, b.shape[-1]), kind)
    if initial_states is not None:
        state = state + initial_states
    per_group = nheads // b.shape[2]
    for t in range(seqlen):
        for h in range(nheads):
            step, g = dt[:, t, h, None, None], h // per_group
            state[:, h] = np.exp(step * a[h]) * state[:, h] + step * x[:, t, h, :, None] * b[:, t, g, None, :]
            y[:, t, h] = (state[:, h] * c[:, t, g, None, :]).sum(-1)
    if d is not None:
        y = y + x * (d if d.ndim == 2 else d[:, None])
    if z is not None:
        y = y * silu(z)
    return {"y": y, "final_state": state}


def selective_state_update(state, x, dt, a, b, c, d=None, z=None, dt_bias=None, *, dt_softplus):
    if state.ndim == 3:  # the form without heads is the form with one head
        lift = lambda m, axis: None if m is None else np.expand_dims(m, axis)  # noqa: E731
        out = selective_state_update(
            lift(state, 1), lift(x, 1), lift(dt, 1), lift(a, 0), lift(b, 1), lift(c, 1), lift(d, 0), lift(z, 1),
            lift(dt_bias, 0), dt_softplus=dt_softplus,
        )
        return {name: value[:, 0] for name, value in out.items()}
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    heads_per_group = state.shape[1] // b.shape[1]
    b, c = (np.repeat(m, heads_per_group, axis=1) for m in (b, c))
    state = np.exp(dt[..., None] * a) * state + (dt * x)[..., None] * b[:, :, None, :]
    y = (state * c[:, :, None, :]).sum(-1)
    if d is not None:
        y = y + x * d
    if z is not None:
        y = y * silu(z)
    return {"y": y, "state": state}


def causal_conv1d(x, weight, bias=None, initial_states=None, *, activation):
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    if initial_states is None:
        initial_states = np.zeros((batch, dim, width - 1))
    window = np.concatenate([initial_states, x], axis=2)
    y = np.stack([(window[:, :, t : t + width] * weight).sum(-1) for t in range(seqlen)], axis=2)
    if bias is not None:
        y = y + bias[:, None]
    return {"y": silu(y) if activation == "silu" else y, "final_states": window[:, :, seqlen:]}


def causal_conv1d_update(x, conv_state, weight, bias=None, *, activation):
    single = x.ndim == 2
    x = x[:, :, None] if single else x
    window, width, y = conv_state, weight.shape[1], []
    for t in range(x.shape[2]):
        window = np.concatenate([window, x[:, :, t : t + 1]], axis=2)
        y.append((window[:, :, -width:] * weight).sum(-1))
        window = window[:, :, 1:]
    y = np.stack(y, axis=2)
    if bias is not None:
        y = y + bias[:, None]
    y = silu(y) if activation == "silu" else y
    return {"y": y[:, :, 0] if single else y, "conv_state": window}


def norm(x, weight, bias=None, residual=None, z=None, x1=None, weight1=None, bias1=None, rowscale=None, *,
         centred, eps, group_size, norm_before_gate, prenorm):
    if rowscale is not None:
        x = x * rowscale[..., None]
    if x1 is not None:
        x = x + x1
    if residual is not None:
        x = x + residual
    if z is not None and not norm_before_gate:
        x = x * silu(z)
    size = group_size or x.shape[-1]
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    if centred:
        groups = groups - groups.mean(-1, keepdims=True)
    normed = (groups / np.sqrt((groups * groups).mean(-1, keepdims=True) + eps)).reshape(x.shape)
    out = {"y": normed * weight + (0 if bias is None else bias)}
    if z is not None and norm_before_gate:
        out["y"] = out["y"] * silu(z)
    if weight1 is not None:
        out["y1"] = normed * weight1 + (0 if bias1 is None else bias1)
    if prenorm:
        out["residual"] = x
    return out
