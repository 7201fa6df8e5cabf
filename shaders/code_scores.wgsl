// Sums of looked-up numbers by the indices of a code: [G, T, rows] per KV head. One thread per entry; tables of four
// query rows lie side by side.

#import group

struct Params {
    // Of a code: words, indices, bits of an index.
    words: u32,
    codes: u32,
    bits: u32,
    levels: u32,
    // Query rows of a KV head.
    rows: u32,
    count: u32,
    spare_a: u32,
    spare_b: u32,
}

struct Chunk {
    // Word of the page, first row, rows.
    page: u32,
    begin: u32,
    rows: u32,
    // Output of the chunk's first entry, and floats from one query row to the next.
    target_at: u32,
    stride: u32,
    // Tables of the KV head, in fours.
    table: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> slab: array<u32>;
@group(0) @binding(2) var<storage, read> chunks: array<Chunk>;
@group(0) @binding(3) var<storage, read> tables: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> scores: array<f32>;

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
    let chunk = chunks[index];
    if t >= chunk.rows {
        return;
    }
    let row = chunk.page + (chunk.begin + t) * params.words;
    let mask = (1u << params.bits) - 1u;
    var table = chunk.table;
    for (var first = 0u; first < params.rows; first += 4u) {
        var sum = vec4<f32>(0.0);
        var m = 0u;
        for (var w = 0u; w < params.words; w++) {
            let word = slab[row + w];
            for (var shift = 0u; shift < 32u && m < params.codes; shift += params.bits) {
                // What no table has counts as its last.
                let code = min((word >> shift) & mask, params.levels - 1u);
                sum += tables[table + code];
                table += params.levels;
                m++;
            }
        }
        for (var c = 0u; c < min(4u, params.rows - first); c++) {
            scores[chunk.target_at + (first + c) * chunk.stride + t] = sum[c];
        }
    }
}
