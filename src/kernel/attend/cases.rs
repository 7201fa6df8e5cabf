//! The cases of every kernel that turns queries and keys into logits: this one, attention mass and window
//! scores.
//!
//! One axis at a time from a small base (lengths around page edges, group sizes, dimensions, types), then
//! everything at random. *Helps* name what broke; *hurts* nothing.

use super::{AttendLane, Share};
use crate::device::{Encoding, HeadRows};
use crate::kernel::{AttentionParams, Spans};
use crate::testing::Random;
use crate::testing::cache::{CacheSpec, SegmentSpec, end_position, packings, poisoned};
use crate::view::DType;

/// Ways to choose entries of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Runs of 1 to 40 entries and gaps of as many, from the middle of one or the other.
    Runs,
    /// One in nine, alone.
    Lone,
    /// Pages of sixteen, at multiples of sixteen.
    Pages,
    /// All.
    All,
    /// None.
    None,
    /// The last.
    Last,
}

impl Choice {
    /// All, in the order of this enumeration.
    pub const ALL: [Self; 6] = [Self::Runs, Self::Lone, Self::Pages, Self::All, Self::None, Self::Last];

    /// The chosen of `rows` entries.
    pub fn of(self, rows: usize, seed: u64) -> Spans {
        let mut random = Random::new(seed ^ 0x5ba5);
        let mut spans = Spans::default();
        match self {
            Self::Runs => {
                let mut at = random.below(2) * random.below(40);
                while at < rows {
                    let end = rows.min(at + 1 + random.below(40));
                    spans.push(at..end);
                    at = end + 1 + random.below(40);
                }
            }
            Self::Lone => (0..rows).filter(|_| random.one_in(9)).for_each(|slot| spans.push(slot..slot + 1)),
            Self::Pages => (0..rows)
                .step_by(16)
                .filter(|_| random.one_in(3))
                .for_each(|slot| spans.push(slot..rows.min(slot + 16))),
            Self::All => spans.push(0..rows),
            Self::None => {}
            Self::Last => spans.push(rows.saturating_sub(1)..rows),
        }
        spans
    }
}

/// One sequence of a case.
#[derive(Clone, Debug)]
pub struct LaneSpec {
    /// Its entries.
    pub cache: CacheSpec,
    /// Its new queries.
    pub tokens: usize,
    /// Position of the first query relative to the end of the entries; `-tokens` is a causal prefill whose
    /// entries were just appended.
    pub start: i32,
}

/// One call.
#[derive(Clone, Debug)]
pub struct AttentionCase {
    /// What it is about.
    pub name: String,
    /// The sequences.
    pub lanes: Vec<LaneSpec>,
    /// Query heads per KV head.
    pub group: usize,
    /// Logit scale.
    pub scale: f32,
    /// Soft cap.
    pub softcap: Option<f32>,
    /// Window.
    pub window: Option<u32>,
    /// One per query head.
    pub sinks: Option<Vec<f32>>,
}

/// Queries of a lane and their positions.
#[derive(Clone, Debug)]
pub struct Queries {
    /// `[Hq, T, d_k]`.
    pub values: Vec<f32>,
    /// `[T]`.
    pub positions: Vec<i32>,
}

/// Outputs of a lane.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// `[Hq, T, d_v]`.
    pub out: Vec<f32>,
    /// `[Hq, T]`.
    pub lse: Vec<f32>,
    /// `[G, rows]` per head.
    pub mass: Vec<f32>,
}

impl LaneSpec {
    /// Its queries, given the entries it was built into.
    pub fn queries(&self, group: usize, heads: &[HeadRows]) -> Queries {
        let mut random = Random::new(self.cache.seed ^ 0x51e5);
        let start = end_position(heads) + self.start;
        Queries {
            values: random.rows(
                self.cache.heads.len() * group * self.tokens * self.cache.d_k,
                1.0,
                DType::F32,
            ),
            positions: (0..self.tokens as i32).map(|i| start + i).collect(),
        }
    }

    /// Chosen entries of every head: head `h` in way `first + h`.
    pub fn spans(&self, first: usize) -> Vec<Spans> {
        let choice = |h| Choice::ALL[(first + h) % Choice::ALL.len()];
        let rows = self.cache.rows();
        rows.iter().enumerate().map(|(h, &n)| choice(h).of(n, self.cache.seed + h as u64)).collect()
    }

    /// Poisoned outputs of the right lengths.
    pub fn outputs(&self, group: usize) -> Outputs {
        let rows = self.cache.heads.len() * group * self.tokens;
        Outputs {
            out: poisoned(rows * self.cache.d_v),
            lse: poisoned(rows),
            mass: poisoned(group * self.cache.rows().iter().sum::<usize>()),
        }
    }
}

impl Outputs {
    /// The argument struct that writes here.
    pub fn lane<'a>(
        &'a mut self,
        heads: &'a [HeadRows],
        queries: &'a Queries,
        share: Share,
        mass: bool,
    ) -> AttendLane<'a> {
        AttendLane {
            heads,
            queries: &queries.values,
            positions: &queries.positions,
            share,
            spans: None,
            out: &mut self.out,
            lse: &mut self.lse,
            mass: mass.then_some(self.mass.as_mut_slice()),
        }
    }
}

impl AttentionCase {
    fn new(name: String, cache: CacheSpec, tokens: usize, group: usize) -> Self {
        let scale = 1.0 / (cache.d_k as f32).sqrt();
        let lanes = vec![LaneSpec { cache, tokens, start: -(tokens as i32) }];
        Self { name, lanes, group, scale, softcap: None, window: None, sinks: None }
    }

    /// Kernel parameters.
    pub fn params(&self) -> AttentionParams<'_> {
        let cache = &self.lanes[0].cache;
        AttentionParams {
            group: self.group,
            d_k: cache.d_k,
            d_v: cache.d_v,
            scale: self.scale,
            softcap: self.softcap,
            window: self.window,
            sink_logits: self.sinks.as_deref(),
        }
    }

    fn with_sinks(mut self) -> Self {
        let mut random = Random::new(self.lanes[0].cache.seed ^ 0x517c);
        let query_heads = self.lanes[0].cache.heads.len() * self.group;
        self.sinks = Some((0..query_heads).map(|_| 2.0 * random.normal()).collect());
        self
    }
}

/// All cases.
pub fn cases() -> Vec<AttentionCase> {
    let mut cases = Vec::new();
    one_axis(&mut cases);
    packed(&mut cases);
    combined(&mut cases);
    extremes(&mut cases);
    lanes(&mut cases);
    (0..60).for_each(|i| cases.push(random_case(i)));
    cases
}

fn one_axis(cases: &mut Vec<AttentionCase>) {
    for rows in [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 300] {
        for capacity in [1, 16, 64, 100] {
            let cache = CacheSpec::f32(1, 16, &[rows, rows / 2], capacity);
            cases.push(AttentionCase::new(format!("rows {rows}, capacity {capacity}"), cache, 1, 3));
        }
    }
    for group in 1..=16 {
        for tokens in [1, 3, 20] {
            let cache = CacheSpec::f32(2, 32, &[70, 33], 16);
            cases.push(AttentionCase::new(format!("group {group}, tokens {tokens}"), cache, tokens, group));
        }
    }
    for d in [1, 2, 3, 7, 8, 16, 31, 33, 64, 80, 96, 128, 256] {
        for (k, v) in [(DType::F32, DType::F32), (DType::F16, DType::F16), (DType::Bf16, DType::Bf16)] {
            let cache = CacheSpec::f32(3, d, &[41, 0, 64], 16).typed(k, v);
            let name = format!("d {d}, {}", k.name());
            cases.push(AttentionCase::new(name, cache, if d % 2 == 0 { 1 } else { 5 }, 2));
        }
    }
    for (d_k, d_v) in [(64, 96), (3, 128), (33, 16), (256, 1), (192, 128), (1, 7)] {
        for (k, v) in [(DType::F32, DType::F16), (DType::F16, DType::F32), (DType::Bf16, DType::F16)] {
            let mut cache = CacheSpec::f32(4, d_k, &[75, 10], 32).typed(k, v);
            cache.d_v = d_v;
            let name = format!("d_k {d_k}, d_v {d_v}, k {}, v {}", k.name(), v.name());
            cases.push(AttentionCase::new(name, cache, 2, 4));
        }
    }
    for tokens in [1, 2, 3, 4, 5, 8, 17, 63, 64, 65, 100] {
        let cache = CacheSpec::f32(5, 24, &[tokens, tokens + 130], 64);
        cases.push(AttentionCase::new(format!("prefill of {tokens}"), cache, tokens, 2));
    }
    for window in [1, 2, 7, 16, 40, 64, 1000] {
        for tokens in [1, 30] {
            let mut cache = CacheSpec::f32(6, 16, &[90, 31], 16);
            cache.gaps = window % 2 == 0;
            let mut case = AttentionCase::new(format!("window {window}, tokens {tokens}"), cache, tokens, 2);
            case.window = Some(window);
            cases.push(case);
        }
    }
}

/// Every packed format between exact runs, from one query to a prompt.
fn packed(cases: &mut Vec<AttentionCase>) {
    for (i, packing) in packings().into_iter().enumerate() {
        for (tokens, group) in [(1, 4), (3, 5), (2, 9), (40, 1)] {
            let (d_k, d_v) = [(128, 128), (64, 64), (80, 96), (33, 7)][(i + tokens) % 4];
            let mut cache = CacheSpec::f32(60 + i as u64, d_k, &[], 64);
            cache.d_v = d_v;
            cache.bias = i % 3 == 0;
            cache.gaps = true;
            cache.heads = vec![
                vec![
                    SegmentSpec::stored(4, 16, DType::F16, DType::F32),
                    SegmentSpec::stored(170, 128, packing, packing),
                    SegmentSpec::stored(19, 16, DType::F32, DType::F16),
                ],
                vec![SegmentSpec::stored(70, 128, packing, DType::F16)],
                vec![SegmentSpec::stored(70, 32, DType::Bf16, packing)],
            ];
            cases.push(AttentionCase::new(
                format!("{packing}, d {d_k}/{d_v}, tokens {tokens}"),
                cache,
                tokens,
                group,
            ));
        }
    }
}

fn combined(cases: &mut Vec<AttentionCase>) {
    for tokens in [1, 9, 70] {
        let base = |name: &str, seed| {
            let cache = CacheSpec::f32(seed, 48, &[100, 37, 0], 16);
            AttentionCase::new(format!("{name}, tokens {tokens}"), cache, tokens, 3)
        };
        let mut case = base("bias", 10);
        case.lanes[0].cache.bias = true;
        cases.push(case);
        let mut case = base("soft cap", 11);
        case.softcap = Some(5.0);
        cases.push(case);
        cases.push(base("sinks", 12).with_sinks());
        let mut case = base("gaps", 13);
        case.lanes[0].cache.gaps = true;
        cases.push(case);
        let mut case = base("everything", 14).with_sinks();
        case.lanes[0].cache.bias = true;
        case.lanes[0].cache.gaps = true;
        case.softcap = Some(20.0);
        case.window = Some(25);
        cases.push(case);
        let mut case = base("first queries see nothing", 15);
        case.lanes[0].start = -120;
        cases.push(case);
        let mut case = base("no query sees anything", 16);
        case.lanes[0].start = -1000;
        cases.push(case);
        let mut case = base("nothing but sinks", 17).with_sinks();
        case.lanes[0].start = -1000;
        cases.push(case);
        let mut case = base("several segments", 18);
        case.lanes[0].cache.heads = vec![
            vec![
                SegmentSpec::stored(4, 8, DType::F32, DType::F32),
                SegmentSpec::stored(75, 32, DType::F16, DType::Bf16),
                SegmentSpec::stored(0, 16, DType::F16, DType::F16),
                SegmentSpec::stored(19, 16, DType::F32, DType::F16),
            ],
            vec![],
            vec![SegmentSpec::stored(30, 64, DType::Bf16, DType::Bf16)],
        ];
        cases.push(case);
    }
    // Long enough for every way of splitting over entries.
    for (rows, tokens) in [(2500, 1), (4100, 3), (1500, 80), (3000, 40)] {
        let cache = CacheSpec::f32(19, 16, &[rows, 70, rows / 2], 64);
        cases.push(AttentionCase::new(format!("long {rows}, tokens {tokens}"), cache, tokens, 2));
    }
}

fn extremes(cases: &mut Vec<AttentionCase>) {
    for (name, key_scale) in
        [("tiny keys", 1e-20), ("large logits", 30.0), ("huge logits", 1e4), ("zero keys", 0.0)]
    {
        for tokens in [1, 12] {
            let mut cache = CacheSpec::f32(20, 64, &[80, 15], 16);
            cache.key_scale = key_scale;
            cases.push(AttentionCase::new(format!("{name}, tokens {tokens}"), cache.clone(), tokens, 2));
            let mut case = AttentionCase::new(format!("{name}, soft cap, tokens {tokens}"), cache, tokens, 2);
            case.softcap = Some(30.0);
            cases.push(case.with_sinks());
        }
    }
    let mut case = AttentionCase::new("sink logit −∞".to_owned(), CacheSpec::f32(21, 16, &[20, 0], 16), 2, 2);
    case.sinks = Some(vec![f32::NEG_INFINITY; 4]);
    cases.push(case);
    let mut case =
        AttentionCase::new("sink outweighs".to_owned(), CacheSpec::f32(22, 16, &[20, 3], 16), 2, 2);
    case.sinks = Some(vec![60.0, -60.0, 5000.0, 0.0]);
    cases.push(case);
    let mut case =
        AttentionCase::new("negative scale".to_owned(), CacheSpec::f32(23, 16, &[20, 3], 16), 2, 2);
    case.scale = -0.5;
    cases.push(case);
    cases.push(AttentionCase::new("no tokens".to_owned(), CacheSpec::f32(24, 16, &[20, 3], 16), 0, 2));
    cases.push(AttentionCase::new("no heads".to_owned(), CacheSpec::f32(25, 16, &[], 16), 3, 2));
}

fn lanes(cases: &mut Vec<AttentionCase>) {
    for (name, sizes) in [
        ("lanes of one token", vec![(100, 1), (3, 1), (0, 1), (257, 1)]),
        ("lanes of several tokens", vec![(100, 7), (30, 1), (64, 64)]),
    ] {
        let mut case = AttentionCase::new(name.to_owned(), CacheSpec::f32(30, 32, &[1, 1], 16), 1, 3);
        case.lanes = sizes
            .into_iter()
            .enumerate()
            .map(|(i, (rows, tokens))| LaneSpec {
                cache: CacheSpec::f32(31 + i as u64, 32, &[rows, rows / 3], 16),
                tokens,
                start: -(tokens as i32),
            })
            .collect();
        cases.push(case);
    }
}

fn random_case(index: u64) -> AttentionCase {
    let seed = 1000 + index;
    let mut random = Random::new(seed);
    let dims = [1, 2, 4, 5, 8, 12, 16, 20, 24, 32, 40, 64, 72, 96, 112, 128];
    let types = [DType::F32, DType::F16, DType::Bf16].map(Encoding::from);
    let d_k = random.pick(&dims);
    let d_v = if random.one_in(2) { d_k } else { random.pick(&dims) };
    let group = 1 + random.below(9);
    let cache = |random: &mut Random| CacheSpec {
        seed: random.bits(),
        d_k,
        d_v,
        heads: (0..1 + random.below(3))
            .map(|_| {
                (0..1 + random.below(3))
                    .map(|_| SegmentSpec {
                        rows: random.below(90),
                        capacity: random.pick(&[1, 4, 16, 32, 64]),
                        k: random.pick(&types),
                        v: random.pick(&types),
                    })
                    .collect()
            })
            .collect(),
        bias: random.one_in(2),
        gaps: random.one_in(2),
        key_scale: random.pick(&[0.3, 1.0, 3.0]),
        column_words: random.below(3),
        steady: false,
    };
    let tokens = random.pick(&[1, 1, 2, 6, 13, 33, 66]);
    let start = -(tokens as i32) + random.pick(&[0, 0, 1, 20]);
    let mut case = AttentionCase::new(format!("random {index}"), cache(&mut random), tokens, group);
    case.lanes[0].start = start;
    if random.one_in(3) {
        let mut other = cache(&mut random);
        other.heads.resize(case.lanes[0].cache.heads.len(), vec![SegmentSpec::f32(11, 4)]);
        case.lanes.push(LaneSpec { cache: other, tokens: 1 + random.below(4), start: 0 });
    }
    case.window = random.one_in(3).then(|| 1 + random.below(60) as u32);
    case.softcap = random.one_in(3).then_some(15.0);
    if random.one_in(3) { case.with_sinks() } else { case }
}
