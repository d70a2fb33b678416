//! What several test programs share.
#![allow(dead_code)]

pub mod alloc;
pub mod golden;
pub mod random;
pub mod target;
pub mod tolerance;
pub mod torch;

/// The message of an error of Candle, without the backtrace that `RUST_BACKTRACE` adds to it.
pub fn message(error: candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
