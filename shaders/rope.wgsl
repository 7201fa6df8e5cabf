// Rotates rows in place: one workgroup per row. The row is widened into workgroup memory, turned pair by
// pair, and narrowed back word by word, so no two threads write one word whatever the pairing.

#import element
#import group
#import narrow

override ROW_TYPE: u32 = 0u;

struct Params {
    // First word of the first row, words from one row to the next.
    base: u32,
    row_words: u32,
    dim: u32,
    // Leading dimensions that rotate.
    rotated: u32,
    // 0: pairs (2i, 2i+1), 1: pairs (i, i + rotated/2).
    halves: u32,
    count: u32,
    spare_a: u32,
    spare_b: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> slab: array<u32>;
// [rows][rotated / 2] of cosine and sine.
@group(0) @binding(2) var<storage, read> angles: array<vec2<f32>>;

var<workgroup> x: array<f32, 1024>;

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
    let row = params.base + index * params.row_words;
    for (var d = t; d < params.rotated; d += 64u) {
        x[d] = load_element(row, d, ROW_TYPE);
    }
    workgroupBarrier();
    let pairs = params.rotated / 2u;
    for (var p = t; p < pairs; p += 64u) {
        let angle = angles[index * pairs + p];
        let a = select(2u * p, p, params.halves == 1u);
        let b = select(2u * p + 1u, p + pairs, params.halves == 1u);
        let u = x[a];
        let v = x[b];
        x[a] = u * angle.x - v * angle.y;
        x[b] = u * angle.y + v * angle.x;
    }
    workgroupBarrier();
    // `rotated` is even, so half-precision pairs of dimensions never share a word with what stays.
    if ROW_TYPE == F32 {
        for (var d = t; d < params.rotated; d += 64u) {
            slab[row + d] = bitcast<u32>(x[d]);
        }
    } else {
        for (var w = t; w < pairs; w += 64u) {
            slab[row + w] = narrow(x[2u * w], ROW_TYPE) | (narrow(x[2u * w + 1u], ROW_TYPE) << 16u);
        }
    }
}
