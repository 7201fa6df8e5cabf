// Elements of packed rows, in the space they were packed in (a rotation is the host's or the merge's to undo).
// The importing shader declares `slab`, an array<u32>, and the uniform `packs`, an array<Pack, 2>: keys, then
// values. How a side is laid out is told in src/device/encoding.rs.
//
// Four consecutive elements of a key, the first a multiple of four, have their codes in the four bytes of one word of each
// plane, and so have four consecutive rows of an element of values. Helps attention read 2 to 8 bits where it read 16. Hurts by shifts and a scale per element.

// The kind of a packed side, after those of exact elements.
const PACKED: u32 = 3u;

const KEYS: u32 = 0u;
const VALUES: u32 = 1u;

struct Pack {
    // Words from the start of a page to the plane of low bits and to that of high bits.
    low: u32,
    high: u32,
    // Bits of a code in each plane; no high ones: 0.
    low_bits: u32,
    high_bits: u32,
    // Words of a row in each plane: a quarter of a stretch of elements.
    low_words: u32,
    high_words: u32,
    // Words from the start of a page.
    parameters: u32,
    mean: u32,
    // Whether there is a mean, and a minimum beside each scale.
    center: u32,
    has_min: u32,
    // A group spans 2^row_shift rows and 2^dim_shift elements of each; a row of groups has row_groups.
    row_shift: u32,
    dim_shift: u32,
    row_groups: u32,
    // The code of 0, or, if `tabled`, sixteen levels as signed bytes.
    zero: u32,
    tabled: u32,
    levels_a: u32,
    levels_b: u32,
    levels_c: u32,
    levels_d: u32,
    // Turns the sign bit of codes that are signed bytes, so that `zero` fits them too.
    flip: u32,
    // Whether words hold four rows of an element, not four elements of a row.
    by_rows: u32,
    padding_a: u32,
    padding_b: u32,
    padding_c: u32,
}

// Rows of keys that lie together: BAND of src/device/encoding.rs, as a power of two.
const BAND_SHIFT: u32 = 6u;

// Words from the first row to this one in a plane with `words` of each row.
fn row_start(side: u32, row: u32, words: u32) -> u32 {
    let by_elements = (((row >> BAND_SHIFT) * words) << BAND_SHIFT) + (row & ((1u << BAND_SHIFT) - 1u));
    return select(by_elements, (row & ~3u) * words, packs[side].by_rows != 0u);
}

// Words from the first element to element `d`, which is within the first stretch.
fn element_start(side: u32, d: u32) -> u32 {
    return select((d >> 2u) << BAND_SHIFT, d, packs[side].by_rows != 0u);
}

// The shift of the byte of an element of a row in its word.
fn byte_shift(side: u32, row: u32, d: u32) -> u32 {
    return 8u * (select(d, row, packs[side].by_rows != 0u) & 3u);
}

fn level_of(side: u32, code: u32) -> f32 {
    if packs[side].tabled == 0u {
        return f32(i32(code ^ packs[side].flip) - i32(packs[side].zero));
    }
    let levels = vec4<u32>(
        packs[side].levels_a,
        packs[side].levels_b,
        packs[side].levels_c,
        packs[side].levels_d,
    );
    // Sign-extends the byte.
    return f32(bitcast<i32>(levels[code >> 2u] << (24u - 8u * (code & 3u))) >> 24u);
}

// Scale and minimum of a group.
fn parameters_of(side: u32, page: u32, group: u32) -> vec2<f32> {
    let start = page + packs[side].parameters;
    if packs[side].has_min != 0u {
        return unpack2x16float(slab[start + group]);
    }
    let pair = unpack2x16float(slab[start + (group >> 1u)]);
    return vec2<f32>(select(pair.x, pair.y, (group & 1u) == 1u), 0.0);
}

// The bits from `shift` of each byte of a word.
fn bytes_of(word: u32, shift: u32, bits: u32) -> vec4<u32> {
    let shifts = vec4<u32>(0u, 8u, 16u, 24u) + vec4<u32>(shift);
    return (vec4<u32>(word) >> shifts) & vec4<u32>((1u << bits) - 1u);
}

// The codes of elements d..d + 4 of a row in the plane at `plane` with `words` of each row.
fn codes_of(side: u32, plane: u32, words: u32, bits: u32, row: u32, d: u32) -> vec4<u32> {
    let stretch = (d >> 2u) / words;
    let first = plane + row_start(side, row, words) + element_start(side, d - 4u * stretch * words);
    let shift = stretch * bits;
    if packs[side].by_rows == 0u {
        return bytes_of(slab[first], shift, bits);
    }
    let four = vec4<u32>(slab[first], slab[first + 1u], slab[first + 2u], slab[first + 3u]);
    return (four >> vec4<u32>(shift + 8u * (row & 3u))) & vec4<u32>((1u << bits) - 1u);
}

// Elements d..d + 4 of a row, d a multiple of 4. Those past the end of the row are undefined.
fn packed_four(side: u32, page: u32, row: u32, d: u32) -> vec4<f32> {
    let bits = packs[side].low_bits;
    var codes = codes_of(side, page + packs[side].low, packs[side].low_words, bits, row, d);
    if packs[side].high_bits != 0u {
        let high = codes_of(side, page + packs[side].high, packs[side].high_words, packs[side].high_bits, row, d);
        codes |= high << vec4<u32>(bits);
    }
    let levels = vec4<f32>(
        level_of(side, codes.x),
        level_of(side, codes.y),
        level_of(side, codes.z),
        level_of(side, codes.w),
    );
    let group = (row >> packs[side].row_shift) * packs[side].row_groups + (d >> packs[side].dim_shift);
    let first = parameters_of(side, page, group);
    var scale = vec4<f32>(first.x);
    var offset = vec4<f32>(first.y);
    if packs[side].dim_shift == 0u {
        let second = parameters_of(side, page, group + 1u);
        let third = parameters_of(side, page, group + 2u);
        let fourth = parameters_of(side, page, group + 3u);
        scale = vec4<f32>(first.x, second.x, third.x, fourth.x);
        offset = vec4<f32>(first.y, second.y, third.y, fourth.y);
    }
    if packs[side].center != 0u {
        let at = page + packs[side].mean + (d >> 1u);
        offset += vec4<f32>(unpack2x16float(slab[at]), unpack2x16float(slab[at + 1u]));
    }
    return levels * scale + offset;
}

// Where element `d` of any row of a page lies.
struct Column {
    // The word of row 0 in each plane, and shifts.
    low: u32,
    low_shift: u32,
    high: u32,
    high_shift: u32,
    d: u32,
    // Index of its group along the row.
    group: u32,
    mean: f32,
}

fn column_of(side: u32, page: u32, d: u32) -> Column {
    let words = packs[side].low_words;
    let stretch = (d >> 2u) / words;
    var column = Column(0u, 0u, 0u, 0u, d, 0u, 0.0);
    column.low = page + packs[side].low + element_start(side, d - 4u * stretch * words);
    column.low_shift = stretch * packs[side].low_bits;
    if packs[side].high_bits != 0u {
        let high_words = packs[side].high_words;
        let high_stretch = (d >> 2u) / high_words;
        column.high = page + packs[side].high + element_start(side, d - 4u * high_stretch * high_words);
        column.high_shift = high_stretch * packs[side].high_bits;
    }
    column.group = d >> packs[side].dim_shift;
    if packs[side].center != 0u {
        let pair = unpack2x16float(slab[page + packs[side].mean + (d >> 1u)]);
        column.mean = select(pair.x, pair.y, (d & 1u) == 1u);
    }
    return column;
}

// The element of a row in this column.
fn packed_element(side: u32, page: u32, row: u32, column: Column) -> f32 {
    let bits = packs[side].low_bits;
    let byte = byte_shift(side, row, column.d);
    let low = slab[column.low + row_start(side, row, packs[side].low_words)] >> (column.low_shift + byte);
    var code = low & ((1u << bits) - 1u);
    if packs[side].high_bits != 0u {
        let high = slab[column.high + row_start(side, row, packs[side].high_words)] >> (column.high_shift + byte);
        code |= (high & ((1u << packs[side].high_bits) - 1u)) << bits;
    }
    let group = (row >> packs[side].row_shift) * packs[side].row_groups + column.group;
    let parameters = parameters_of(side, page, group);
    return level_of(side, code) * parameters.x + (parameters.y + column.mean);
}
