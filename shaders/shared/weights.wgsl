// Normalised attention weights of one stored entry for the rows of a tile, given their log-sum-exp.
// Imported together with logit; the importing shader declares `lses` ([tile][8] as vec4 pairs).

// Up to 64 entries of one page of one KV head.
struct Chunk {
    // Word of the page, first row, rows.
    page: u32,
    begin: u32,
    rows: u32,
    // Output of the chunk's first entry, and floats from one query row to the next.
    target_at: u32,
    stride: u32,
    // Tiles of the head: the first one, and those that may see the chunk.
    tile: u32,
    tile_begin: u32,
    tile_end: u32,
}

fn weights_of(tile: u32, page: u32, row: u32) -> Logits {
    let x = logits_of(tile, page, row);
    let a = lses[2u * tile];
    let b = lses[2u * tile + 1u];
    let none = vec4<f32>(NONE);
    let zero = vec4<f32>(0.0);
    return Logits(
        select(exp(x.a - a), zero, (x.a == none) | (a == none)),
        select(exp(x.b - b), zero, (x.b == none) | (b == none)),
    );
}

fn weight_at(w: Logits, r: u32) -> f32 {
    if r < 4u {
        return w.a[r];
    }
    return w.b[r - 4u];
}
