//! Product quantisation: codes are those of the nearest codewords, and what is read is what they rank first.

use super::{BUDGET, PROMPT, prompted, queries};
use crate::support::{backends, dense, distance, entries, feed};
use kvsieve::geometry::{LayerShape, Slot};
use kvsieve::index::{Growth, LayerIndex, Role, TableStorage};
use kvsieve::kernel::gather::{GatherArgs, GatherTarget};
use kvsieve::recipe::Recipe;
use kvsieve::testing::cache::CacheSpec;

const RECIPE: &str = "pq(pieces=8,train=128,rounds=6,sinks=4,recent=20,min_context=0)";

#[test]
fn codes_name_the_nearest_codewords_however_the_entries_come() {
    let shape = LayerShape::new(4, 2, 20);
    // Pieces of unequal sizes, and codes of one, two and four fours of bits.
    for own in ["pieces=8,levels=16", "pieces=3,levels=100", "pieces=1,levels=300,train=150"] {
        let retrieval =
            Recipe::parse(&format!("pq({own},aware=no,sinks=2,recent=10)")).unwrap().index.unwrap();
        let Role::Code(layout) = retrieval.summary.tables()[0].role else { panic!("{own}") };
        for backend in backends() {
            let heads = CacheSpec::f32(5, 20, &[700, 700], 64).build(&*backend).unwrap();
            let storage = TableStorage::of(&retrieval, &shape, backend.mirrored());
            let mut index = LayerIndex::new(&retrieval, 2);
            index
                .extend(&Growth {
                    backend: &*backend,
                    retrieval: &retrieval,
                    shape: &shape,
                    storage: &storage,
                    heads: &heads,
                    open: false,
                    queries: &|| unreachable!("nothing is learnt from queries"),
                })
                .unwrap();
            for (h, head) in heads.iter().enumerate() {
                let book = index.book(h).unwrap();
                assert_eq!(index.heads()[h].units(), 700 - 12, "{own}");
                let mut row = 0;
                for page in index.table(0)[h].pages() {
                    let mut words = vec![0.0; layout.words() * page.rows];
                    let mut nothing: Vec<f32> = Vec::new();
                    let slots: Vec<u32> = (row as u32..(row + page.rows) as u32).collect();
                    let target = GatherTarget::Dense { keys: &mut words, values: &mut nothing };
                    let codes = &index.table(0)[h];
                    let args = &mut GatherArgs { head: codes, slots: &slots, target };
                    backend.gather(args).unwrap();
                    for words in words.chunks_exact(layout.words()).step_by(37) {
                        let words: Vec<u32> = words.iter().map(|x| x.to_bits()).collect();
                        let (mut key, mut value) = (vec![0.0; 20], vec![0.0; 20]);
                        let target = GatherTarget::Dense { keys: &mut key, values: &mut value };
                        let slots = [(row + 2) as u32];
                        backend.gather(&mut GatherArgs { head, slots: &slots, target }).unwrap();
                        let far = |words: &[u32]| -> f64 {
                            let mut near = vec![0.0; 20];
                            book.decode(words, &mut near);
                            near.iter().zip(&key).map(|(a, b)| f64::from(a - b).powi(2)).sum()
                        };
                        let (best, mut codes) = (far(&words), vec![0; layout.codes]);
                        layout.unpack(&words, &mut codes);
                        for m in 0..layout.codes {
                            for level in 0..book.levels() as u16 {
                                let mut others = codes.clone();
                                others[m] = level;
                                let mut other = words.clone();
                                layout.pack(&others, &mut other);
                                assert!(
                                    best <= far(&other) + 1e-5,
                                    "{own}: row {row}, piece {m}, {level} is nearer"
                                );
                            }
                        }
                        row += 37;
                    }
                    row = slots.last().map_or(0, |&slot| slot as usize + 1);
                }
            }
        }
    }
}

#[test]
fn entries_are_ranked_by_their_codes_and_read_exactly() {
    for backend in backends() {
        let (mut cache, id) = prompted(RECIPE, &backend, &[PROMPT]);
        let mut found = Vec::new();
        for token in PROMPT..PROMPT + 8 {
            let out = feed(&mut cache, id, &[token], 1);
            let read = cache.last_choice(id, 1).unwrap().unwrap();
            let report = cache.last_read(id, 1).unwrap().unwrap();
            assert!(report.missing.is_some_and(|missing| missing > 0.0 && missing < 1.0), "{report:?}");
            let shape = cache.shape().layer(1).clone();
            for head in 0..2 {
                let all = entries(&cache, id, 1, head);
                let slots = &read.slots[read.offsets[head]..read.offsets[head + 1]];
                assert_eq!(slots.len(), BUDGET, "single entries fill a budget");
                let chosen: Vec<_> = slots.iter().map(|slot| all[slot.0 as usize].clone()).collect();
                let asked = queries(&shape, 1, head, &[(token, token as i32)]);
                for (g, (query, at)) in asked.iter().enumerate() {
                    let want = dense(&shape, head * 3 + g, query, *at, &chosen);
                    let error = distance(&out[1][(head * 3 + g) * 16..][..16], &want);
                    assert!(error < 2e-4, "{}: {error}", backend.name());
                }
                // Of the entries that weigh most to the group, how many were read; a choice by chance reads a third.
                let weight = |slot: usize| -> f64 {
                    let product =
                        |query: &[f32]| -> f32 { query.iter().zip(&all[slot].key).map(|(q, k)| q * k).sum() };
                    asked.iter().map(|(query, _)| f64::from(shape.scale * product(query)).exp()).sum()
                };
                let mut order: Vec<usize> = (4..all.len() - 21).collect();
                order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
                let best = order.iter().take(40);
                found.push(best.filter(|&&slot| slots.contains(&Slot(slot as u32))).count());
            }
        }
        let mean = found.iter().sum::<usize>() as f64 / found.len() as f64;
        assert!(mean > 32.0, "{}: {mean} of the best 40", backend.name());
    }
}
