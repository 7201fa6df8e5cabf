//! Policies that are not made of stages.
//!
//! *Helps* what chooses entries jointly or not at all. *Hurts* reuse: nothing here combines with an
//! allocator or a protection from the recipe.

use super::registry::Entry;

macro_rules! policies {
    ($($module:ident,)*) => {
        $(pub mod $module;)*

        /// The built-in whole policies.
        pub const ENTRIES: &[Entry] = &[$($module::ENTRY,)*];
    };
}

// One line per policy: the file of that name, with its `ENTRY`.
policies! {
    full,
}
