// The most alike of the candidates by the cosine of their keys: one workgroup per entry, threads over candidates. Of two
// equal ones the earlier is found, within a thread because later ones must be better, between threads by its index.

#import group

struct Params {
    dim: u32,
    candidates: u32,
    count: u32,
    first: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// [entries][dim] and [candidates][dim].
@group(0) @binding(1) var<storage, read> entries: array<f32>;
@group(0) @binding(2) var<storage, read> candidates: array<f32>;
// The index of the candidate, and the bits of its cosine.
@group(0) @binding(3) var<storage, read_write> found: array<vec2<u32>>;

const THREADS: u32 = 64u;
// Below every cosine.
const NONE: f32 = -2.0;

var<workgroup> cosines: array<f32, 64>;
var<workgroup> indices: array<u32, 64>;

// The largest magnitude of a key: divided by it, its squares neither overflow nor vanish.
fn largest(row: u32, of_candidate: bool) -> f32 {
    var most = 0.0;
    for (var d = 0u; d < params.dim; d++) {
        if of_candidate {
            most = max(most, abs(candidates[row * params.dim + d]));
        } else {
            most = max(most, abs(entries[row * params.dim + d]));
        }
    }
    return most;
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
    let entry = params.first + index;
    let mine = largest(entry, false);
    var best = NONE;
    var at = 0xffffffffu;
    for (var candidate = t; candidate < params.candidates; candidate += THREADS) {
        let theirs = largest(candidate, true);
        var cosine = 0.0;
        if mine > 0.0 && theirs > 0.0 {
            var dot = 0.0;
            var own = 0.0;
            var other = 0.0;
            for (var d = 0u; d < params.dim; d++) {
                let a = entries[entry * params.dim + d] / mine;
                let b = candidates[candidate * params.dim + d] / theirs;
                dot += a * b;
                own += a * a;
                other += b * b;
            }
            cosine = dot / (sqrt(own) * sqrt(other));
        }
        if cosine > best {
            best = cosine;
            at = candidate;
        }
    }
    cosines[t] = best;
    indices[t] = at;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if t < half {
            let better = cosines[t + half] > cosines[t];
            let earlier = cosines[t + half] == cosines[t] && indices[t + half] < indices[t];
            if better || earlier {
                cosines[t] = cosines[t + half];
                indices[t] = indices[t + half];
            }
        }
        workgroupBarrier();
    }
    if t == 0u {
        found[entry] = vec2<u32>(indices[0], bitcast<u32>(cosines[0]));
    }
}
