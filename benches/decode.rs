//! Placeholder that is replaced before the first release.
fn main() {}
