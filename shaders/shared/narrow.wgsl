// Rounding to half precision, to nearest and ties to even. Spelled out in integers because the built-in
// packing may round either way, and stored keys must not depend on the driver.

fn narrow(value: f32, kind: u32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    let sign = (bits >> 16u) & 0x8000u;
    if kind == BF16 {
        if magnitude > 0x7f800000u {
            return (bits >> 16u) | 0x40u;
        }
        return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    }
    if magnitude > 0x7f800000u {
        return sign | 0x7e00u;
    }
    // 65520, half-way between the largest finite f16 and the next step, rounds to infinity.
    if magnitude >= 0x477ff000u {
        return sign | 0x7c00u;
    }
    if magnitude >= 0x38800000u {
        // Normal: rebias the exponent from 127 to 15 and drop 13 bits.
        let rebased = magnitude - 0x38000000u;
        return sign | ((rebased + 0xfffu + ((rebased >> 13u) & 1u)) >> 13u);
    }
    if magnitude < 0x33000000u {
        return sign;
    }
    // Subnormal: the significand in units of 2^-24.
    let shift = 126u - (magnitude >> 23u);
    let significand = (magnitude & 0x7fffffu) | 0x800000u;
    let kept = significand >> shift;
    let rest = significand & ((1u << shift) - 1u);
    let half = 1u << (shift - 1u);
    let up = rest > half || (rest == half && (kept & 1u) == 1u);
    return sign | (kept + u32(up));
}
