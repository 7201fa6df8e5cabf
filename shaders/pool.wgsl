// Pooling along rows of different lengths: one thread per score, which finds its row by bisection.

#import group

struct Params {
    // Scores, and rows.
    count: u32,
    rows: u32,
    width: u32,
    // 0: average, 1: maximum.
    kind: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// rows + 1 starts.
@group(0) @binding(1) var<storage, read> starts: array<u32>;
@group(0) @binding(2) var<storage, read> scores: array<f32>;
@group(0) @binding(3) var<storage, read_write> pooled: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let at = group_index(id, groups) * 64u + t;
    if at >= params.count {
        return;
    }
    // The last row that starts at or before `at`: empty rows before it start there too.
    var low = 0u;
    var high = params.rows;
    while high - low > 1u {
        let middle = (low + high) / 2u;
        if starts[middle] <= at {
            low = middle;
        } else {
            high = middle;
        }
    }
    let reach = params.width / 2u;
    let first = at - min(reach, at - starts[low]);
    let last = at + min(reach, starts[low + 1u] - 1u - at);
    if params.kind == 0u {
        var sum = 0.0;
        for (var j = first; j <= last; j++) {
            sum += scores[j];
        }
        pooled[at] = sum / f32(params.width);
    } else {
        var peak = scores[first];
        for (var j = first + 1u; j <= last; j++) {
            peak = max(peak, scores[j]);
        }
        pooled[at] = peak;
    }
}
