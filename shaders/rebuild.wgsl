// Latent rows times a basis, or keys that are kept in their place, turned to their positions: one workgroup per row, threads
// over dimensions.
//
// latents: | keys [rows][rank_k] | values [rows][rank_v] |      basis: [rank][stride]      out: [rows][d], from `target_at` on

#import group

struct Params {
    d: u32,
    rank: u32,
    // Elements from one row of the basis to the next.
    stride: u32,
    // Words before the first latent row and before the first row of `out`.
    source: u32,
    target_at: u32,
    count: u32,
    // Leading dimensions that turn; 0 for none.
    dims: u32,
    // 1: neighbours pair up; 0: the first half with the second.
    interleaved: u32,
}

// As in `src/device/angles.rs`.
const FINE: u32 = 128u;

// As in `src/kernel/rebuild/gpu.rs`.
const MADE: u32 = 0xffffffffu;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latents: array<f32>;
@group(0) @binding(2) var<storage, read> basis: array<f32>;
// Position, and which row of `kept` stands in the place of the product.
@group(0) @binding(3) var<storage, read> places: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read> kept: array<f32>;
@group(0) @binding(5) var<storage, read> fine: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read> coarse: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read_write> out: array<f32>;

// The largest head dimension there is.
var<workgroup> row: array<f32, 1024>;

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
    let latent = params.source + index * params.rank;
    let own = places[index].y;
    for (var d = t; d < params.d; d += 64u) {
        if own != MADE {
            row[d] = kept[own * params.d + d];
            continue;
        }
        var sum = 0.0;
        for (var j = 0u; j < params.rank; j++) {
            sum += latents[latent + j] * basis[j * params.stride + d];
        }
        row[d] = sum;
    }
    workgroupBarrier();
    let pairs = params.dims / 2u;
    for (var i = t; i < pairs; i += 64u) {
        let position = places[index].x;
        let f = fine[position % FINE * pairs + i];
        let c = coarse[position / FINE * pairs + i];
        let angle = vec2<f32>(f.x * c.x - f.y * c.y, f.x * c.y + f.y * c.x);
        var a = i;
        var b = i + pairs;
        if params.interleaved == 1u {
            a = 2u * i;
            b = 2u * i + 1u;
        }
        let x = row[a];
        let y = row[b];
        row[a] = x * angle.x - y * angle.y;
        row[b] = x * angle.y + y * angle.x;
    }
    workgroupBarrier();
    for (var d = t; d < params.d; d += 64u) {
        out[params.target_at + index * params.d + d] = row[d];
    }
}
