//! Which KV head is stored how: one encoding for keys and one for values, rules that override them for some layers,
//! heads or group sizes, and what stays exact.

use crate::device::encoding::Encoding;
use crate::view::DType;
use std::fmt;
use std::str::FromStr;

/// Layers or heads from `start` to before `end`; negative ones count from the last. Text: `0..2`, `-2..`, `5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// The first.
    pub start: i32,
    /// The one behind the last; none is all that follow.
    pub end: Option<i32>,
}

impl Span {
    /// Everything.
    pub const ALL: Self = Self { start: 0, end: None };

    /// Whether number `index` of `count` is one of them.
    pub fn contains(&self, index: usize, count: usize) -> bool {
        let (index, count) = (index as i64, count as i64);
        let place = |x: i32| if x < 0 { i64::from(x) + count } else { i64::from(x) };
        // A negative end that reaches before the first is an empty span, a negative start begins at the first.
        index >= place(self.start) && self.end.is_none_or(|end| index < place(end))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let want =
            || "a layer or head such as 5 or -1, or a range of them such as 0..2, -2.. or ..4".to_owned();
        let number = |t: &str| t.parse::<i32>().ok().filter(|_| !t.starts_with('+')).ok_or_else(want);
        match text.split_once("..") {
            Some((start, end)) => {
                let start = if start.is_empty() { 0 } else { number(start)? };
                let end = if end.is_empty() { None } else { Some(number(end)?) };
                Ok(Self { start, end })
            }
            // The last one has none behind it to name.
            None if text == "-1" => Ok(Self { start: -1, end: None }),
            None => number(text)
                .and_then(|n| Ok(Self { start: n, end: Some(n.checked_add(1).ok_or_else(want)?) })),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..", self.start)?;
        self.end.map_or(Ok(()), |end| write!(f, "{end}"))
    }
}

/// Other storage for some heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// In these layers.
    pub layers: Span,
    /// These KV heads.
    pub heads: Span,
    /// Where at least so many query heads share a KV head.
    pub group: usize,
    /// Their keys, if the rule says.
    pub k: Option<Encoding>,
    /// Their values, if the rule says.
    pub v: Option<Encoding>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layers={}(", self.layers)?;
        let mut between = "";
        let mut argument = |name: &str, value: &dyn fmt::Display| {
            write!(f, "{}{name}={value}", std::mem::replace(&mut between, ","))
        };
        if self.heads != Span::ALL {
            argument("heads", &self.heads)?;
        }
        if self.group > 1 {
            argument("group", &self.group)?;
        }
        for (name, encoding) in [("k", self.k), ("v", self.v)] {
            if let Some(encoding) = encoding {
                argument(name, &encoding)?;
            }
        }
        f.write_str(")")
    }
}

/// What stays exact where the rest is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Exact {
    /// Its type.
    pub dtype: DType,
    /// First entries: every query leans on them.
    pub sinks: usize,
    /// Last entries, at least: they may still be taken back, and carry most of the attention.
    pub tail: usize,
}

impl Default for Exact {
    fn default() -> Self {
        Self { dtype: DType::F16, sinks: 4, tail: 128 }
    }
}

/// The storage of every KV head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Precision {
    k: Encoding,
    v: Encoding,
    rules: Vec<Rule>,
    /// What stays exact where either side is packed.
    pub exact: Exact,
}

impl Default for Precision {
    /// Everything in `f32`.
    fn default() -> Self {
        let f32 = Encoding::Exact(DType::F32);
        Self { k: f32, v: f32, rules: Vec::new(), exact: Exact::default() }
    }
}

/// The storage of one KV head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadPrecision {
    /// Keys of the bulk.
    pub k: Encoding,
    /// Values of the bulk.
    pub v: Encoding,
    /// Types of sinks and tail; of everything, if neither side is packed.
    pub exact: (DType, DType),
}

impl HeadPrecision {
    /// Whether anything is packed.
    pub fn packs(&self) -> bool {
        self.k.packed().is_some() || self.v.packed().is_some()
    }
}

impl Precision {
    /// All keys so, whatever rules said before.
    pub fn set_k(&mut self, encoding: Encoding) {
        self.k = encoding;
        self.rules.iter_mut().for_each(|rule| rule.k = None);
        self.rules.retain(|rule| rule.v.is_some());
    }

    /// All values so, whatever rules said before.
    pub fn set_v(&mut self, encoding: Encoding) {
        self.v = encoding;
        self.rules.iter_mut().for_each(|rule| rule.v = None);
        self.rules.retain(|rule| rule.k.is_some());
    }

    /// Overrides what was said so far for the heads the rule names.
    pub fn add(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    /// The storage of KV head `head` of `heads` in layer `layer` of `layers`, which `group` query heads share.
    pub fn head(
        &self,
        (layer, layers): (usize, usize),
        (head, heads): (usize, usize),
        group: usize,
    ) -> HeadPrecision {
        let applies =
            |r: &&Rule| r.layers.contains(layer, layers) && r.heads.contains(head, heads) && group >= r.group;
        let (mut k, mut v) = (self.k, self.v);
        for rule in self.rules.iter().filter(applies) {
            (k, v) = (rule.k.unwrap_or(k), rule.v.unwrap_or(v));
        }
        let exact = |e: Encoding| e.exact().unwrap_or(self.exact.dtype);
        HeadPrecision { k, v, exact: (exact(k), exact(v)) }
    }

    /// Whether keys of any head may be packed.
    pub fn packs_keys(&self) -> bool {
        self.encodings().any(|(k, _)| k.is_some_and(|k| k.packed().is_some()))
    }

    /// Whether anything may be packed.
    pub fn packs(&self) -> bool {
        self.encodings().any(|(k, v)| [k, v].into_iter().flatten().any(|e| e.packed().is_some()))
    }

    fn encodings(&self) -> impl Iterator<Item = (Option<Encoding>, Option<Encoding>)> {
        std::iter::once((Some(self.k), Some(self.v))).chain(self.rules.iter().map(|r| (r.k, r.v)))
    }
}

/// The terms of a recipe that say it, each with a `+` before it: nothing for `f32`.
impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (stage, encoding) in [("k", self.k), ("v", self.v)] {
            if encoding != Encoding::Exact(DType::F32) {
                write!(f, "+{stage}={encoding}")?;
            }
        }
        self.rules.iter().try_for_each(|rule| write!(f, "+{rule}"))?;
        let (exact, default) = (self.exact, Exact::default());
        if exact == default {
            return Ok(());
        }
        write!(f, "+exact={}", exact.dtype.name())?;
        let mut open = "(";
        for (name, n, default) in [("sinks", exact.sinks, default.sinks), ("tail", exact.tail, default.tail)]
        {
            if n != default {
                write!(f, "{}{name}={n}", std::mem::replace(&mut open, ","))?;
            }
        }
        if open == "," { f.write_str(")") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_count_from_both_ends() {
        let members = |text: &str, count: usize| -> Vec<usize> {
            let span: Span = text.parse().unwrap();
            (0..count).filter(|&i| span.contains(i, count)).collect()
        };
        assert_eq!(members("0..2", 5), [0, 1]);
        assert_eq!(members("-2..", 5), [3, 4]);
        assert_eq!(members("..-3", 5), [0, 1]);
        assert_eq!(members("3", 5), [3]);
        assert_eq!(members("-1", 5), [4]);
        assert_eq!(members("-2", 5), [3]);
        assert_eq!(members("-9..", 2), [0, 1]);
        assert!(members("7..", 5).is_empty() && members("3..1", 5).is_empty());
        for bad in ["", "a", "1..b", "+1", "1...2", "99999999999", "2147483647"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }
}
