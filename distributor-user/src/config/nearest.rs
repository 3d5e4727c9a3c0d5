//! "Did you mean": the known word that a mistyped one is nearest to.
#![forbid(unsafe_code)]

/// The nearest of `known`, if it is near enough to be what was meant.
pub(super) fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let plain = |text: &str| text.to_lowercase().replace('-', "_");
    let word = plain(word);
    known
        .into_iter()
        .map(|candidate| {
            let distance = distance(&word, &plain(candidate));
            (distance, candidate)
        })
        .min()
        // A third of the letters wrong is a typing error; more is another word.
        .filter(|(distance, candidate)| *distance * 3 <= candidate.len().max(3))
        .map(|(_, candidate)| candidate)
}

/// How many letters to insert, drop, replace, or swap with their neighbour.
fn distance(left: &str, right: &str) -> usize {
    let left: Vec<char> = left.chars().collect();
    let right: Vec<char> = right.chars().collect();
    let mut table = vec![vec![0; right.len() + 1]; left.len() + 1];
    for i in 0..=left.len() {
        for j in 0..=right.len() {
            table[i][j] = match (i, j) {
                (0, far) | (far, 0) => far,
                _ => {
                    let same = left[i - 1] == right[j - 1];
                    let mut least = (table[i - 1][j] + 1)
                        .min(table[i][j - 1] + 1)
                        .min(table[i - 1][j - 1] + usize::from(!same));
                    if i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1] {
                        least = least.min(table[i - 2][j - 2] + 1);
                    }
                    least
                }
            };
        }
    }
    table[left.len()][right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 6] = ["stop_timeout", "start_timeout", "weight", "limit", "limits", "TERM"];

    #[test]
    fn mistyped_words_find_the_word_that_was_meant() {
        for (word, meant) in [
            ("stop-timeout", Some("stop_timeout")),
            ("stop_timout", Some("stop_timeout")),
            ("wieght", Some("weight")),
            ("Limit", Some("limit")),
            ("trem", Some("TERM")),
            ("limit", Some("limit")),
            ("health", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, KNOWN), meant, "{word}");
        }
    }
}
