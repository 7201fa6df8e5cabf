// Euclidean norm of stored rows: one thread per row, one workgroup per up to 64 rows of a page. A rotation
// does not change it.

#import element
#import group
#import packed

override ROW_TYPE: u32 = 0u;

struct Params {
    dim: u32,
    // Words from one row to the next, and from the start of a page to the side.
    row_words: u32,
    side: u32,
    count: u32,
    first: u32,
    spare_a: u32,
    spare_b: u32,
    spare_c: u32,
}

struct Chunk {
    page: u32,
    begin: u32,
    rows: u32,
    target_at: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> slab: array<u32>;
@group(0) @binding(2) var<storage, read> chunks: array<Chunk>;
@group(0) @binding(3) var<storage, read_write> norms: array<f32>;
// The first is that of the side asked for.
@group(0) @binding(4) var<uniform> packs: array<Pack, 2>;

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
    let chunk = chunks[params.first + index];
    if t >= chunk.rows {
        return;
    }
    let row = chunk.page + params.side + (chunk.begin + t) * params.row_words;
    var sum = 0.0;
    if ROW_TYPE == PACKED {
        for (var d = 0u; d < params.dim; d += 4u) {
            let x = packed_four(0u, chunk.page, chunk.begin + t, d);
            let inside = vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.dim);
            let y = select(vec4<f32>(0.0), x, inside);
            sum += dot(y, y);
        }
        norms[chunk.target_at + t] = sqrt(sum);
        return;
    }
    for (var d = 0u; d < params.dim; d++) {
        let x = load_element(row, d, ROW_TYPE);
        sum += x * x;
    }
    norms[chunk.target_at + t] = sqrt(sum);
}
