//! The one integration binary: every file here is a module of it.

mod conformance;
