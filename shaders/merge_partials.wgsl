// Merges partial attentions row by row: every part is (maximum, sum, unnormalised output); a normalised
// partial is (lse, 1, output). Strides describe both the layout of attend's runs and the dense one of the
// host's call. One workgroup per row, threads over value dimensions.

#import group

const NONE: f32 = -3.4028234663852886e38;

struct Params {
    d_v: u32,
    count: u32,
    // Floats from one part to the next, from one row to the next, from one dimension to the next.
    part_stride: u32,
    row_stride: u32,
    dim_stride: u32,
    // Floats from one part's state to the next, and from its maxima to its sums.
    state_stride: u32,
    sum_offset: u32,
    spare: u32,
}

struct Row {
    // First part, number of parts, row within a part, row of the output.
    part: u32,
    parts: u32,
    lane: u32,
    target_row: u32,
    // Logit that joins the denominator, or NONE.
    sink: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> states: array<f32>;
@group(0) @binding(3) var<storage, read> sums: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read_write> lses: array<f32>;

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
    let row = rows[index];
    // Every thread walks the parts' states itself: they are few, and it saves a round of barriers.
    var peak = row.sink;
    for (var p = row.part; p < row.part + row.parts; p++) {
        peak = max(peak, states[p * params.state_stride + row.lane]);
    }
    var total = 0.0;
    if row.sink != NONE {
        total = exp(row.sink - peak);
    }
    for (var p = row.part; p < row.part + row.parts; p++) {
        let at = p * params.state_stride + row.lane;
        if states[at] != NONE {
            total += exp(states[at] - peak) * states[at + params.sum_offset];
        }
    }
    let seen = peak != NONE;
    for (var d = t; d < params.d_v; d += 64u) {
        var sum = 0.0;
        for (var p = row.part; p < row.part + row.parts; p++) {
            let state = states[p * params.state_stride + row.lane];
            let weight = exp(state - peak);
            // A part that saw nothing has no defined output, so it is skipped rather than multiplied by 0.
            if state != NONE && weight != 0.0 {
                sum += weight * sums[p * params.part_stride + row.lane * params.row_stride + d * params.dim_stride];
            }
        }
        out[row.target_row * params.d_v + d] = select(0.0, sum / total, seen);
    }
    if t == 0u {
        lses[row.target_row] = select(NONE, peak + log(total), seen);
    }
}
