// Sums of values by given weights, in eight rows of weights: a workgroup per stretch of pages, a thread per dimension.

#import element
#import group
#import packed

override V_TYPE: u32 = 0u;

struct Params {
    d_v: u32,
    // Words from the start of a page to its values, and of a row of them.
    v_offset: u32,
    v_words: u32,
    // Rows of a page.
    capacity: u32,
    count: u32,
    spare_a: u32,
    spare_b: u32,
    spare_c: u32,
}

struct Stretch {
    // First page in `pages`; all but the last are full.
    pages: u32,
    rows: u32,
    // First entry in `weights`.
    weights: u32,
    // First dimension in `sums`.
    sums: u32,
    // 0: the first stretch of its run.
    resume: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> slab: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> stretches: array<Stretch>;
// [entry][8 rows]
@group(0) @binding(4) var<storage, read> weights: array<vec4<f32>>;
// [run][d_v][8 rows]
@group(0) @binding(5) var<storage, read_write> sums: array<vec4<f32>>;
@group(0) @binding(6) var<uniform> packs: array<Pack, 2>;

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
    let s = stretches[index];
    for (var d = t; d < params.d_v; d += 64u) {
        var a = vec4<f32>(0.0);
        var b = vec4<f32>(0.0);
        if s.resume != 0u {
            a = sums[2u * (s.sums + d)];
            b = sums[2u * (s.sums + d) + 1u];
        }
        var row = 0u;
        for (var p = s.pages; row < s.rows; p++) {
            let page = pages[p];
            let n = min(params.capacity, s.rows - row);
            if V_TYPE == PACKED {
                let column = column_of(VALUES, page, d);
                for (var j = 0u; j < n; j++) {
                    let v = packed_element(VALUES, page, j, column);
                    let w = 2u * (s.weights + row + j);
                    a += v * weights[w];
                    b += v * weights[w + 1u];
                }
            } else {
                var value = page + params.v_offset;
                for (var j = 0u; j < n; j++) {
                    let v = load_element(value, d, V_TYPE);
                    let w = 2u * (s.weights + row + j);
                    a += v * weights[w];
                    b += v * weights[w + 1u];
                    value += params.v_words;
                }
            }
            row += n;
        }
        sums[2u * (s.sums + d)] = a;
        sums[2u * (s.sums + d) + 1u] = b;
    }
}
