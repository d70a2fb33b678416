//! Custom ops.
