//! Which part of a closure can be registered before the rest of it has arrived. Pure.

use std::collections::{HashMap, HashSet};

use nix_csi_store::StorePath;

/// Those of `arrived` whose references are all valid, or arrived and of this kind themselves.
///
/// `arrived` maps each path to what it refers to.
pub(super) fn closed<'a>(
    arrived: &HashMap<&'a StorePath, &'a [StorePath]>,
    is_valid: impl Fn(&StorePath) -> bool,
) -> HashSet<&'a StorePath> {
    let mut referrers: HashMap<&StorePath, Vec<&'a StorePath>> = HashMap::new();
    let mut open = Vec::new();
    for (path, references) in arrived {
        for reference in *references {
            if arrived.contains_key(reference) {
                referrers.entry(reference).or_default().push(path);
            } else if !is_valid(reference) {
                open.push(*path);
            }
        }
    }
    let mut closed: HashSet<_> = arrived.keys().copied().collect();
    // Whoever refers to one that has to wait has to wait too.
    while let Some(path) = open.pop() {
        if closed.remove(path) {
            open.extend(referrers.get(path).into_iter().flatten());
        }
    }
    closed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(n: usize) -> StorePath {
        format!("/nix/store/{n:032}-p").parse().unwrap()
    }

    fn closed_numbers(arrived: &[(usize, &[usize])], valid: &[usize]) -> Vec<usize> {
        let paths: Vec<_> = (0..50).map(path).collect();
        let references: Vec<Vec<_>> =
            arrived.iter().map(|(_, to)| to.iter().map(|n| path(*n)).collect()).collect();
        let map = arrived.iter().zip(&references).map(|((n, _), to)| (&paths[*n], &to[..])).collect();
        let closed = closed(&map, |path| valid.iter().any(|n| paths[*n] == *path));
        (0..50).filter(|n| closed.contains(&paths[*n])).collect()
    }

    #[test]
    fn what_waits_makes_its_referrers_wait() {
        // 1 -> 2 -> 9 (not here), 3 -> 4 -> 3, 5 -> 8 (valid), 6 -> 6
        let arrived: &[(usize, &[usize])] =
            &[(1, &[2]), (2, &[9]), (3, &[4]), (4, &[3]), (5, &[8]), (6, &[6])];
        assert_eq!(closed_numbers(arrived, &[8]), [3, 4, 5, 6]);
        assert_eq!(closed_numbers(arrived, &[8, 9]), [1, 2, 3, 4, 5, 6]);
    }

    proptest! {
        #[test]
        fn it_is_the_largest_set_that_refers_to_nothing_outside(
            graph in prop::collection::vec(prop::collection::vec(0_usize..12, 0..4), 8)
        ) {
            let arrived: Vec<_> = graph.iter().enumerate().map(|(n, to)| (n, &to[..])).collect();
            let found = closed_numbers(&arrived, &[11]);
            let good = |n: usize, set: &[usize]| graph[n].iter().all(|to| *to == 11 || set.contains(to));
            prop_assert!(found.iter().all(|n| good(*n, &found)));
            // Largest: dropping whoever cannot stay, until nothing changes, from all of them.
            let mut all: Vec<_> = (0..8).collect();
            while let Some(at) = all.iter().position(|n| !good(*n, &all)) {
                all.remove(at);
            }
            prop_assert_eq!(found, all);
        }
    }
}
