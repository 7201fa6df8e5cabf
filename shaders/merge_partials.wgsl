// Merges partial attentions row by row: every part is (maximum, sum, unnormalised output); a normalised
// partial is (lse, 1, output). Strides describe both the layout of attend's runs and the dense one of the
// host's call. One workgroup per row, threads over value dimensions.
//
// Parts whose values are stored rotated come last in a row; their sum is turned back here, once per row of the
// output instead of once per part or per stored entry.

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
    // Elements a rotation spans.
    block: u32,
}

struct Row {
    // First part, number of parts.
    part: u32,
    parts: u32,
    // How many parts, at the end, are rotated.
    rotated: u32,
    // Row within a part, row of the output.
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

// One block of a rotated row; as long as `TURNED` in src/kernel/merge_partials/gpu.rs.
var<workgroup> turned: array<f32, 1024>;

// Weighted sum of parts in one dimension.
fn sum_of(row: Row, begin: u32, end: u32, peak: f32, d: u32) -> f32 {
    var sum = 0.0;
    for (var p = begin; p < end; p++) {
        let state = states[p * params.state_stride + row.lane];
        let weight = exp(state - peak);
        // A part that saw nothing has no defined output, so it is skipped rather than multiplied by 0.
        if state != NONE && weight != 0.0 {
            sum += weight * sums[p * params.part_stride + row.lane * params.row_stride + d * params.dim_stride];
        }
    }
    return sum;
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
    let end = row.part + row.parts;
    let straight = end - row.rotated;
    if row.rotated == 0u {
        for (var d = t; d < params.d_v; d += 64u) {
            let sum = sum_of(row, row.part, end, peak, d);
            out[row.target_row * params.d_v + d] = select(0.0, sum / total, seen);
        }
    } else {
        let block = params.block;
        let factor = 1.0 / sqrt(f32(block));
        for (var first = 0u; first < params.d_v; first += block) {
            for (var i = t; i < block; i += 64u) {
                turned[i] = sum_of(row, straight, end, peak, first + i);
            }
            workgroupBarrier();
            for (var width = 1u; width < block; width *= 2u) {
                for (var pair = t; pair < block / 2u; pair += 64u) {
                    // `width` is a power of two: a zero bit goes in at its place.
                    let i = ((pair & ~(width - 1u)) << 1u) | (pair & (width - 1u));
                    let a = turned[i];
                    let b = turned[i + width];
                    turned[i] = a + b;
                    turned[i + width] = a - b;
                }
                workgroupBarrier();
            }
            for (var i = t; i < block; i += 64u) {
                let sum = sum_of(row, row.part, straight, peak, first + i) + factor * turned[i];
                out[row.target_row * params.d_v + first + i] = select(0.0, sum / total, seen);
            }
            workgroupBarrier();
        }
    }
    if t == 0u {
        lses[row.target_row] = select(NONE, peak + log(total), seen);
    }
}
