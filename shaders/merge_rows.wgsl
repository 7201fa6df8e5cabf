// Weighted sums of rows: one workgroup per target, threads over dimensions. The rows lie one after another, those of a
// target together, its own first.
//
// rows: | keys [rows][d_k] | values [rows][d_v] |        merged: | keys [targets][d_k] | values [targets][d_v] |

#import group

struct Params {
    d_k: u32,
    d_v: u32,
    // Words before the values of `rows` and of `merged`.
    values: u32,
    merged_values: u32,
    count: u32,
    first: u32,
    spare_a: u32,
    spare_b: u32,
}

struct Sum {
    begin: u32,
    end: u32,
}

struct Weight {
    key: f32,
    value: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<f32>;
@group(0) @binding(2) var<storage, read> sums: array<Sum>;
@group(0) @binding(3) var<storage, read> weights: array<Weight>;
@group(0) @binding(4) var<storage, read_write> merged: array<f32>;

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
    let sum = sums[params.first + index];
    for (var d = t; d < params.d_k; d += 64u) {
        var total = 0.0;
        for (var row = sum.begin; row < sum.end; row++) {
            total += weights[row].key * rows[row * params.d_k + d];
        }
        merged[index * params.d_k + d] = total;
    }
    for (var d = t; d < params.d_v; d += 64u) {
        var total = 0.0;
        for (var row = sum.begin; row < sum.end; row++) {
            total += weights[row].value * rows[params.values + row * params.d_v + d];
        }
        merged[params.merged_values + index * params.d_v + d] = total;
    }
}
