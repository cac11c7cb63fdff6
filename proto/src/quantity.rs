//! Quantities as Kubernetes writes them (`64Mi`, `1.5G`, `1e9`), as a number of bytes.

/// Reads a quantity that is more than nothing. A part of a byte counts as a whole one.
pub fn parse_quantity(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = format!("{whole}{}", fraction.trim_end_matches('0'));
    // What has more digits than this is no number of bytes of this world.
    if digits.len() > 19 {
        return None;
    }
    let mantissa: u128 = digits.parse().ok()?;
    let (factor, mut divisor) = factor(suffix)?;
    divisor *= 10_u128.checked_pow(u32::try_from(fraction.trim_end_matches('0').len()).ok()?)?;
    let bytes = mantissa.checked_mul(factor)?.div_ceil(divisor);
    u64::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

/// What a suffix multiplies with, and what it divides by.
fn factor(suffix: &str) -> Option<(u128, u128)> {
    Some(match suffix {
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "" => (1, 1),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let power: i32 = exponent.parse().ok().filter(|power| (-18..=18).contains(power))?;
            let ten = 10_u128.pow(power.unsigned_abs());
            if power < 0 { (1, ten) } else { (ten, 1) }
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::plain("1024", Some(1024))]
    #[case::binary("64Mi", Some(64 << 20))]
    #[case::decimal("2k", Some(2000))]
    #[case::fraction("1.5Gi", Some(3 << 29))]
    #[case::fraction_alone(".5Ki", Some(512))]
    #[case::trailing_point("1.Ki", Some(1024))]
    #[case::exponent("1e3", Some(1000))]
    #[case::upper_exponent("1.25E2", Some(125))]
    #[case::exa("1E", Some(1_000_000_000_000_000_000))]
    #[case::part_of_a_byte("100m", Some(1))]
    #[case::one_and_a_part("1001m", Some(2))]
    #[case::zeros("1.000Ki", Some(1024))]
    #[case::nothing("0", None)]
    #[case::empty("", None)]
    #[case::only_a_suffix("Mi", None)]
    #[case::point(".", None)]
    #[case::two_points("1.2.3", None)]
    #[case::negative("-1Gi", None)]
    #[case::unknown("1Qi", None)]
    #[case::lower_case("1gi", None)]
    #[case::blank("1 Gi", None)]
    #[case::too_large("17Ei", None)]
    #[case::too_long("99999999999999999999", None)]
    #[case::wild_exponent("1e99", None)]
    fn quantities(#[case] text: &str, #[case] bytes: Option<u64>) {
        assert_eq!(parse_quantity(text), bytes);
    }

    proptest! {
        #[test]
        fn any_text_is_an_answer(text in ".*") {
            let _ = parse_quantity(&text);
        }

        #[test]
        fn bytes_are_bytes(bytes in 1_u64..) {
            prop_assume!(bytes.to_string().len() <= 19);
            prop_assert_eq!(parse_quantity(&bytes.to_string()), Some(bytes));
        }
    }
}
