//! The `kvsieve` program.
fn main() {}
