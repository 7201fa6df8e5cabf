// Copies chosen rows of pages into one dense buffer: one workgroup per entry, threads over words. Raw words
// when they go on into other pages, widened to f32 when they go to the host, which turns back rotated ones.
//
// packed: | keys [entries][k] | values [entries][v] | positions [entries] | bias [entries] |  (no tail if widened)

#import element
#import group
#import packed

override K_TYPE: u32 = 0u;
override V_TYPE: u32 = 0u;

struct Params {
    d_k: u32,
    d_v: u32,
    k_words: u32,
    v_words: u32,
    v_offset: u32,
    mirror: u32,
    capacity: u32,
    count: u32,
    first: u32,
    // 1: widen to f32.
    widen: u32,
    // Words before the values, the positions and the biases of `packed`.
    values: u32,
    positions: u32,
    biases: u32,
    spare_a: u32,
    spare_b: u32,
    spare_c: u32,
}

struct Entry {
    page: u32,
    row: u32,
    // Index in `packed`.
    to: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> slab: array<u32>;
@group(0) @binding(2) var<storage, read> entries: array<Entry>;
@group(0) @binding(3) var<storage, read_write> packed: array<u32>;
@group(0) @binding(4) var<uniform> packs: array<Pack, 2>;

fn widened(side: u32, entry: Entry, row: u32, d: u32, kind: u32) -> u32 {
    if kind == PACKED {
        return bitcast<u32>(packed_element(side, entry.page, entry.row, column_of(side, entry.page, d)));
    }
    if kind == F32 {
        // As it lies: words that are no numbers (codes) pass no floating-point register.
        return slab[row + d];
    }
    return bitcast<u32>(load_element(row, d, kind));
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
    let entry = entries[params.first + index];
    let key = entry.page + entry.row * params.k_words;
    let value = entry.page + params.v_offset + entry.row * params.v_words;
    if params.widen != 0u {
        for (var d = t; d < params.d_k; d += 64u) {
            packed[entry.to * params.d_k + d] = widened(KEYS, entry, key, d, K_TYPE);
        }
        for (var d = t; d < params.d_v; d += 64u) {
            packed[params.values + entry.to * params.d_v + d] = widened(VALUES, entry, value, d, V_TYPE);
        }
        return;
    }
    for (var w = t; w < params.k_words; w += 64u) {
        packed[entry.to * params.k_words + w] = slab[key + w];
    }
    for (var w = t; w < params.v_words; w += 64u) {
        packed[params.values + entry.to * params.v_words + w] = slab[value + w];
    }
    if t == 0u {
        packed[params.positions + entry.to] = slab[entry.page + params.mirror + entry.row];
        packed[params.biases + entry.to] = slab[entry.page + params.mirror + params.capacity + entry.row];
    }
}
