//! What a training leaves for people to look at: lines of JSON, TensorBoard events, a curve.

mod curve;
mod jsonl;
mod tensorboard;

pub use curve::{Curve, loss_curve};
pub use jsonl::JsonLines;
pub use tensorboard::EventWriter;
