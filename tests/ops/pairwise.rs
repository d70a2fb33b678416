//! Covering grids that are too large to visit: cases such that each pair of levels of any two factors meets in one.

/// A factor: the weight of each of its levels in the cost of a case, which is their product. 0 makes a case empty.
pub type Factor = Vec<f64>;

/// Levels by factor, one entry a case.
///
/// Greedy: a case begins with a pair that no case has yet, then takes for each other factor the level that meets most
/// pairs not yet seen, of those that can keep the cost below `budget`, and the cheapest among equals. An empty case
/// proves little, so it counts only for pairs with the level that makes it empty.
pub fn cover(factors: &[Factor], budget: f64) -> Vec<Vec<usize>> {
    let mut uncovered: Vec<[(usize, usize); 2]> = pairs(factors);
    // Dear pairs first, while anything may join them.
    let weight = |pair: &[(usize, usize); 2]| factors[pair[0].0][pair[0].1] * factors[pair[1].0][pair[1].1];
    uncovered.sort_by(|a, b| weight(b).total_cmp(&weight(a)));
    let smallest = |f: usize| factors[f].iter().copied().filter(|w| *w > 0.0).fold(f64::INFINITY, f64::min);
    let mut cases = vec![];
    while let Some([(f, a), (g, b)]) = uncovered.first().copied() {
        let mut case: Vec<Option<usize>> = vec![None; factors.len()];
        (case[f], case[g]) = (Some(a), Some(b));
        for factor in 0..factors.len() {
            if case[factor].is_some() {
                continue;
            }
            let others: f64 = (0..factors.len())
                .filter(|f| *f != factor)
                .map(|f| case[f].map_or_else(|| smallest(f), |level| factors[f][level]))
                .product();
            let rank = |level: usize| {
                let mut trial = case.clone();
                trial[factor] = Some(level);
                let gain = uncovered.iter().filter(|pair| meets(factors, &trial, pair)).count();
                let cost = others * factors[factor][level];
                (cost <= budget, gain, -cost)
            };
            let better = |a: &(bool, usize, f64), b: &(bool, usize, f64)| {
                (a.0.cmp(&b.0))
                    .then(if a.0 { a.1.cmp(&b.1) } else { a.2.total_cmp(&b.2) })
                    .then(a.2.total_cmp(&b.2))
            };
            // An empty level where nothing is empty yet would waste the case.
            let empty =
                case.iter().enumerate().any(|(f, level)| level.is_some_and(|level| factors[f][level] == 0.0));
            let levels = (0..factors[factor].len()).filter(|level| empty || factors[factor][*level] > 0.0);
            case[factor] =
                levels.map(|level| (rank(level), level)).max_by(|a, b| better(&a.0, &b.0)).map(|x| x.1);
        }
        let before = uncovered.len();
        uncovered.retain(|pair| !meets(factors, &case, pair));
        assert!(uncovered.len() < before, "a case without a new pair");
        cases.push(case.into_iter().map(Option::unwrap).collect());
    }
    cases
}

/// Every pair of levels of two factors, but not of two that are both empty.
fn pairs(factors: &[Factor]) -> Vec<[(usize, usize); 2]> {
    let mut pairs = vec![];
    for f in 0..factors.len() {
        for g in f + 1..factors.len() {
            for a in 0..factors[f].len() {
                pairs.extend((0..factors[g].len()).map(|b| [(f, a), (g, b)]));
            }
        }
    }
    pairs
}

/// Whether a case, perhaps in part, proves something about a pair.
fn meets(factors: &[Factor], case: &[Option<usize>], pair: &[(usize, usize); 2]) -> bool {
    let empty = |(f, level): (usize, usize)| factors[f][level] == 0.0;
    let case_empty = case.iter().enumerate().any(|(f, level)| level.is_some_and(|level| empty((f, level))));
    pair.iter().all(|(f, level)| case[*f] == Some(*level)) && (!case_empty || pair.iter().any(|x| empty(*x)))
}

#[test]
fn every_pair_meets() {
    let factors: Vec<Factor> =
        vec![vec![0.0, 1.0, 3.0], vec![1.0, 1.0], vec![0.0, 1.0, 2.0, 100.0], vec![1.0; 5]];
    let cases = cover(&factors, 150.0);
    for pair in pairs(&factors) {
        let met = cases.iter().any(|case| {
            let case: Vec<Option<usize>> = case.iter().copied().map(Some).collect();
            meets(&factors, &case, &pair)
        });
        assert!(met, "{pair:?}");
    }
    assert!((20..40).contains(&cases.len()), "{} cases", cases.len());
}
