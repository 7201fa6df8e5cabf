// Normalised attention weights of one stored entry for the rows of a tile, given their log-sum-exp.
// Imported together with logit and chunk; the importing shader declares `lses` ([tile][8] as vec4 pairs).

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
