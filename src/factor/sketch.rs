//! Random directions: a number for each place of a matrix, from the seed and the place alone.

use super::zeros;
use crate::error::FactorError;

/// A bijection of 64-bit words that scatters neighbours: xor-shifts and the two multipliers of splitmix64.
fn scatter(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Mean 0, variance 1, nearly normal: four sixteenths of a word's bits added up. Integers until the last step, so that
/// every platform has the same.
fn normal(word: u64) -> f32 {
    let sum: i32 = (0..4).map(|part| ((word >> (16 * part)) & 0xffff) as i32).sum();
    // Four uniforms of 65,536 values have the mean 131,070 and a standard deviation of 37,837.
    (sum - 2 * 0xffff) as f32 * (1.0 / 37_837.23)
}

/// `Ω[features, directions]`, row-major. A direction is the same however many there are.
pub(super) fn directions(seed: u64, features: usize, directions: usize) -> Result<Vec<f32>, FactorError> {
    let mut omega = zeros("random directions", features, directions)?;
    let key = scatter(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    for (i, row) in omega.chunks_exact_mut(directions).enumerate() {
        let row_key = scatter(key ^ scatter(i as u64 + 1));
        for (j, x) in row.iter_mut().enumerate() {
            *x = normal(scatter(row_key.wrapping_add((j as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        }
    }
    Ok(omega)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_are_normal_nested_and_a_matter_of_the_seed() {
        let (n, l) = (400, 50);
        let omega = directions(7, n, l).unwrap();
        let mean = omega.iter().sum::<f32>() / (n * l) as f32;
        let variance = omega.iter().map(|x| x * x).sum::<f32>() / (n * l) as f32;
        // Three standard deviations of the mean and of the variance of 20,000 independent numbers.
        assert!(mean.abs() < 0.022 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        let fewer = directions(7, n, 20).unwrap();
        assert!(fewer.chunks(20).zip(omega.chunks(l)).all(|(few, many)| few == &many[..20]));
        assert_ne!(directions(8, n, l).unwrap(), omega);
        // Neighbouring columns and rows have nothing in common.
        for step in [1, l] {
            let pairs = omega.iter().zip(&omega[step..]);
            let common = pairs.map(|(a, b)| a * b).sum::<f32>() / (n * l) as f32;
            assert!(common.abs() < 0.022, "{common}");
        }
    }
}
