// Attention of one row of queries per workgroup over keys that were made and values that are latent rows, whose sum is
// multiplied by their basis at the end.
//
// keys: [entries][d_k]      values: [entries][rank], from `values_at` on      basis: [rank][stride]; none if rank is d_v and
// `basis` is 0      out: [rows][d_v], then [rows] log-sum-exps, then [rows][rank] work space

#import group

struct Params {
    d_k: u32,
    d_v: u32,
    rank: u32,
    stride: u32,
    // Words before the first key and the first latent row.
    keys_at: u32,
    values_at: u32,
    entries: u32,
    rows: u32,
    scale: f32,
    // 0: none.
    cap: f32,
    // 1: values are latent rows.
    latent: u32,
    count: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> queries: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<f32>;
@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read> basis: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

var<workgroup> weights: array<f32, 64>;
var<workgroup> shared_most: f32;
var<workgroup> shared_shrink: f32;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let row = group_index(id, groups);
    if row >= params.count {
        return;
    }
    let sums = params.rows * (params.d_v + 1u) + row * params.rank;
    for (var d = t; d < params.rank; d += 64u) {
        out[sums + d] = 0.0;
    }
    var most = -3.0e38;
    var total = 0.0;
    for (var first = 0u; first < params.entries; first += 64u) {
        let n = min(64u, params.entries - first);
        var x = -3.0e38;
        if t < n {
            let key = params.keys_at + (first + t) * params.d_k;
            var dot = 0.0;
            for (var d = 0u; d < params.d_k; d++) {
                dot += queries[row * params.d_k + d] * keys[key + d];
            }
            x = dot * params.scale;
            if params.cap > 0.0 {
                x = params.cap * tanh(x / params.cap);
            }
        }
        weights[t] = x;
        workgroupBarrier();
        if t == 0u {
            var new_most = most;
            for (var i = 0u; i < n; i++) {
                new_most = max(new_most, weights[i]);
            }
            shared_most = new_most;
            shared_shrink = exp(most - new_most);
        }
        workgroupBarrier();
        most = shared_most;
        let shrink = shared_shrink;
        weights[t] = select(0.0, exp(x - most), t < n);
        workgroupBarrier();
        var share = 0.0;
        for (var i = 0u; i < n; i++) {
            share += weights[i];
        }
        total = total * shrink + share;
        for (var d = t; d < params.rank; d += 64u) {
            var sum = out[sums + d] * shrink;
            for (var i = 0u; i < n; i++) {
                sum += weights[i] * values[params.values_at + (first + i) * params.rank + d];
            }
            out[sums + d] = sum;
        }
        workgroupBarrier();
    }
    storageBarrier();
    for (var d = t; d < params.d_v; d += 64u) {
        var value = 0.0;
        if params.latent == 1u {
            for (var j = 0u; j < params.rank; j++) {
                value += out[sums + j] * basis[j * params.stride + d];
            }
        } else {
            value = out[sums + d];
        }
        out[row * params.d_v + d] = value / total;
    }
    if t == 0u {
        out[params.rows * params.d_v + row] = most + log(total);
    }
}
