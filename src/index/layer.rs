//! The index of one layer: tables of rows in pages, and which entries of each KV head a row stands for.
//!
//! Entries in front (sinks) and behind (recent ones, and those that wait to become a unit) belong to no unit and are
//! always read. An index grows when tokens are committed and shrinks when they are forgotten; a step that is rolled back
//! never touches it. When entries between are removed it is built again.

use super::{Codebook, Entries, Lesson, Retrieval, Role, Spread, Table, UnitRows, Units};
use crate::backend::Backend;
use crate::codec::PACK_ENTRIES;
use crate::device::page::{HeadRows, PageLayout};
use crate::error::KernelError;
use crate::geometry::LayerShape;
use crate::kernel::Spans;
use crate::kernel::gather::{GatherArgs, GatherTarget};
use crate::kernel::simd::prefetch::request;
use crate::store::{self, NewRows, Packed, SharedPositions, Storage};
use crate::view::DType;
use std::ops::Range;
use std::sync::Arc;

/// Rows per page of a table.
const TABLE_ENTRIES: usize = 64;

/// The same of codes, which are much smaller.
const CODE_ENTRIES: usize = 512;

/// Elements by which lists grow.
const LIST_STEP: usize = 64;

/// How many chosen entries ahead the slot of one is requested.
const PICKS_AHEAD: usize = 32;

/// How the tables of one layer are stored.
#[derive(Clone, Debug)]
pub struct TableStorage {
    role: Role,
    storage: Storage,
}

impl TableStorage {
    /// Storage of the tables of an index for a layer.
    pub fn of(retrieval: &Retrieval, shape: &LayerShape, mirrored: bool) -> Vec<Self> {
        retrieval.summary.tables().iter().map(|table| Self::new(table, shape, mirrored)).collect()
    }

    fn new(table: &Table, shape: &LayerShape, mirrored: bool) -> Self {
        let (d_k, d_v) = table.role.dims(shape);
        let layout = |capacity, k, v, steady| {
            let column_words = 0;
            PageLayout { capacity, d_k, d_v, k, v, mirrored, column_words, steady }
        };
        let (waiting, packs) = (table.waiting().into(), table.encoding.packed().is_some());
        let entries = if table.role.codes().is_some() { CODE_ENTRIES } else { TABLE_ENTRIES };
        let exact = Arc::new(layout(entries, waiting, waiting, !packs));
        let packed = table.encoding.packed().map(|_| {
            let values = if table.role != Role::Mean { DType::F32.into() } else { table.encoding };
            Packed {
                layout: Arc::new(layout(PACK_ENTRIES, table.encoding, values, true)),
                sinks: 0,
                sink_layout: Arc::clone(&exact),
                // With one entry left behind, only whole pages are packed: however the rows came.
                tail: 1,
            }
        });
        Self { role: table.role, storage: Storage { exact, packed } }
    }

    /// What the rows say.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Layout of most rows.
    pub fn bulk(&self) -> &PageLayout {
        self.storage.bulk()
    }
}

/// Which entries the units stand for.
#[derive(Clone, Debug)]
enum Members {
    /// Unit `u` is `u · size ..` of the covered entries, which are made `step` at a time.
    Runs { size: usize, step: usize },
    /// Units of any entries, in batches that were made together.
    Lists {
        /// Where each unit's members end.
        ends: Vec<u32>,
        /// Slots, unit after unit, ascending within one.
        slots: Vec<u32>,
        /// Units and entries covered after each batch.
        batches: Vec<(usize, usize)>,
    },
}

/// The units of one KV head.
#[derive(Clone, Debug)]
pub struct HeadUnits {
    members: Members,
    /// Slot of the first entry that is a member of a unit.
    first: usize,
    /// Members of units, from there on.
    covered: usize,
    units: usize,
    /// Where each group's units end, where units are grouped.
    groups: Vec<u32>,
    /// Whether entries are chosen out of units.
    single: bool,
    /// Then: how far each unit's farthest key lies from its mean, and the logarithm of its members.
    radii: Vec<f32>,
    logarithms: Vec<f32>,
    /// Where outliers are read first: how far each unit's members point away from their mean, and the units that do so
    /// furthest, furthest first.
    strays: Vec<f32>,
    outliers: Vec<u32>,
    most_outliers: usize,
}

/// The tables of one layer, and the units of its KV heads.
#[derive(Clone, Debug)]
pub struct LayerIndex {
    /// Per table.
    roles: Vec<Role>,
    /// Per table, per KV head.
    tables: Vec<Vec<HeadRows>>,
    /// Per table, per KV head: the largest norm that a key ever had.
    norms: Vec<Vec<f32>>,
    heads: Vec<HeadUnits>,
    /// Per KV head: around means, and around what codes say beside them.
    spread: Vec<[Spread; 2]>,
    /// Per KV head: what was learnt from its first entries.
    books: Vec<Option<Arc<Codebook>>>,
}

/// What an index grows from: one layer as it is now.
pub struct Growth<'a> {
    /// Where kernels run.
    pub backend: &'a dyn Backend,
    /// Whose units they are.
    pub retrieval: &'a Retrieval,
    /// The layer.
    pub shape: &'a LayerShape,
    /// How its tables are stored.
    pub storage: &'a [TableStorage],
    /// Its entries, per KV head.
    pub heads: &'a [HeadRows],
    /// Whether more of the prompt may follow.
    pub open: bool,
    /// The recorded queries, `[Hq, W, d_k]`, and their positions. Asked only when something is learnt from them.
    pub queries: &'a dyn Fn() -> (Vec<f32>, Vec<i32>),
}

impl std::fmt::Debug for Growth<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { retrieval, shape, open, .. } = self;
        f.debug_struct("Growth")
            .field("retrieval", retrieval)
            .field("shape", shape)
            .field("open", open)
            .finish()
    }
}

impl HeadUnits {
    fn new(retrieval: &Retrieval) -> Self {
        let members = match retrieval.summary.unit() {
            Some(size) => Members::Runs { size, step: retrieval.summary.waiting() + 1 },
            None => Members::Lists { ends: Vec::new(), slots: Vec::new(), batches: Vec::new() },
        };
        Self {
            members,
            first: retrieval.rule.sinks,
            covered: 0,
            units: 0,
            groups: Vec::new(),
            single: retrieval.residuals().is_some(),
            radii: Vec::new(),
            logarithms: Vec::new(),
            strays: Vec::new(),
            outliers: Vec::new(),
            most_outliers: retrieval.rule.outliers,
        }
    }

    /// The units whose members point furthest away from their mean, furthest first.
    pub fn outliers(&self) -> &[u32] {
        &self.outliers
    }

    /// Puts the units from one on among the outliers, as far as they are; of equals the older comes first.
    fn note_outliers(&mut self, from: usize) {
        let Self { strays, outliers, most_outliers, .. } = self;
        for (unit, stray) in strays.iter().enumerate().skip(from) {
            let at = outliers.partition_point(|&other| strays[other as usize] >= *stray);
            if at < *most_outliers {
                outliers.truncate(*most_outliers - 1);
                reserve(outliers, 1);
                outliers.insert(at, unit as u32);
            }
        }
    }

    /// Rows of a table of some role.
    fn rows_of(&self, role: Role) -> usize {
        match role {
            Role::Group => self.groups.len(),
            Role::Residual(_) => self.covered,
            Role::Mean | Role::Bound | Role::Code(_) => self.units,
        }
    }

    /// Where entries are chosen out of units: how far each unit's farthest key lies from its mean.
    pub fn radii(&self) -> &[f32] {
        &self.radii
    }

    /// Where entries are chosen out of units: the logarithm of each unit's number of members.
    pub fn logarithms(&self) -> &[f32] {
        &self.logarithms
    }

    /// What may be chosen: units, or their entries where these have codes of their own. Both count from 0, entries unit
    /// after unit.
    pub fn picks(&self) -> usize {
        if self.single { self.covered } else { self.units }
    }

    /// The entries of a unit, as they are counted when entries are chosen.
    pub fn picks_of(&self, unit: usize) -> Range<usize> {
        let Members::Lists { ends, .. } = &self.members else { return 0..0 };
        unit.checked_sub(1).map_or(0, |before| ends[before] as usize)..ends[unit] as usize
    }

    /// The unit of an entry, as they are counted when entries are chosen.
    pub fn unit_of(&self, pick: usize) -> usize {
        let Members::Lists { ends, .. } = &self.members else { return 0 };
        ends.partition_point(|&end| end as usize <= pick)
    }

    /// Number of groups of units.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Units of a group.
    pub fn group(&self, group: usize) -> Range<usize> {
        let start = group.checked_sub(1).map_or(0, |before| self.groups[before] as usize);
        start..self.groups[group] as usize
    }

    /// Entries that a row of a table of some role stands for.
    pub fn count_of(&self, role: Role, row: usize) -> usize {
        if role == Role::Group { self.group_count(row) } else { self.count(row) }
    }

    /// Entries of a group.
    fn group_count(&self, group: usize) -> usize {
        let Members::Lists { ends, .. } = &self.members else { return 0 };
        let end = |unit: usize| unit.checked_sub(1).map_or(0, |last| ends[last] as usize);
        let units = self.group(group);
        end(units.end) - end(units.start)
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.units
    }

    /// Slots of the entries that are members of units.
    pub fn covered(&self) -> Range<usize> {
        self.first..self.first + self.covered
    }

    /// Entries of a unit.
    pub fn count(&self, unit: usize) -> usize {
        match &self.members {
            Members::Runs { size, .. } => *size,
            Members::Lists { .. } => self.list(unit).len(),
        }
    }

    /// Slots of a unit's entries, ascending.
    pub fn members(&self, unit: usize) -> impl Iterator<Item = usize> + '_ {
        let run = match &self.members {
            Members::Runs { size, .. } => self.first + unit * size..self.first + (unit + 1) * size,
            Members::Lists { .. } => 0..0,
        };
        run.chain(self.list(unit).iter().map(|&slot| slot as usize))
    }

    /// Slots of a unit of a list.
    fn list(&self, unit: usize) -> &[u32] {
        let Members::Lists { ends, slots, .. } = &self.members else { return &[] };
        let start = unit.checked_sub(1).map_or(0, |before| ends[before] as usize);
        &slots[start..ends[unit] as usize]
    }

    /// The entries of what is chosen (ascending, see [`HeadUnits::picks`]) and, with `zone`, everything before and behind
    /// the units, up to `rows` entries. `slots` is lent.
    pub fn spans(&self, chosen: &[u32], zone: bool, rows: usize, out: &mut Spans, slots: &mut Vec<u64>) {
        out.clear();
        let covered = self.covered();
        if zone {
            out.push(0..covered.start.min(rows));
        }
        match &self.members {
            Members::Runs { size, .. } => {
                for &unit in chosen {
                    let start = self.first + unit as usize * size;
                    out.push(start..start + size);
                }
            }
            Members::Lists { slots: all, .. } => {
                // A bit per slot puts them in order faster than sorting would.
                slots.clear();
                slots.resize(covered.end.div_ceil(64), 0);
                let mut mark = |slot: u32| slots[slot as usize / 64] |= 1 << (slot % 64);
                match self.single {
                    true => {
                        for (i, &pick) in chosen.iter().enumerate() {
                            // Far apart in a list that is longer than the caches.
                            if let Some(&later) = chosen.get(i + PICKS_AHEAD) {
                                request(&all[later as usize]);
                            }
                            mark(all[pick as usize]);
                        }
                    }
                    false => {
                        let lists = chosen.iter().flat_map(|&unit| self.list(unit as usize));
                        lists.for_each(|&slot| mark(slot));
                    }
                }
                out.push_bits(slots);
            }
        }
        if zone {
            out.push(covered.end.min(rows)..rows);
        }
    }

    /// Entries that are members of no unit, of `rows`.
    pub fn zone(&self, rows: usize) -> usize {
        rows - self.covered
    }

    /// Bytes the index keeps on the host beside its pages.
    pub fn list_bytes(&self) -> usize {
        let numbers = self.radii.capacity() + self.logarithms.capacity() + self.strays.capacity();
        numbers * size_of::<f32>()
            + self.outliers.capacity() * size_of::<u32>()
            + match &self.members {
                Members::Runs { .. } => 0,
                Members::Lists { ends, slots, batches } => {
                    (ends.capacity() + slots.capacity() + self.groups.capacity()) * size_of::<u32>()
                        + batches.capacity() * size_of::<(usize, usize)>()
                }
            }
    }

    fn add(&mut self, units: &Units, entries: usize) {
        let from = self.covered().end as u32;
        self.covered += entries;
        let mut end = self.units as u32;
        self.groups.extend(units.groups.iter().map(|&n| {
            end += n;
            end
        }));
        self.units += units.counts.len();
        self.radii.extend_from_slice(&units.radii);
        if !units.strays.is_empty() {
            let before = self.strays.len();
            reserve(&mut self.strays, units.strays.len());
            self.strays.extend_from_slice(&units.strays);
            self.note_outliers(before);
        }
        if self.single {
            self.logarithms.extend(units.counts.iter().map(|&n| (n as f32).ln()));
        }
        if let Members::Lists { ends, slots, batches } = &mut self.members {
            slots.extend(units.members.iter().map(|&m| from + m));
            let mut end = ends.last().copied().unwrap_or(0);
            ends.extend(units.counts.iter().map(|&n| {
                end += n;
                end
            }));
            batches.push((ends.len(), self.covered));
        }
    }

    /// Forgets the units that have members at slot `rows` or behind, and those made together with them.
    fn truncate(&mut self, rows: usize) {
        let most = rows.saturating_sub(self.first);
        if self.covered <= most {
            return;
        }
        match &mut self.members {
            Members::Runs { size, step } => {
                self.covered = most / *step * *step;
                self.units = self.covered / *size;
            }
            Members::Lists { ends, slots, batches } => {
                let stay = batches.partition_point(|&(_, covered)| covered <= most);
                batches.truncate(stay);
                (self.units, self.covered) = batches.last().copied().unwrap_or((0, 0));
                ends.truncate(self.units);
                slots.truncate(ends.last().map_or(0, |&end| end as usize));
            }
        }
        self.radii.truncate(self.units);
        self.logarithms.truncate(self.units);
        if self.strays.len() > self.units {
            self.strays.truncate(self.units);
            self.outliers.clear();
            self.note_outliers(0);
        }
        // Groups are of units that were made together, and go with them.
        let stay = self.groups.partition_point(|&end| end as usize <= self.units);
        self.groups.truncate(stay);
    }
}

impl LayerIndex {
    /// An index without units.
    pub fn new(retrieval: &Retrieval, kv_heads: usize) -> Self {
        let roles: Vec<Role> = retrieval.summary.tables().iter().map(|table| table.role).collect();
        let tables = roles.len();
        Self {
            roles,
            tables: vec![vec![HeadRows::default(); kv_heads]; tables],
            norms: vec![vec![0.0; kv_heads]; tables],
            heads: vec![HeadUnits::new(retrieval); kv_heads],
            spread: vec![Default::default(); kv_heads],
            books: vec![None; kv_heads],
        }
    }

    /// The same with codebooks that were learnt elsewhere, per KV head.
    #[must_use]
    pub fn with_books(mut self, books: &[Option<Arc<Codebook>>]) -> Self {
        self.books.iter_mut().zip(books).for_each(|(book, given)| book.clone_from(given));
        self
    }

    /// What was learnt, per KV head.
    pub fn books(&self) -> &[Option<Arc<Codebook>>] {
        &self.books
    }

    /// The units of each KV head.
    pub fn heads(&self) -> &[HeadUnits] {
        &self.heads
    }

    /// Rows of a table for each KV head, one per unit.
    pub fn table(&self, table: usize) -> &[HeadRows] {
        &self.tables[table]
    }

    /// Rows of all tables.
    pub fn rows(&self) -> impl Iterator<Item = &HeadRows> + '_ {
        self.tables.iter().flatten()
    }

    /// How the keys of a KV head lie around the means of their units.
    pub fn spread(&self, head: usize) -> &Spread {
        &self.spread[head][0]
    }

    /// How they lie around what codes within units say.
    pub fn code_spread(&self, head: usize) -> &Spread {
        &self.spread[head][1]
    }

    /// What was learnt from the first entries of a KV head.
    pub fn book(&self, head: usize) -> Option<&Codebook> {
        self.books[head].as_deref()
    }

    /// The largest norm that a key of a table had: what a kernel's error in a logit is a share of.
    pub fn norm(&self, table: usize, head: usize) -> f32 {
        self.norms[table][head]
    }

    /// Bytes kept on the host beside the pages of the tables.
    pub fn list_bytes(&self) -> usize {
        let spread = self.spread.iter().flatten().map(Spread::bytes).sum::<usize>();
        let books = self.books.iter().flatten().map(|book| book.bytes()).sum::<usize>();
        spread + books + self.heads.iter().map(HeadUnits::list_bytes).sum::<usize>()
    }

    /// Whether a KV head has yet to learn what its codes mean.
    pub fn unlearnt(&self) -> bool {
        self.books.iter().any(Option::is_none)
    }

    /// Makes units of the entries that came since, as far as they are not recent.
    ///
    /// # Errors
    /// [`KernelError`]; every unit there is is whole.
    pub fn extend(&mut self, growth: &Growth<'_>) -> Result<(), KernelError> {
        let Growth { backend, retrieval, shape, storage, heads, open, .. } = *growth;
        let mut recorded = None;
        for (h, head) in heads.iter().enumerate() {
            let end = head.rows().saturating_sub(retrieval.rule.recent);
            loop {
                let from = self.heads[h].covered().end;
                let learnt = self.books[h].is_some();
                let asks = retrieval.summary.queries() > 0 && !learnt;
                let take = retrieval.summary.take(end.saturating_sub(from), open, learnt);
                // Queries are there when the prompt ends: until then entries wait where they are stored anyway.
                if take == 0 || open && asks {
                    break;
                }
                let slots: Vec<u32> = (from as u32..(from + take) as u32).collect();
                let (mut keys, mut values) = (vec![0.0; take * shape.d_k], vec![0.0; take * shape.d_v]);
                let target = GatherTarget::Dense { keys: &mut keys, values: &mut values };
                backend.gather(&mut GatherArgs { head, slots: &slots, target })?;
                let positions = positions(head, from..from + take);
                let entries = Entries { keys: &keys, values: &values, positions: &positions, count: take };
                let (queries, asked) = match asks {
                    false => (&[][..], &[][..]),
                    true => {
                        let (rows, asked) = recorded.get_or_insert_with(growth.queries);
                        let group = shape.group() * asked.len() * shape.d_k;
                        (&rows[h * group..(h + 1) * group], &asked[..])
                    }
                };
                let lesson = Lesson { backend, shape, entries: &entries, queries, asked };
                let mut units = retrieval.summary.summarise(&lesson, self.books[h].as_deref())?;
                if let Some(book) = units.book.take() {
                    self.books[h] = Some(Arc::new(book));
                }
                if retrieval.rule.correct || retrieval.residuals().is_some() {
                    self.measure_spread(h, retrieval, shape.d_k, &entries, &units);
                }
                self.add_rows(backend, storage, &units, h)?;
                self.heads[h].add(&units, take);
            }
        }
        Ok(())
    }

    fn measure_spread(
        &mut self,
        h: usize,
        retrieval: &Retrieval,
        d_k: usize,
        entries: &Entries<'_>,
        units: &Units,
    ) {
        let [means, codes] = &mut self.spread[h];
        means.add(entries, units, d_k, |_, offset| offset.fill(0.0));
        if let (Some((table, layout)), Some(book)) = (retrieval.residuals(), &self.books[h]) {
            let words = bytemuck::cast_slice::<f32, u32>(&units.rows[table].keys);
            codes.add(entries, units, d_k, |i, out| {
                book.decode(&words[i * layout.words()..(i + 1) * layout.words()], out);
            });
        }
    }

    fn add_rows(
        &mut self,
        backend: &dyn Backend,
        storage: &[TableStorage],
        units: &Units,
        head: usize,
    ) -> Result<(), KernelError> {
        for (rows, storage) in units.rows.iter().zip(storage) {
            if storage.role.codes().is_none() {
                check_range(rows, &storage.storage.exact)?;
            }
        }
        let group_counts = units.group_counts();
        let mut tables = self.tables.iter_mut().zip(&units.rows).zip(storage);
        let added = tables.try_for_each(|((table, rows), storage)| {
            let (table, role, storage) = (&mut table[head], storage.role, &storage.storage);
            let bias: Vec<f32> = match role {
                Role::Group => group_counts.iter().map(|&n| (n as f32).ln()).collect(),
                Role::Residual(_) => vec![0.0; units.members.len()],
                _ => units.counts.iter().map(|&n| (n as f32).ln()).collect(),
            };
            // Rows of a table count their units: a position is all a kernel knows of their order.
            let before = table.rows();
            let positions: Vec<i32> = (before as i32..(before + bias.len()) as i32).collect();
            let new = NewRows { positions: &positions, keys: &rows.keys, values: &rows.values };
            store::append(backend, &storage.exact, table, new)?;
            if bias.iter().any(|&b| b != 0.0) {
                store::set_bias(backend, table, before, &bias)?;
            }
            store::seal(backend, storage, table, &mut SharedPositions::default()).map(drop)
        });
        if added.is_err() {
            self.truncate_tables(head);
            return added;
        }
        for ((norms, rows), storage) in self.norms.iter_mut().zip(&units.rows).zip(storage) {
            if storage.role.codes().is_some() {
                continue;
            }
            let keys = rows.keys.chunks_exact(storage.storage.exact.d_k);
            let largest = keys.map(|k| k.iter().map(|x| x * x).sum::<f32>().sqrt());
            norms[head] = largest.fold(norms[head], f32::max);
        }
        Ok(())
    }

    /// Forgets the units that have members behind the entries there are now; entries that lose their unit are read
    /// always until they are in one again.
    pub fn truncate(&mut self, heads: &[HeadRows]) {
        for (h, head) in heads.iter().enumerate() {
            self.truncate_head(h, head.rows());
        }
    }

    fn truncate_head(&mut self, head: usize, rows: usize) {
        self.heads[head].truncate(rows);
        self.truncate_tables(head);
    }

    /// Forgets rows whose units are not there.
    fn truncate_tables(&mut self, head: usize) {
        for (table, &role) in self.tables.iter_mut().zip(&self.roles) {
            store::truncate_rows(&mut table[head], self.heads[head].rows_of(role));
        }
    }

    /// Forgets all units: entries between were removed, or keys were turned.
    pub fn clear(&mut self) {
        (0..self.heads.len()).for_each(|head| self.truncate_head(head, 0));
        self.spread.fill(Default::default());
        self.books.iter_mut().for_each(|book| drop(book.take_if(|book| !book.lasts())));
    }
}

/// Room for so many elements more, of a size that does not depend on how many came at a time.
fn reserve<T>(list: &mut Vec<T>, more: usize) {
    let len = list.len();
    list.reserve_exact((len + more).next_multiple_of(LIST_STEP) - len);
}

/// Positions of some slots of a KV head.
fn positions(head: &HeadRows, slots: Range<usize>) -> Vec<i32> {
    let mut out = Vec::with_capacity(slots.len());
    for page in head.pages() {
        let (from, to) = (slots.start.max(page.first), slots.end.min(page.first + page.rows));
        if from < to {
            out.extend_from_slice(&page.positions()[from - page.first..to - page.first]);
        }
    }
    out
}

/// Refuses rows that their type would store as infinities: a bound would not be one, and a mean would swallow the rest.
fn check_range(rows: &UnitRows, layout: &PageLayout) -> Result<(), KernelError> {
    for (side, dim, rows) in [(layout.k, layout.d_k, &rows.keys), (layout.v, layout.d_v, &rows.values)] {
        let limit = side.largest(dim);
        if let Some(at) = rows.iter().position(|x| x.is_nan() || x.abs() > limit) {
            let (kernel, row) = ("index", at / dim);
            return Err(match side.exact() {
                Some(dtype) if rows[at].is_finite() => {
                    KernelError::Range { kernel, row, format: dtype.name() }
                }
                _ => KernelError::NotFinite { kernel, buffer: "summaries", row },
            });
        }
    }
    Ok(())
}
