//! The backward pass.

use super::Scan;
use crate::simd::Isa;

/// Gradients of the inputs, each laid out as its input.
pub(in super::super) struct Grads {
    pub x: Vec<f32>,
    pub dt: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: Vec<f32>,
    pub z: Vec<f32>,
    pub dt_bias: Vec<f32>,
    pub initial_state: Vec<f32>,
}

pub(in super::super) fn backward(_: &Scan, _: Isa, _: &[f32], _: Option<&[f32]>, _: Option<&[f32]>) -> Grads {
    unimplemented!()
}
