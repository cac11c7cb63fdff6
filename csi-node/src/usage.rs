//! Which views are being worked with, and which were used last.
//!
//! Time is a number that grows with each use: whatever the wall clock does, the order stays. It is written down now
//! and then, so that it outlives the process; a power cut costs the order of the last uses and nothing else.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The uses of the views of one node. A clone is the same.
#[derive(Clone)]
pub(crate) struct Usage(Arc<Inner>);

struct Inner {
    file: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    clock: u64,
    last: HashMap<String, u64>,
    /// How many calls work with a view that no record may name yet.
    holders: HashMap<String, usize>,
    is_saved: bool,
}

impl State {
    fn touch(&mut self, view: &str) {
        self.clock += 1;
        self.last.insert(view.to_owned(), self.clock);
        self.is_saved = false;
    }
}

impl Usage {
    /// As it was written down in `file`. If that cannot be read, all views were used at the same time.
    pub(crate) fn load(file: PathBuf) -> Self {
        let last: HashMap<String, u64> = match fs::read(&file).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(last)) => last,
            Ok(Err(error)) => {
                tracing::warn!(%error, file = %file.display(), "forgotten: which views were used last");
                HashMap::new()
            }
            Err(_) => HashMap::new(),
        };
        // Only the order counts: with small numbers there is always a larger one.
        let times: BTreeSet<_> = last.values().copied().collect();
        let times: HashMap<_, _> = times.into_iter().zip(1..).collect();
        let clock = times.len() as u64;
        let last = last.into_iter().map(|(view, used)| (view, times[&used])).collect();
        let state = State { clock, last, is_saved: true, ..State::default() };
        Self(Arc::new(Inner { file, state: Mutex::new(state) }))
    }

    /// The view stays as long as the guard lives; it may not be there yet.
    pub(crate) fn begin(&self, view: &str) -> Using {
        let mut state = self.state();
        state.touch(view);
        *state.holders.entry(view.to_owned()).or_default() += 1;
        Using { usage: self.clone(), view: view.to_owned() }
    }

    /// The view was used until now.
    pub(crate) fn touch(&self, view: &str) {
        self.state().touch(view);
    }

    /// When which view was used last.
    pub(crate) fn last(&self) -> HashMap<String, u64> {
        self.state().last.clone()
    }

    /// Forgets views that are not there, as those that could not be built.
    pub(crate) fn retain(&self, is_there: impl Fn(&str) -> bool) {
        let mut state = self.state();
        let State { last, holders, .. } = &mut *state;
        last.retain(|view, _| is_there(view) || holders.contains_key(view));
    }

    /// Removes a view, unless somebody works with it, or has done so after `then`.
    pub(crate) fn remove_unless_used(
        &self,
        view: &str,
        then: u64,
        remove: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut state = self.state();
        let last = state.last.get(view).copied().unwrap_or_default();
        if last > then || state.holders.contains_key(view) {
            return Ok(false);
        }
        // Whoever begins meanwhile waits, and then finds it gone.
        remove()?;
        state.last.remove(view);
        state.is_saved = false;
        Ok(true)
    }

    /// Writes down what has changed.
    pub(crate) fn save(&self) -> io::Result<()> {
        let last = {
            let mut state = self.state();
            if std::mem::replace(&mut state.is_saved, true) {
                return Ok(());
            }
            state.last.clone()
        };
        let beside = self.0.file.with_extension("new");
        let written =
            fs::write(&beside, serde_json::to_vec(&last)?).and_then(|()| fs::rename(&beside, &self.0.file));
        if written.is_err() {
            self.state().is_saved = false;
        }
        written
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody works with a view.
pub(crate) struct Using {
    usage: Usage,
    view: String,
}

impl Drop for Using {
    fn drop(&mut self) {
        let mut state = self.usage.state();
        // Again: whoever looked between the two has not seen what this call has written down.
        state.touch(&self.view);
        if let Some(count) = state.holders.get_mut(&self.view) {
            *count -= 1;
            if *count == 0 {
                state.holders.remove(&self.view);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worked_with_stays() {
        let dir = tempfile::tempdir().unwrap();
        let usage = Usage::load(dir.path().join("used.json"));
        let remove = |then| usage.remove_unless_used("a", then, || Ok(())).unwrap();
        let using = [usage.begin("a"), usage.begin("a")];
        let seen = usage.last()["a"];
        assert!(!remove(seen));
        drop(using);
        assert!(!remove(seen), "it was used after somebody looked");
        assert!(remove(usage.last()["a"]));
        assert!(!usage.last().contains_key("a"));
        assert!(remove(0), "nobody knows it");
    }

    #[test]
    fn the_order_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("used.json");
        let usage = Usage::load(file.clone());
        usage.touch("a");
        usage.touch("b");
        usage.save().unwrap();
        let usage = Usage::load(file.clone());
        usage.touch("c");
        let last = usage.last();
        assert!(last["a"] < last["b"] && last["b"] < last["c"]);
        fs::write(&file, format!("{{\"a\":{},\"b\":7}}", u64::MAX)).unwrap();
        let usage = Usage::load(file.clone());
        usage.touch("c");
        let last = usage.last();
        assert!(last["b"] < last["a"] && last["a"] < last["c"]);
        fs::write(&file, "{").unwrap();
        assert!(Usage::load(file).last().is_empty());
    }
}
