//! What several test programs share.
#![allow(dead_code)]

pub mod alloc;
pub mod golden;
pub mod random;
pub mod target;
pub mod tolerance;
