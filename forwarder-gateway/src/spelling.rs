//! What somebody likely meant who wrote a name that does not exist.

/// The one of `names` that was likely meant.
pub fn meant<'n>(text: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let most = (text.chars().count() / 3).clamp(1, 2);
    names
        .map(|name| {
            let is_other_case = name.eq_ignore_ascii_case(text);
            (if is_other_case { 0 } else { strsim::damerau_levenshtein(text, name) }, name)
        })
        .filter(|(distance, _)| *distance <= most)
        .min()
        .map(|(_, name)| name)
}
