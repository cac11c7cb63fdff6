//! What goes, and in which order. Pure.

use nix_csi_store::StorePath;

use crate::store::Graph;

/// A view that nobody uses now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unused {
    /// Its name.
    pub(super) view: String,
    /// When it was last used: a number that only grows.
    pub(super) used: u64,
    /// What it keeps.
    pub(super) roots: Vec<StorePath>,
}

/// What is to be deleted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Views, the least recently used one first.
    pub(super) views: Vec<Unused>,
    /// Paths that nothing needs once these views are gone.
    pub(super) paths: Vec<StorePath>,
    /// The bytes of their NARs.
    pub(super) bytes: u64,
}

/// What becomes of paths that nothing needs, and no view ever may have needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nobodys {
    /// They go first, whether that is enough or not.
    First,
    /// They go last, if at all: some may be parts of what there was no room for, and are wanted again in a moment.
    Last,
}

/// Plans to free `goal` bytes, or as many as can be: one unused view after another with what only it and those before
/// it need, and what nothing needs. What `live` refers to, directly or not, always stays.
pub(super) fn plan(
    graph: &Graph,
    live: &[StorePath],
    mut unused: Vec<Unused>,
    goal: u64,
    nobodys: Nobodys,
) -> Plan {
    // Each path belongs to whoever goes last of all that need it: the live ones, then perhaps those that nothing
    // needs, then the views from the most recent one on.
    const NOBODY: usize = usize::MAX;
    const LIVE: usize = usize::MAX - 1;
    unused.sort_unstable_by(|a, b| (a.used, &a.view).cmp(&(b.used, &b.view)));
    let keepers = |apart: &[StorePath]| {
        let mut keeper = vec![NOBODY; graph.len()];
        let mut keep = |roots: &[StorePath], who| {
            graph.mark(roots, |n| {
                let is_new = keeper[n] == NOBODY;
                if is_new {
                    keeper[n] = who;
                }
                is_new
            });
        };
        keep(live, LIVE);
        keep(apart, unused.len());
        unused.iter().enumerate().rev().for_each(|(number, view)| keep(&view.roots, number));
        keeper
    };
    let mut keeper = keepers(&[]);
    if nobodys == Nobodys::Last {
        let of_nobody = keeper.iter().enumerate().filter(|(_, keeper)| **keeper == NOBODY);
        let of_nobody: Vec<_> = of_nobody.map(|(n, _)| graph.path(n).clone()).collect();
        keeper = keepers(&of_nobody);
    }
    let bytes_of = |who: usize| {
        let kept = keeper.iter().enumerate().filter(move |(_, keeper)| **keeper == who);
        kept.map(|(n, _)| graph.size(n)).sum::<u64>()
    };
    let mut plan = Plan { bytes: bytes_of(NOBODY), ..Plan::default() };
    let mut count = 0;
    while plan.bytes < goal && count <= unused.len() {
        plan.bytes += bytes_of(count);
        count += 1;
    }
    let goes = |keeper: usize| keeper == NOBODY || keeper < count;
    let paths = keeper.iter().enumerate().filter(|(_, keeper)| goes(**keeper));
    plan.paths = paths.map(|(n, _)| graph.path(n).clone()).collect();
    unused.truncate(count);
    plan.views = unused;
    plan
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use rstest::rstest;

    use super::Nobodys::{First, Last};
    use super::*;

    fn path(n: usize) -> StorePath {
        let digits = [b'a' + u8::try_from(n / 10).unwrap(), b'0' + u8::try_from(n % 10).unwrap()];
        let text = String::from_utf8(digits.to_vec()).unwrap();
        StorePath::from_base_name(&format!("{}-p{n}", text.repeat(16))).unwrap()
    }

    /// Path `n` of `2^n` bytes refers to `references[n]`.
    fn graph(references: &[Vec<usize>]) -> Graph {
        let nodes = (0..references.len()).map(|n| (path(n), 1 << n)).collect();
        let edges = references.iter().enumerate().flat_map(|(n, to)| to.iter().map(move |to| (n, *to)));
        Graph::new(nodes, edges)
    }

    fn view(name: &str, used: u64, roots: &[usize]) -> Unused {
        Unused { view: name.into(), used, roots: roots.iter().map(|n| path(*n)).collect() }
    }

    /// 0 is needed by all, 1 by "old" and "new", 2 by "old", 3 by "new", 4 by what is live, 5 by nobody.
    #[rstest]
    #[case::nothing_to_do(First, 0, &[], &[5])]
    #[case::only_what_nobody_needs(First, 32, &[], &[5])]
    #[case::the_older_one(First, 33, &["old"], &[2, 5])]
    #[case::both(First, 37, &["old", "new"], &[1, 2, 3, 5])]
    #[case::more_than_there_is(First, u64::MAX, &["old", "new"], &[1, 2, 3, 5])]
    #[case::nothing_at_all(Last, 0, &[], &[])]
    #[case::the_older_one_alone(Last, 4, &["old"], &[2])]
    #[case::both_alone(Last, 14, &["old", "new"], &[1, 2, 3])]
    #[case::what_nobody_needs_too(Last, 15, &["old", "new"], &[1, 2, 3, 5])]
    fn the_least_recently_used_goes_first(
        #[case] nobodys: Nobodys,
        #[case] goal: u64,
        #[case] views: &[&str],
        #[case] paths: &[usize],
    ) {
        let graph = graph(&[vec![], vec![0], vec![1], vec![1], vec![0], vec![0]]);
        let unused = vec![view("new", 9, &[3]), view("old", 4, &[2])];
        let plan = plan(&graph, &[path(4)], unused, goal, nobodys);
        assert_eq!(plan.views.iter().map(|view| view.view.as_str()).collect::<Vec<_>>(), views);
        assert_eq!(plan.paths, paths.iter().map(|n| path(*n)).collect::<Vec<_>>());
        assert_eq!(plan.bytes, paths.iter().map(|n| 1 << n).sum::<u64>());
    }

    proptest! {
        #[test]
        fn nothing_that_is_needed_goes(
            references in prop::collection::vec(prop::collection::vec(0..12_usize, 0..4), 12),
            live in prop::collection::vec(0..12_usize, 0..3),
            views in prop::collection::vec((any::<u64>(), prop::collection::vec(0..12_usize, 1..3)), 0..5),
            goal in 0..5000_u64,
            is_first in any::<bool>(),
        ) {
            let graph = graph(&references);
            let unused: Vec<_> =
                views.iter().enumerate().map(|(n, (used, roots))| view(&n.to_string(), *used, roots)).collect();
            let live: Vec<_> = live.into_iter().map(path).collect();
            let nobodys = if is_first { First } else { Last };
            let plan = plan(&graph, &live, unused.clone(), goal, nobodys);
            let gone: HashSet<_> = plan.paths.iter().collect();
            let stays = unused.iter().filter(|view| !plan.views.contains(view));
            let roots: Vec<_> = stays.flat_map(|view| view.roots.clone()).chain(live).collect();
            let mut seen = HashSet::new();
            graph.mark(&roots, |n| seen.insert(n));
            for n in &seen {
                prop_assert!(!gone.contains(graph.path(*n)));
            }
            // All else goes, and no view without need.
            prop_assert!(!is_first || seen.len() + gone.len() == graph.len());
            prop_assert!(plan.bytes >= goal || seen.len() + gone.len() == graph.len());
            prop_assert!(plan.bytes >= goal || plan.views.len() == unused.len());
            // Nothing that stays needs what goes.
            let rest: Vec<_> = graph.paths().filter(|path| !gone.contains(path)).cloned().collect();
            let mut reached = HashSet::new();
            graph.mark(&rest, |n| reached.insert(n));
            for n in reached {
                prop_assert!(!gone.contains(graph.path(n)));
            }
            let newest = plan.views.iter().map(|view| view.used).max().unwrap_or(0);
            for view in unused.iter().filter(|view| !plan.views.contains(view)) {
                prop_assert!(view.used >= newest);
            }
        }
    }
}
