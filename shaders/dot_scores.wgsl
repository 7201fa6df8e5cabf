// Logits of every query row on stored entries, one by one: [G, T, rows] per KV head. The queries stand at a position
// behind everything, so none is masked.

#import chunk
#import element
#import group
#import logit
#import packed

override K_TYPE: u32 = 0u;

@group(0) @binding(0) var<uniform> params: AttentionParams;
@group(0) @binding(1) var<storage, read> slab: array<u32>;
@group(0) @binding(2) var<storage, read> chunks: array<Chunk>;
@group(0) @binding(3) var<storage, read> positions: array<vec4<i32>>;
@group(0) @binding(4) var<storage, read> queries: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> scores: array<f32>;
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
    let chunk = chunks[params.first + index];
    if t >= chunk.rows {
        return;
    }
    for (var tile = chunk.tile_begin; tile < chunk.tile_end; tile++) {
        let x = logits_of(tile, chunk.page, chunk.begin + t);
        for (var r = 0u; r < 8u; r++) {
            let row = (tile - chunk.tile) * 8u + r;
            if row < params.group * params.tokens {
                let line = (row % params.group) * params.tokens + row / params.group;
                scores[chunk.target_at + line * chunk.stride + t] = of_row(x, r);
            }
        }
    }
}
