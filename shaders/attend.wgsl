// Flash attention of one tile of eight query rows over one run of pages: online softmax in f32, unnormalised
// result and (maximum, sum) per row, to be merged over runs by merge_partials.
//
// A workgroup takes one stretch: the part of a run whose pages lie in the slab that is bound. Stretches of
// one run are dispatched in order and continue from the stored state with the same arithmetic, so the bits
// of a result do not depend on which slab a page happened to get.
//
// With CHOSEN a run is a range of a table of entries, each of which may lie anywhere in the slab.
//
// Per chunk of up to 64 entries (of a page, or of the table): thread = entry computes eight logits; the maximum is reduced in
// workgroup memory; thread = value dimension adds the weighted values to its own eight sums in `sums`.

#import element
#import group
#import logit
#import packed

override K_TYPE: u32 = 0u;
override V_TYPE: u32 = 0u;
// 1: `pages` holds two words per entry, that of its page and its row; `begin` and `end` count entries.
override CHOSEN: u32 = 0u;

struct Stretch {
    // Index of the run among all runs of this call: where state and sums are.
    run: u32,
    tile: u32,
    // First page (entry, if CHOSEN) in `pages`, first row in that page, end row counted from the start of that page.
    pages: u32,
    begin: u32,
    end: u32,
    // 0: the first stretch of its run.
    resume: u32,
}

@group(0) @binding(0) var<uniform> params: AttentionParams;
@group(0) @binding(1) var<storage, read> slab: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> stretches: array<Stretch>;
@group(0) @binding(4) var<storage, read> positions: array<vec4<i32>>;
@group(0) @binding(5) var<storage, read> queries: array<vec4<f32>>;
// [run][d_v][8]
@group(0) @binding(6) var<storage, read_write> sums: array<vec4<f32>>;
// [run][maximum of 8 rows, sum of 8 rows]
@group(0) @binding(7) var<storage, read_write> states: array<vec4<f32>>;
@group(0) @binding(8) var<uniform> packs: array<Pack, 2>;

const CHUNK: u32 = 64u;
const SPLIT: u32 = 8u;

// [entry of the chunk][8 rows]: logits, then weights.
var<workgroup> weights: array<vec4<f32>, 128>;
var<workgroup> peaks: array<vec4<f32>, 16>;
var<workgroup> totals: array<vec4<f32>, 16>;

// Element `d` of the value of entry `index` of the table.
fn chosen_value(index: u32, d: u32) -> f32 {
    let page = pages[2u * index];
    let row = pages[2u * index + 1u];
    if V_TYPE == PACKED {
        return packed_element(VALUES, page, row, column_of(VALUES, page, d));
    }
    return load_element(page + params.v_offset + row * params.v_words, d, V_TYPE);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let index = group_index(id, groups);
    if index >= params.count {
        return;
    }
    let s = stretches[params.first + index];
    let none = vec4<f32>(NONE);
    var max_a = none;
    var max_b = none;
    var sum_a = vec4<f32>(0.0);
    var sum_b = vec4<f32>(0.0);
    if s.resume != 0u {
        max_a = states[4u * s.run];
        max_b = states[4u * s.run + 1u];
        sum_a = states[4u * s.run + 2u];
        sum_b = states[4u * s.run + 3u];
    }
    var fresh = s.resume == 0u;
    var row = s.begin;
    while row < s.end {
        var page = 0u;
        var local = 0u;
        var n = min(CHUNK, s.end - row);
        if CHOSEN == 0u {
            page = pages[s.pages + row / params.capacity];
            local = row % params.capacity;
            n = min(n, params.capacity - local);
        }

        var x = Logits(none, none);
        if t < n {
            var at = vec2<u32>(page, local + t);
            if CHOSEN != 0u {
                let index = 2u * (s.pages + row + t);
                at = vec2<u32>(pages[index], pages[index + 1u]);
            }
            x = logits_of(s.tile, at.x, at.y);
        }
        weights[2u * t] = x.a;
        weights[2u * t + 1u] = x.b;
        workgroupBarrier();

        if t < SPLIT {
            var a = none;
            var b = none;
            for (var j = t * SPLIT; j < (t + 1u) * SPLIT; j++) {
                a = max(a, weights[2u * j]);
                b = max(b, weights[2u * j + 1u]);
            }
            peaks[2u * t] = a;
            peaks[2u * t + 1u] = b;
        }
        workgroupBarrier();

        let old_a = max_a;
        let old_b = max_b;
        for (var j = 0u; j < SPLIT; j++) {
            max_a = max(max_a, peaks[2u * j]);
            max_b = max(max_b, peaks[2u * j + 1u]);
        }
        let zero = vec4<f32>(0.0);
        let keep_a = select(exp(old_a - max_a), zero, old_a == none);
        let keep_b = select(exp(old_b - max_b), zero, old_b == none);
        // Compared with ==, a NaN counts as seen and reaches the output.
        weights[2u * t] = select(exp(x.a - max_a), zero, x.a == none);
        weights[2u * t + 1u] = select(exp(x.b - max_b), zero, x.b == none);
        workgroupBarrier();

        if t < SPLIT {
            var a = zero;
            var b = zero;
            for (var j = t * SPLIT; j < (t + 1u) * SPLIT; j++) {
                a += weights[2u * j];
                b += weights[2u * j + 1u];
            }
            totals[2u * t] = a;
            totals[2u * t + 1u] = b;
        }
        for (var d = t; d < params.d_v; d += CHUNK) {
            let at = 2u * (s.run * params.d_v + d);
            var a = zero;
            var b = zero;
            if !fresh {
                a = keep_a * sums[at];
                b = keep_b * sums[at + 1u];
            }
            var value = page + params.v_offset + local * params.v_words;
            var j = 0u;
            if CHOSEN != 0u {
                let first = s.pages + row;
                for (; j + 4u <= n; j += 4u) {
                    let w = 2u * j;
                    let v = vec4<f32>(
                        chosen_value(first + j, d),
                        chosen_value(first + j + 1u, d),
                        chosen_value(first + j + 2u, d),
                        chosen_value(first + j + 3u, d),
                    );
                    a += v.x * weights[w] + v.y * weights[w + 2u] + v.z * weights[w + 4u] + v.w * weights[w + 6u];
                    b += v.x * weights[w + 1u] + v.y * weights[w + 3u] + v.z * weights[w + 5u] + v.w * weights[w + 7u];
                }
                for (; j < n; j++) {
                    let v = chosen_value(first + j, d);
                    a += v * weights[2u * j];
                    b += v * weights[2u * j + 1u];
                }
            } else if V_TYPE == PACKED {
                let column = column_of(VALUES, page, d);
                for (; j + 4u <= n; j += 4u) {
                    let w = 2u * j;
                    let v = vec4<f32>(
                        packed_element(VALUES, page, local + j, column),
                        packed_element(VALUES, page, local + j + 1u, column),
                        packed_element(VALUES, page, local + j + 2u, column),
                        packed_element(VALUES, page, local + j + 3u, column),
                    );
                    a += v.x * weights[w] + v.y * weights[w + 2u] + v.z * weights[w + 4u] + v.w * weights[w + 6u];
                    b += v.x * weights[w + 1u] + v.y * weights[w + 3u] + v.z * weights[w + 5u] + v.w * weights[w + 7u];
                }
                for (; j < n; j++) {
                    let v = packed_element(VALUES, page, local + j, column);
                    a += v * weights[2u * j];
                    b += v * weights[2u * j + 1u];
                }
            }
            for (; j + 4u <= n; j += 4u) {
                let w = 2u * j;
                let v = vec4<f32>(
                    load_element(value, d, V_TYPE),
                    load_element(value + params.v_words, d, V_TYPE),
                    load_element(value + 2u * params.v_words, d, V_TYPE),
                    load_element(value + 3u * params.v_words, d, V_TYPE),
                );
                a += v.x * weights[w] + v.y * weights[w + 2u] + v.z * weights[w + 4u] + v.w * weights[w + 6u];
                b += v.x * weights[w + 1u] + v.y * weights[w + 3u] + v.z * weights[w + 5u] + v.w * weights[w + 7u];
                value += 4u * params.v_words;
            }
            for (; j < n; j++) {
                let v = load_element(value, d, V_TYPE);
                a += v * weights[2u * j];
                b += v * weights[2u * j + 1u];
                value += params.v_words;
            }
            sums[at] = a;
            sums[at + 1u] = b;
        }
        workgroupBarrier();

        sum_a *= keep_a;
        sum_b *= keep_b;
        for (var j = 0u; j < SPLIT; j++) {
            sum_a += totals[2u * j];
            sum_b += totals[2u * j + 1u];
        }
        fresh = false;
        row += n;
    }
    if t == 0u {
        states[4u * s.run] = max_a;
        states[4u * s.run + 1u] = max_b;
        states[4u * s.run + 2u] = sum_a;
        states[4u * s.run + 3u] = sum_b;
    }
}
