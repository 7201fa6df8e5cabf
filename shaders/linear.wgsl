// A dense layer and its activation: one workgroup per tile of 32 rows by 32 outputs, 4 by 4 of them per thread. Inputs pass
// through workgroup memory 16 at a time, and are summed by so many first: a single sum over thousands would round more.

#import group

struct Params {
    rows: u32,
    inputs: u32,
    outputs: u32,
    // 0: none, 1: SiLU, 2: GELU.
    activation: u32,
    // Tiles side by side, and in all.
    across: u32,
    count: u32,
    // 1: there is a bias.
    biased: u32,
    spare: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// [rows][inputs], [outputs][inputs] and [outputs].
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

const TILE: u32 = 32u;
const DEPTH: u32 = 16u;
// A line of a tile and one more, so that neighbouring inputs of a row lie in different banks.
const LINE: u32 = 33u;

// [DEPTH][LINE].
var<workgroup> x_tile: array<f32, 528>;
var<workgroup> w_tile: array<f32, 528>;

// As on the host, in `src/kernel/linear/cpu.rs`. An infinity or NaN gets through by the factor `v`.
fn activate(v: f32) -> f32 {
    if params.activation == 1u {
        let t = exp(-abs(v));
        return v * (select(1.0, t, v < 0.0) / (1.0 + t));
    }
    if params.activation == 2u {
        // Beyond 12 nothing is left, and squares of what is larger may overflow.
        let z = min(abs(v) * 0.70710678, 12.0);
        let t = 1.0 / (1.0 + 0.3275911 * z);
        let p = ((((1.0614054 * t - 1.453152) * t + 1.4214137) * t - 0.28449674) * t + 0.2548296) * t;
        let tail = 0.5 * p * exp(-z * z);
        return v * select(1.0 - tail, tail, v < 0.0);
    }
    return v;
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let index = group_index(id, groups);
    // Uniform in the workgroup.
    if index >= params.count {
        return;
    }
    let first_row = index / params.across * TILE;
    let first_column = index % params.across * TILE;
    // Rows and outputs of a thread are 8 apart.
    let row = t / 8u;
    let column = t % 8u;
    var sums = array<vec4<f32>, 4>();
    for (var first = 0u; first < params.inputs; first += DEPTH) {
        for (var e = t; e < TILE * DEPTH; e += 64u) {
            let k = first + e % DEPTH;
            let line = e / DEPTH;
            let at = e % DEPTH * LINE + line;
            var a = 0.0;
            if k < params.inputs && first_row + line < params.rows {
                a = x[(first_row + line) * params.inputs + k];
            }
            x_tile[at] = a;
            var b = 0.0;
            if k < params.inputs && first_column + line < params.outputs {
                b = weight[(first_column + line) * params.inputs + k];
            }
            w_tile[at] = b;
        }
        workgroupBarrier();
        var part = array<vec4<f32>, 4>();
        for (var k = 0u; k < DEPTH; k++) {
            let at = k * LINE + column;
            let w = vec4<f32>(w_tile[at], w_tile[at + 8u], w_tile[at + 16u], w_tile[at + 24u]);
            part[0] += x_tile[k * LINE + row] * w;
            part[1] += x_tile[k * LINE + row + 8u] * w;
            part[2] += x_tile[k * LINE + row + 16u] * w;
            part[3] += x_tile[k * LINE + row + 24u] * w;
        }
        for (var r = 0u; r < 4u; r++) {
            sums[r] += part[r];
        }
        workgroupBarrier();
    }
    for (var r = 0u; r < 4u; r++) {
        let i = first_row + row + 8u * r;
        for (var c = 0u; c < 4u; c++) {
            let j = first_column + column + 8u * c;
            if i < params.rows && j < params.outputs {
                var sum = sums[r][c];
                if params.biased == 1u {
                    sum += bias[j];
                }
                out[i * params.outputs + j] = activate(sum);
            }
        }
    }
}
