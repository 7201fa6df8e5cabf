// Elements of the rows of a page. The importing shader declares `slab`, an array<u32>.
// Half-precision rows hold two elements per word, the even one in the low half; rows are padded to whole
// words, so the word of an element is always inside its row.

const F32: u32 = 0u;
const F16: u32 = 1u;
const BF16: u32 = 2u;

fn low_element(word: u32, kind: u32) -> f32 {
    if kind == F16 {
        return unpack2x16float(word).x;
    }
    return bitcast<f32>(word << 16u);
}

fn high_element(word: u32, kind: u32) -> f32 {
    if kind == F16 {
        return unpack2x16float(word).y;
    }
    return bitcast<f32>(word & 0xffff0000u);
}

// Element `d` of the row that starts at word `row`.
fn load_element(row: u32, d: u32, kind: u32) -> f32 {
    if kind == F32 {
        return bitcast<f32>(slab[row + d]);
    }
    let word = slab[row + (d >> 1u)];
    if (d & 1u) == 1u {
        return high_element(word, kind);
    }
    return low_element(word, kind);
}
