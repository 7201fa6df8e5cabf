// Logits of one stored key for the eight query rows of a tile: two vec4, rows 0..4 and 4..8.
// The importing shader declares `params` (an AttentionParams), `slab`, `queries` ([tile][d_k][8] as vec4
// pairs, rotated if the keys are), `positions` ([tile][8] as vec4 pairs) and the override K_TYPE.
// Imported together with element and packed.

// "Sees nothing": shading languages may assume that infinities do not happen, so -infinity is spelled as the
// lowest finite number on the device and translated on the host.
const NONE: f32 = -3.4028234663852886e38;

struct AttentionParams {
    d_k: u32,
    d_v: u32,
    // Words from one row to the next.
    k_words: u32,
    v_words: u32,
    // Words from the start of a page.
    v_offset: u32,
    mirror: u32,
    capacity: u32,
    // Work records of this dispatch: how many, and where they start.
    count: u32,
    first: u32,
    // 0: no window.
    window: u32,
    // Query heads per KV head, and queries per head.
    group: u32,
    tokens: u32,
    scale: f32,
    // 0: no cap.
    softcap: f32,
    spare_a: u32,
    spare_b: u32,
}

struct Logits {
    a: vec4<f32>,
    b: vec4<f32>,
}

// Of row `r` of the tile.
fn of_row(x: Logits, r: u32) -> f32 {
    if r < 4u {
        return x.a[r];
    }
    return x.b[r - 4u];
}

fn capped(dot: vec4<f32>) -> vec4<f32> {
    let x = dot * params.scale;
    if params.softcap > 0.0 {
        // Drivers that compute tanh from exponentials overflow for large arguments; beyond 15 it is 1 in f32.
        return params.softcap * tanh(clamp(x / params.softcap, vec4<f32>(-15.0), vec4<f32>(15.0)));
    }
    return x;
}

fn sees(query: vec4<i32>, entry: i32) -> vec4<bool> {
    // Where entry <= query the wrapped difference is the exact distance, whatever the signs.
    let distance = bitcast<vec4<u32>>(query) - vec4<u32>(bitcast<u32>(entry));
    let past = vec4<i32>(entry) <= query;
    let near = distance < vec4<u32>(params.window);
    return past & (near | vec4<bool>(params.window == 0u));
}

// Logits of the entry in row `row` of the page at word `page`; NONE where a query does not see it.
fn logits_of(tile: u32, page: u32, row: u32) -> Logits {
    let key = page + row * params.k_words;
    let first = tile * params.d_k * 2u;
    var a = vec4<f32>(0.0);
    var b = vec4<f32>(0.0);
    // Four dimensions at a time: loops of portable shaders carry a guard, and it is paid per round.
    let whole = params.d_k & ~3u;
    if K_TYPE == PACKED {
        for (var d = 0u; d < whole; d += 4u) {
            let q = first + 2u * d;
            let k = packed_four(KEYS, page, row, d);
            a += k.x * queries[q] + k.y * queries[q + 2u] + k.z * queries[q + 4u] + k.w * queries[q + 6u];
            b += k.x * queries[q + 1u] + k.y * queries[q + 3u] + k.z * queries[q + 5u] + k.w * queries[q + 7u];
        }
    } else if K_TYPE == F32 {
        for (var d = 0u; d < whole; d += 4u) {
            let q = first + 2u * d;
            let k = vec4<f32>(
                bitcast<f32>(slab[key + d]),
                bitcast<f32>(slab[key + d + 1u]),
                bitcast<f32>(slab[key + d + 2u]),
                bitcast<f32>(slab[key + d + 3u]),
            );
            a += k.x * queries[q] + k.y * queries[q + 2u] + k.z * queries[q + 4u] + k.w * queries[q + 6u];
            b += k.x * queries[q + 1u] + k.y * queries[q + 3u] + k.z * queries[q + 5u] + k.w * queries[q + 7u];
        }
    } else {
        for (var d = 0u; d < whole; d += 4u) {
            let q = first + 2u * d;
            let low = slab[key + (d >> 1u)];
            let high = slab[key + (d >> 1u) + 1u];
            let k = vec4<f32>(
                low_element(low, K_TYPE),
                high_element(low, K_TYPE),
                low_element(high, K_TYPE),
                high_element(high, K_TYPE),
            );
            a += k.x * queries[q] + k.y * queries[q + 2u] + k.z * queries[q + 4u] + k.w * queries[q + 6u];
            b += k.x * queries[q + 1u] + k.y * queries[q + 3u] + k.z * queries[q + 5u] + k.w * queries[q + 7u];
        }
    }
    for (var d = whole; d < params.d_k; d++) {
        var k: f32;
        if K_TYPE == PACKED {
            k = packed_element(KEYS, page, row, column_of(KEYS, page, d));
        } else {
            k = load_element(key, d, K_TYPE);
        }
        a += k * queries[first + 2u * d];
        b += k * queries[first + 2u * d + 1u];
    }
    let entry = bitcast<i32>(slab[page + params.mirror + row]);
    let bias = bitcast<f32>(slab[page + params.mirror + params.capacity + row]);
    let none = vec4<f32>(NONE);
    return Logits(
        select(none, capped(a) + bias, sees(positions[2u * tile], entry)),
        select(none, capped(b) + bias, sees(positions[2u * tile + 1u], entry)),
    );
}
