//! Storage under one name: what we would choose, as terms of a recipe.
//!
//! Keys get more bits than values, the first and last two layers more than those between, and models whose KV heads
//! serve eight or more query heads more than others: there one rounded key errs for all of them. Keys are centred and
//! rotated, which at 8 bits already makes a tenth of the error. So are values of 4 bits, since the first entries are exact: where
//! they are packed too, a page's mean adds error to their small values, which draw most attention.

/// Terms under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The name, a term of its own: `full+balanced`.
    pub name: &'static str,
    /// What it is for, in a sentence.
    pub summary: &'static str,
    /// The terms it stands for. Later terms of a recipe override them.
    pub terms: &'static str,
}

/// All, from most to fewest bits.
pub const PRESETS: [Preset; 3] = [
    Preset { name: "safe", summary: "8 bits everywhere", terms: "k=int8(center,hadamard)+v=int8" },
    Preset {
        name: "balanced",
        summary: "keys at 8 bits, values at 4; 8 at both ends of the model and at 8 query heads per KV head",
        terms: "k=int8(center,hadamard)+v=int4(center,hadamard)+layers=0..2(v=int8)+layers=-2..(v=int8)+layers=0..(group=8,v=int8)",
    },
    Preset {
        name: "compact",
        summary: "4 bits, centred and rotated; keys at 8 at both ends of the model and at 8 query heads per KV head",
        terms: "k=lm4+v=lm4+layers=0..2(k=int8(center,hadamard))+layers=-2..(k=int8(center,hadamard))+layers=0..(group=8,k=int8(center,hadamard))",
    },
];

/// The preset of a name.
pub fn preset(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|p| p.name == name)
}
