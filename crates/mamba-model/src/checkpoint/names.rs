//! How a family's checkpoints spell the names of the model's tensors.

/// A map from the names that the model uses to the names that a family of checkpoints uses.
///
/// A map is a list of rows `(canonical prefix, file prefix)`. Prefixes end at a dot or at the end of the name;
/// `{l}`, or any other word in braces, stands for one number between dots and is carried over. The row with the
/// longest canonical prefix applies; a name without a row is spelled the same in the file. Several rows with the
/// same canonical prefix are alternatives: the first one that the checkpoint has is taken.
///
/// ```
/// use mamba_model::checkpoint::NameMap;
///
/// const NAMES: NameMap = NameMap::new(&[
///     ("embedding", "backbone.embedding"),
///     ("embedding", "backbone.embeddings"),
///     ("layers.{l}.0.norm", "backbone.layers.{l}.norm"),
///     ("layers.{l}.0.mamba2", "backbone.layers.{l}.mixer"),
/// ])
/// .with_leading("model.")
/// .with_unread(&["mtp"]);
///
/// let here = ["backbone.embeddings.weight", "model.backbone.layers.7.mixer.in_proj.weight"];
/// let find = |name| NAMES.resolve(name, |candidate| here.contains(&candidate));
/// assert_eq!(find("embedding.weight").as_deref(), Some(here[0]));
/// assert_eq!(find("layers.7.0.mamba2.in_proj.weight").as_deref(), Some(here[1]));
/// assert_eq!(find("layers.8.0.mamba2.in_proj.weight"), None);
/// assert!(NAMES.may_stay_unread("mtp.layers.0.weight"));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NameMap {
    rows: &'static [(&'static str, &'static str)],
    leading: Option<&'static str>,
    optional: Option<&'static str>,
    unread: &'static [&'static str],
    unread_from: Option<(&'static str, usize)>,
    tied_head: bool,
}

/// The embedding by its canonical name.
const EMBEDDING: &str = "embedding.weight";

/// The head, which has the same name everywhere but in GGUF files.
const HEAD: &str = "lm_head.weight";

impl NameMap {
    /// A map with these rows of canonical and file prefixes.
    pub const fn new(rows: &'static [(&'static str, &'static str)]) -> Self {
        Self { rows, leading: None, optional: None, unread: &[], unread_from: None, tied_head: false }
    }

    /// The same map for checkpoints in which every name may stand behind `leading` (with its dot), as in Codestral.
    pub const fn with_leading(self, leading: &'static str) -> Self {
        Self { leading: Some(leading), ..self }
    }

    /// The same map for checkpoints whose names may lack `prefix` (with its dot), as those of models without a head do.
    pub const fn with_optional(self, prefix: &'static str) -> Self {
        Self { optional: Some(prefix), ..self }
    }

    /// The same map with a list of prefixes of file names that a model may leave unread: buffers that are computed, heads that
    /// are not used.
    pub const fn with_unread(self, unread: &'static [&'static str]) -> Self {
        Self { unread, ..self }
    }

    /// The same map for checkpoints that hold more layers than the model has, of which a model may leave those unread whose
    /// number is at least `first`: `prefix` with a placeholder last says where the number stands, as in `blk.{l}`.
    pub const fn with_unread_from(self, prefix: &'static str, first: usize) -> Self {
        Self { unread_from: Some((prefix, first)), ..self }
    }

    /// The same map for models whose head is their embedding: a file may hold both, of which the head stays unread, or the
    /// head alone, as files do whose writer kept the first of two names of one tensor.
    pub const fn with_tied_head(self) -> Self {
        Self { tied_head: true, ..self }
    }

    /// The names under which a file may hold the tensor `canonical`, the preferred one first.
    pub fn candidates(&self, canonical: &str) -> Vec<String> {
        let matches: Vec<_> = self
            .rows
            .iter()
            .filter_map(|(from, to)| Some((weight(from), to, match_prefix(from, canonical)?)))
            .collect();
        let longest = matches.iter().map(|(weight, ..)| *weight).max();
        let mut names: Vec<String> = matches
            .into_iter()
            .filter(|(weight, ..)| Some(*weight) == longest)
            .map(|(_, to, found)| fill(to, &found))
            .collect();
        if names.is_empty() {
            names.push(canonical.to_string());
        }
        if self.tied_head && canonical == EMBEDDING {
            names.push(HEAD.into());
        }
        if let Some(optional) = self.optional {
            let bare: Vec<_> =
                names.iter().filter_map(|name| Some(name.strip_prefix(optional)?.to_string())).collect();
            names.extend(bare);
        }
        if let Some(leading) = self.leading {
            let behind: Vec<_> = names.iter().map(|name| format!("{leading}{name}")).collect();
            names.extend(behind);
        }
        names
    }

    /// The first of the [`candidates`](Self::candidates) that exists.
    pub fn resolve(&self, canonical: &str, exists: impl Fn(&str) -> bool) -> Option<String> {
        self.candidates(canonical).into_iter().find(|name| exists(name))
    }

    /// Whether a model may leave the tensor `file_name` of a file unread.
    pub fn may_stay_unread(&self, file_name: &str) -> bool {
        let bare = self.leading.and_then(|leading| file_name.strip_prefix(leading)).unwrap_or(file_name);
        let beyond = self.unread_from.is_some_and(|(prefix, first)| {
            let number = match_prefix(prefix, bare).and_then(|found| found.numbers.last()?.1.parse().ok());
            number.is_some_and(|number: usize| number >= first)
        });
        let head = self.tied_head && bare == HEAD;
        head || beyond || self.unread.iter().any(|prefix| match_prefix(prefix, bare).is_some())
    }
}

/// What a pattern found in a name: the numbers behind its placeholders, and what is left of the name.
struct Found<'a> {
    numbers: Vec<(&'static str, &'a str)>,
    rest: Option<&'a str>,
}

fn is_placeholder(part: &str) -> bool {
    part.starts_with('{') && part.ends_with('}')
}

/// Longer patterns win; among equally long ones, the one with more literal parts.
fn weight(pattern: &str) -> (usize, usize) {
    let parts = pattern.split('.');
    (parts.clone().count(), parts.filter(|part| !is_placeholder(part)).count())
}

fn match_prefix<'a>(pattern: &'static str, name: &'a str) -> Option<Found<'a>> {
    let mut rest = Some(name);
    let mut numbers = Vec::new();
    for want in pattern.split('.') {
        let (have, left) = match rest?.split_once('.') {
            Some((have, left)) => (have, Some(left)),
            None => (rest?, None),
        };
        if is_placeholder(want) {
            if have.is_empty() || !have.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            numbers.push((want, have));
        } else if want != have {
            return None;
        }
        rest = left;
    }
    Some(Found { numbers, rest })
}

fn fill(pattern: &str, found: &Found) -> String {
    let number = |part| {
        let known = found.numbers.iter().find(|(placeholder, _)| *placeholder == part);
        known.map_or(part, |(_, number)| *number)
    };
    let parts: Vec<&str> = pattern.split('.').map(number).chain(found.rest).collect();
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: NameMap = NameMap::new(&[
        ("layers.{l}", "model.layers.{l}"),
        ("layers.{l}.1.moe.experts.{e}", "model.layers.{l}.feed_forward.experts.{e}"),
        ("layers.{l}.1.moe", "model.layers.{l}.feed_forward"),
        ("layers.{l}.0.mamba1.dt_norm.weight", "model.layers.{l}.dt_layernorm_weight"),
        ("layers.0.0", "first"),
        ("norm_f", "model.final_layernorm"),
    ]);

    #[test]
    fn the_longest_prefix_wins_and_numbers_are_carried_over() {
        let one = |name| NAMES.candidates(name).join(" ");
        assert_eq!(one("layers.12.1.moe.router.weight"), "model.layers.12.feed_forward.router.weight");
        assert_eq!(
            one("layers.1.1.moe.experts.5.up.weight"),
            "model.layers.1.feed_forward.experts.5.up.weight"
        );
        assert_eq!(one("layers.1.0.mamba1.dt_norm.weight"), "model.layers.1.dt_layernorm_weight");
        assert_eq!(one("layers.3.0.norm.weight"), "model.layers.3.0.norm.weight");
        assert_eq!(one("layers.0.0.norm.weight"), "first.norm.weight");
    }

    #[test]
    fn prefixes_end_at_dots_and_placeholders_are_numbers() {
        let one = |name| NAMES.candidates(name).join(" ");
        assert_eq!(one("norm_f.weight"), "model.final_layernorm.weight");
        assert_eq!(one("norm_f"), "model.final_layernorm");
        assert_eq!(one("norm_first.weight"), "norm_first.weight");
        assert_eq!(one("layers.x.norm"), "layers.x.norm");
        assert_eq!(one("layers..norm"), "layers..norm");
        assert_eq!(one("layers"), "layers");
        assert_eq!(one(""), "");
    }

    #[test]
    fn prefixes_that_may_be_there_or_not_are_tried_later() {
        let names = NameMap::new(&[("a", "model.b"), ("c", "d")]).with_optional("model.");
        assert_eq!(
            (names.candidates("a.w"), names.candidates("c.w")),
            (vec!["model.b.w".into(), "b.w".into()], vec!["d.w".to_string()])
        );
        let names = NameMap::new(&[("a", "b")]).with_leading("model.").with_unread(&["b.{i}.inv_freq"]);
        assert_eq!(names.candidates("a.w"), ["b.w", "model.b.w"]);
        assert_eq!(names.candidates("c"), ["c", "model.c"]);
        assert!(names.may_stay_unread("b.3.inv_freq") && names.may_stay_unread("model.b.3.inv_freq"));
        assert!(!names.may_stay_unread("b.3.inv") && !names.may_stay_unread("b.x.inv_freq"));
        assert!(!names.may_stay_unread("lm_head.weight"));
        let tied = names.with_tied_head();
        assert!(tied.may_stay_unread("model.lm_head.weight") && tied.may_stay_unread("b.3.inv_freq"));
        assert_eq!(
            tied.candidates("embedding.weight").join(" "),
            "embedding.weight lm_head.weight model.embedding.weight model.lm_head.weight"
        );
        let names = names.with_unread_from("blk.{l}", 12);
        assert!(names.may_stay_unread("blk.12.x") && names.may_stay_unread("blk.100.y.weight"));
        assert!(!names.may_stay_unread("blk.2.x") && !names.may_stay_unread("blk.y"));
    }
}
