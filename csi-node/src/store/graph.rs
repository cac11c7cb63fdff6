//! All valid paths and what they refer to, in memory for a moment. Pure.

use std::collections::HashMap;

use nix_csi_store::StorePath;

/// Paths by number, with the sizes of their NARs.
pub struct Graph {
    nodes: Vec<(StorePath, u64)>,
    numbers: HashMap<StorePath, usize>,
    references: Vec<Vec<u32>>,
}

impl Graph {
    /// From paths with their sizes, and pairs of numbers: who refers to whom.
    pub fn new(nodes: Vec<(StorePath, u64)>, edges: impl Iterator<Item = (usize, usize)>) -> Self {
        let numbers = nodes.iter().enumerate().map(|(n, (path, _))| (path.clone(), n)).collect();
        let mut references = vec![Vec::new(); nodes.len()];
        for (from, to) in edges {
            if let Ok(to) = u32::try_from(to) {
                references[from].push(to);
            }
        }
        Self { nodes, numbers, references }
    }

    /// How many paths there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The path of that number.
    pub fn path(&self, n: usize) -> &StorePath {
        &self.nodes[n].0
    }

    /// How many bytes its NAR has.
    pub fn size(&self, n: usize) -> u64 {
        self.nodes[n].1
    }

    /// All paths.
    pub fn paths(&self) -> impl Iterator<Item = &StorePath> {
        self.nodes.iter().map(|(path, _)| path)
    }

    /// Walks all that `roots` refer to, themselves included, as far as they are valid. `enter` says whether a path is
    /// seen for the first time.
    pub fn mark(&self, roots: &[StorePath], mut enter: impl FnMut(usize) -> bool) {
        let mut open: Vec<_> = roots.iter().filter_map(|path| self.numbers.get(path).copied()).collect();
        while let Some(n) = open.pop() {
            if enter(n) {
                open.extend(self.references[n].iter().map(|n| *n as usize));
            }
        }
    }
}
