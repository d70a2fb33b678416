//! Names by patterns.

/// Whether a name is what a pattern says; `*` stands for any text.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(name) = name.strip_prefix(head) else { return false };
    (0..=name.len()).filter(|i| name.is_char_boundary(*i)).any(|i| matches(rest, &name[i..]))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_stand_for_anything() {
        assert!(matches("a.b", "a.b") && !matches("a.b", "a.bc") && !matches("a.b", "xa.b"));
        assert!(matches("*.b", "a.b") && matches("*b", "b") && !matches("*.b", "b"));
        assert!(matches("a*c*e", "abcde") && matches("*", "") && !matches("a*c*e", "abcd"));
    }
}
